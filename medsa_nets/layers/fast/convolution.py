"""Convolution and frozen batch normalisation as one convolution, or one matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medsa_nets.layers.fast.dispatch import is_exporting
from medsa_nets.layers.fast.kept import remember
from medsa_nets.layers.fast.linear import multiply


def convolve(layer: Any, x: Tensor) -> Tensor:
    """:class:`medsa_nets.layers.ConvBN`, its folded weights kept in the type that is computed in.

    Args:
        layer: the ``ConvBN``.
        x: (B, in_channels, H, W).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    sources = (layer.c.weight, layer.bn.weight, layer.bn.bias, layer.bn.running_mean, layer.bn.running_var)
    weight = remember(layer, f"weight {dtype}", sources, lambda: layer.folded_weight().to(dtype))
    bias = remember(layer, f"bias {dtype}", sources, lambda: layer.folded_bias().to(dtype))
    if layer.pointwise and not is_exporting():
        return multiply(x.permute(0, 2, 3, 1).to(dtype), weight.flatten(1), bias).permute(0, 3, 1, 2)
    convolved: Tensor = layer.convolve(x, weight, bias)
    return convolved
