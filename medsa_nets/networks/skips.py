"""Finer maps of an encoder, in one tensor with the image embedding.

An image embedding is one tensor, wherever it is kept, cut into slabs, sent or exported. Maps at a half and a quarter of
its stride go along as further channels: the pixels of each 2 x 2, or 4 x 4, stand beside each other there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIDDLE, WIDE = 64, 32  # channels of the maps at a half and at a quarter of the embedding's stride


def packed_channels(features: int) -> int:
    """Channels of an embedding of ``features`` channels with its finer maps."""
    return features + 4 * MIDDLE + 16 * WIDE


def pack_skips(embedding: Tensor, middle: Tensor, wide: Tensor) -> Tensor:
    """Join an embedding (B, C, h, w) and maps (B, 64, 2 h, 2 w) and (B, 32, 4 h, 4 w): (B, C + 768, h, w)."""
    return torch.cat([embedding, F.pixel_unshuffle(middle, 2), F.pixel_unshuffle(wide, 4)], dim=1)


def unpack_skips(packed: Tensor, middle: int = MIDDLE, wide: int = WIDE) -> tuple[Tensor, Tensor]:
    """The finer maps (B, 64, 2 h, 2 w) and (B, 32, 4 h, 4 w) of what :func:`pack_skips` joined."""
    second = packed.shape[1] - 16 * wide  # numbers of the module are none to TorchScript, defaults are
    first = second - 4 * middle
    return F.pixel_shuffle(packed[:, first:second], 2), F.pixel_shuffle(packed[:, second:], 4)
