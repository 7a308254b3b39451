"""Sessions in DICOM: a segmentation of a series, and the session's log in a private block of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from medsa_nets.data.atomic import temporary_name
from medsa_nets.data.slices import is_dicom, order_slices, split_frames
from medsa_nets.data.volumes import series_slices
from medsa_nets.errors import DataError, describe

if TYPE_CHECKING:
    from medsa_nets.interaction.session import InteractiveSession

GROUP, CREATOR, ELEMENT = 0x0071, "MedSA SESSION", 0x01
TEXT = 64  # characters of a DICOM long string


def put_log(segmentation: Dataset, log: Mapping[str, Any]) -> None:
    """Put a session's log into a DICOM object, in place of one that it holds.

    It is one private element of unlimited text, JSON in ASCII: (0071,xx01) in the block of ``MedSA SESSION``.
    """
    block = segmentation.private_block(GROUP, CREATOR, create=True)
    if ELEMENT in block:
        del block[ELEMENT]
    block.add_new(ELEMENT, "UT", json.dumps(log))


def attach_log(path: Path, log: Mapping[str, Any]) -> None:
    """Put a session's log into the file of a DICOM segmentation that any program wrote.

    Raises:
        DataError: when there is no such file, or it is no DICOM segmentation.
    """
    segmentation = _read(path)
    if segmentation.get("Modality") != "SEG":
        raise DataError(f"{path}: it is no DICOM segmentation. Pass the file of one.")
    put_log(segmentation, log)
    with temporary_name(path) as part:
        segmentation.save_as(part)


def find_log(path: Path) -> str:
    """The log that a DICOM file holds, as text.

    Raises:
        DataError: when it is no DICOM file, or holds none.
    """
    found = _read(path, stop_before_pixels=True)
    try:
        value = found.private_block(GROUP, CREATOR)[ELEMENT].value
    except KeyError as error:
        raise DataError(
            f"{path}: this DICOM object holds no session. Expected a segmentation that a session saved, or the "
            ".session.json file beside a saved mask."
        ) from error
    # what has no explicit value representation is read as bytes
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)).rstrip("\0 ")


def _read(path: Path, **options: Any) -> Dataset:
    try:
        return pydicom.dcmread(path, **options)
    except (OSError, InvalidDicomError, ValueError, KeyError) as error:
        raise DataError(f"{path}: it can't be read as DICOM ({describe(error)}).") from error


def write_segmentation(
    session: InteractiveSession, masks: Sequence[tuple[str | int, np.ndarray]], log: Mapping[str, Any], path: Path
) -> None:
    """Write masks of a session as a DICOM segmentation of the series that is open, with the session's log in it.

    Args:
        session: with a series (folder) or a multi-frame object open.
        masks: classes (name or id) and their masks (X, Y, Z), boolean, in the order of the segments.
        log: of the session.
        path: of the file.

    Raises:
        DataError: when highdicom is not installed, no DICOM series is open, or it lacks what a segmentation has to
            repeat of it.
    """
    try:
        import highdicom as hd
        from highdicom.sr import CodedConcept
    except ImportError as error:
        raise DataError(f"{path}: writing DICOM needs highdicom: pip install highdicom.") from error
    source = Path(str(session.source))
    if not session.segmenter.volumes or not (source.is_dir() or (source.is_file() and is_dicom(source))):
        raise DataError(f"{path}: a DICOM segmentation belongs to a DICOM series, and {source} is none.")
    slices = order_slices(split_frames(series_slices(source)), str(source))
    if len({one.file for one in slices}) < len(slices):
        raise DataError(f"{path}: {source} is a multi-frame object. Save the mask as .nii.gz, or open single slices.")
    images = [pydicom.dcmread(one.file) for one in slices]
    codes: Mapping[str, Any] = getattr(session.segmenter, "codes", {})
    version = str(log["versions"]["medsa"] or "0")
    algorithm = hd.AlgorithmIdentificationSequence(
        "MedSA", CodedConcept("123109", "DCM", "Artificial Intelligence"), version
    )
    described = []
    for number, (chosen, _) in enumerate(masks, start=1):
        name = session.classes[chosen] if isinstance(chosen, int) else chosen
        entry = codes.get(name, {"code": "85756007", "meaning": "Tissue"})
        described.append(
            hd.seg.SegmentDescription(
                number, name[:TEXT], CodedConcept("91723000", "SCT", "Anatomical Structure"),
                CodedConcept(str(entry["code"]), "SCT", str(entry["meaning"])),
                hd.seg.SegmentAlgorithmTypeValues.SEMIAUTOMATIC, algorithm,
            )
        )  # fmt: skip
    pixels = np.stack([mask.transpose(2, 1, 0) for _, mask in masks], axis=-1).astype(np.uint8)
    try:
        segmentation = hd.seg.Segmentation(
            images, pixels, hd.seg.SegmentationTypeValues.BINARY, described, hd.UID(), 100, hd.UID(), 1, "MedSA",
            "MedSA", version, "0", series_description="MedSA session",
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{source}: its objects lack what a DICOM segmentation has to repeat ({describe(error)}). Save the mask as "
            ".nii.gz."
        ) from error
    put_log(segmentation, log)
    with temporary_name(path) as part:
        segmentation.save_as(part)
