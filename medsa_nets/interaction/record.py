"""A session's log: what was said, in which order, of which image, to which adapter; enough to give a mask again."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.data import MetaTensor

from medsa_nets.checksums import file_sha256
from medsa_nets.data import save_png, volume_writer
from medsa_nets.data.atomic import temporary_name
from medsa_nets.data.slices import is_dicom
from medsa_nets.errors import DataError, describe
from medsa_nets.interaction.answers import AnswerSettings, answer_identity
from medsa_nets.interaction.dicom import find_log, write_segmentation
from medsa_nets.prompts.observations import Kernel
from medsa_nets.prompts.user import prompt_from_json, prompt_to_json

if TYPE_CHECKING:
    from medsa_nets.interaction.session import InteractiveSession

SCHEMA = 1
SUFFIX = ".session.json"
DICOM = ".dcm"
PACKAGES = ("medsa", "torch", "monai", "numpy", "scipy")


def source_sha256(source: Any) -> str:
    """SHA-256 of an image's file, or of all files of a folder by name; empty for what is no path."""
    path = Path(str(source))
    if path.is_file():
        return file_sha256(path)
    if path.is_dir():
        lines = [f"{file.name} {file_sha256(file)}" for file in sorted(path.iterdir()) if file.is_file()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return ""


def describe_session(session: InteractiveSession) -> dict[str, Any]:
    """A session as JSON."""
    grids = session.grids
    settings = dataclasses.asdict(session.settings.of(grids.dims))
    return {
        "schema": SCHEMA,
        "image": {
            "name": Path(str(session.source)).name,
            "sha256": source_sha256(session.source),
            "size": list(grids.file_shape),
            "affine": grids.world.tolist(),
        },
        "network": answer_identity(session.settings, session.segmenter),
        "classes": session.classes,
        "start": session.start,
        "settings": settings,
        "versions": {**_versions(), "python": platform.python_version(), "machine": platform.machine()},
        "prompts": [
            prompt_to_json(prompt, session.classes, grids.world_coordinates(prompt.positions))
            for prompt in session.prompts()
        ],
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def save_session(session: InteractiveSession, path: Path, class_name: str | int | None) -> tuple[Path, Path]:
    """Write a mask and the log beside it, or in it; see :meth:`InteractiveSession.save`."""
    if path.suffix.lower() == DICOM:
        log = describe_session(session)
        chosen = session.classes if class_name is None else [class_name]
        write_segmentation(session, [(name, session.mask(name)) for name in chosen], log, path)
        return path, path
    if class_name is None and (session.segmenter.exclusive or len(session.classes) == 1):
        label = session.label_map()
    else:
        label = session.mask(class_name).astype(np.uint8)
    text = json.dumps(describe_session(session), indent=1)
    write_label(label, session.image, path)
    beside = path.with_name(path.name + SUFFIX)
    with temporary_name(beside) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return path, beside


def write_label(label: np.ndarray, image: MetaTensor, path: Path) -> None:
    """Write a label map on the grid of an image's file: an image's as PNG of 0 and 255, a volume's with its affine.

    Raises:
        DataError: when the suffix names no format for it.
    """
    if label.ndim == 2:
        if path.suffix.lower() != ".png":
            raise DataError(f"{path}: masks of images are written as .png.")
        from PIL import Image

        save_png(Image.fromarray((label > 0).T.astype(np.uint8) * 255), path)
        return
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    writer = volume_writer(suffix)(output_dtype=np.uint8)
    affine = torch.as_tensor(np.asarray(image.meta["original_affine"]))
    writer.set_data_array(label[None], channel_dim=0)
    meta = {name: image.meta[name] for name in ("nifti_geometry", "nrrd_unit") if name in image.meta}
    writer.set_metadata({**meta, "affine": affine, "original_affine": affine}, resample=False)
    writer.write(path)


def read_log(path: Path) -> dict[str, Any]:
    """Read a log, or that which a DICOM object holds, and check its form.

    Raises:
        DataError: when it is missing, damaged, or of a newer form.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such log. Expected the {SUFFIX} file beside a saved mask.")
    try:
        log = json.loads(find_log(path) if is_dicom(path) else path.read_text(encoding="utf-8"))
        if log["schema"] != SCHEMA:
            raise DataError(f"{path}: its schema is {log['schema']!r}, this version reads {SCHEMA}. Update medsa.")
        shape = tuple(int(n) for n in log["image"]["size"])
        for name in ("sha256", "affine"):
            _ = log["image"][name]
        log["settings"] = read_settings(log["settings"])
        log["network"] = {str(k): str(v) for k, v in log["network"].items()}
        log["prompts"] = [prompt_from_json(entry, log["classes"], shape) for entry in log["prompts"]]
        if log["start"] not in ("automatic", "nothing"):
            raise ValueError(f"start {log['start']!r}")
    except DataError as error:
        raise DataError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: the log is damaged ({describe(error)}). Take the file that was saved.") from error
    return log


def read_settings(entry: Mapping[str, Any]) -> AnswerSettings:
    """Settings of answers as a log holds them.

    Raises:
        ValueError: when one is unknown or has another value than it may have.
    """
    known = {field.name for field in dataclasses.fields(AnswerSettings)}
    entry = {"refinement": "", "click_certainty": None, **entry}  # logs that were written before there were these
    if set(entry) != known:
        raise ValueError(f"settings {sorted(entry)}, expected {sorted(known)}")
    return AnswerSettings(**{**entry, "kernel": None if entry["kernel"] is None else Kernel(**entry["kernel"])})


def replay_session(session: InteractiveSession, path: Path, source: Any) -> None:
    """Give the prompts of a log again; see :meth:`InteractiveSession.replay`."""
    log = read_log(path)
    own = answer_identity(log["settings"], session.segmenter)
    for name, there in log["network"].items():
        here = own.get(name)
        if here != there:
            raise DataError(
                f"{path}: the log belongs to another network: {name} is {there[:16]}, here {str(here)[:16]}. Open the "
                "session with the bundle and adapter that it was saved with."
            )
    if log["classes"] != session.classes:
        raise DataError(f"{path}: its classes are {', '.join(log['classes'])}, here {', '.join(session.classes)}.")
    if log["image"]["sha256"] and log["image"]["sha256"] != source_sha256(source):
        raise DataError(
            f"{source}: it is another image than that of {path} ({log['image'].get('name', '')}, SHA-256 "
            f"{log['image']['sha256'][:16]}). Pass that file."
        )
    again = type(session)(session.segmenter, log["settings"], log["start"])
    again.open(source)
    if list(again.file_shape) != list(log["image"]["size"]):
        raise DataError(f"{source}: its size is {again.file_shape}, that of {path} {tuple(log['image']['size'])}.")
    for prompt in log["prompts"]:
        again.apply(prompt)
    session.__dict__.update(again.__dict__)  # all or nothing: an error above leaves the session as it was
