"""Areas that a user drew as closed lines: corners of the polygon whose pixels are the area's."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

# Neighbours of a pixel in the order in which they lie around it, beginning above it.
AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


def areas_of(drawn: np.ndarray) -> list[np.ndarray]:
    """Areas (boolean, of the plane's shape) of what was drawn in a plane, each connected, with holes filled.

    Args:
        drawn: boolean (rows, columns): areas, or closed lines around them.
    """
    parts, count = ndimage.label(ndimage.binary_fill_holes(drawn), np.ones((3, 3)))
    return [parts == number for number in range(1, count + 1)]


def corners_of(area: np.ndarray) -> np.ndarray:
    """Corners (N, 2), 3 or more, of the closed line along an area's outermost pixels.

    :func:`~medsa_nets.prompts.user.polygon_mask` of them is the area: pixels on the line belong to it.

    Args:
        area: boolean (rows, columns), one part (8 neighbours) without holes.
    """
    padded = np.pad(area, 1)
    row, column = np.argwhere(padded)[0]
    first = (int(row), int(column))  # nothing above it, nor to its left in its row
    line, here, back = [first], first, 6  # came from the left, where nothing is
    start: tuple[tuple[int, int], int] | None = None
    while True:
        for step in range(1, 9):
            turn = (back + step) % 8
            there = (here[0] + AROUND[turn][0], here[1] + AROUND[turn][1])
            if padded[there]:
                break
        else:
            break  # a single pixel
        if start == (here, turn):
            break
        start = start or (here, turn)
        line.append(there)
        here, back = there, (turn + 4) % 8
    corners = np.array(line[:-1] if len(line) > 1 else line)
    if len(corners) > 2:  # only where the line turns
        before, after = corners - np.roll(corners, 1, 0), np.roll(corners, -1, 0) - corners
        turning = (before != after).any(1)
        corners = corners[turning] if turning.any() else corners
    while len(corners) < 3:
        corners = np.concatenate([corners, corners[-1:]])
    return corners.astype(np.float64) - 1.0
