"""The mask of an answer, as the network takes it in the next one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

LIMIT = 12.0  # logits of an earlier answer are held within it: beyond, they say the same


def as_earlier(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits of an answer as the network takes those of an earlier mask.

    Args:
        logits: (B, K, H, W[, D]).
        size: rows h and columns w of the embedding.

    Returns:
        Logits (B, K, 4 h, 4 w[, D]), within :data:`LIMIT` of 0.
    """
    logits = logits.detach().float().clamp(-LIMIT, LIMIT)
    size = [4 * size[0], 4 * size[1], *logits.shape[4:]]
    if list(logits.shape[2:]) != size:
        mode = "bilinear" if logits.dim() == 4 else "trilinear"
        logits = functional.interpolate(logits, size, mode=mode, align_corners=False)
    return logits
