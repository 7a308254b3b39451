"""The peers of ``tests/benchmarks/sessions.py``: other means of a user who clicks."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Resized
from torch import Tensor

from medsa_nets.interaction.evaluation import run_simulated
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.interaction.users import SimulatedUser

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIZE = 32


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "peers", raising=False)
    import peers

    return peers


class Painter:
    """A base that fills the box that it is told, and paints a square around the newest click, on what was there."""

    def __init__(self) -> None:
        self.told: list[dict[str, Tensor]] = []

    def encode_image(self, image: Tensor) -> Tensor:
        assert image.shape == (1, 3, SIZE, SIZE)
        assert float(image.min()) == 0.0
        assert float(image.max()) == 1.0
        return torch.zeros(1, 1, SIZE // 4, SIZE // 4)

    def decode(self, embedding: Tensor, **prompts: Tensor) -> Tensor:
        self.told.append(prompts)
        rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None]
        if "boxes" in prompts:
            r0, c0, r1, c1 = prompts["boxes"].flatten().tolist()
        else:
            row, column = prompts["point_coords"][0, 0, -1].tolist()
            r0, c0, r1, c1 = row - 4, column - 4, row + 4, column + 4
        inside = (rows >= r0 - 0.5) & (rows <= r1 + 0.5) & (columns >= c0 - 0.5) & (columns <= c1 + 0.5)
        painted = torch.where(inside, 4.0, -4.0)[None, None]
        if "masks" in prompts and float(prompts["point_labels"][0, 0, -1]) == 0:
            return torch.minimum(prompts["masks"], -painted)
        return torch.maximum(prompts["masks"], painted) if "masks" in prompts else painted


@pytest.fixture
def painter(peers: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Painter:
    base = Painter()
    monkeypatch.setattr(peers, "unadapted", lambda name: base)
    monkeypatch.setattr(peers, "get_base", lambda name: types.SimpleNamespace(img_size=SIZE))
    return base


@pytest.mark.parametrize("volumes", [False, True], ids=["image", "volume"])
def test_the_boxes_of_the_truth_reach_the_base_where_the_truth_is(
    peers: Any, painter: Painter, stand_in: Any, volumes: bool
) -> None:
    session = InteractiveSession(stand_in(volumes))
    peer = peers.Boxes(session)
    peer.open("image_3")
    target = np.zeros(session.file_shape, dtype=bool)
    target[(slice(4, 12), slice(5, 14)) if not volumes else (slice(3, 7), slice(2, 6), slice(1, 4))] = True
    peer.show(target, types.SimpleNamespace(integers=lambda low, high, size: np.zeros(size, dtype=int)))
    exact = peer.mask(None)
    assert 2 * (exact & target).sum() / (exact.sum() + target.sum()) > 0.8
    peer.show(target, np.random.default_rng(1))
    assert peer.mask(None).sum() > exact.sum()  # people draw them a little too large
    assert len(painter.told[0]["boxes"].flatten()) == 4


@pytest.mark.parametrize("volumes", [False, True], ids=["image", "volume"])
def test_the_feedback_of_the_base_takes_all_clicks_of_a_slice_and_its_own_answer(
    peers: Any, painter: Painter, stand_in: Any, volumes: bool
) -> None:
    session = InteractiveSession(stand_in(volumes), start="nothing")
    peer = peers.Feedback(session)
    peer.open("image_3")
    first, second = ([5, 6], [11, 4]) if not volumes else ([2, 5, 3], [6, 5, 3])
    one = peer.point(first, 1, 0)
    assert one[tuple(first)]
    assert "masks" not in painter.told[0]
    both = peer.point(second, 1, 0)
    assert both[tuple(first)]
    assert both[tuple(second)]
    assert painter.told[1]["point_coords"].shape[2] == 2
    assert (painter.told[1]["masks"] > 0).any()
    if volumes:
        other = peer.point([2, 5, 0], 1, 0)
        assert painter.told[2]["point_coords"].shape[2] == 1  # of another slice, on which nothing was said
        assert other[tuple(first)]
        assert not both[2, 5, 0]
    peer.reset()
    assert not peer.mask(0).any()


def test_a_walker_starts_from_what_lies_deep_and_far_and_from_clicks(peers: Any) -> None:
    start = np.zeros((40, 40), dtype=bool)
    start[10:31, 10:31] = True
    none = np.empty((0, 2), dtype=int)
    seeds = peers.walker_seeds(start, none, np.empty(0, dtype=int), np.ones(2))
    assert seeds[20, 20] == 1
    assert seeds[0, 0] == 2
    assert (seeds[start] != 2).all()
    assert (seeds[~start] != 1).all()
    assert (seeds[9:12, 20] == 0).all()  # near the border it decides
    clicks, labels = np.array([[20, 13], [20, 20]]), np.array([0, 0])
    seeds = peers.walker_seeds(start, clicks, labels, np.ones(2))
    assert (seeds[20, [11, 13, 15]] == 2).all()
    assert not (seeds == 1).any()  # the second click says that the middle is none of it
    seeds = peers.walker_seeds(np.zeros((9, 9), dtype=bool), np.array([[4, 4]]), np.array([1]), np.ones(2))
    assert (seeds[[0, -1]] == 2).all()
    assert seeds[4, 4] == seeds[4, 2] == 1
    assert seeds[1, 1] == 0


def test_a_walker_finds_a_bright_disc_by_clicks_from_nothing(peers: Any, stand_in: Any) -> None:
    pytest.importorskip("skimage")

    class Disc(stand_in):  # type: ignore[misc,valid-type]
        def open(self, source: Any) -> MetaTensor:
            rows, columns = np.indices((60, 50))
            self.disc = (rows - 30) ** 2 + (columns - 20) ** 2 <= 144
            values = 0.2 + 0.5 * self.disc + 0.02 * np.random.default_rng(0).normal(size=self.disc.shape)
            image = MetaTensor(torch.from_numpy(np.stack([values] * 3)).float())
            return Resized("image", (32, 32), anti_aliasing=True)({"image": image})["image"]

    segmenter = Disc(False)
    peer = peers.Walker(InteractiveSession(segmenter, start="nothing"))
    peer.open("image_3")
    curve = run_simulated(peer, segmenter.disc, None, SimulatedUser(), np.random.default_rng(0), clicks=2)
    assert curve.dice[0] == 0.0
    assert curve.dice[-1] > 0.9
    assert curve.obeyed == [1.0] * len(curve.obeyed)


@pytest.mark.parametrize("volumes", [False, True])
def test_an_oracle_mends_what_is_wrong_near_a_click_and_nothing_else(peers: Any, stand_in: Any, volumes: bool) -> None:
    peer = peers.Oracle(InteractiveSession(stand_in(volumes), start="nothing"))
    peer.open("image_3")
    peer.show(np.ones(peer.session.file_shape, dtype=bool), np.random.default_rng(0))
    first = peer.point([0] * peer.session.grids.dims, 1, peer.session.classes[0])
    index = np.indices(first.shape).reshape(len(first.shape), *first.shape)
    spacing = np.ones(2)
    if volumes:
        spacing = np.linalg.norm(np.asarray(peer.session.image.meta["original_affine"])[:3, :3], axis=0)
    away = np.sqrt(((index.T * spacing) ** 2).sum(-1)).T
    assert np.array_equal(first, away <= peers.REACH[first.ndim])
    assert not first.all()
    both = peer.point([n - 1 for n in first.shape], 1, peer.session.classes[0])
    assert both[first].all()
    assert both.sum() > first.sum()
