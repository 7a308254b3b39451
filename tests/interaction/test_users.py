"""A simulated user."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medsa_nets.interaction.users import SimulatedUser


def _masks():
    target = np.zeros((40, 40), dtype=bool)
    target[10:20, 10:21] = True
    mask = np.zeros_like(target)
    mask[30:33, 30:33] = True
    return mask, target


def test_the_click_lies_in_the_middle_of_the_largest_error():
    mask, target = _masks()
    voxel, label = SimulatedUser().click(mask, target, np.random.default_rng(0))
    assert label == 1
    assert 14 <= voxel[0] <= 15
    assert 14 <= voxel[1] <= 16
    voxel, label = SimulatedUser().click(mask | target, target, np.random.default_rng(0))
    assert (tuple(voxel), label) == ((31, 31), 0)


def test_clicks_at_the_border_touch_what_is_right():
    mask, target = _masks()
    user = SimulatedUser(centre=0.0, border=1.0)
    places = [user.click(mask, target, np.random.default_rng(i))[0] for i in range(20)]
    assert all(y in (10, 19) or x in (10, 20) for y, x in places)


@pytest.mark.parametrize("settings", [{"jitter": 3}, {"centre": 0.0, "uniform": 1.0}, {"border": 1.0, "jitter": 5}])
def test_the_label_is_true_wherever_a_click_moves(settings):
    mask, target = _masks()
    for seed in range(30):
        voxel, label = SimulatedUser(**settings).click(mask, target, np.random.default_rng(seed))
        assert bool(target[tuple(voxel)]) == bool(label)


def test_nothing_is_clicked_where_nothing_is_wrong():
    _, target = _masks()
    assert SimulatedUser().click(target, target, np.random.default_rng(0)) is None
    both = torch.from_numpy(target)[None, None]
    assert SimulatedUser().clicks(both, both, [torch.Generator()])[1].tolist() == [[-1.0]]


def test_an_image_s_clicks_do_not_depend_on_its_batch():
    mask, target = (torch.from_numpy(m)[None, None] for m in _masks())
    user = SimulatedUser(uniform=1.0)
    alone = user.clicks(mask, target, [torch.Generator().manual_seed(5)])
    both = user.clicks(
        torch.cat([target, mask]), torch.cat([mask, target]), [torch.Generator().manual_seed(i) for i in (1, 5)]
    )
    assert torch.equal(alone[0][0], both[0][1])
    assert torch.equal(alone[1][0], both[1][1])


@pytest.mark.parametrize("settings", [{"centre": 0.0}, {"uniform": -1.0}])
def test_impossible_shares_are_refused(settings):
    with pytest.raises(ValueError, match="centre"):
        SimulatedUser(**settings)
