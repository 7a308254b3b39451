"""How one answer is made from the network's, the mask before it, and what the newest prompt may change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medsa_nets.interaction.answers import AnswerSettings, keep_local, make_answer
from medsa_nets.interaction.grids import Grids
from medsa_nets.prompts import UserPrompt

SHAPE = (24, 24)


def square(first: int, last: int, inside: float = 3.0, outside: float = -3.0) -> np.ndarray:
    out = np.full(SHAPE, outside, dtype=np.float32)
    out[first:last, first:last] = inside
    return out


def test_borders_far_from_a_click_move_only_where_the_answer_is_certain() -> None:
    before, after = square(6, 18), square(6, 18)
    after[6, 6:18] = -0.4  # a little smaller
    after[17, 6:18] = -2.0  # clearly smaller
    newest, spacing = np.array([[12, 2]]), np.ones(2)
    settings = AnswerSettings("free", reach=3.0, certainty=1.0, depth=0.0)
    out = keep_local(before, after, newest, 0, spacing, settings)
    assert (out[6, 6:18] > 0).all()
    assert (out[17, 6:18] < 0).all()
    near = keep_local(before, after, np.array([[6, 12]]), 0, spacing, settings)
    assert (near[6, 10:15] < 0).all()  # here somebody looked
    assert (near[6, 6:9] > 0).all()


@pytest.mark.parametrize("label", [0, 1])
def test_a_directed_answer_adds_or_takes_away_beyond_its_reach(label: int) -> None:
    before, after = square(4, 12), square(8, 16)
    settings = AnswerSettings("directed", reach=2.0, certainty=0.0, depth=0.0)
    out = keep_local(before, after, np.array([[20, 2]]), label, np.ones(2), settings) > 0
    both = (before > 0) | (after > 0) if label else (before > 0) & (after > 0)
    assert np.array_equal(out, both)


def test_a_mask_changes_no_deeper_than_a_click_says() -> None:
    before, after = square(8, 16), square(2, 22)  # 6 voxels wider on each side
    newest, settings = np.array([[12, 17]]), AnswerSettings("free", reach=3.0, certainty=0.0, depth=2.0)
    out = keep_local(before, after, newest, 1, np.ones(2), settings) > 0  # two voxels from the border
    assert out[12, 8:22].all()  # 2 x 2 and 2 more
    assert not out[:, 22].any()
    shallow = keep_local(before, after, np.array([[12, 16]]), 1, np.ones(2), settings) > 0
    assert shallow[12, 16:20].all()
    assert not shallow[12, 20:].any()


@pytest.mark.parametrize("label", [0, 1])
def test_a_mark_on_what_is_right_already_is_no_reason_to_take_it_back(label: int) -> None:
    before, after = square(4, 12), square(8, 16)
    newest = np.array([[5, 5]]) if label else np.array([[15, 15]])
    settings = AnswerSettings("free", reach=20.0, certainty=0.0, depth=0.0)
    out = keep_local(before, after, newest, label, np.ones(2), settings) > 0
    assert np.array_equal(out, (before > 0) | (after > 0) if label else (before > 0) & (after > 0))


class Fixed:
    """A network with one answer to prompts, whatever they are."""

    volumes = True
    feedback = False
    refinement = None

    def __init__(self, answer: np.ndarray, prompted: bool) -> None:
        self.answer = torch.from_numpy(answer)
        self.prompted = prompted

    def decode(self, image: Any, index: int, asked: Any, earlier: Tensor | None) -> Tensor:
        assert earlier is None
        return self.answer


@pytest.fixture
def volume(stand_in: type) -> Any:
    return stand_in(volumes=True).open("image_0.nii")


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("moved", [0, 1, 6])
def test_a_wrong_mask_gives_way_to_what_clicks_show(volume: Any, prompted: bool, moved: int) -> None:
    grids = Grids(volume)
    before, other = (np.full(grids.shape, -4.0, dtype=np.float32) for _ in range(2))
    before[2:6, :5], other[2 + moved : 6 + moved, :5] = 4.0, 4.0
    place = np.array([3.0 + moved, 2.0, 2.0])
    position = grids.to_file[:3, :3] @ place + grids.to_file[:3, 3]
    click = UserPrompt("point", 0, 1, 0.0, np.rint(position)[None])
    segmenter: Any = Fixed(other, prompted)
    out = make_answer(segmenter, volume, grids, 0, torch.from_numpy(before), [click], AnswerSettings())
    mine, theirs = ((out.numpy() > 0) & (one > 0) for one in (before, other))
    taken = prompted and moved == 6
    assert theirs.sum() > 0.9 * (other > 0).sum() if taken else mine.sum() > 0.9 * (before > 0).sum()
    if taken:
        assert not mine.any()
    elif moved == 6:
        assert theirs.sum() < 0.9 * (other > 0).sum()  # the click alone speaks


@pytest.mark.parametrize("name", ["reach", "certainty", "depth"])
def test_lengths_below_zero_make_no_sense(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 0 or more"):
        AnswerSettings(**{name: -1.0})
