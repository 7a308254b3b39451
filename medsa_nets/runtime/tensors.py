"""Tensors as networks take them."""

from __future__ import annotations

from monai.data import MetaTensor
from torch import Tensor


def plain(tensor: Tensor) -> Tensor:
    """Without MONAI's metadata, which every operation of a network would carry along."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
