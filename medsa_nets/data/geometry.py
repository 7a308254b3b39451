"""What a volume's file says of its place: units, and the transforms of a NIfTI header, kept for what is written.

Everything here counts in mm. A file may count in metres or micrometres; its affine is scaled as it is read, and a mask
in the same format is written as its image is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medsa_nets.errors import DataError, describe

logger = logging.getLogger(__name__)

NIFTI_UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # mm for each unit of xyzt_units; 0 is not stated
NRRD_UNITS = {"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "millimetre": 1.0, "millimetres": 1.0, "": 1.0,
              "m": 1000.0, "meter": 1000.0, "meters": 1000.0, "metre": 1000.0, "metres": 1000.0,
              "cm": 10.0, "centimeter": 10.0, "centimeters": 10.0,
              "um": 0.001, "µm": 0.001, "μm": 0.001, "micron": 0.001, "microns": 0.001, "micrometer": 0.001,
              "micrometers": 0.001, "micrometre": 0.001, "micrometres": 0.001}  # fmt: skip
NRRD_SPACES = ("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las")
SPACING = (1e-3, 100.0)  # mm: a voxel outside is none of a patient; its unit is stated wrongly
MAX_COMPRESSION = 1032  # deflate makes no more of one byte; text needs a byte or more for each number
HEADER_BYTES = 2**20
NIFTI_FIELDS = ("qform_code", "sform_code", "xyzt_units", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
                "qoffset_y", "qoffset_z", "pixdim", "srow_x", "srow_y", "srow_z")  # fmt: skip
_DISAGREEMENT = 0.1  # mm that corners may lie apart


def nifti_geometry(image: Any, path: Path, colours: bool = False) -> tuple[float, np.ndarray]:
    """Unit (mm) and transforms of a NIfTI image of a file: the values of :data:`NIFTI_FIELDS`, one after the other.

    Args:
        image: as nibabel opens it.
        path: of its file.
        colours: whether voxels may be colours.

    Raises:
        DataError: when voxels are complex, or colours where these are not expected, or no orientation is stated.
    """
    header = image.header
    kind = np.dtype(header.get_data_dtype())
    if kind.kind == "c":
        raise DataError(f"{path}: its voxels are complex numbers ({kind}). Write the magnitude as a file of its own.")
    if kind.kind == "V" and not colours:
        raise DataError(f"{path}: its voxels are colours ({kind}); expected grey values.")
    if not (int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0):
        raise DataError(
            f"{path}: the file has no affine (qform_code and sform_code are 0), so that its orientation is not known. "
            "Write it again with its affine."
        )
    unit = NIFTI_UNITS.get(int(header["xyzt_units"]) & 7)
    if unit is None:
        raise DataError(f"{path}: its xyzt_units is {int(header['xyzt_units'])}; expected metres, mm or micrometres.")
    if int(header["qform_code"]) > 0 and int(header["sform_code"]) > 0:
        try:
            qform = header.get_qform()
        except ValueError as error:  # of a quaternion that is none; the sform is what counts
            logger.warning("%s: its qform is damaged (%s); the sform is taken.", path, describe(error))
            qform = header.get_sform()
        apart = _corner_distance(qform, header.get_sform(), image.shape) * unit
        if apart > _DISAGREEMENT:
            logger.warning(
                "%s: qform and sform disagree by %.1f mm; the sform is taken, and outputs carry both.", path, apart
            )
    return unit, np.concatenate([np.atleast_1d(header[name]).astype(np.float64).ravel() for name in NIFTI_FIELDS])


def _corner_distance(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> float:
    size = (*shape, 1, 1, 1)[:3]
    corners = np.array([[x, y, z, 1] for x in (0, size[0]) for y in (0, size[1]) for z in (0, size[2])], dtype=float)
    return float(np.linalg.norm((corners @ (a - b).T)[:, :3], axis=1).max())


def with_nifti_geometry(image: Any, geometry: np.ndarray) -> Any:
    """A NIfTI image of the same grid with the transforms and units of :func:`nifti_geometry`."""
    header = image.header.copy()
    place = 0
    for name in NIFTI_FIELDS:
        count = np.atleast_1d(header[name]).size
        values = geometry[place : place + count]
        if name == "pixdim":
            # qfac and the three spacings, where there are as many; times stay the image's own
            header["pixdim"][:4] = np.where(values[:4] != 0.0, values[:4], header["pixdim"][:4])
        else:
            header[name] = values[0] if count == 1 else values
        place += count
    return type(image)(np.asanyarray(image.dataobj), None, header)  # an affine would replace both transforms


def check_spacing(affine: np.ndarray, unit: float, path: Path) -> None:
    """Check that a unit other than mm gives voxels of a size that a scanner's have.

    Raises:
        DataError: when it does not.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if unit != 1.0 and not (SPACING[0] <= spacing.min() and spacing.max() <= SPACING[1]):
        raise DataError(
            f"{path}: its voxels are {' x '.join(f'{s:g}' for s in spacing)} mm by the unit that it states ({unit:g} "
            "mm). Expected 0.001 to 100 mm; correct the unit (NIfTI: xyzt_units; NRRD: space units)."
        )


def text_header(path: Path) -> dict[str, str]:
    """Fields of the header of an NRRD or MetaImage file, names in lower case; those of NRRD's keys are left out.

    Raises:
        DataError: when the file does not begin with such a header.
    """
    with open(path, "rb") as file:
        content = file.read(HEADER_BYTES)
    fields = {}
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    for line in content.splitlines():
        if nrrd and not line.strip():
            break
        text = line.decode("utf-8", errors="replace")
        name, parted, value = text.partition(":" if nrrd else "=")
        if parted and not (nrrd and value.startswith("=")) and not text.startswith("#"):
            fields[name.strip().lower()] = value.strip()
        if not nrrd and name.strip().lower() == "elementdatafile":
            break
    if (nrrd and not content.startswith(b"NRRD")) or ("sizes" not in fields and "dimsize" not in fields):
        raise DataError(
            f"{path}: not readable as a volume (no {'NRRD' if nrrd else 'MetaImage'} header). Expected a whole NIfTI, "
            "NRRD or MetaImage file, or the folder of a DICOM series; replace it."
        )
    return fields


def stated_unit(path: Path) -> float:
    """Unit (mm) of an NRRD or MetaImage file that states its geometry.

    Raises:
        DataError: when orientation or spacing is not stated, or when units are not known.
    """
    fields = text_header(path)
    advice = "so that its orientation and spacing are not known. Write it again with its geometry."
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        if fields.get("space", "").lower() not in NRRD_SPACES or "space directions" not in fields:
            found = fields.get("space", "none")
            raise DataError(
                f"{path}: the file states no geometry (space: {found}, space directions: "
                f"{fields.get('space directions', 'none')}), {advice}"
            )
        names = re.findall(r'"([^"]*)"', fields.get("space units", ""))
        units = {NRRD_UNITS.get(name.strip().lower()) for name in names} or {1.0}
        if len(units) > 1 or None in units:
            raise DataError(f"{path}: its space units are {', '.join(names)}; expected mm, m, cm or um for all axes.")
        return float(units.pop() or 1.0)
    oriented = {"transformmatrix", "orientation", "rotation"} & fields.keys()
    if not oriented or not {"elementspacing", "elementsize"} & fields.keys():
        raise DataError(
            f"{path}: the file states no geometry ({'ElementSpacing' if oriented else 'TransformMatrix'} is missing), "
            f"{advice}"
        )
    return 1.0


def data_file(path: Path) -> Path:
    """The file that holds the voxels of an NRRD or MetaImage file: another one, where the header names a single one."""
    fields = text_header(path)
    names = (fields.get(name, "") for name in ("elementdatafile", "data file", "datafile"))
    named = next((name for name in names if name), "LOCAL")
    other = path.parent / named
    return other if named != "LOCAL" and other.is_file() else path


def is_packed(path: Path) -> bool:
    """Whether an NRRD or MetaImage file holds its voxels other than byte by byte: compressed, or as text."""
    fields = text_header(path)
    encoding, packed, binary = (fields.get(name, "") for name in ("encoding", "compresseddata", "binarydata"))
    return encoding.lower() not in ("", "raw") or packed.lower() == "true" or binary.lower() == "false"


def check_size(needed: int, path: Path, packed: bool) -> None:
    """Check that a file can hold the voxels that its header states, before memory is taken for them.

    Args:
        needed: bytes of the voxels.
        path: file that holds them.
        packed: whether they are compressed.

    Raises:
        DataError: when it can't.
    """
    size = path.stat().st_size
    if not 0 < needed <= size * (MAX_COMPRESSION if packed else 1):
        raise DataError(
            f"{path}: not readable as a volume (its header states {needed} bytes of voxels; the file has {size} "
            "bytes). It is truncated or damaged; replace it."
        )


def scale_nrrd(path: Path, unit: float) -> None:
    """Let an NRRD file in mm, with its data attached, count in another unit."""
    content = path.read_bytes()
    header, _, data = content.partition(b"\n\n")
    lines = []
    for line in header.decode("utf-8").split("\n"):
        if line.startswith(("space directions:", "space origin:")):
            line = re.sub(r"[-+0-9.eE]+(?=[,)])", lambda number: repr(float(number[0]) / unit), line)
        lines.append(line)
    name = {1000.0: "m", 10.0: "cm", 0.001: "um"}[unit]
    lines.append("space units: " + " ".join([f'"{name}"'] * 3))
    path.write_bytes("\n".join(lines).encode() + b"\n\n" + data)


def written_geometry(meta: Mapping[str, Any] | None) -> tuple[np.ndarray | None, float]:
    """Of an image's metadata: its NIfTI transforms, or none, and the unit (mm) of its NRRD file."""
    stored = np.asarray((meta or {}).get("nifti_geometry", []), dtype=np.float64).ravel()
    unit = float(np.asarray((meta or {}).get("nrrd_unit", 1.0)).ravel()[0])
    return (stored if stored.any() else None), unit
