"""Volumes: which files and DICOM series there are, and reading them with errors that name what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import itk
import nibabel
import numpy as np
import pydicom
import torch
from monai.data import ITKReader, ITKWriter, MetaTensor, NibabelReader, NibabelWriter
from pydicom.errors import InvalidDicomError

from medsa_nets.data.atomic import AtomicWriter
from medsa_nets.data.datalists import SPLITS, choose_split, is_dicom, read_datalist, read_json
from medsa_nets.data.labels import Renumbering, match_labels, read_labels
from medsa_nets.errors import DataError, describe

logger = logging.getLogger(__name__)

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
_DATALIST_NAMES = ("dataset_0.json", "dataset.json")
_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))
SLICE_FIELDS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1}
_TOLERANCE = 1e-2  # mm, or its like in directions, by which positions may deviate


def volume_id(path: str | Path) -> str:
    """Name of a volume without folder and suffix; that of the folder, for a DICOM series."""
    name = Path(path).name
    for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def is_volume(path: str | Path) -> bool:
    """Whether a path looks like a volume: a file with a volume's suffix, a DICOM file, or a folder with such in it."""
    path = Path(path)
    if path.is_dir():
        return any(file.is_file() and is_dicom(file) for file in path.iterdir())
    return path.is_file() and (path.name.lower().endswith(VOLUME_SUFFIXES) or is_dicom(path))


def list_volumes(folder: str | Path) -> list[dict[str, str]]:
    """List the volumes of a folder for inference, by name, as entries with ``image``.

    Args:
        folder: a volume (NIfTI, NRRD, MetaImage, or the folder of a DICOM series), or a folder of such.

    Raises:
        DataError: when there is no such folder, or no volume in it; the message says what was found.
    """
    root = Path(folder).expanduser()
    if not root.exists():
        raise DataError(f"dataset_dir {root}: no such folder or file. Pass the volumes' folder (--dataset_dir).")
    if is_volume(root):
        return [{"image": str(root)}]
    volumes = sorted(path for path in root.iterdir() if is_volume(path)) if root.is_dir() else []
    if not volumes:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:10]) if root.is_dir() else f"the file {root.name}"
        raise DataError(
            f"dataset_dir {root}: no volumes ({', '.join(VOLUME_SUFFIXES)}, or folders of DICOM series); "
            f"found {found or 'nothing'}."
        )
    return [{"image": str(path)} for path in volumes]


def load_volume_datalist(
    split: str,
    dataset_dir: str | Path,
    datalist: str | Path | None = None,
    *,
    classes: Sequence[str] = (),
    validation_fraction: float = 0.2,
    seed: int = 0,
    limit: int = 0,
    required: bool = True,
) -> list[dict[str, Any]]:
    """List the volumes and labels of a split.

    Where the data set has no validation split, a share of the training volumes, chosen by a hash of their names, is
    kept for validation: the same volumes on every machine.

    Args:
        split: ``training``, ``validation`` or ``testing``.
        dataset_dir: folder with ``dataset_0.json`` or ``dataset.json`` (BTCV, Medical Segmentation Decathlon), with
            ``imagesTr/`` and ``labelsTr/`` (or ``images/`` and ``labels/``), or any folder together with ``datalist``.
        datalist: file in the Decathlon JSON form, paths relative to ``dataset_dir``. An entry may name the classes
            that are annotated in it: ``"annotated": ["liver", "spleen"]``.
        classes: names of the classes, in the order of their ids; checks and translates ``annotated``.
        validation_fraction: share of the training volumes kept for validation where the data set has no such split.
        seed: seed of that choice.
        limit: if above 0, this many volumes of the split, chosen by the same hash.
        required: whether an empty split is an error; a training goes on without validation.

    Returns:
        Entries with ``image`` and ``label`` (absolute paths, sorted by name) and, with ``classes``, ``annotated``: an
        array of booleans, one for each class. Where the data list's ``labels`` give these names other ids than the
        classes have, also ``label_ids``: the new id of each old one
        (:class:`~medsa_nets.transforms.RenumberLabelsd`).

    Raises:
        DataError: when folder, file or split is missing, when the list is empty, when files are not there, when
            ``annotated`` names an unknown class, or when ``labels`` of the data list do not fit the classes
            (:func:`~medsa_nets.data.labels.match_labels`).
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    root = Path(dataset_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"dataset_dir {root}: there is no such folder. Pass the data set's folder (--dataset_dir).")
    if datalist is None:
        datalist = next((root / name for name in _DATALIST_NAMES if (root / name).is_file()), None)
    splits = read_datalist(Path(datalist).expanduser(), root, _scan) if datalist else _scan(root)
    items = choose_split(
        splits,
        split,
        validation_fraction,
        seed,
        limit,
        str(datalist or root),
        lambda i: volume_id(i["image"]),
        required,
    )
    if classes:
        names = read_labels(read_json(Path(datalist).expanduser()), f"datalist {datalist}") if datalist else {}
        matched = match_labels(names, list(classes), f"datalist {datalist}")
        for item in items:
            item["annotated"] = np.asarray(_annotated(item, list(classes), str(datalist), matched))
            if matched is not None and matched.needed:
                item["label_ids"] = np.asarray(matched.ids)
    return items


def _annotated(item: dict[str, Any], classes: list[str], source: str, matched: Renumbering | None) -> list[bool]:
    named = item.get("annotated", classes if matched is None else list(matched.annotated))
    if not isinstance(named, list) or any(name not in classes for name in named):
        raise DataError(
            f"datalist {source}: 'annotated' of {item['image']} is {named!r}; expected a list of names out of "
            f"{', '.join(classes)}."
        )
    return [name in named for name in classes]


def _scan(root: Path) -> dict[str, list[dict[str, Any]]]:
    for images, labels in _FOLDERS:
        if (root / images).is_dir() and (root / labels).is_dir():
            known = {_case(path): path for path in sorted((root / labels).iterdir()) if is_volume(path)}
            volumes = [path for path in sorted((root / images).iterdir()) if is_volume(path)]
            unpaired = [path for path in volumes if _case(path) not in known]
            if unpaired:
                raise DataError(
                    f"{unpaired[0]}: no label of that name in {root / labels}; {len(unpaired)} of {len(volumes)} "
                    "volumes have none."
                )
            if volumes:
                return {"training": [{"image": str(path), "label": str(known[_case(path)])} for path in volumes]}
    looked = [*_DATALIST_NAMES, *(f"{a}/ with {b}/" for a, b in _FOLDERS)]
    found = sorted(p.name + ("/" if p.is_dir() else "") for p in root.iterdir())
    raise DataError(
        f"dataset_dir {root}: no data set found. Looked for {'; '.join(looked)}. "
        f"Found {', '.join(found[:10]) or 'nothing'}{' …' if len(found) > 10 else ''}. "
        "For another layout, pass a Decathlon JSON (--datalist)."
    )


def _case(path: Path) -> str:
    """What an image and its label have in common: ``img0001``, ``label0001``; ``case_0000`` (nnU-Net), ``case``."""
    name = volume_id(path)
    for prefix in ("img", "label"):
        if name.startswith(prefix) and name[len(prefix) :].isdigit():
            return name[len(prefix) :]
    return name.removesuffix("_0000")


def read_volume(path: str | Path, files: Sequence[Path] = ()) -> MetaTensor:
    """Read a volume: NIfTI, NRRD, MetaImage, or the folder of a DICOM series.

    A folder with several DICOM series gives the one with most slices; the log names the others.

    Args:
        path: file or folder.
        files: the slices of a series in the folder, as :func:`order_slices` gives them; none finds them.

    Returns:
        (1, X, Y, Z) with its affine (RAS, in mm).

    Raises:
        DataError: when the file is missing, unreadable or truncated, has no usable affine, is a time series, holds
            values that are not finite, or when DICOM slices are missing, tilted or unevenly spaced.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such volume.")
    try:
        # MONAI's LoadImage tries other readers where one fails, and ITK takes a cut NIfTI file for a whole one.
        if path.is_dir() or is_dicom(path):
            slices = files or (_dicom_series(path) if path.is_dir() else [path])  # one file is a volume of one slice
            volume = _from_reader(ITKReader(), itk.imread([str(file) for file in slices], itk.F))
        elif path.name.lower().endswith((".nii", ".nii.gz")):
            _check_affine(nibabel.load(path).affine, path)  # MONAI's reader repairs some, silently
            reader = NibabelReader()
            volume = _from_reader(reader, reader.read(path))
            if not (int(volume.meta.get("qform_code", 0)) or int(volume.meta.get("sform_code", 0))):
                raise DataError(
                    f"{path}: the file has no affine (qform_code and sform_code are 0), so that its orientation is not "
                    "known. Write it again with its affine."
                )
        else:
            volume = _from_reader(ITKReader(), ITKReader().read(path))
    except DataError:
        raise
    except Exception as error:  # nibabel, ITK, zlib and pydicom raise errors of their own
        cause = error
        while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise DataError(
            f"{path}: not readable as a volume ({describe(cause)}). Expected a whole NIfTI, NRRD or MetaImage file, or "
            "the folder of a DICOM series; replace it."
        ) from error
    volume.meta["filename_or_obj"] = str(path)
    shape = tuple(volume.shape)
    if volume.dim() == 2:
        volume = volume.unsqueeze(-1)
    while volume.dim() > 3 and volume.shape[-1] == 1:
        volume = volume.squeeze(-1)
    if volume.dim() != 3:
        raise DataError(
            f"{path}: its shape is {shape}; expected one volume of three dimensions. Split time series and channels "
            "into files of their own."
        )
    _check_affine(np.asarray(volume.affine, dtype=np.float64), path)
    bad = int((~torch.isfinite(volume.as_tensor())).sum())
    if bad:
        raise DataError(f"{path}: {bad} voxels are not finite (NaN or infinite). Replace them, for example by air.")
    return MetaTensor(volume.as_tensor().unsqueeze(0).float(), affine=volume.affine, meta=_plain_meta(volume, path))


def _check_affine(affine: np.ndarray, path: Path) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(f"{path}: its affine is singular: {affine.tolist()}. Write the file again with a valid one.")


def _from_reader(reader: ITKReader | NibabelReader, image: Any) -> MetaTensor:
    array, meta = reader.get_data(image)
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)), meta=meta)


def _plain_meta(volume: MetaTensor, path: Path) -> dict[str, Any]:
    return {
        "filename_or_obj": str(path),
        "original_affine": np.asarray(volume.affine, dtype=np.float64),
        "original_channel_dim": 0,
        "spatial_shape": np.asarray(volume.shape),
        "space": "RAS",
    }


class _VolumeWriter(AtomicWriter):
    """Keeps the third axis of a volume of one slice; MONAI's writers drop it, and then can't place the volume."""

    data_obj: Any

    def set_data_array(
        self, data_array: Any, channel_dim: int | None = 0, squeeze_end_dims: bool = True, **kwargs: Any
    ) -> None:
        """Set the voxels (1, X, Y, Z), or whatever else MONAI's writer takes."""
        if channel_dim == 0 and data_array.ndim == 4 and data_array.shape[0] == 1:
            data_array, channel_dim, squeeze_end_dims = data_array[0], None, False
        super().set_data_array(  # type: ignore[misc]
            data_array, channel_dim=channel_dim, squeeze_end_dims=squeeze_end_dims, **kwargs
        )
        if channel_dim is None and self.data_obj.ndim == 4:
            self.data_obj = self.data_obj[..., 0]  # MONAI's NIfTI writer adds an axis of channels


class AtomicNibabelWriter(_VolumeWriter, NibabelWriter):
    """MONAI's NIfTI writer, whole files only."""


class AtomicITKWriter(_VolumeWriter, ITKWriter):
    """MONAI's ITK writer (NRRD, MetaImage), whole files only."""


def volume_writer(output_ext: str) -> type[NibabelWriter] | type[ITKWriter]:
    """The writer of a format, by the files' suffix.

    Raises:
        DataError: when the suffix is that of no format.
    """
    if output_ext in (".nii", ".nii.gz"):
        return AtomicNibabelWriter
    if output_ext in (".nrrd", ".mha"):
        return AtomicITKWriter
    raise DataError(f"output_ext must be .nii.gz, .nii, .nrrd or .mha; got {output_ext!r}.")


def _dicom_series(folder: Path) -> list[Path]:
    """Files of the largest DICOM series of a folder, in the order of their position along the slice's normal."""
    series: dict[str, list[tuple[Path, Any]]] = {}
    for file in sorted(folder.iterdir()):
        if not file.is_file() or not is_dicom(file):
            continue
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
        except (InvalidDicomError, OSError, ValueError) as error:
            raise DataError(f"{file}: not readable as DICOM ({describe(error)}). Replace the file.") from error
        series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((file, header))
    if not series:
        raise DataError(f"{folder}: no DICOM files in this folder.")
    chosen = max(series, key=lambda uid: len(series[uid]))
    if len(series) > 1:
        others = ", ".join(f"{uid} ({len(files)} files)" for uid, files in series.items() if uid != chosen)
        logger.warning("%s: took the series %s (%d files); left out %s.", folder, chosen, len(series[chosen]), others)
    return [file for file, _ in order_slices(series[chosen], str(folder))]


def order_slices(slices: Sequence[tuple[Path, Any]], name: str) -> list[tuple[Path, Any]]:
    """Sort the slices of a DICOM series by their position along the slice's normal, and check that they are a grid.

    Args:
        slices: path and header (pydicom) of each slice.
        name: what errors about the series as a whole name.

    Raises:
        DataError: when a position field is missing or no number, when orientation, size, spacing or frame of reference
            differ, or when slices are missing, doubled, tilted or unevenly spaced.
    """
    slices = list(slices)
    for file, header in slices:
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
    orientation = np.asarray(slices[0][1].ImageOrientationPatient, dtype=float)
    normal = np.cross(orientation[:3], orientation[3:])
    if abs(float(np.linalg.norm(normal)) - 1.0) > _TOLERANCE:
        raise DataError(f"{slices[0][0]}: ImageOrientationPatient {orientation.tolist()} is no pair of directions.")
    first = slices[0][1]
    for file, header in slices:
        if np.abs(np.asarray(header.ImageOrientationPatient, dtype=float) - orientation).max() > _TOLERANCE:
            raise DataError(f"{file}: its orientation differs from that of {slices[0][0].name}. Split the series.")
        if (header.Rows, header.Columns, *header.PixelSpacing) != (first.Rows, first.Columns, *first.PixelSpacing):
            raise DataError(f"{file}: its size or pixel spacing differs from that of {slices[0][0].name}.")
        if header.get("FrameOfReferenceUID") != first.get("FrameOfReferenceUID"):
            raise DataError(
                f"{file}: its frame of reference differs from that of {slices[0][0].name}: the slices do not share one "
                "coordinate system. Split the series."
            )
    slices.sort(key=lambda pair: float(np.asarray(pair[1].ImagePositionPatient, dtype=float) @ normal))
    places = np.asarray([header.ImagePositionPatient for _, header in slices], dtype=float)
    if len(places) > 1:
        steps = np.diff(places, axis=0)
        lengths = steps @ normal
        middle = float(np.median(lengths))
        if middle <= _TOLERANCE:
            raise DataError(f"{name}: several slices lie at one position. Split the series (phases, echoes).")
        worst = int(np.abs(lengths - middle).argmax())
        if abs(lengths[worst] - middle) > max(_TOLERANCE, 0.02 * middle):
            raise DataError(
                f"{name}: unevenly spaced slices: {lengths[worst]:.3f} mm between {slices[worst][0].name} and "
                f"{slices[worst + 1][0].name}, {middle:.3f} mm elsewhere. A slice is missing, or the series has to be "
                "resampled first."
            )
        aside = np.linalg.norm(steps - lengths[:, None] * normal, axis=1).max()
        if aside > max(_TOLERANCE, 0.02 * middle):
            raise DataError(
                f"{name}: a tilted gantry: slices are shifted by {aside:.3f} mm against each other in their plane. "
                "Resample the series to a straight grid first."
            )
    return slices
