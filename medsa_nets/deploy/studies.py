"""Finds the series and photographs in a folder that a bundle can segment, and says why others are left out."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.transforms import LoadImage
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, MRImageStorage, generate_uid
from pydicom.valuerep import PersonName

from medsa_nets.data import PhotographReader, read_volume
from medsa_nets.data.datalists import is_photograph
from medsa_nets.data.slices import (
    MEDIA_DIRECTORY,
    SLICE_FIELDS,
    Slice,
    count_frames,
    drop_twins,
    is_dicom,
    is_multi_frame,
    order_slices,
    read_dicom,
    split_frames,
)
from medsa_nets.errors import DataError, describe

REFERENCE_FIELDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
MADE_FIELDS = (*REFERENCE_FIELDS, "FrameOfReferenceUID")  # what find_sources can make
_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage}
MAX_VOXELS = 2**31  # of a series: beyond it, memory would not do


@dataclass(frozen=True)
class Rules:
    """Which series and photographs a bundle takes.

    Args:
        modality: DICOM modalities.
        slices: fewest and most slices of a series.
        volumes: whether a series is one volume; else every object is an image of its own, and JPEG and PNG files are
            taken too.
    """

    modality: tuple[str, ...]
    slices: tuple[int, int] = (1, 2000)
    volumes: bool = True


@dataclass(frozen=True)
class Source:
    """One volume or photograph to be segmented.

    Args:
        name: what messages call it.
        files: its files; the slices of a volume in the order of their position.
        headers: DICOM header of each file, without pixels; none for a JPEG or PNG file.
        volume: whether it is a volume.
        made: DICOM fields that the files lack, and that the headers were given.
        frames: of a volume in one multi-frame object: the number of the frame of each slice.
    """

    name: str
    files: tuple[Path, ...]
    headers: tuple[Dataset, ...] = ()
    volume: bool = True
    made: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()

    def read(self) -> MetaTensor:
        """Read it as ``monai.bundle run`` does: (1, X, Y, Z) with affine, or (3, W, H).

        Raises:
            DataError: when a file is truncated or its pixels can't be decoded.
        """
        for file, header in zip(self.files, self.headers):
            check_pixels(file, header)
        if self.volume:
            return read_volume(self.files[0].parent, self.files)
        loader = LoadImage(reader=PhotographReader(mode="RGB"), image_only=True, ensure_channel_first=True)
        image: MetaTensor = loader(str(self.files[0]))
        return image

    def datasets(self) -> list[Dataset]:
        """The DICOM objects with their pixels, in the order of :attr:`files`; none for a JPEG or PNG file.

        They have the identifiers of the headers, where these were made.
        """
        out = []
        for file, header in zip(self.files, self.headers):
            data = with_known_characters(read_dicom(file), file)
            for name in self.made:
                setattr(data, name, header.get(name))
            if self.made:
                data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
                data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
            out.append(data)
        return out

    def write_copies(self, folder: Path) -> None:
        """Write the DICOM objects under the identifiers that were made: what a segmentation of them refers to."""
        folder.mkdir()
        for number, data in enumerate(self.datasets(), start=1):
            data.save_as(folder / f"{number:05d}.dcm")


@dataclass
class Found:
    """What :func:`find_sources` found: sources, and lines about what was left out or is damaged."""

    sources: list[Source] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def find_sources(folder: str | Path, rules: Rules, make_uids: bool = False) -> Found:
    """Find what a bundle takes in a folder and the folders in it.

    Args:
        folder: holds DICOM files of any number of studies, in any order and depth; or is one file.
        rules: what the bundle takes.
        make_uids: whether DICOM objects without identifiers get some (:func:`fill_uids`); else they are damaged.

    Returns:
        The sources, and a line for everything else: ``skipped`` is what the bundle does not take, ``damaged`` what it
        would take if it were whole.

    Raises:
        DataError: when there is no such folder, or it may not be read.
    """
    root = Path(folder).expanduser()
    if not root.exists():
        raise DataError(f"input {root}: there is no such folder. Pass the folder of the DICOM files (-i).")
    found = Found()
    series: dict[tuple[str, str], list[tuple[Path, Dataset]]] = {}
    left_out: dict[tuple[str, str], list[Path]] = {}
    for file in _files(root):
        try:
            marked = is_dicom(file)
        except OSError as error:
            found.damaged.append(f"{file}: it can't be read ({error.strerror}).")
            continue
        if not marked:
            if not rules.volumes and is_photograph(file):
                found.sources.append(Source(str(file), (file,), volume=False))
            else:
                left_out.setdefault((str(file.parent), "no DICOM file"), []).append(file)
            continue
        try:
            header = read_header(file)
            if make_uids:
                fill_uids(file, header)
            reason = _unwanted(file, header, rules)
        except DataError as error:
            found.damaged.append(str(error))
            continue
        key = (str(header.get("StudyInstanceUID", "")), str(header.get("SeriesInstanceUID", "")))
        if reason:
            left_out.setdefault((_series_name(header), reason), []).append(file)
        else:
            series.setdefault(key, []).append((file, header))
    for (name, reason), files in left_out.items():
        found.skipped.append(f"{name}: {reason} ({files[0].name}{_and_more(files)}).")
    for members in series.values():
        try:
            _add_series(members, rules, found)
        except DataError as error:
            found.damaged.append(str(error))
    found.sources.sort(key=lambda source: source.files[0])
    return found


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"input {root}: the folder may not be read. Change its permissions.")
    return sorted(path for path in root.rglob("*") if path.is_file())


def _and_more(files: Sequence[Path]) -> str:
    return f" and {len(files) - 1} more" if len(files) > 1 else ""


def read_header(file: Path) -> Dataset:
    """Read a DICOM header without pixels, with the values of the fields that are used here checked.

    Raises:
        DataError: when the file can't be read as DICOM, or a field's value is none of its kind.
    """
    name = "its data elements"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are unusual, which the checks below judge
            header = read_dicom(file, stop_before_pixels=True)
            for name in (*REFERENCE_FIELDS, *SLICE_FIELDS, "Modality", "ImageType", "FrameOfReferenceUID",
                         "SeriesDescription", "WindowCenter", "WindowWidth"):  # fmt: skip
                str(header.get(name, ""))
            for name in ("MediaStorageSOPClassUID", "TransferSyntaxUID"):
                str(header.file_meta.get(name, ""))
            for name in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "BitsAllocated"):
                if header.get(name) is not None:
                    int(header[name].value)
    except DataError:
        raise
    except Exception as error:  # pydicom raises its own, struct.error, UnicodeError, NotImplementedError and others
        raise DataError(
            f"{file}: not readable as DICOM ({name}: {describe(error)}). Expected a whole DICOM file; send it again."
        ) from error
    return with_known_characters(header, file)


def with_known_characters(dataset: Dataset, file: Path) -> Dataset:
    """A DICOM object, changed in place, with a single character set, which objects that refer to it can repeat.

    An empty character set and ``ISO_IR 6`` are the default one, which has no name; text with code extensions becomes
    UTF-8 (``ISO_IR 192``).

    Args:
        dataset: the object, with or without pixels.
        file: its file, which errors name.

    Raises:
        DataError: when the character set is none of DICOM's, or does not fit the text.
    """
    stated = dataset.get("SpecificCharacterSet")
    names = [str(part or "").strip() for part in ([stated] if stated is None or isinstance(stated, str) else stated)]
    if len(names) == 1 and re.fullmatch(r"ISO_IR (100|101|109|110|144|127|126|138|148|203|13|166|192)", names[0]):
        unchanged = names[0] == stated
        dataset.SpecificCharacterSet = stated if unchanged else names[0]
        return dataset
    if not set(names) - {"", "ISO_IR 6", "ISO 2022 IR 6"}:
        dataset.pop("SpecificCharacterSet", None)
        return dataset
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # pydicom warns of character sets that it does not know, and of text that does not fit
            warnings.filterwarnings("error", message="(?i).*(encoding|decode)")
            dataset.decode()
            for element in dataset.iterall():
                if element.VR == "PN" and element.value:
                    many = not isinstance(element.value, str | PersonName)
                    element.value = [str(one) for one in element.value] if many else str(element.value)
    except Exception as error:  # pydicom's warnings, LookupError, UnicodeError
        raise DataError(
            f"{file}: the DICOM field SpecificCharacterSet is {stated!r} ({describe(error)}). Expected one of DICOM's "
            "character sets, that of the text in the file; correct it."
        ) from error
    dataset.SpecificCharacterSet = "ISO_IR 192"
    return dataset


def fill_uids(file: Path, header: Dataset) -> None:
    """Give a header the identifiers that it lacks, in place: always the same ones for the same file in its folder.

    Objects of one folder become one study; those of one series number, description, size and orientation one series.
    An instance keeps the identifier of its file's preamble where there is one. The class is that of the preamble, else
    follows from the modality; where neither tells it, it stays absent.

    Args:
        file: the file.
        header: as :func:`read_header` gives it.
    """
    absent = [name for name in MADE_FIELDS if not header.get(name)]
    if not absent:
        return
    study = [str(file.resolve().parent), *(str(header.get(n, "")) for n in ("PatientID", "StudyDate", "StudyID"))]
    series = [
        *(header.get("StudyInstanceUID") or "", *study),
        *(str(header.get(n, "")) for n in ("SeriesNumber", "SeriesDescription", "Modality", "Rows", "Columns")),
        str(header.get("ImageOrientationPatient", "")),
    ]
    values = {
        "StudyInstanceUID": lambda: generate_uid(entropy_srcs=["study", *study]),
        "SeriesInstanceUID": lambda: generate_uid(entropy_srcs=["series", *series]),
        "FrameOfReferenceUID": lambda: generate_uid(entropy_srcs=["frame", *study]),
        "SOPClassUID": lambda: (
            header.file_meta.get("MediaStorageSOPClassUID") or _CLASSES.get(str(header.get("Modality", "")), "")
        ),
        "SOPInstanceUID": lambda: (
            header.file_meta.get("MediaStorageSOPInstanceUID")
            or generate_uid(entropy_srcs=["instance", hashlib.sha256(file.read_bytes()).hexdigest()])
        ),
    }
    for name in absent:
        if value := values[name]():
            setattr(header, name, value)
    header.made_uids = tuple(absent)


def _require(file: Path, header: Dataset, name: str) -> None:
    if not header.get(name):
        raise DataError(
            f"{file}: the DICOM field {name} is missing. The file is cut, or lost its identifiers, and a segmentation "
            "has to name its source; restore it, or pass --make_uids, which makes identifiers and writes copies of the "
            "images with them beside the segmentation."
        )


def _unwanted(file: Path, header: Dataset, rules: Rules) -> str:
    """Why a bundle does not take a DICOM object, or nothing."""
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", "")
    if kind == MEDIA_DIRECTORY:
        return "a DICOMDIR"
    _require(file, header, "SOPClassUID")  # every whole object has one
    kind = getattr(kind, "name", kind) or "an object of no SOP class"
    modality = str(header.get("Modality", "") or "")
    if modality in ("SEG", "RTDOSE") or not header.get("Rows") or not header.get("Columns"):
        return f"no image of a patient: {kind}"
    if modality not in rules.modality:
        return f"modality {modality or 'not given'}; the bundle takes {', '.join(rules.modality)}"
    if "LOCALIZER" in (str(part).upper() for part in np.atleast_1d(header.get("ImageType", []) or [])):
        return "a localizer"
    if is_multi_frame(header) and not (rules.volumes and "PerFrameFunctionalGroupsSequence" in header):
        return f"several frames in one object ({kind}); expected one"
    samples = int(header.get("SamplesPerPixel", 1) or 1)
    if rules.volumes and samples != 1:
        return f"a colour image of {samples} samples per pixel; the bundle takes grey values"
    return ""


def _series_name(header: Dataset) -> str:
    described = str(header.get("SeriesDescription", "") or "").strip()
    uid = str(header.get("SeriesInstanceUID", "") or "without SeriesInstanceUID")
    return f"series {uid}" + (f" ({described})" if described else "")


def _add_series(members: list[tuple[Path, Dataset]], rules: Rules, found: Found) -> None:
    """Add the source or sources of one series.

    Raises:
        DataError: when the series is damaged.
    """
    name = _series_name(members[0][1])
    for file, header in members:
        for required in REFERENCE_FIELDS:
            _require(file, header, required)
    kept, twins = drop_twins([Slice(file, header) for file, header in members])
    found.skipped += [f"{file}: the same image as {twin}." for file, twin in twins]
    single = [(one.file, one.header) for one in kept]
    if not rules.volumes:
        found.sources += [
            Source(f"{file}", (file,), (header,), volume=False, made=_made([header])) for file, header in single
        ]
        return
    if len(single) > 1 and any(is_multi_frame(header) for _, header in single):
        # a segmentation of frames refers to one object
        for one in single:
            _add_series([one], rules, found)
        return
    slices = split_frames(kept)
    fewest, most = rules.slices
    if not fewest <= len(slices) <= most:
        found.skipped.append(f"{name}: {len(slices)} slices; the bundle takes {fewest} to {most}.")
        return
    ordered = order_slices(slices, name)
    first = ordered[0].header
    if int(first.Rows) * int(first.Columns) * len(ordered) > MAX_VOXELS:
        raise DataError(f"{name}: {len(ordered)} slices of {first.Rows} x {first.Columns} are more than fit in memory.")
    own = dict(single)
    files = tuple(dict.fromkeys(one.file for one in ordered))
    headers = tuple(own[file] for file in files)
    frames = tuple(one.frame for one in ordered) if is_multi_frame(headers[0]) else ()
    found.sources.append(Source(f"{name}, {len(ordered)} slices", files, headers, made=_made(headers), frames=frames))


def _made(headers: Sequence[Dataset]) -> tuple[str, ...]:
    """Fields that any of several objects was given."""
    made = {name for header in headers for name in getattr(header, "made_uids", ())}
    return tuple(name for name in MADE_FIELDS if name in made)


def check_pixels(file: Path, header: Dataset) -> None:
    """Check that a DICOM file holds all of its pixels.

    Raises:
        DataError: when the file is truncated or has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data: Any = read_dicom(file)
            pixels = data.get("PixelData")
            compressed = data.file_meta.TransferSyntaxUID.is_compressed
    except Exception as error:  # EOFError of a cut encapsulated image, and pydicom's own
        raise DataError(f"{file}: its pixels can't be read ({describe(error)}). Send the file again.") from error
    samples = int(header.get("SamplesPerPixel", 1) or 1) * count_frames(header)
    needed = int(header.Rows) * int(header.Columns) * samples * int(header.get("BitsAllocated", 8) or 8) // 8
    have = len(pixels) if pixels is not None else 0
    if not have or (not compressed and have < needed):
        raise DataError(
            f"{file}: {have} bytes of pixels, expected {'some' if compressed else needed}. The file is truncated, or "
            "has no pixels; send it again."
        )
