"""Drawn areas as polygons, against the pixels of these polygons."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medsa_nets.prompts.user import polygon_mask
from medsa_nets.server.outlines import areas_of, corners_of


@pytest.mark.parametrize("seed", range(8))
def test_polygon_of_an_area_holds_its_pixels_and_no_others(seed: int) -> None:
    random = np.random.default_rng(seed)
    noise = (
        ndimage.gaussian_filter(random.normal(size=(25, 31)), 0.3 * (seed + 1)) if seed % 4 else random.random((25, 31))
    )
    areas = areas_of(noise > np.quantile(noise, 0.6))
    assert areas
    for area in areas:
        corners = corners_of(area)
        assert len(corners) >= 3
        np.testing.assert_array_equal(polygon_mask(corners, area.shape), area)


def test_closed_line_is_its_area() -> None:
    line = np.zeros((20, 20), dtype=bool)
    line[3, 3:12] = line[15, 3:12] = line[3:16, 3] = line[3:16, 11] = True
    (area,) = areas_of(line)
    assert area.sum() == 13 * 9
    assert len(corners_of(area)) == 4
