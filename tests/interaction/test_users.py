"""The simulated user: where an error is largest, as the CVPR 2025 challenge places clicks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medsa_nets.interaction.users import SimulatedUser, largest_error
from medsa_nets.prompts.user import polygon_mask


def scene(seed: int, shape: tuple[int, ...] = (20, 18, 12)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mask, target = (ndimage.gaussian_filter(random.normal(size=shape), 2.0) > 0.02 for _ in range(2))
    return mask, target


def components(wrong: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Connected components with 8 or 26 neighbours, by search."""
    left, out = set(map(tuple, np.argwhere(wrong).tolist())), []
    while left:
        todo, found = [left.pop()], set()
        while todo:
            voxel = todo.pop()
            found.add(voxel)
            for step in np.ndindex(*(3,) * wrong.ndim):
                there = tuple(v + s - 1 for v, s in zip(voxel, step))
                if there in left:
                    left.remove(there)
                    todo.append(there)
        out.append(found)
    return out


@pytest.mark.parametrize("shape", [(20, 18, 12), (30, 26)])
def test_clicks_fall_on_the_voxels_of_the_largest_error_that_are_farthest_from_its_border(
    shape: tuple[int, ...],
) -> None:
    for seed in range(8):
        mask, target = scene(seed, shape)
        largest = max(components(mask != target), key=len)
        outside = np.pad(np.ones(shape, dtype=bool), 1, constant_values=True)
        for voxel in largest:
            outside[tuple(v + 1 for v in voxel)] = False
        border = np.argwhere(outside) - 1
        depth = {voxel: float(((border - voxel) ** 2).sum(1).min()) for voxel in largest}
        best = {voxel for voxel, d in depth.items() if d == max(depth.values())}
        drawn = set()
        for draw in range(6):
            found = SimulatedUser().click(mask, target, np.random.default_rng(draw))
            assert found is not None
            assert tuple(found[0]) in best
            assert found[1] == int(target[tuple(found[0])])
            drawn.add(tuple(found[0]))
        assert len(drawn) > 1 or len(best) == 1


def test_missing_and_surplus_voxels_that_touch_are_one_error() -> None:
    target, mask = np.zeros((9, 20), dtype=bool), np.zeros((9, 20), dtype=bool)
    target[2:5, 2:6], mask[2:5, 6:10] = True, True  # 12 missing beside 12 surplus
    target[2:6, 14:18] = True  # 16 missing
    found = largest_error(mask, target)
    assert found is not None
    assert found[0].sum() == 24
    found = largest_error(mask, target, apart=True)
    assert found is not None
    assert found[0].sum() == 16
    assert found[1].tolist() == [2, 14]


@pytest.mark.parametrize(("place", "border"), [("uniform", None), ("border", True), ("centre", False)])
def test_places_are_what_they_are_called(place: str, border: bool | None) -> None:
    target, mask = np.zeros((21, 21), dtype=bool), np.zeros((21, 21), dtype=bool)
    target[5:16, 5:16] = True
    user = SimulatedUser(**{"centre": 0.0, place: 1.0})
    clicks = [user.click(mask, target, np.random.default_rng(seed)) for seed in range(200)]
    voxels = np.array([click[0] for click in clicks if click is not None])
    at_border = ((voxels == 5) | (voxels == 15)).any(1)
    assert 0.2 < at_border.mean() < 0.5 if border is None else (at_border == border).all()
    assert border is False or len(np.unique(voxels, axis=0)) > 30


def test_jitter_moves_clicks_within_the_errors_kind() -> None:
    target = np.zeros((30, 30), dtype=bool)
    target[10:20, 10:20] = True
    user = SimulatedUser(jitter=3)
    voxels = []
    for seed in range(100):
        found = user.click(np.zeros_like(target), target, np.random.default_rng(seed))
        assert found is not None
        assert target[tuple(found[0])]
        voxels.append(found[0])
    assert np.ptp(voxels, axis=0).min() >= 5


@pytest.mark.parametrize("shape", [(20, 18, 12), (30, 26)])
def test_scribbles_are_short_curves_in_one_slice_of_the_error(shape: tuple[int, ...]) -> None:
    lengths = []
    for seed in range(30):
        mask, target = scene(seed, shape)
        found = SimulatedUser().scribble(mask, target, np.random.default_rng(seed))
        assert found is not None
        voxels, label = found
        place = tuple(voxels.T)
        assert (mask[place] != bool(label)).all()
        assert (target[place] == bool(label)).all()
        assert len(shape) == 2 or (np.ptp(voxels, axis=0) == 0).any()
        marked = np.zeros(shape, dtype=bool)
        marked[place] = True
        assert len(components(marked)) == 1
        lengths.append(len(voxels))
    assert max(lengths) <= 15
    assert np.mean(lengths) > 4


@pytest.mark.parametrize("shape", [(20, 18, 12), (30, 26)])
def test_lassos_enclose_what_is_wanted_in_their_slice(shape: tuple[int, ...]) -> None:
    kinds = set()
    for seed in range(40):
        mask, target = scene(seed, shape)
        if seed % 2:
            target &= np.indices(shape)[0] < (3 if len(shape) == 3 else 0)
        found = SimulatedUser(jitter=seed % 3).lasso(mask, target, np.random.default_rng(seed))
        assert found is not None
        corners, label = found
        kinds.add(label)
        axis = 0 if len(shape) == 2 else next(a for a in range(3) if np.ptp(corners[:, a]) == 0)
        own = mask if len(shape) == 2 else mask.take(int(corners[0, axis]), axis)
        wanted = target if len(shape) == 2 else target.take(int(corners[0, axis]), axis)
        plane = corners if len(shape) == 2 else np.delete(corners, axis, axis=1)
        inside = polygon_mask(plane, own.shape)
        if label:
            assert not (wanted & ~inside).any()
        else:
            assert not wanted.any()
            assert not (own & ~inside).any()
    assert kinds == {0, 1}


def test_nothing_wrong_asks_for_nothing() -> None:
    mask, _ = scene(0)
    for draw in (SimulatedUser().click, SimulatedUser().scribble, SimulatedUser().lasso):
        assert draw(mask, mask, np.random.default_rng(0)) is None


def test_a_seed_gives_the_same_click_again() -> None:
    mask, target = scene(3)
    user = SimulatedUser(centre=1, uniform=1, border=1, jitter=2)
    one, two = (user.click(mask, target, np.random.default_rng(5)) for _ in range(2))
    assert one is not None
    assert two is not None
    assert np.array_equal(one[0], two[0])


@pytest.mark.parametrize("shares", [{"centre": -1.0}, {"centre": 0.0}])
def test_shares_that_make_no_sense_are_an_error(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="0 or more and not all 0"):
        SimulatedUser(**shares)


def test_clicks_on_an_image_do_not_depend_on_its_batch() -> None:
    mask, target = (torch.from_numpy(m)[None, None] for m in scene(2))
    user = SimulatedUser(uniform=1.0)
    alone = user.clicks(mask, target, [torch.Generator().manual_seed(5)])
    both = user.clicks(
        torch.cat([target, mask]), torch.cat([mask, target]), [torch.Generator().manual_seed(i) for i in (1, 5)]
    )
    assert torch.equal(alone[0][0], both[0][1])
    assert torch.equal(alone[1][0], both[1][1])
    assert user.clicks(mask, mask, [torch.Generator()])[1].tolist() == [[-1.0]]  # nothing is wrong
