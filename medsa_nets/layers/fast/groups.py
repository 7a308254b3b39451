"""Splits a batch where its hidden maps would not fit the processor's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medsa_nets.layers.fast.dispatch import is_exporting, is_on

HIDDEN_BYTES = 2**26  # of a hidden map, that is computed at once on a CPU where no backward pass keeps it


def in_groups(transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``transform`` (B, ...), a few images at a time where its hidden maps, four times as wide, would be large."""
    images = max(1, HIDDEN_BYTES // (4 * x[0].numel() * x.element_size()))
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if not is_on() or x.shape[0] <= images or x.device.type != "cpu" or is_exporting() or needs_grad:
        return transform(x)
    return torch.cat([transform(part) for part in x.split(images)])
