"""Checks of a mask against its image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
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
            mask, image = out[key], out[self.image_key]
            name = getattr(mask, "meta", {}).get("filename_or_obj", key)
            image_name = getattr(image, "meta", {}).get("filename_or_obj", self.image_key)
            if mask.shape[1:] != image.shape[1:]:
                raise DataError(
                    f"{name}: the mask is {_size(mask)} pixels, its image {image_name} is {_size(image)}. "
                    "Expected the same size; export the mask at the image's size, upright "
                    "(an image whose EXIF data state an orientation is turned as it is read)."
                )
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

    Raises:
        DataError: when there are several masks and ``raters`` is none, or one mask and it is not.
    """

    def __init__(
        self,
        keys: KeysCollection,
        raters: str | None = None,
        rater_key: str = "rater",
        all_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        if raters is not None and raters not in RATERS:
            raise DataError(f"raters must be one of {', '.join(RATERS)}; got {raters!r}.")
        self.raters, self.rater_key, self.all_key = raters, rater_key, all_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Choose."""
        out = dict(data)
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


def _size(image: torch.Tensor) -> str:
    return " x ".join(str(n) for n in image.shape[1:])
