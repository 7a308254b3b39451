"""Base weights as Hugging Face keeps them: folders of a ``SamModel``, and repositories of a hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from medsa_nets.errors import WeightsError, describe
from medsa_nets.weights.files import check_sha256

CONFIG, FILES = "config.json", ("model.safetensors", "pytorch_model.bin")
MODEL = "sam"  # what a SamModel's settings call themselves
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?:@[\w./-]+)?")  # OWNER/NAME or OWNER/NAME@REVISION
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")


def load_hub() -> Any:
    """The package ``huggingface_hub``.

    Raises:
        WeightsError: when it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise WeightsError("A hub needs huggingface_hub: pip install 'medsa[hub]'.") from error
    return huggingface_hub


def find_file(source: str | Path) -> Path:
    """The file of weights that a path or the id of a hub's repository means.

    Args:
        source: a file; a folder with ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``) of a
            ``SamModel``; or, where there is neither, ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` on the hub
            (``$HF_ENDPOINT``, else Hugging Face's), which keeps what it gives in its own cache.

    Returns:
        The file, which need not exist where ``source`` is called as a file is.

    Raises:
        WeightsError: when a folder holds no such model, or the hub has none.
    """
    path = Path(source)
    if path.is_dir():
        return _of_folder(path)
    if path.exists() or path.suffix in _SUFFIXES or not _REPOSITORY.fullmatch(str(source)):
        return path
    return _of_folder(_download(str(source)))


def _of_folder(folder: Path) -> Path:
    settings = folder / CONFIG
    try:
        model = json.loads(settings.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{settings}: not readable ({describe(error)}). Expected the folder of a SamModel: {CONFIG} and {FILES[0]}."
        ) from error
    if model != MODEL:
        raise WeightsError(
            f"{settings}: model_type is {model!r}, expected {MODEL!r} (SamModel). Other bases load from their own "
            "published files (python -m medsa_nets.weights)."
        )
    for name in FILES:
        if (file := folder / name).is_file():
            _check(file)
            return file
    raise WeightsError(f"{folder}: holds neither {' nor '.join(FILES)}. Fetch or save the model again, in one file.")


def _check(file: Path) -> None:
    """Compare a file of the hub's cache with the checksum that it is kept under."""
    kept = file.resolve().name
    if kept != file.name and re.fullmatch("[0-9a-f]{64}", kept):
        check_sha256(file, kept)


def _download(repository: str) -> Path:
    name, _, revision = repository.partition("@")
    try:
        hub = load_hub()
        for file in FILES:  # the second one only where the first one is not there
            place = hub.snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[CONFIG, file],
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
            if (Path(place) / file).is_file():
                break
    except Exception as error:  # the hub's client, its HTTP library and the system raise errors of their own
        raise WeightsError(
            f"{repository}: neither a file nor a folder here, nor to be had from the hub ({describe(error)})."
        ) from error
    return Path(place)
