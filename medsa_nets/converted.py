"""A cache on disk of converted encoders: the next process loads one in a second or two instead of converting it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from medsa_nets.checksums import file_sha256
from medsa_nets.measurements import cache_dir

logger = logging.getLogger(__name__)
MAX_BYTES = 4 * 2**30  # of all kept models; those that were not used for longest go first
WHOLE = "sha256.json"  # of the file that is written last, with the others' checksums


def models_dir() -> Path:
    """Folder of the kept models; it need not exist, or be writable."""
    return cache_dir() / "models"


@lru_cache(maxsize=1)
def source_fingerprint() -> str:
    """SHA-256 of the sources of networks and layers: what else a converted encoder depends on, beside its weights."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("networks", "layers") for path in (package / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def folder_of(parts: Sequence[object]) -> Path:
    """Folder of the model that was made from ``parts``: weights, input shape, type, versions."""
    return models_dir() / hashlib.sha256(repr((*parts, source_fingerprint())).encode()).hexdigest()[:32]


def is_kept(folder: Path) -> bool:
    """Whether a folder holds a whole model."""
    return (folder / WHOLE).is_file()


def is_intact(folder: Path) -> bool:
    """Whether a kept model's files are as they were written; a folder of a damaged one is removed."""
    try:
        sums = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        if all(file_sha256(folder / name) == found for name, found in sums.items()):
            return True
    except (OSError, ValueError, AttributeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return False


def keep(folder: Path, write: Callable[[Path], None]) -> bool:
    """Let ``write`` fill a folder beside ``folder``, then give it that name: a kept model is whole or absent.

    Args:
        folder: as :func:`folder_of` names it.
        write: writes the model's files into the folder that it gets.

    Returns:
        Whether it is kept; a cache that is absent, full or read-only keeps nothing, which is no error.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        logger.debug("%s: converted models are not kept (%s)", folder.parent, error)
        return False
    try:
        write(part)
        (part / WHOLE).write_text(
            json.dumps({file.name: file_sha256(file) for file in part.iterdir()}), encoding="utf-8"
        )
        if folder.exists() and not is_kept(folder):
            shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    except (OSError, RuntimeError) as error:  # full; or another process was faster; OpenVINO raises the latter
        logger.debug("%s: not kept (%s)", folder, error)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    discard(keeping=folder)
    return is_kept(folder)


def use(folder: Path) -> None:
    """Note that a model is in use: those that were not for longest are discarded first."""
    with suppress(OSError):
        os.utime(folder / WHOLE)


def discard(keeping: Path) -> None:
    """Remove the models that were not used for longest, until all are at most ``MAX_BYTES``; ``keeping`` stays."""
    sizes: dict[Path, tuple[float, int]] = {}
    with suppress(OSError):
        for folder in (path for path in models_dir().iterdir() if path.is_dir()):
            with suppress(OSError):
                used = (folder / WHOLE if is_kept(folder) else folder).stat().st_mtime
                sizes[folder] = (used, sum(file.stat().st_size for file in folder.iterdir()))
    total = sum(size for _, size in sizes.values())
    for folder, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
        if total <= MAX_BYTES:
            return
        if folder != keeping:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
