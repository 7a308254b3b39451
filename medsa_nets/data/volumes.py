"""Volumes: which files and DICOM series there are, and reading them with errors that name what is wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import itk
import nibabel
import numpy as np
import torch
from monai.data import ITKReader, ITKWriter, MetaTensor, NibabelWriter

from medsa_nets.data.atomic import AtomicWriter
from medsa_nets.data.datalists import SPLITS, choose_split, read_datalist, read_json
from medsa_nets.data.geometry import (
    check_size,
    check_spacing,
    data_file,
    is_packed,
    nifti_geometry,
    scale_nrrd,
    stated_unit,
    with_nifti_geometry,
    written_geometry,
)
from medsa_nets.data.labels import Renumbering, match_labels, read_labels
from medsa_nets.data.layouts import find_list, list_images, read_layout
from medsa_nets.data.outputs import image_path
from medsa_nets.data.slices import (
    Slice,
    count_frames,
    drop_twins,
    grid_affine,
    is_dicom,
    is_media_directory,
    is_multi_frame,
    order_slices,
    read_slice_header,
    read_slices,
    split_frames,
)
from medsa_nets.errors import DataError, describe

logger = logging.getLogger(__name__)

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
ARRAY_SUFFIX = ".npy"  # an array without geometry, which a setting has to state
GRID_TOLERANCE = 0.1  # mm that corners of two grids may lie apart
_DATALIST_NAMES = ("dataset_0.json", "dataset.json")
_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))


def volume_id(path: str | Path) -> str:
    """Name of a volume without folder and suffix; that of the folder, for a DICOM series."""
    name = Path(path).name
    for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def is_volume(path: str | Path) -> bool:
    """Whether a path looks like a volume: a file of a volume's suffix or of DICOM, or a folder with DICOM files.

    A folder that holds volumes' files beside DICOM files is none.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
        return not any(map(_has_volume_suffix, files)) and any(_is_dicom_image(file) for file in files)
    return path.is_file() and (_has_volume_suffix(path) or _is_dicom_image(path))


def _has_volume_suffix(path: Path) -> bool:
    return path.name.lower().endswith(VOLUME_SUFFIXES)


def _is_dicom_image(path: Path) -> bool:
    """Whether a file is DICOM and no directory of a medium."""
    return is_dicom(path) and path.name.upper() != "DICOMDIR"


def is_case(path: Path) -> bool:
    """Whether a path that a layout names is a volume: as :func:`is_volume`, or an array."""
    return (path.is_file() and path.name.lower().endswith(ARRAY_SUFFIX)) or is_volume(path)


def list_volumes(folder: str | Path, layout: Any = None) -> list[dict[str, Any]]:
    """List the volumes of a folder for inference, by name, as entries with ``image``; the log names what is left out.

    Args:
        folder: a volume (NIfTI, NRRD, MetaImage, a multi-frame DICOM file, or the folder of a DICOM series), a folder
            of such, or a DICOM medium (a folder with a ``DICOMDIR``, at any depth below which series lie).

    Raises:
        DataError: when there is no such folder, no volume in it, or slices beside volumes; the message says what was
            found.
    """
    root = Path(folder).expanduser()
    if not root.exists():
        raise DataError(f"dataset_dir {root}: no such folder or file. Pass the volumes' folder (--dataset_dir).")
    if root.name.upper() == "DICOMDIR" and root.is_file():
        root = root.parent
    if layout and root.is_dir() and (found_cases := list_images(root, layout, is_case)):
        return found_cases
    if root.is_file() and is_case(root):
        return [{"image": str(root)}]
    inside = sorted(root.iterdir()) if root.is_dir() else []
    if any(path.name.upper() == "DICOMDIR" for path in inside):
        folders = [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())]
        volumes = [volume for path in folders if is_volume(path) for volume in _of_folder(path)]
        left_out: list[Path] = []  # what else a medium holds, as viewers, is no loss
    elif is_volume(root):
        volumes = _of_folder(root)
        left_out = [path for path in inside if path.is_dir() and is_volume(path)]
    else:
        slices = [path for path in inside if path.is_file() and not _has_volume_suffix(path) and is_dicom(path)]
        found = [path for path in inside if path not in slices and is_volume(path)]
        if found and len(slices) >= len(found):
            raise DataError(
                f"dataset_dir {root}: it holds {len(slices)} DICOM files ({slices[0].name}) beside {len(found)} "
                f"volumes ({found[0].name}). Put a series into a folder of its own."
            )
        volumes = [volume for path in found for volume in (_of_folder(path) if path.is_dir() else [path])]
        left_out = [path for path in inside if path not in found]
    if not volumes:
        listed = _first([p.name for p in inside]) if root.is_dir() else f"the file {root.name}"
        deeper = next((p for p in sorted(root.rglob("*")) if p.is_dir() and any(map(is_volume, p.iterdir()))), None)
        raise DataError(
            f"dataset_dir {root}: no volumes ({', '.join(VOLUME_SUFFIXES)}, or folders of DICOM series); "
            f"found {listed or 'nothing'}.{f' Volumes lie deeper: pass {deeper}.' if deeper else ''}"
        )
    if left_out:
        names = [path.name + ("/" if path.is_dir() else "") for path in left_out]
        logger.warning("dataset_dir %s: left out %d that are no volumes: %s.", root, len(names), _first(names))
    return [{"image": str(path)} for path in volumes]


def _of_folder(folder: Path) -> list[Path]:
    """The volumes of a folder of DICOM files: the folder, as one series, or its files where each holds frames."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_dicom_image(path)]
    if len(files) > 1 and is_multi_frame(read_slice_header(files[0])):
        headers = [read_slice_header(file) for file in files]
        if len({str(h.get("SeriesInstanceUID", "")) for h in headers}) == len(files) and all(
            map(is_multi_frame, headers)
        ):
            return files
    return [folder]


def load_volume_datalist(
    split: str,
    dataset_dir: str | Path,
    datalist: str | Path | None = None,
    *,
    classes: Sequence[str] = (),
    layout: Any = None,
    channels: int = 1,
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
        layout: where a data set of another folder shape has its volumes and labels, or its list
            (:func:`~medsa_nets.data.layouts.read_layout`, :func:`~medsa_nets.data.layouts.find_list`); none looks for
            the shapes above. Its ``label_ids`` is the new id of each old one.
        channels: of an image. With several, ``image`` may be a list of as many files.
        validation_fraction: share of the training volumes kept for validation where the data set has no such split.
        seed: seed of that choice.
        limit: if above 0, this many volumes of the split, chosen by the same hash.
        required: whether an empty split is an error; a training goes on without validation.

    Returns:
        Entries with ``image`` and ``label`` (absolute paths, sorted by name) and, with ``classes``, ``annotated``: an
        array of booleans, one for each class. Where the data list's ``labels`` give these names other ids than the
        classes have, or the layout does, also ``label_ids``: the new id of each old one
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
    if datalist is None and layout:
        datalist = find_list(root, layout)
        root = datalist.parent if datalist else root
    elif datalist is None:
        datalist = next((root / name for name in _DATALIST_NAMES if (root / name).is_file()), None)
    if datalist:
        several = ("image",) if channels > 1 else ()
        splits = read_datalist(Path(datalist).expanduser(), root, _scan, several)
    else:
        splits = read_layout(root, layout, is_case) if layout else _scan(root)
    items = choose_split(
        splits,
        split,
        validation_fraction,
        seed,
        limit,
        str(datalist or root),
        lambda i: volume_id(image_path(i)),
        required,
    )
    if classes:
        names = read_labels(read_json(Path(datalist).expanduser()), f"datalist {datalist}") if datalist else {}
        matched = match_labels(names, list(classes), f"datalist {datalist}")
        for item in items:
            item["annotated"] = np.asarray(_annotated(item, list(classes), str(datalist), matched))
            if matched is not None and matched.needed:
                item["label_ids"] = np.asarray(matched.ids)
            elif layout and not datalist and layout.get("label_ids"):
                item["label_ids"] = np.asarray(layout["label_ids"])
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


def read_volume(
    path: str | Path | Sequence[str | Path],
    files: Sequence[Path] = (),
    *,
    channels: int = 1,
    arrays: Mapping[str, Any] | None = None,
) -> MetaTensor:
    """Read a volume: NIfTI, NRRD, MetaImage, the folder of a DICOM series, or an array (``.npy``).

    A folder with several DICOM series gives the one with most slices; the log names the others.

    Args:
        path: file or folder; of several channels, a file that holds them all, or a list of files, one each.
        files: the slices of a series in the folder, as :func:`order_slices` gives them; none finds them.
        channels: number of channels (sequences, phases, colours).
        arrays: what an array does not state: ``spacing`` of its axes in mm, and ``axes``, the directions in which they
            run, as ``SPL`` (up, back, left); none refuses arrays.

    Returns:
        (channels, X, Y, Z) with its affine (RAS, in mm).

    Raises:
        DataError: when the file is missing, unreadable or truncated, has no usable affine, is a time series, has
            another number of channels, holds values that are not finite, when files of channels lie on different grids,
            or when DICOM slices are missing, tilted or unevenly spaced.
    """
    if isinstance(path, (list, tuple)):
        return _read_channels([Path(own) for own in path], channels, arrays)
    path = Path(str(path))
    if not path.exists():
        raise DataError(f"{path}: there is no such volume.")
    try:
        # MONAI's LoadImage tries other readers where one fails, and ITK takes a cut NIfTI file for a whole one.
        unit, nifti, nrrd_unit = 1.0, np.zeros(0), 1.0
        if path.is_dir() or files or (path.suffix.lower() != ARRAY_SUFFIX and is_dicom(path)):
            volume = _read_dicom(path, files)
        elif path.name.lower().endswith((".nii", ".nii.gz")):
            image = nibabel.load(path)
            _check_affine(image.affine, path)
            unit, nifti = nifti_geometry(image, path, colours=channels > 1)
            needed = math.prod(image.shape) * image.get_data_dtype().itemsize
            check_size(needed, path, packed=path.name.lower().endswith(".gz"))
            # MONAI's reader replaces a sform by the qform where the header's spacing is not that of the sform
            stored = np.asanyarray(image.dataobj)
            if channels > 1 and stored.dtype.fields:  # colours
                stored = np.stack([stored[name] for name in stored.dtype.names or ()], axis=-1)
            array = np.ascontiguousarray(stored, dtype=np.float32)
            volume = MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(image.affine.astype(np.float64)))
        elif path.suffix.lower() == ARRAY_SUFFIX:
            volume = _read_array(path, arrays)
        else:
            unit = stated_unit(path)
            nrrd_unit = unit if path.suffix.lower() == ".nrrd" else 1.0
            components, needed = _components_and_bytes(path)
            check_size(needed, data_file(path), packed=is_packed(path))
            if components > 1 and channels == 1:
                raise DataError(
                    f"{path}: its voxels have {components} components (colours, vectors or complex numbers); expected "
                    "grey values. Split channels into files of their own."
                )
            # floating-point numbers, whatever type the file has
            read = _read_vectors(path) if components > 1 else itk.imread(str(path), itk.F)
            array, meta = ITKReader().get_data(read)
            volume = MetaTensor(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)), meta=meta)
        if unit != 1.0:
            scale = torch.diag(torch.tensor([unit, unit, unit, 1.0], dtype=torch.float64))
            volume.affine = scale @ volume.affine.double()
            check_spacing(np.asarray(volume.affine), unit, path)
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
    values = _channels_first(volume.as_tensor(), channels, path)
    _check_affine(np.asarray(volume.affine, dtype=np.float64), path)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise DataError(f"{path}: {bad} voxels are not finite (NaN or infinite). Replace them, for example by air.")
    meta = _plain_meta(volume.affine, values.shape[1:], path, nifti, nrrd_unit)
    return MetaTensor(values.float(), affine=volume.affine, meta=meta)


def _read_vectors(path: Path) -> Any:
    """An ITK image of three dimensions whose voxels have several components."""
    reader = itk.ImageFileReader[itk.VectorImage[itk.F, 3]].New()
    reader.SetFileName(str(path))
    reader.Update()
    return reader.GetOutput()


def _channels_first(values: torch.Tensor, channels: int, path: Path) -> torch.Tensor:
    """Voxels (X, Y, Z), or (X, Y, Z, channels), of a file as (channels, X, Y, Z)."""
    shape = tuple(values.shape)
    if channels == 1:
        if values.dim() == 2:
            values = values.unsqueeze(-1)
        while values.dim() > 3 and values.shape[-1] == 1:
            values = values.squeeze(-1)
        if values.dim() != 3:
            raise DataError(
                f"{path}: its shape is {shape}; expected one volume of three dimensions. Split time series and "
                "channels into files of their own."
            )
        return values.unsqueeze(0)
    if values.dim() == 5 and values.shape[3] == 1:  # vectors of NIfTI
        values = values[:, :, :, 0]
    if values.dim() != 4 or values.shape[3] != channels:
        found = values.shape[3] if values.dim() == 4 else 1 if values.dim() == 3 else None
        stated = f"{found} channel(s)" if found else f"the shape {shape}"
        raise DataError(
            f"{path}: it has {stated}; expected {channels} (in_channels). Give {channels} files as a list, one file of "
            "all channels, or the number that there is (--in_channels)."
        )
    return values.movedim(3, 0).contiguous()


def _read_channels(paths: Sequence[Path], channels: int, arrays: Mapping[str, Any] | None) -> MetaTensor:
    """A volume whose channels are files of their own, on one grid."""
    if len(paths) != channels:
        listed = ", ".join(path.name for path in paths[:4])
        raise DataError(
            f"{paths[0] if paths else 'image'}: the case has {len(paths)} files ({listed}); expected {channels} "
            "(in_channels)."
        )
    read = [read_volume(path, arrays=arrays) for path in paths]
    for path, volume in zip(paths[1:], read[1:]):
        if volume.shape != read[0].shape or grid_distance(volume, read[0]) > GRID_TOLERANCE:
            raise DataError(
                f"{path}: its grid is {describe_grid(volume)}; that of {paths[0].name}, another channel of the case, "
                f"is {describe_grid(read[0])}. Register and resample the channels to one grid."
            )
    meta = {key: value for key, value in read[0].meta.items() if key != "affine"}
    return MetaTensor(torch.cat([volume.as_tensor() for volume in read]), affine=read[0].affine, meta=meta)


def describe_grid(volume: MetaTensor) -> str:
    """Size, spacing and origin of a volume (C, X, Y, Z), for errors."""
    affine = np.round(np.asarray(volume.affine), 3)
    spacing = np.round(np.linalg.norm(np.asarray(volume.affine)[:3, :3], axis=0), 3)
    size = " x ".join(str(n) for n in volume.shape[1:])
    return f"{size} voxels of {' x '.join(f'{s:g}' for s in spacing)} mm from {affine[:3, 3].tolist()}"


def grid_distance(a: MetaTensor, b: MetaTensor) -> float:
    """How far the corners of two grids of one shape lie apart, in mm."""
    corners = np.array([[x, y, z, 1.0] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    corners[:, :3] *= np.array(a.shape[1:]) - 1
    moved = corners @ (np.asarray(a.affine, dtype=float) - np.asarray(b.affine, dtype=float)).T
    return float(np.linalg.norm(moved[:, :3], axis=1).max())


def _read_array(path: Path, arrays: Mapping[str, Any] | None) -> MetaTensor:
    """An array with the geometry that a setting states."""
    advice = "expected {spacing: [mm of each axis], axes: three letters of R or L, A or P, S or I}"
    if arrays is None:
        raise DataError(f"{path}: an array states neither spacing nor directions. Set arrays; {advice}.")
    axes, spacing = str(arrays.get("axes", "")), arrays.get("spacing")
    numbers = [float(mm) for mm in spacing] if isinstance(spacing, (list, tuple)) else []
    pairs = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    places = [pairs[axis] for axis in axes if axis in pairs]
    if len(numbers) != 3 or min(numbers) <= 0 or len(axes) != 3 or sorted(place for place, _ in places) != [0, 1, 2]:
        raise DataError(f"arrays: {dict(arrays)!r}; {advice}.")
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # a header that states too much takes no memory
    affine = np.eye(4)
    affine[:3, :3] = 0.0
    for column, ((row, sign), mm) in enumerate(zip(places, numbers)):
        affine[row, column] = sign * mm
    return MetaTensor(torch.from_numpy(np.array(array, dtype=np.float32)), affine=torch.from_numpy(affine))


def _check_affine(affine: np.ndarray, path: Path) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(f"{path}: its affine is singular: {affine.tolist()}. Write the file again with a valid one.")


def _components_and_bytes(path: Path) -> tuple[int, int]:
    header = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if header is None:
        raise ValueError("no ITK reader knows it")
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return int(header.GetNumberOfComponents()), int(header.GetImageSizeInBytes())


def _plain_meta(
    affine: torch.Tensor, shape: Sequence[int], path: Path, nifti: np.ndarray, nrrd_unit: float
) -> dict[str, Any]:
    return {
        "filename_or_obj": str(path),
        "original_affine": np.asarray(affine, dtype=np.float64),
        "original_channel_dim": 0,
        "spatial_shape": np.asarray(shape),
        "space": "RAS",
        "nifti_geometry": nifti if nifti.size else np.zeros(28),  # as geometry.py says; zeros: the file is no NIfTI
        "nrrd_unit": nrrd_unit,
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


class _SourceNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer; a mask on the grid of a NIfTI file carries that file's qform, sform, codes and units."""

    geometry: np.ndarray | None = None
    source_affine = np.eye(4)

    def set_metadata(self, meta_dict: Mapping[str, Any] | None, resample: bool = True, **options: Any) -> None:
        """Note affine and source of the voxels."""
        super().set_metadata(meta_dict, resample, **options)
        self.geometry, _ = written_geometry(meta_dict)
        self.source_affine = np.asarray((meta_dict or {}).get("original_affine", np.eye(4)), dtype=np.float64)

    def write(self, filename: Any, verbose: bool = False, **kwargs: Any) -> None:
        """Write the image to ``filename``."""
        super().write(filename, verbose=verbose, **kwargs)
        if self.geometry is not None and np.allclose(np.asarray(self.affine), self.source_affine, atol=1e-4):
            nibabel.save(with_nifti_geometry(self.data_obj, self.geometry), filename)


class _SourceITKWriter(ITKWriter):
    """MONAI's ITK writer; the mask of an NRRD file counts in that file's unit."""

    unit = 1.0

    def set_metadata(self, meta_dict: Mapping[str, Any] | None = None, resample: bool = True, **options: Any) -> None:
        """Note affine and unit of the voxels."""
        super().set_metadata(meta_dict, resample, **options)
        _, self.unit = written_geometry(meta_dict)

    def write(self, filename: Any, verbose: bool = False, **kwargs: Any) -> None:
        """Write the image to ``filename``."""
        super().write(filename, verbose=verbose, **kwargs)
        if self.unit != 1.0 and str(filename).endswith(".nrrd"):
            scale_nrrd(Path(filename), self.unit)


class AtomicNibabelWriter(_VolumeWriter, _SourceNibabelWriter):
    """MONAI's NIfTI writer, whole files only, with the transforms of the image's file."""


class AtomicITKWriter(_VolumeWriter, _SourceITKWriter):
    """MONAI's ITK writer (NRRD, MetaImage), whole files only, in the unit of the image's file."""


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


def _read_dicom(path: Path, files: Sequence[Path]) -> MetaTensor:
    found = [Slice(file, read_slice_header(file)) for file in files] if files else series_slices(path)
    slices = order_slices(split_frames(found), str(path))
    return MetaTensor(torch.from_numpy(read_slices(slices)), affine=torch.from_numpy(grid_affine(slices)))


def series_slices(path: Path) -> list[Slice]:
    """Slices of the largest DICOM series of a folder, or of one file."""
    series: dict[str, list[Slice]] = {}
    others = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.is_file() or not is_dicom(file):
            others.append(file.name + ("/" if file.is_dir() else ""))
            continue
        header = read_slice_header(file)
        if is_media_directory(header) or not {"Rows", "ImagePositionPatient"} & set(header.dir()):
            others.append(file.name)
            continue
        series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(Slice(file, header))
    if not series:
        raise DataError(f"{path}: no DICOM images in it; found {_first(others) or 'nothing'}.")
    if others:
        logger.warning("%s: left out %d that are no DICOM images: %s.", path, len(others), _first(others))
    chosen = max(series, key=lambda uid: sum(count_frames(one.header) for one in series[uid]))
    if len(series) > 1:
        left = _first([f"{uid} ({len(files)} files)" for uid, files in series.items() if uid != chosen])
        logger.warning("%s: took the series %s (%d files); left out %s.", path, chosen, len(series[chosen]), left)
    slices, twins = drop_twins(series[chosen])
    if twins:
        named = _first([f"{file.name} (as {twin.name})" for file, twin in twins])
        logger.warning("%s: left out %d slices that are there twice: %s.", path, len(twins), named)
    return slices


def _first(names: Sequence[str]) -> str:
    """Some of many names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
