"""Clicks and an earlier mask as maps."""

from __future__ import annotations

import pytest
import torch

from medsa_nets.layers import ClickFeedback
from medsa_nets.layers.feedback import CHANNELS

NARROW, WIDE = 2.0, 10.0
EARLIER, KNOWN, NARROW_FOREGROUND, NARROW_BACKGROUND, WIDE_FOREGROUND, WIDE_BACKGROUND, NEW, NEW_BACKGROUND = range(8)


def _maps(coords, labels, earlier=None, size=(32, 24), image_size=None):
    branch = ClickFeedback(spatial_dims=len(size))
    return branch.maps(coords, labels, earlier, len(labels), list(size), list(image_size or size))


@pytest.mark.parametrize("size", [(32, 24), (32, 24, 5)])
def test_a_click_is_a_gaussian_around_its_voxel(size):
    place = (10, 7, 3)[: len(size)]
    maps = _maps(torch.tensor([[place]], dtype=torch.float32), torch.tensor([[1]]), size=size)
    assert maps.shape == (1, CHANNELS, *size)
    grid = torch.stack(torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij"), -1)
    squared = (grid - torch.tensor(place)).square().sum(-1)
    for channel, radius in ((NARROW_FOREGROUND, NARROW), (WIDE_FOREGROUND, WIDE), (NEW, WIDE)):
        torch.testing.assert_close(maps[0, channel], torch.exp(-squared / (2 * radius**2)))
    for channel in (EARLIER, KNOWN, NARROW_BACKGROUND, WIDE_BACKGROUND, NEW_BACKGROUND):
        assert not maps[0, channel].any()


def test_a_click_keeps_its_place_and_size_where_the_mask_is_coarser_than_the_image():
    maps = _maps(torch.tensor([[[21.5, 9.5]]]), torch.tensor([[1]]), size=(16, 16), image_size=(64, 64))
    centres = 4.0 * torch.arange(16) + 1.5  # in pixels of the image, as the click is
    squared = (centres[:, None] - 21.5).square() + (centres[None] - 9.5).square()
    torch.testing.assert_close(maps[0, WIDE_FOREGROUND], torch.exp(-squared / (2 * WIDE**2)))
    torch.testing.assert_close(maps[0, NARROW_FOREGROUND], torch.exp(-squared / (2 * NARROW**2)))


def test_padding_draws_nothing_and_the_newest_click_is_the_last_that_is_none():
    coords = torch.tensor([[[3.0, 3.0], [20.0, 20.0], [9.0, 9.0]], [[3.0, 3.0], [8.0, 8.0], [9.0, 9.0]]])
    maps = _maps(coords, torch.tensor([[1, 0, -1], [-1, -1, -1]]))
    assert not maps[1].any()
    alone = _maps(coords[:1, 1:2], torch.tensor([[0]]))
    torch.testing.assert_close(maps[0, NEW_BACKGROUND], alone[0, WIDE_BACKGROUND])
    assert not maps[0, NEW].any()
    torch.testing.assert_close(maps[0, NARROW_FOREGROUND], _maps(coords[:1, :1], torch.tensor([[1]]))[0, 2])


def test_a_set_without_an_earlier_mask_is_told_from_one_with():
    earlier = torch.stack([torch.zeros(32, 24), torch.full((32, 24), -3.0)])
    maps = _maps(None, torch.ones(2, 0), earlier)
    assert not maps[0].any()
    assert bool((maps[1, KNOWN] == 1).all())
    torch.testing.assert_close(maps[1, EARLIER], torch.tanh(earlier[1] / 4))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_fresh_branch_adds_nothing_and_learns(spatial_dims):
    size = (16, 16, 4)[:spatial_dims]
    branch = ClickFeedback(spatial_dims=spatial_dims)
    maps = branch.maps(torch.full((2, 1, spatial_dims), 3.0), torch.ones(2, 1), None, 2, list(size), list(size))
    slices = maps if spatial_dims == 2 else maps.permute(0, 4, 1, 2, 3).flatten(0, 1)
    embedded = branch.embed(slices)
    refined = branch.refine(maps, torch.randn(2, 32, *size), torch.randn(2, 1, *size))
    assert embedded.shape == (len(slices), 256, 4, 4)
    assert refined.shape == (2, 1, *size)
    assert not embedded.any()
    assert not refined.any()
    (embedded.sum() + refined.sum()).backward()
    assert branch.to_embedding[-1].weight.grad.abs().sum() > 0
    assert branch.to_logits[-1].weight.grad.abs().sum() > 0
