"""Masks of a picture: checked against their image, one class or several, in a channel each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable

from medsa_nets.data.datalists import RATERS
from medsa_nets.data.masks import binarize_mask
from medsa_nets.errors import DataError


class BinarizeMaskd(MapTransform):
    """Turn a two-valued mask (0 and 255, 0 and 1) into 0 and 1, after checking it against its image.

    Its distinct values are judged, see :func:`medsa_nets.data.masks.binarize_mask`.

    Args:
        keys: keys of the masks (raters, spatial…).
        image_key: key of the image that the mask belongs to.

    Raises:
        DataError: when a mask has another size than its image, or is not clearly two-valued.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check and binarise."""
        out = dict(data)
        for key in self.key_iterator(out):
            mask, name = out[key], _same_size(out, key, self.image_key)
            lossy = bool(getattr(mask, "meta", {}).get("lossy", False))
            values = torch.as_tensor(mask).cpu().numpy()
            names = [str(name) if len(values) == 1 else f"{name} (rater {i})" for i in range(1, len(values) + 1)]
            found = torch.stack([torch.from_numpy(binarize_mask(own, n, lossy)) for own, n in zip(values, names)])
            out[key] = torch.zeros_like(mask).float() + found.to(mask.device)
        return out


class ChooseRaterd(Randomizable, MapTransform):
    """Make one mask of those of several raters. Place it after :class:`BinarizeMaskd`.

    Args:
        keys: keys of the masks (raters, spatial…), of 0 and 1.
        raters: ``majority`` takes what half of the raters or more marked, ``random`` one rater, ``each`` the rater that
            the entry names (:func:`~medsa_nets.data.load_datalist`). None expects one mask and leaves it.
        rater_key: key of that rater, 0 and more.
        all_key: key under which the masks of all raters stay, for evaluation; none drops them.
        classes: of an image. Several classes have a mask each, which is left; then ``raters`` has to be none.

    Raises:
        DataError: when there are several masks of one class and ``raters`` is none, or one mask and it is not; when
            there are raters of several classes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        raters: str | None = None,
        rater_key: str = "rater",
        all_key: str | None = None,
        classes: int = 1,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        if raters is not None and classes > 1:
            raise DataError(f"raters is {raters!r}, but there are {classes} classes; expected one. Set raters to null.")
        self.classes = classes
        if raters is not None and raters not in RATERS:
            raise DataError(f"raters must be one of {', '.join(RATERS)}; got {raters!r}.")
        self.raters, self.rater_key, self.all_key = raters, rater_key, all_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Choose."""
        out = dict(data)
        if self.classes > 1:
            return out
        for key in self.key_iterator(out):
            masks = out[key]
            if (len(masks) > 1) != (self.raters is not None):
                name = getattr(masks, "meta", {}).get("filename_or_obj", key)
                raise DataError(
                    f"{name}: {len(masks)} mask(s) of one image, and raters is {self.raters}. Several masks need one "
                    f"of {', '.join(RATERS)} (--raters), one mask none."
                )
            if self.raters is None:
                continue
            if self.all_key is not None:
                out[self.all_key] = masks
            if self.raters == "majority":
                out[key] = (masks.mean(dim=0, keepdim=True) >= 0.5).float()
            else:
                number = self.R.randint(len(masks)) if self.raters == "random" else int(out[self.rater_key])
                out[key] = masks[number : number + 1]
        return out


class ClassMasksd(BinarizeMaskd):
    """Turn a map of classes (cup and disc, kinds of cells) into a mask of 0 and 1 for each class.

    One class without values of its own is marked by any two-valued mask, as :class:`BinarizeMaskd` reads it.

    A value may belong to several classes, which then overlap: where a map holds 1 for the rim of the optic disc and 2
    for its cup, ``values=[[1, 2], [2]]`` gives disc and cup.

    Args:
        keys: keys of the maps (1, spatial…); they become (classes, spatial…).
        classes: names of the classes, in the order of their ids.
        values: of each class, the value or values that a map marks it by; none takes 1, 2, … in their order.
        background: values that belong to no class.
        image_key: key of the image that the map belongs to.

    Raises:
        DataError: when a map has another size than its image, or holds a value that is named nowhere; when values are
            named for another number of classes, a class has none, or a value is background and class at once.
    """

    def __init__(
        self,
        keys: KeysCollection,
        classes: Sequence[str],
        values: Sequence[Any] | None = None,
        background: Sequence[float] = (0,),
        image_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, image_key, allow_missing_keys)
        self.two_valued = len(classes) == 1 and values is None
        own = list(range(1, len(classes) + 1)) if values is None else list(values)
        if len(own) != len(classes):
            raise DataError(
                f"class_values names values for {len(own)} classes, but there are {len(classes)} "
                f"({', '.join(classes)}). Name those of each class, in the order of the classes."
            )
        self.classes = list(classes)
        self.values = [[float(v) for v in (one if isinstance(one, Sequence) else [one])] for one in own]
        self.background = [float(value) for value in background]
        for name, of_class in zip(self.classes, self.values):
            shared = sorted(set(of_class) & set(self.background))
            if not of_class or shared:
                found = f"{', '.join(f'{v:g}' for v in shared)}, which is background too" if shared else "no value"
                raise DataError(f"class_values: the class {name} has {found}. Expected values of its own.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check and separate."""
        if self.two_valued:
            return super().__call__(data)
        out = dict(data)
        for key in self.key_iterator(out):
            name = _same_size(out, key, self.image_key)
            label = out[key]
            plain = torch.as_tensor(label).float()
            known = {value for one in self.values for value in one} | set(self.background)
            other = [value for value in torch.unique(plain).tolist() if value not in known]
            if other:
                named = "; ".join(
                    f"{what}: {', '.join(f'{v:g}' for v in one)}"
                    for what, one in [("background", self.background), *zip(self.classes, self.values)]
                )
                raise DataError(
                    f"{name}: the map of classes holds {', '.join(f'{v:g}' for v in other[:8])}"
                    f"{', …' if len(other) > 8 else ''}; expected {named}. Say what these values mean (class_values, "
                    "class_background), and save maps without losses (PNG), not as JPEG."
                )
            masks = [torch.isin(plain[:1], plain.new_tensor(one)) for one in self.values]
            separate = label[:1].repeat(len(self.values), *[1] * (label.dim() - 1))  # keeps affine and history
            out[key] = torch.zeros_like(separate).float() + torch.cat(masks).to(separate.device)
        return out


class SeparateClassesd(MapTransform):
    """Decide which pixels hold each class, from what a network gives for them.

    Args:
        keys: keys of logits or probabilities (classes, spatial…).
        overlap: whether a pixel may hold several classes; else it holds the most probable one.
        threshold: a pixel holds no class whose value is below it: 0 for logits, 0.5 for probabilities.
    """

    def __init__(
        self, keys: KeysCollection, overlap: bool = False, threshold: float = 0.0, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.overlap = overlap
        self.threshold = threshold

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map to 0 and 1, of the same shape."""
        out = dict(data)
        for key in self.key_iterator(out):
            values = out[key]
            held = values >= self.threshold
            if not self.overlap and len(values) > 1:
                ids = torch.arange(len(values), device=values.device).reshape(-1, *[1] * (values.dim() - 1))
                held = held & (torch.as_tensor(values).argmax(0, keepdim=True) == ids)
            out[key] = held.float()
        return out


class ClassMapd(MapTransform):
    """Join masks of classes into one map of 0 (background) and 1 + class id; of overlapping ones the last is seen.

    Args:
        keys: keys of masks (classes, spatial…), foreground above 0.5.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map to (1, spatial…)."""
        out = dict(data)
        for key in self.key_iterator(out):
            masks = out[key]
            ids = torch.arange(1, len(masks) + 1, device=masks.device).reshape(-1, *[1] * (masks.dim() - 1))
            out[key] = ((masks > 0.5) * ids).amax(dim=0, keepdim=True).float()
        return out


def _same_size(data: Mapping[Hashable, Any], key: Hashable, image_key: str) -> str:
    """Name of a mask, which has the size of its image.

    Raises:
        DataError: when it has another one.
    """
    mask, image = data[key], data[image_key]
    name = getattr(mask, "meta", {}).get("filename_or_obj", key)
    image_name = getattr(image, "meta", {}).get("filename_or_obj", image_key)
    if mask.shape[1:] != image.shape[1:]:
        raise DataError(
            f"{name}: the mask is {_size(mask)} pixels, its image {image_name} is {_size(image)}. "
            "Expected the same size; export the mask at the image's size, upright "
            "(an image whose EXIF data state an orientation is turned as it is read)."
        )
    return str(name)


def _size(image: torch.Tensor) -> str:
    return " x ".join(str(n) for n in image.shape[1:])
