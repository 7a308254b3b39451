"""Clicks as measurements: exact where they are, alike where place and intensity are, nothing beyond their reach."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from medsa_nets.prompts import observations
from medsa_nets.prompts.observations import MARGIN, Kernel, observe

KERNEL = Kernel(length=3.0, contrast=0.15)


def scene(seed: int = 0, shape: tuple[int, ...] = (14, 12, 10)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=shape).astype(np.float32) * 4, random.random((1, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(14, 12, 10), (20, 18)])
@pytest.mark.parametrize("count", [1, 5, 60, 600])
def test_every_clicked_voxel_carries_its_label(shape: tuple[int, ...], count: int) -> None:
    logits, image = scene(count, shape)
    random = np.random.default_rng(1)
    voxels = np.stack([random.integers(0, n, count) for n in shape], axis=1)
    labels = random.integers(0, 2, count)
    found = observe(logits, image, voxels, labels, [1.0] * len(shape), KERNEL)
    wanted = {tuple(v): label for v, label in zip(voxels.tolist(), labels)}  # the newest wins
    assert all((found[v] >= MARGIN) if label else (found[v] <= -MARGIN) for v, label in wanted.items())


def test_voxels_beyond_the_reach_of_a_click_keep_their_logits_bit_for_bit() -> None:
    logits, image = scene(shape=(40, 40, 20))
    logits[5, 5, 5], logits[30, 30, 10] = -3.0, 2.0
    found = observe(logits, image, np.array([[5, 5, 5], [30, 30, 10]]), np.array([1, 1]), (1.0, 1.0, 2.0), KERNEL)
    place = np.indices(logits.shape).transpose(1, 2, 3, 0) * np.array([1.0, 1.0, 2.0])
    far = np.linalg.norm(place - [5, 5, 10], axis=-1) > KERNEL.radius
    assert np.array_equal(found[far], logits[far])
    assert not np.array_equal(found[~far], logits[~far])


def test_a_click_that_the_mask_obeys_already_changes_nothing() -> None:
    logits, image = scene()
    voxel = np.argwhere(logits > MARGIN)[3:4]
    assert np.array_equal(observe(logits, image, voxel, np.array([1]), (1, 1, 1), KERNEL), logits)


def test_the_residual_is_interpolated_as_a_gaussian_process_does() -> None:
    shape, spacing = (10, 9, 8), np.array([0.5, 0.5, 1.0])
    logits, image = scene(3, shape)
    logits = -np.abs(logits) - 2.0
    voxels = np.array([[2, 3, 1], [7, 6, 5], [5, 1, 7]])
    labels = np.array([1, 1, 0])
    residual = np.where(labels, MARGIN - logits[tuple(voxels.T)], 0.0)
    features = np.concatenate([voxels * spacing / 3.0, image[0][tuple(voxels.T)][:, None] / 0.15], axis=1)
    process = GaussianProcessRegressor(RBF(1.0, "fixed"), alpha=observations.NUGGET, optimizer=None)
    process.fit(features, residual)
    everywhere = np.indices(shape).reshape(3, -1).T
    asked = np.concatenate([everywhere * spacing / 3.0, image[0].reshape(-1, 1) / 0.15], axis=1)
    expected = process.predict(asked).reshape(shape).clip(0.0, residual.max())
    found = observe(logits, image, voxels, labels, spacing, KERNEL)
    assert np.abs(found - (logits + expected)).max() < 1e-3


def test_a_click_speaks_for_its_like_more_than_for_what_looks_different() -> None:
    image = np.zeros((1, 11, 11), dtype=np.float32)
    image[:, :, 6:] = 0.8
    found = observe(np.full((11, 11), -2.0), image, np.array([[5, 5]]), np.array([1]), (1, 1), KERNEL)
    assert found[5, 4] > 0 > found[5, 6]


def test_neighbours_that_contradict_each_other_do_not_blow_up() -> None:
    logits, image = np.zeros((9, 9), dtype=np.float32) - 5.0, np.zeros((1, 9, 9), dtype=np.float32)
    found = observe(logits, image, np.array([[4, 4], [4, 5]]), np.array([1, 0]), (1, 1), KERNEL)
    assert found.min() >= -5.0
    assert found.max() <= 1.0 + 1e-6


def test_many_voxels_of_a_scribble_make_a_small_system(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    solve = observations.linalg.solve

    def measured(matrix: np.ndarray, *arguments: object, **settings: object) -> np.ndarray:
        sizes.append(len(matrix))
        return solve(matrix, *arguments, **settings)

    monkeypatch.setattr(observations.linalg, "solve", measured)
    logits, image = np.full((60, 60), -3.0), np.zeros((3, 60, 60), dtype=np.float32)
    voxels = np.argwhere(np.ones((40, 40), dtype=bool))
    found = observe(logits, image, voxels, np.ones(1600), (1, 1), KERNEL)
    assert (found[:40, :40] >= MARGIN).all()
    assert sizes == [observations.MAX_POINTS]


@pytest.mark.parametrize("voxel", [[-1, 0], [0, 9]])
def test_a_voxel_outside_is_an_error(voxel: list[int]) -> None:
    with pytest.raises(ValueError, match="outside"):
        observe(np.zeros((9, 9)), np.zeros((1, 9, 9)), np.array([voxel]), np.array([1]), (1, 1), KERNEL)
