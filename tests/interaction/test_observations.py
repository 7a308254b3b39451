"""Clicks as measurements of the logit."""

from __future__ import annotations

import numpy as np
import pytest

from medsa_nets.interaction.observations import MARGIN, Kernel, observe


@pytest.mark.parametrize("shape", [(40, 30), (20, 18, 9)])
def test_every_clicked_voxel_carries_its_label(shape):
    random = np.random.default_rng(0)
    for _ in range(40):
        logits = (4 * random.standard_normal(shape)).astype(np.float32)
        image = random.random((1, *shape))
        voxels = np.unique(np.stack([random.integers(0, n, 12) for n in shape], 1), axis=0)
        labels = random.integers(0, 2, len(voxels))
        out = observe(logits, image, voxels, labels, (1.0,) * len(shape), Kernel())
        assert np.array_equal(out[tuple(voxels.T)] > 0, labels == 1)
        assert (np.abs(out[tuple(voxels.T)]) >= MARGIN).all()


def test_what_lies_beyond_a_click_s_reach_stays_bit_for_bit():
    logits = np.random.default_rng(0).standard_normal((80, 80)).astype(np.float32) - 3
    kernel = Kernel(length=2.0)
    out = observe(logits, np.zeros((1, 80, 80)), np.array([[40, 40]]), np.array([1]), (1.0, 1.0), kernel)
    far = np.hypot(*(np.indices((80, 80)) - 40)) > kernel.radius
    assert np.array_equal(out[far], logits[far])
    assert (out[~far] >= logits[~far]).all()
    assert out[40, 41] > 0


def test_a_click_spreads_to_what_looks_like_it_and_no_further():
    image = np.zeros((1, 40, 40))
    image[..., 20:] = 1.0
    out = observe(np.full((40, 40), -2.0), image, np.array([[20, 18]]), np.array([1]), (1.0, 1.0), Kernel())
    assert out[20, 17] > 0
    assert out[20, 20] == pytest.approx(-2.0, abs=1e-3)


def test_a_click_that_is_obeyed_already_changes_nothing():
    logits = np.full((20, 20), 5.0, dtype=np.float32)
    out = observe(logits, np.zeros((3, 20, 20)), np.array([[4, 4]]), np.array([1]), (1.0, 1.0), Kernel())
    assert np.array_equal(out, logits)


def test_of_contradicting_clicks_the_newest_wins():
    voxels = np.array([[4, 4], [4, 4]])
    for labels in ([1, 0], [0, 1]):
        out = observe(np.zeros((9, 9)), np.zeros((1, 9, 9)), voxels, np.array(labels), (1.0, 1.0), Kernel())
        assert (out[4, 4] > 0) == bool(labels[-1])


def test_a_long_scribble_is_obeyed_everywhere():
    voxels = np.stack(np.indices((40, 40)), -1).reshape(-1, 2)[::2]
    out = observe(np.full((40, 40), -9.0), np.zeros((1, 40, 40)), voxels, np.ones(len(voxels)), (1.0, 1.0), Kernel())
    assert (out[tuple(voxels.T)] > 0).all()


@pytest.mark.parametrize("voxel", [[-1, 0], [0, 20]])
def test_a_click_outside_is_refused(voxel):
    with pytest.raises(ValueError, match="outside"):
        observe(np.zeros((20, 20)), np.zeros((1, 20, 20)), np.array([voxel]), np.array([1]), (1.0, 1.0), Kernel())
