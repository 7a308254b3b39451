"""DICOM slices: their headers and order, twins dropped, frames of multi-frame objects, pixels in HU or the like."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import itk
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medsa_nets.errors import DataError, describe

logger = logging.getLogger(__name__)

MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
SLICE_FIELDS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1}
PLACE = ("ImagePositionPatient", "ImageOrientationPatient")
# where the functional groups of a frame keep what a slice of its own has
_GROUPS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
_TOLERANCE = 1e-2  # mm, or its like in directions, by which positions may deviate
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM: ``DICM`` at byte 128 or, without that preamble, an object that names its SOP class."""
    with open(path, "rb") as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return True
    if start[:2] not in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08") or len(start) < 132:
        return False  # an object without preamble begins with group 2 or 8, in either byte order
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, force=True, specific_tags=["SOPClassUID"], stop_before_pixels=True)
            return str(header.get("SOPClassUID", "")).startswith("1.2.840.10008.")
    except Exception:  # pydicom raises errors of every kind for what is no DICOM
        return False


@dataclass(frozen=True)
class Slice:
    """One slice of a series, or one frame of a multi-frame object.

    Args:
        file: that holds it.
        header: of the slice; that of a frame has the fields of the object and of the frame's functional groups.
        frame: number of the frame in its file.
    """

    file: Path
    header: Dataset
    frame: int = 0

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.file.name + (f" (frame {self.frame + 1})" if self.frame or is_multi_frame(self.header) else "")


def read_dicom(file: Path, **options: Any) -> Dataset:
    """Read a DICOM object with or without preamble; ``file_meta`` always names a transfer syntax.

    Args:
        file: its file.
        options: of ``pydicom.dcmread``.

    Raises:
        DataError: when it can't be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are unusual
            dataset = pydicom.dcmread(file, force=True, **options)
            if getattr(dataset, "file_meta", None) is None:
                dataset.file_meta = FileMetaDataset()
            if not dataset.file_meta.get("TransferSyntaxUID"):
                dataset.file_meta.TransferSyntaxUID = _found_syntax(dataset)
    except Exception as error:  # pydicom raises its own, struct.error, UnicodeError, NotImplementedError and others
        raise DataError(f"{file}: not readable as DICOM ({describe(error)}). Replace the file.") from error
    return dataset


def decoded_pixels(dataset: Dataset) -> np.ndarray:
    """Pixels of a DICOM object, as pydicom and its plugins decode them.

    Raises:
        ValueError, and whatever else pydicom and plugins raise, for pixels that can't be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(dataset.pixel_array)
    except Exception:
        raise
    except BaseException as error:  # a plugin in Rust ends so in damaged data, and nothing would catch it
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(describe(error)) from error


def _found_syntax(dataset: Any) -> str:
    """Transfer syntax of an object that does not say it: what pydicom found by its first elements."""
    if int(pydicom.__version__.split(".")[0]) < 3:
        implicit, little = dataset.is_implicit_VR, dataset.is_little_endian
    else:
        implicit, little = dataset.original_encoding
    if implicit:
        return str(ImplicitVRLittleEndian)
    return str(ExplicitVRLittleEndian if little else ExplicitVRBigEndian)


def read_slice_header(file: Path) -> Dataset:
    """Header of a DICOM file, with or without preamble, without pixels.

    Raises:
        DataError: when it can't be read.
    """
    return read_dicom(file, stop_before_pixels=True)


def is_media_directory(header: Dataset) -> bool:
    """Whether a header is that of a DICOMDIR, which names files and holds no image."""
    kind = header.get("SOPClassUID") or getattr(header, "file_meta", Dataset()).get("MediaStorageSOPClassUID", "")
    return str(kind) == MEDIA_DIRECTORY


def count_frames(header: Dataset) -> int:
    """Frames that an object says it holds; 1 where it says nothing, or no number."""
    try:
        return max(1, int(header.get("NumberOfFrames", 1) or 1))
    except (TypeError, ValueError):
        return 1


def is_multi_frame(header: Dataset) -> bool:
    """Whether an object holds several frames, or keeps the place of one in functional groups."""
    return count_frames(header) > 1 or "PerFrameFunctionalGroupsSequence" in header


def drop_twins(slices: Sequence[Slice]) -> tuple[list[Slice], list[tuple[Path, Path]]]:
    """Slices without those that were exported twice: of one instance or one place, and with the same pixels.

    Returns:
        The slices that stay, and the file of each that does not with that of its twin.

    Raises:
        DataError: when two files say that they are the same instance and are not.
    """
    kept: list[Slice] = []
    places: dict[str, list[Slice]] = {}
    instances: dict[str, Slice] = {}
    twins = []
    for one in slices:
        header = one.header
        instance = str(header.get("SOPInstanceUID", "") or "")
        same = instances.get(instance) if instance else None
        # the place of frames stands in functional groups, which are compared as the pixels are
        place = str([header.get(name) for name in (*PLACE, "NumberOfFrames")])
        placed = bool(header.get("ImagePositionPatient")) or is_multi_frame(header)
        near = places.setdefault(place, []) if placed else []
        candidates = [other for other in near if other is not same] + ([same] if same is not None else [])
        twin = next((other for other in candidates if _pixels(other.file) == _pixels(one.file)), None)
        if twin is not None:
            twins.append((one.file, twin.file))
            continue
        if same is not None:
            raise DataError(
                f"{one.file}: it has the SOPInstanceUID of {same.file}, and is another image. Keep one of them."
            )
        near.append(one)
        instances[instance] = one
        kept.append(one)
    return kept, twins


def _pixels(file: Path) -> bytes:
    dataset = read_dicom(file)
    found = [dataset[name].value for name in _PIXELS if name in dataset]
    places = str(dataset.get("PerFrameFunctionalGroupsSequence", ""))
    return bytes(found[0] or b"") + places.encode() if found else str(file).encode()


def split_frames(slices: Sequence[Slice]) -> list[Slice]:
    """The frames of multi-frame objects, as slices of their own; other slices as they are.

    Raises:
        DataError: when an object has no functional groups for its frames.
    """
    return [part for one in slices for part in (_frames(one) if is_multi_frame(one.header) else [one])]


def _frames(one: Slice) -> Iterator[Slice]:
    header, count = one.header, count_frames(one.header)
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(frames) != count:
        raise DataError(
            f"{one.file}: it holds {count} frames, and the place of {len(frames)}. Expected an enhanced CT or MR "
            "object, with a PerFrameFunctionalGroupsSequence for every frame; export its slices as files of their own."
        )
    for number, frame in enumerate(frames):
        own = Dataset()
        names = ("Rows", "Columns", "FrameOfReferenceUID", "SamplesPerPixel", "NumberOfFrames")
        for name in (*names, *(n for fields in _GROUPS.values() for n in fields)):
            if name in header:
                own[name] = header[name]
        for group, fields in _GROUPS.items():
            found = (frame.get(group) or shared.get(group) or [Dataset()])[0]
            for name in fields:
                if name in found:
                    own[name] = found[name]
        yield Slice(one.file, own, number)


def order_slices(slices: Sequence[Slice], name: str) -> list[Slice]:
    """Sort the slices of a DICOM series by their position along the slice's normal, and check that they are a grid.

    Args:
        slices: in any order.
        name: what errors about the series as a whole name.

    Raises:
        DataError: when a position field is missing or no number, when orientation, size, spacing or frame of reference
            differ, or when slices are missing, doubled, tilted or unevenly spaced.
    """
    slices = list(slices)
    for file, header in ((one.file, one.header) for one in slices):
        for field, count in SLICE_FIELDS.items():
            value = header.get(field)
            if value is None or value == "":
                raise DataError(f"{file}: the DICOM field {field} is missing. Expected slices of a CT or MR series.")
            try:
                usable = bool(np.isfinite(numbers := np.atleast_1d(np.asarray(value, dtype=float))).all())
                usable = usable and len(numbers) == count and (field.startswith("Image") or bool((numbers > 0).all()))
            except (TypeError, ValueError):
                usable = False
            if not usable:
                raise DataError(f"{file}: the DICOM field {field} is {value!r}; expected {count} number(s).")
    orientation = np.asarray(slices[0].header.ImageOrientationPatient, dtype=float)
    normal = np.cross(orientation[:3], orientation[3:])
    if abs(float(np.linalg.norm(normal)) - 1.0) > _TOLERANCE:
        raise DataError(f"{slices[0].file}: ImageOrientationPatient {orientation.tolist()} is no pair of directions.")
    first = slices[0].header
    for file, header in ((one.file, one.header) for one in slices):
        if np.abs(np.asarray(header.ImageOrientationPatient, dtype=float) - orientation).max() > _TOLERANCE:
            raise DataError(f"{file}: its orientation differs from that of {slices[0].file.name}. Split the series.")
        if (header.Rows, header.Columns, *header.PixelSpacing) != (first.Rows, first.Columns, *first.PixelSpacing):
            raise DataError(f"{file}: its size or pixel spacing differs from that of {slices[0].file.name}.")
        if header.get("FrameOfReferenceUID") != first.get("FrameOfReferenceUID"):
            raise DataError(
                f"{file}: its frame of reference differs from that of {slices[0].file.name}: the slices do not share "
                "one coordinate system. Split the series."
            )
    slices.sort(key=lambda one: float(np.asarray(one.header.ImagePositionPatient, dtype=float) @ normal))
    places = np.asarray([one.header.ImagePositionPatient for one in slices], dtype=float)
    if len(places) > 1:
        steps = np.diff(places, axis=0)
        lengths = steps @ normal
        middle = float(np.median(lengths))
        if middle <= _TOLERANCE:
            raise DataError(f"{name}: several slices lie at one position. Split the series (phases, echoes).")
        worst = int(np.abs(lengths - middle).argmax())
        if abs(lengths[worst] - middle) > max(_TOLERANCE, 0.02 * middle):
            raise DataError(
                f"{name}: unevenly spaced slices: {lengths[worst]:.3f} mm between {slices[worst].name} and "
                f"{slices[worst + 1].name}, {middle:.3f} mm elsewhere. A slice is missing, or the series has to be "
                "resampled first."
            )
        aside = np.linalg.norm(steps - lengths[:, None] * normal, axis=1).max()
        if aside > max(_TOLERANCE, 0.02 * middle):
            raise DataError(
                f"{name}: a tilted gantry: slices are shifted by {aside:.3f} mm against each other in their plane. "
                "Resample the series to a straight grid first."
            )
    return slices


def grid_affine(slices: Sequence[Slice]) -> np.ndarray:
    """Affine (RAS, mm) of the voxels (X, Y, Z) of slices in the order of their position."""
    first, last = slices[0].header, slices[-1].header
    rows = np.asarray(first.ImageOrientationPatient[:3], dtype=float)
    columns = np.asarray(first.ImageOrientationPatient[3:], dtype=float)
    start, end = (np.asarray(h.ImagePositionPatient, dtype=float) for h in (first, last))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows * float(first.PixelSpacing[1]), columns * float(first.PixelSpacing[0])
    affine[:3, 3] = start
    if len(slices) > 1:
        affine[:3, 2] = (end - start) / (len(slices) - 1)
    else:
        stated = [float(first.get(n) or 0.0) for n in ("SpacingBetweenSlices", "SliceThickness")]
        affine[:3, 2] = np.cross(rows, columns) * next((abs(mm) for mm in stated if mm), 1.0)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM counts in LPS


def read_slices(slices: Sequence[Slice]) -> np.ndarray:
    """Voxels (X, Y, Z) in HU or the like of slices or frames: what is stored, by slope and intercept of each.

    MONOCHROME1 says how grey values are shown, not what they are: nothing is inverted.

    Raises:
        DataError: when pixels are missing, cut, of colours, or compressed in a way that can't be decoded.
    """
    shape = int(slices[0].header.Rows), int(slices[0].header.Columns)
    volume = np.empty((shape[1], shape[0], len(slices)), dtype=np.float32)
    wanted: dict[Path, list[int]] = {}
    for place, one in enumerate(slices):
        wanted.setdefault(one.file, []).append(place)
    for file, places in wanted.items():
        dataset = read_dicom(file)
        stored = _stored_values(dataset, file, [slices[place].frame for place in places])
        for place, values in zip(places, stored):
            if values.shape != shape:
                raise DataError(f"{file}: pixels of shape {values.shape}; expected {shape}, rows and columns.")
            volume[..., place] = _rescaled(values, slices[place].header, dataset, file).T
    return volume


def _rescaled(values: np.ndarray, header: Dataset, dataset: Dataset, file: Path) -> np.ndarray:
    if "ModalityLUTSequence" in dataset and not header.get("RescaleSlope"):
        raise DataError(f"{file}: its values are looked up in a table (ModalityLUTSequence). Write them as numbers.")
    try:
        slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
        slope, intercept = 1.0 if slope in (None, "") else float(slope), float(intercept or 0.0)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: RescaleSlope or RescaleIntercept is no number ({describe(error)}).") from error
    if slope == 0.0:
        raise DataError(f"{file}: RescaleSlope is 0, which leaves one value for all voxels. Correct it.")
    return values.astype(np.float64) * slope + intercept


def _stored_values(dataset: Dataset, file: Path, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """Stored values (rows, columns) of some frames of an object."""
    if int(dataset.get("SamplesPerPixel", 1) or 1) != 1:
        raise DataError(f"{file}: a colour image of {dataset.SamplesPerPixel} samples per pixel; expected grey values.")
    if not any(dataset.get(name) for name in _PIXELS):
        raise DataError(f"{file}: the DICOM object has no pixels. The file is cut, or is no image; send it again.")
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        compressed = bool(syntax.is_compressed)
    except ValueError as error:  # private ones
        raise DataError(f"{file}: its transfer syntax is {syntax}, which is not known ({describe(error)}).") from error
    if compressed:
        yield from _decompressed(dataset, file, frames)
        return
    try:
        pixels = decoded_pixels(dataset)
    except Exception as error:  # pydicom raises its own, AttributeError, ValueError, NotImplementedError and others
        raise DataError(
            f"{file}: its pixels can't be read ({describe(error)}). The file is truncated or damaged; send it again."
        ) from error
    pixels = _signed_bits(pixels, dataset)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    for frame in frames:
        yield pixels[frame]


def _signed_bits(pixels: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Values without what stands in bits that are not stored (overlays of old scanners), with their sign."""
    allocated = pixels.dtype.itemsize * 8
    bits = int(dataset.get("BitsStored", allocated) or allocated)
    if pixels.dtype.kind == "f" or not 1 < bits < allocated or int(dataset.get("BitsAllocated", 0) or 0) == 1:
        return pixels
    below = max(0, int(dataset.get("HighBit", bits - 1)) + 1 - bits)
    above = allocated - bits - below
    if above < 0:
        return pixels
    # arithmetic shifts carry the sign of signed values; those of unsigned values fill with 0
    return (pixels << np.array(above, pixels.dtype)) >> np.array(above + below, pixels.dtype)


def _decompressed(dataset: Any, file: Path, frames: Sequence[int]) -> list[np.ndarray]:
    """Frames that ITK decodes, which knows what scanners use; what it does not, pydicom with its plugins."""
    try:
        with tempfile.TemporaryDirectory(prefix="medsa_") as folder:
            decoded = []
            for frame in frames:
                copy = Path(folder) / "frame.dcm"
                _write_frame(dataset, frame, copy)
                values = itk.array_from_image(itk.imread(str(copy), itk.F))
                decoded.append(values[0] if values.ndim == 3 else values)
            return decoded
    except Exception as error:  # ITK's RuntimeError, and those of pydicom for what is no whole frame
        first = error
    try:
        pixels = decoded_pixels(dataset)
    except Exception as error:
        raise DataError(
            f"{file}: its pixels, compressed as {dataset.file_meta.TransferSyntaxUID.name}, can't be decoded "
            f"({describe(error)}). The file is truncated or damaged, or needs pip install pylibjpeg "
            "pylibjpeg-openjpeg pylibjpeg-libjpeg."
        ) from first
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    return [pixels[frame] for frame in frames]


def _write_frame(dataset: Any, frame: int, path: Path) -> None:
    """Write one compressed frame as a slice without rescaling, as MONOCHROME2: ITK would invert MONOCHROME1."""
    count = count_frames(dataset)
    one = pydicom.Dataset()
    for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(one, name, dataset[name].value)
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.SOPClassUID, one.SOPInstanceUID, one.Modality = CTImageStorage, "1.2.3", "CT"
    one.PixelData = pydicom.encaps.encapsulate([_encapsulated_frame(dataset.PixelData, frame, count)])
    one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    one.file_meta.MediaStorageSOPClassUID, one.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3"
    one.preamble = b"\0" * 128
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if int(pydicom.__version__.split(".")[0]) < 3:
            one.is_little_endian, one.is_implicit_VR = True, False
            one.save_as(path, write_like_original=False)
        else:
            one.save_as(path, enforce_file_format=True)


def _encapsulated_frame(pixels: bytes, frame: int, count: int) -> bytes:
    if hasattr(pydicom.encaps, "get_frame"):
        return bytes(pydicom.encaps.get_frame(pixels, frame, number_of_frames=count))
    frames = pydicom.encaps.generate_pixel_data_frame(pixels, count)
    return next(data for number, data in enumerate(frames) if number == frame)
