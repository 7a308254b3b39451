"""Transforms of volumes: reading, checks of labels, prompts of each class, and masks back to one label map."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation, Spacingd, SpatialResample
from nibabel.orientations import aff2axcodes
from scipy import ndimage
from torch import Tensor

from medsa_nets.data.labels import renumber
from medsa_nets.data.masks import binarize_mask
from medsa_nets.data.volumes import GRID_TOLERANCE, describe_grid, grid_distance, read_volume
from medsa_nets.errors import DataError
from medsa_nets.prompts import Prompts, class_protocol_prompts
from medsa_nets.transforms.prompts import ReadPromptsd, SamplePromptsd, file_affine, tensor_to_source

ABSENT = -20.0  # logit of a class that is not there
ROUNDING = 0.01  # by which ids that a file stores with a scale may miss whole numbers


class LoadImageVolumed(MapTransform):
    """Read volumes (see :func:`medsa_nets.data.read_volume`) into (channels, X, Y, Z) tensors with affine.

    Tools that hand over volumes in memory (MONAI Deploy) leave out transforms whose name starts with ``LoadImage``.

    Args:
        keys: keys of the paths: files, or folders of DICOM series.
        allow_missing_keys: whether entries without a key pass.
        channels: of the image; other keys have one.
        arrays: spacing and directions of arrays (``.npy``), which do not state them; none refuses these.
        image_key: key of the image.

    Raises:
        DataError: when a volume can't be read.
    """

    def __init__(
        self,
        keys: KeysCollection,
        allow_missing_keys: bool = False,
        channels: int = 1,
        arrays: Mapping[str, Any] | None = None,
        image_key: str = "image",
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.channels, self.arrays, self.image_key = channels, arrays, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read."""
        out = dict(data)
        for key in self.key_iterator(out):
            channels = self.channels if key == self.image_key else 1
            out[key] = read_volume(out[key], channels=channels, arrays=self.arrays)
        return out


class SpacingBesidePathsd(Spacingd):
    """MONAI's ``Spacingd`` for data in which an entry ``<key>_…`` may be something other than metadata.

    From MONAI 1.6 on, ``Spacingd`` updates each entry whose name begins with that of the volume and ``_`` as if it were
    a dictionary of metadata, and fails on MONAI Label's ``image_path``. The arguments are those of ``Spacingd``.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Resample."""
        beside = {
            name: value
            for name, value in data.items()
            if not isinstance(value, Mapping) and any(str(name).startswith(f"{key}_") for key in self.keys)
        }
        return {**super().__call__({k: v for k, v in data.items() if k not in beside}, lazy), **beside}


class MatchOrientationd(MapTransform):
    """Store labels in the axis order and directions of their image, so that both go back to one grid.

    Files of one grid may store it in different ways, as a DICOM series in LPS and its label in LAS. Axes are swapped
    and flipped, nothing is resampled, and ``Invertd`` ends at the image's grid. Place it before ``Orientationd``.

    Args:
        keys: keys of the labels (1, X, Y, Z).
        image_key: key of the image.
        allow_missing_keys: whether entries without a label pass.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Reorder axes."""
        out = dict(data)
        axes = aff2axcodes(np.asarray(out[self.image_key].affine))
        for key in self.key_iterator(out):
            label = out[key]
            if aff2axcodes(np.asarray(label.affine)) != axes:
                turned = Orientation("".join(axes), labels=None)(label)
                meta = {k: v for k, v in label.meta.items() if k != "affine"}
                meta["original_affine"] = turned.affine.numpy()
                out[key] = MetaTensor(turned.as_tensor().contiguous(), affine=turned.affine, meta=meta)
        return out


class RenumberLabelsd(MapTransform):
    """Give labels the ids of the bundle's classes, where their data set has others. Place it before ``CheckLabelsd``.

    Args:
        keys: keys of the labels (1, X, Y, Z).
        ids_key: key of the new id of each old one, as :func:`~medsa_nets.data.load_volume_datalist` gives it; entries
            without it stay as they are.
        allow_missing_keys: whether entries without a label pass.

    Raises:
        DataError: when a label holds an id that its data set does not name.
    """

    def __init__(self, keys: KeysCollection, ids_key: str = "label_ids", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ids_key = ids_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Renumber."""
        out = dict(data)
        ids = out.pop(self.ids_key, None)
        if ids is None:
            return out
        for key in self.key_iterator(out):
            label = out[key]
            name = str(label.meta.get("filename_or_obj", key))
            values = torch.from_numpy(renumber(label.as_tensor().cpu().numpy(), np.asarray(ids).tolist(), name))
            meta = {k: v for k, v in label.meta.items() if k != "affine"}
            operations = label.applied_operations
            out[key] = MetaTensor(values, affine=label.affine, meta=meta, applied_operations=operations)
        return out


class CheckLabelsd(MapTransform):
    """Check label volumes against their image and their classes. Place it after ``Orientationd``.

    Args:
        keys: keys of the labels (1, X, Y, Z).
        image_key: key of the image.
        classes: names of the classes, 1 + id in the labels.
        tolerance: how far corners of the two grids may lie apart, in mm.
        allow_missing_keys: whether entries without a label pass.

    Raises:
        DataError: when the grids differ or values are no classes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        classes: Sequence[str],
        image_key: str = "image",
        tolerance: float = GRID_TOLERANCE,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.classes = list(classes)
        self.image_key = image_key
        self.tolerance = tolerance

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check."""
        out = dict(data)
        for key in self.key_iterator(out):
            label, image = out[key], out[self.image_key]
            names = [str(x.meta.get("filename_or_obj", k)) for x, k in ((label, key), (image, self.image_key))]
            if label.shape[1:] != image.shape[1:] or grid_distance(label, image) > self.tolerance:
                raise DataError(
                    f"{names[0]}: the label's grid is {describe_grid(label)}; its image {names[1]} has "
                    f"{describe_grid(image)}. Expected one grid; resample the label to the image."
                )
            out[key] = label = near_integers(label)
            values = torch.unique(torch.as_tensor(label))
            known = torch.arange(len(self.classes) + 1, dtype=values.dtype, device=values.device)
            unknown = values[~torch.isin(values, known)]
            if len(unknown):
                listed = ", ".join(f"{v:g}" for v in unknown[:10].tolist())
                raise DataError(
                    f"{names[0]}: the label holds {listed}{' …' if len(unknown) > 10 else ''}; expected 0 (background) "
                    f"to {len(self.classes)} ({', '.join(self.classes)})."
                )
        return out


def near_integers(label: MetaTensor) -> MetaTensor:
    """A label whose ids were stored with a scale, as 1.00002, as whole numbers; any other as it is."""
    whole = label.round()
    return whole if float((label - whole).abs().max()) <= ROUNDING else label


class SampleClassPromptsd(SamplePromptsd):
    """Draw the prompts of an evaluation protocol for each class of a label, the same for a volume in every run.

    Image and label may have been reoriented before; prompts are given in the file's grid, as a user would give them,
    and :class:`~medsa_nets.transforms.PromptsToNetworkd` carries them to the network's.

    Args:
        keys: key of the label (1, X, Y, Z).
        num_classes: number of classes.
        prompt: protocol, see :func:`medsa_nets.prompts.class_protocol_prompts`.
        image_key: key of the image, whose file name seeds the draw.
        seed: seed of the draw.
    """

    def __init__(
        self, keys: KeysCollection, num_classes: int, prompt: str = "none", image_key: str = "image", seed: int = 0
    ) -> None:
        super().__init__(keys, prompt, image_key, seed)
        self.num_classes = num_classes

    def draw(self, data: Mapping[Hashable, Any], label: Tensor) -> Prompts:
        """The prompts for each class of a label (X, Y, Z) of an item, in the file's grid."""
        prompts = class_protocol_prompts(label, self.num_classes, self.prompt, self.generator(data))
        return prompts.through(tensor_to_source(data[self.image_key]))


class ReadClassPromptsd(ReadPromptsd):
    """Read a volume's prompts from a JSON file; volumes that it does not name are segmented automatically.

    The file maps the name of a file (or DICOM folder) to classes, and these to what
    :class:`~medsa_nets.transforms.ReadPromptsd` takes, in voxel indices [i, j, k] of the file's own grid: ``points``
    and ``labels``, ``box`` (two corners), ``scribbles``, ``lasso`` (in one slice, of any axis) and ``mask``::

        {"ct.nii.gz": {"liver": {"points": [[210, 180, 40]]}, "spleen": {"points": [[90, 160, 42], [80, 99, 42]],
                                                                         "labels": [1, 0]}}}

    Place it after ``LoadImageVolumed``, before any spatial transform.

    Args:
        prompts: path of the file; none or empty reads nothing.
        classes: names of the classes, in the order of their ids.
        image_key: key of the image.

    Raises:
        DataError: when the file is missing or malformed, when it names an unknown class, or when a prompt lies outside
            the volume.
    """

    def __init__(self, prompts: str | None = None, classes: Sequence[str] = (), image_key: str = "image") -> None:
        super().__init__(prompts, image_key, classes)
        self.named = True

    def read_mask(self, path: Path, image: MetaTensor) -> np.ndarray:
        """A mask of a volume, boolean on the volume's own grid."""
        pair: dict[Hashable, Any] = {self.image_key: image, "mask": read_volume(path)}
        mask = MatchOrientationd("mask", self.image_key)(pair)["mask"]
        if mask.shape[1:] != image.shape[1:] or grid_distance(mask, image) > GRID_TOLERANCE:
            raise DataError(
                f"mask {path}: its grid is {describe_grid(mask)}; that of the volume {describe_grid(image)}. "
                "Resample the mask."
            )
        return binarize_mask(near_integers(mask).as_tensor()[0].numpy(), f"mask {path}")


class HighestProbabilityd(MapTransform):
    """Probability of the most probable class at each voxel, on the network's grid: what scoring by uncertainty needs.

    Args:
        keys: keys of logits (num_classes, X, Y, Z).
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map to (1, X, Y, Z) in [0, 1]."""
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = out[key].amax(dim=0, keepdim=True).sigmoid()
        return out


class MasksToSourceLabeld(MapTransform):
    """Join the masks of classes into one label map on the grid of the image's file: the highest positive logit's class.

    The same as ``Invertd`` on the logits of every class (linear interpolation), then a comparison at each voxel, up to
    rounding, for spatial transforms that are affine. Only where a class is positive it is resampled, one class after
    the other: time goes with the size of the organs and memory holds two volumes of the file's grid, whatever the
    number of classes.

    Args:
        keys: keys of logits (num_classes, X, Y, Z) on the grid of the image.
        image_key: key of the image, a :class:`monai.data.MetaTensor` after its spatial transforms.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map to (1, X, Y, Z) of 0 (background) and 1 + class id."""
        out = dict(data)
        image = out[self.image_key]
        shape, affine = source_grid(image)
        for key in self.key_iterator(out):
            logits = out[key].as_tensor() if isinstance(out[key], MetaTensor) else out[key]
            highest = torch.zeros(shape, device=logits.device)
            label = torch.zeros(shape, device=logits.device)
            for index, values in enumerate(logits):
                part = _resample_positive(values.float(), image.affine.double().cpu(), affine, shape)
                if part is not None:
                    place, resampled = part
                    higher = resampled > highest[place]
                    label[place] = torch.where(higher, torch.full_like(resampled, index + 1.0), label[place])
                    highest[place] = torch.where(higher, resampled, highest[place])
            meta = {k: v for k, v in image.meta.items() if k != "affine"}
            out[key] = MetaTensor(label[None], affine=affine, meta={**meta, "spatial_shape": np.asarray(shape)})
        return out


def source_grid(image: MetaTensor) -> tuple[tuple[int, ...], Tensor]:
    """Size and affine of the grid that an image had before its spatial transforms."""
    operations = image.applied_operations
    shape = tuple(int(n) for n in (operations[0]["orig_size"] if operations else image.shape[1:]))
    return shape, file_affine(image)


def _resample_positive(
    values: Tensor, affine: Tensor, target: Tensor, shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], Tensor] | None:
    """Resample (X, Y, Z) where it may be positive: the place in a grid, and values there; none without such a place."""
    positive = values > 0
    low, high = [], []
    for axis in range(3):
        first, second = (a for a in range(3) if a != axis)
        found = torch.nonzero(positive.any(dim=second).any(dim=first)).flatten()
        if not len(found):
            return None
        low.append(max(0, int(found[0]) - 1))
        high.append(min(values.shape[axis], int(found[-1]) + 2))
    part = values[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    start = torch.eye(4, dtype=torch.float64)
    start[:3, 3] = torch.tensor(low, dtype=torch.float64)
    own = affine @ start
    to_target = torch.linalg.solve(target, own)
    # the outer faces of the voxels, as far as linear interpolation reaches
    ends = torch.tensor([[-1.0, float(n)] for n in part.shape], dtype=torch.float64)
    corners = torch.cartesian_prod(*ends) @ to_target[:3, :3].T + to_target[:3, 3]
    begin = [max(0, math.floor(v + 1e-6)) for v in corners.amin(0).tolist()]
    end = [min(n, math.ceil(v - 1e-6) + 1) for v, n in zip(corners.amax(0).tolist(), shape)]
    if any(a >= b for a, b in zip(begin, end)):
        return None
    start[:3, 3] = torch.tensor(begin, dtype=torch.float64)
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True, dtype=torch.float32)
    size = [b - a for a, b in zip(begin, end)]
    resampled = resample(MetaTensor(part[None], affine=own), dst_affine=target @ start, spatial_size=size)
    return tuple(slice(a, b) for a, b in zip(begin, end)), resampled[0].as_tensor()


def keep_main_components(logits: Tensor, share: float) -> Tensor:
    """Masks of organs without what lies apart from them and is small beside them.

    Of the voxels at which a class has the highest positive logit, connected components (26 neighbours; 8 in images)
    that are smaller than a share of the class's largest one lose the class: its logits change their sign there. An
    organ has one place; a far component is a mistake more often than a part of it.

    Args:
        logits: (B, K, spatial…).
        share: of the size of the largest component, in [0, 1]; 0 keeps everything, 1 the largest one alone.

    Returns:
        (B, K, spatial…).

    Raises:
        ValueError: when ``share`` lies outside.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be between 0 and 1, got {share}.")
    if share == 0.0:
        return logits
    out = logits.clone()
    highest, winner = logits.max(dim=1)
    winner = torch.where(highest > 0, winner, torch.full_like(winner, -1)).cpu()
    structure = np.ones((3,) * (logits.dim() - 2))
    for b, classes in enumerate(winner):
        for k in torch.unique(classes[classes >= 0]).tolist():
            parts, count = ndimage.label((classes == k).numpy(), structure)
            sizes = np.bincount(parts.ravel())[1:]
            if count > 1 and sizes.min() < share * sizes.max():
                small = np.concatenate([[False], sizes < share * sizes.max()])[parts]
                there = torch.from_numpy(small).to(logits.device)
                out[b, k][there] = -out[b, k][there]
    return out


def all_classes(
    logits: Tensor, classes: Tensor, num_classes: int, absent: float = ABSENT, others: Tensor | None = None
) -> Tensor:
    """Logits of some classes as those of all classes.

    Args:
        logits: (B, K, spatial…).
        classes: ids of these classes (K,).
        num_classes: number of all classes.
        absent: logit of a class that is not there.
        others: logits of all classes (B, num_classes, spatial…) for those that ``classes`` does not name; where a named
            class is positive, it is raised above them. None leaves them absent.

    Returns:
        (B, num_classes, spatial…).
    """
    classes = classes.to(logits.device)
    if others is None:
        out = logits.new_full((logits.shape[0], num_classes, *logits.shape[2:]), absent)
    else:
        out = others.clone()
        out[:, classes] = absent
        highest = out.amax(dim=1, keepdim=True).clamp_min(0.0)
        logits = torch.where(logits > 0, logits + highest, logits)
    out[:, classes] = logits
    return out
