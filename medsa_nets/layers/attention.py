"""Scaled dot-product attention, of tokens and over a map."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from medsa_nets.layers import fast


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor] = None, scale: Optional[float] = None) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: queries (B, heads, N, C).
        k: keys (B, heads, M, C).
        v: values (B, heads, M, E).
        bias: added to the scores, (1 or B, heads, N, M), or none.
        scale: of the products of queries and keys; none takes 1 / sqrt(C).

    Returns:
        (B, heads, N, E).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript leaves out what this alone holds)
        if fast.is_on():
            return fast.attend(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def attend_map(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, padded: Optional[Tensor] = None, scale: float = 1.0
) -> Tensor:
    """Attention over a map whose scores have a bias for each row and one for each column of the keys.

    Args:
        q: queries (B, heads, N, C).
        k: keys of a map, row by row (B, heads, H * W, C), or with one more that stands for padded ones.
        v: values, likewise (B, heads, H * W, E).
        rows: bias of the map's rows (B, heads, N, H).
        columns: bias of its columns (B, heads, N, W).
        padded: bias of the additional key (B, heads, N, 1), or none.
        scale: of the products of queries and keys.

    Returns:
        (B, heads, N, E).
    """
    if torch.jit.is_scripting():
        return fast.attend_by_columns(q, k, v, rows, columns, padded, scale)  # without a bias of N x H * W in memory
    else:  # TorchScript compiles what follows a return
        if fast.is_on():
            return fast.attend_map(q, k, v, rows, columns, padded, scale)
        bias = (rows.unsqueeze(4) + columns.unsqueeze(3)).flatten(3)
        if padded is not None:
            bias = torch.cat([bias, padded], dim=3)
        return attend(q, k, v, bias, scale)
