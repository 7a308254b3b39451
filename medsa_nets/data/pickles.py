"""Crops of LIDC-IDRI as they are handed on, in a pickle: unpacked once into pictures, without running what is in it."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medsa_nets.errors import DataError, OutputError, describe

logger = logging.getLogger(__name__)

_FIELDS = ("image", "masks", "series_uid")
# what pickled arrays call; everything else in a file is refused, since it could do anything
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    ),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, texts, numbers and arrays; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What a file names, where arrays need it."""
        if (module, name) not in _ALLOWED:
            raise DataError(f"it names {module}.{name}; only numbers, texts and numpy arrays are read.")
        parts = module.split(".")
        if len(parts) > 2:
            parts[1] = "core" if int(np.__version__.split(".")[0]) < 2 else "_core"  # whichever numpy wrote the file
        return super().find_class(".".join(parts), name)


def unpack_pickles(root: Path, pattern: str) -> Path:
    """Unpack the pickles of a folder into pictures, once.

    Each holds a dictionary by the crops' names: ``image`` (rows, columns) from 0 to 1, ``masks`` (one for each rater,
    of 0 and 1) and ``series_uid``, the scan that the crop is from.

    Args:
        root: folder of the pickles.
        pattern: of their names.

    Returns:
        Folder ``unpacked-…`` in ``root`` with ``images/SERIES/NAME.png`` and ``masks/SERIES/NAME_1.png``, ``…_2.png``.
        It is known by names and sizes of the pickles, and made anew where these change. Without pickles, ``root``.

    Raises:
        DataError: when a pickle is damaged, names more than arrays, or holds something else.
        OutputError: when the folder can't be written.
    """
    files = sorted(path for path in root.glob(pattern) if path.is_file() and not path.name.startswith("."))
    if not files:
        return root
    known = json.dumps([[path.name, path.stat().st_size] for path in files])
    folder = root / f"unpacked-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    logger.info("%s: unpacking %s, once, into %s.", root, ", ".join(path.name for path in files), folder.name)
    try:
        part = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=root))
    except OSError as error:
        raise OutputError(
            f"{root}: its pickles are unpacked into it once, and it can't be written to ({error.strerror}). Copy it."
        ) from error
    try:
        names: set[str] = set()
        for path in files:
            for name, crop in _read(path).items():
                _write(part, name, crop, f"{path}: {name!r}", names)
        try:
            part.replace(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    except OSError as error:
        raise OutputError(f"{folder}: it can't be written ({error.strerror}). Free space, or copy {root}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _read(path: Path) -> dict[str, Any]:
    form = f"Expected a dictionary of crops, each with {', '.join(_FIELDS)}"
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file).load()
    except DataError as error:
        raise DataError(f"{path}: refused, {error}") from error
    except Exception as error:  # pickle raises errors of every kind for damaged files
        raise DataError(f"{path}: not readable as a pickle of arrays ({describe(error)}). {form}.") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: it holds {type(content).__name__} of nothing that is known. {form}.")
    return {str(name): crop for name, crop in content.items()}


def _write(folder: Path, name: str, crop: Any, place: str, names: set[str]) -> None:
    if not isinstance(crop, Mapping) or any(field not in crop for field in _FIELDS):
        raise DataError(f"{place} is no crop: expected a dictionary with {', '.join(_FIELDS)}.")
    image, masks = np.asarray(crop["image"], dtype=np.float64), crop["masks"]
    if image.ndim != 2 or not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise DataError(f"{place}: expected an image (rows, columns) of values from 0 to 1, got {image.shape}.")
    if not isinstance(masks, (Sequence, np.ndarray)) or len(masks) < 1:
        raise DataError(f"{place}: expected a list of masks, one of each rater.")
    series, stem = (re.sub(r"[^\w.-]+", "_", text).strip(".") or "_" for text in (str(crop["series_uid"]), name))
    if f"{series}/{stem}".casefold() in names:
        raise DataError(f"{place}: another crop of its series has that name. Rename it.")
    names.add(f"{series}/{stem}".casefold())
    for kind in ("images", "masks"):
        (folder / kind / series).mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255.0).round().astype(np.uint8)).save(folder / "images" / series / f"{stem}.png")
    for rater, mask in enumerate(masks, start=1):
        values = np.asarray(mask)
        if values.shape != image.shape or not np.isin(values, (0, 1)).all():
            raise DataError(f"{place}: mask {rater} is no {image.shape} of 0 and 1.")
        Image.fromarray(values.astype(np.uint8) * 255).save(folder / "masks" / series / f"{stem}_{rater}.png")
