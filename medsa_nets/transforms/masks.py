"""Checks of a mask against its image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medsa_nets.data.masks import binarize_mask
from medsa_nets.errors import DataError


class BinarizeMaskd(MapTransform):
    """Turn a two-valued mask (0 and 255, 0 and 1) into 0 and 1, after checking it against its image.

    Its distinct values are judged, see :func:`medsa_nets.data.masks.binarize_mask`.

    Args:
        keys: keys of the masks (1, spatial…).
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
            found = torch.from_numpy(binarize_mask(torch.as_tensor(mask)[0].cpu().numpy(), str(name), lossy))
            out[key] = torch.zeros_like(mask).float() + found[None].to(mask.device)
        return out


def _size(image: torch.Tensor) -> str:
    return " x ".join(str(n) for n in image.shape[1:])
