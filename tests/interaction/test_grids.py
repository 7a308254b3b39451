"""Masks from the network's grid to the file's: parts give what the whole gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Spacingd

from medsa_nets.interaction.grids import Grids, bounding_place


def open_volume(spacing: float) -> Grids:
    """A turned volume, whose network's grid has another orientation and spacing."""
    affine = np.array([[0.0, -1.1, 0, 4], [0.9, 0, 0.1, -2], [0, 0, 2.0, 1], [0, 0, 0, 1]])
    image = MetaTensor(torch.rand(1, 17, 23, 9), affine=torch.from_numpy(affine))
    image.meta.update(original_affine=affine, spatial_shape=np.array([17, 23, 9]), filename_or_obj="image")
    keys = ("image",)
    transforms = Compose([Orientationd(keys, "RAS"), Spacingd(keys, [spacing] * 3)])
    return Grids(transforms({"image": image})["image"])


@pytest.mark.parametrize("level", [0.0, 0.5])
@pytest.mark.parametrize("spacing", [0.7, 1.9])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_a_mask_is_that_of_the_whole_grid_bit_for_bit(spacing, share, level):
    grids = open_volume(spacing)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(grids.shape, generator=generator)
    values = torch.where(torch.rand(grids.shape, generator=generator) < share, values, -values.abs())
    values = values.sigmoid() if level else values
    for place in (tuple(slice(0, n) for n in grids.file_shape), (slice(3, 11), slice(0, 20), slice(4, 4 + 5))):
        expected = (grids.on_file(values, place) > level).numpy()
        assert np.array_equal(grids.above(values, level, place), expected)


def test_where_nothing_lies_above_the_level_the_mask_is_empty():
    grids = open_volume(1.0)
    found = grids.above(torch.full(grids.shape, 0.5), 0.5, tuple(slice(0, n) for n in grids.file_shape))
    assert found.shape == grids.file_shape
    assert not found.any()


@pytest.mark.parametrize("margin", [0, 2, (1, 0, 4)])
def test_the_bounding_box_holds_every_voxel_and_no_more(margin):
    random = np.random.default_rng(0)
    margins = np.broadcast_to(margin, 3)
    for _ in range(20):
        mask = np.zeros((7, 9, 11), dtype=bool)
        for voxel in random.integers(0, mask.shape, (random.integers(1, 4), 3)):
            mask[tuple(voxel)] = True
        found = np.argwhere(mask)
        low, high = found.min(0) - margins, found.max(0) + 1 + margins
        expected = tuple(slice(max(0, a), min(n, b)) for a, b, n in zip(low, high, mask.shape))
        assert bounding_place(mask, margin) == expected
    assert bounding_place(np.zeros((3, 3), dtype=bool)) is None


def test_grids_of_a_part_know_the_same_places():
    grids = open_volume(0.7)
    place = (slice(2, 12), slice(5, 20), slice(0, 7))
    part, start = grids.part(place), np.array([2, 5, 0])
    assert part.shape == (10, 15, 7)
    assert part.file_shape == grids.file_shape
    positions = np.random.default_rng(0).uniform(0.0, 8.0, (20, 3))
    assert np.allclose(part.positions(positions), grids.positions(positions) - start)
    homogeneous = np.concatenate([part.positions(positions), np.ones((20, 1))], 1)
    assert np.allclose((homogeneous @ part.to_file.T)[:, :3], positions)
    mask = np.random.default_rng(1).random(grids.file_shape) > 0.5
    assert torch.allclose(part.on_tensor(mask), grids.on_tensor(mask)[place], atol=1e-5)
