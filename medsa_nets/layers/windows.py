"""Windows of a token map: cut without padding, and joined again."""

from __future__ import annotations

import torch
from torch import Tensor


def split_windows(height: int, width: int, window_size: int) -> list[tuple[int, int, int, int]]:
    """Where a token map is cut so that all windows of a part have one size.

    Windows tile the map from its top left; those at the bottom and at the right may be smaller than the others.

    Returns:
        First and last row (exclusive), first and last column of each part; rows of parts from top to bottom.
    """
    row, column = height - height % window_size, width - width % window_size
    parts: list[tuple[int, int, int, int]] = []
    for top, bottom in [(0, row), (row, height)]:
        for left, right in [(0, column), (column, width)]:
            if bottom > top and right > left:
                parts.append((top, bottom, left, right))
    return parts


def cut_windows(x: Tensor, part: tuple[int, int, int, int], window_size: int) -> Tensor:
    """Windows (B * nH * nW, h, w, C) of a part of a token map (B, H, W, C), as :func:`split_windows` cuts it."""
    top, bottom, left, right = part
    high, wide = min(window_size, bottom - top), min(window_size, right - left)
    x = x[:, top:bottom, left:right]
    x = x.reshape(x.shape[0], (bottom - top) // high, high, (right - left) // wide, wide, x.shape[3])
    return x.transpose(2, 3).reshape(-1, high, wide, x.shape[5])


def join_windows(windows: list[Tensor], parts: list[tuple[int, int, int, int]], batch: int) -> Tensor:
    """Undo :func:`cut_windows` for all parts of a map of ``batch`` images: (B, H, W, C)."""
    rows: list[Tensor] = []
    for i, (top, bottom, left, right) in enumerate(parts):
        x = windows[i]
        high, wide = x.shape[1], x.shape[2]
        x = x.reshape(batch, (bottom - top) // high, (right - left) // wide, high, wide, x.shape[3]).transpose(2, 3)
        x = x.reshape(batch, bottom - top, right - left, x.shape[5])
        if left == 0:
            rows.append(x)
        else:
            rows[-1] = torch.cat([rows[-1], x], dim=2)
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
