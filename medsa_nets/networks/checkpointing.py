"""Activation checkpointing of an encoder's blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, depth: int, checkpointing: bool) -> Tensor:
    """Call ``block(x, depth)``; in training with checkpointing, keep its input only and compute it twice."""
    if checkpointing and torch.is_grad_enabled() and block.training:
        return checkpoint(block, x, depth, use_reentrant=False)
    return block(x, depth)
