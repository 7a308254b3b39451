"""Checks of a mask against its image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medsa_nets.errors import DataError


class BinarizeMaskd(MapTransform):
    """Turn a two-valued mask (0 and 255, 0 and 1) into 0 and 1, after checking it against its image.

    Values within a tenth of the range from the lowest or the highest one count as that one, since masks come as JPEG
    too. A mask of one value is empty, unless that value is above 127 (all foreground).

    Args:
        keys: keys of the masks (1, spatial…).
        image_key: key of the image that the mask belongs to.

    Raises:
        DataError: when a mask has another size than its image, or more than two values.
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
                    "Expected the same size; export the mask at the image's size."
                )
            low, high = float(mask.min()), float(mask.max())
            between = (mask > low + 0.1 * (high - low)) & (mask < high - 0.1 * (high - low))
            # JPEG leaves a few values in between at the edge of the mask.
            if int(between.sum()) > 0.05 * mask.numel():
                values = torch.unique(torch.as_tensor(mask))
                raise DataError(
                    f"{name}: the mask has {len(values)} values ({', '.join(f'{v:g}' for v in values[:6].tolist())}…); "
                    "expected two, background and foreground."
                )
            threshold = (low + high) / 2.0 if high > low else (127.0 if high > 1.0 else 0.5)
            out[key] = (mask > threshold).float()
        return out


def _size(image: torch.Tensor) -> str:
    return " x ".join(str(n) for n in image.shape[1:])
