"""Sessions behind a bundle's evaluator: requests that go on from each other, and images without prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate

from medsa_nets.interaction import inferer as module
from medsa_nets.interaction.inferer import SessionInferer
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.networks import MedSA
from medsa_nets.networks.identity import Adapted
from medsa_nets.prompts import Prompts, UserPrompt, with_user_prompts


def click(*position: float, label: int = 1, index: int = 0) -> UserPrompt:
    return UserPrompt("point", index, 0, 0.0, np.array([position], dtype=float), label=label)


class Automatic:
    """An inferer that is asked for images without prompts."""

    cache = None
    amp = False

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, prompts: Any = None) -> torch.Tensor:
        self.asked.append(prompts)
        return torch.zeros(len(inputs), 1 if inputs.dim() == 4 else 3, *inputs.shape[2:])


@pytest.fixture
def make(stand_in: type, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[SessionInferer, Any, MetaTensor]]:
    def made(volumes: bool, **settings: Any) -> tuple[SessionInferer, Any, MetaTensor]:
        segmenter = stand_in(volumes=volumes)
        monkeypatch.setattr(module, "NetworkSegmenter", lambda *arguments: segmenter)
        return SessionInferer(Automatic(), segmenter.classes, **settings), segmenter, segmenter.open("image_0.png")

    return made


class _Network(MedSA):
    """A network that nobody asks: the segmenter stands in for it."""

    def __init__(self) -> None:
        Adapted.__init__(self)


NETWORK = _Network().eval()


@pytest.mark.parametrize("volumes", [False, True])
def test_a_request_is_answered_as_a_session_answers(make: Any, stand_in: type, volumes: bool) -> None:
    inferer, _, image = make(volumes)
    said = [click(*place, label=label) for place, label in (((4, 5, 1), 1), ((2, 2, 3), 0), ((6, 3, 2), 1))]
    said = [UserPrompt(p.kind, 0, 0, 0.0, p.positions[:, : image.dim() - 1], label=p.label) for p in said]
    found = inferer(with_user_prompts(image, said)[None], NETWORK)
    session = InteractiveSession(stand_in(volumes=volumes))
    session.open(image)
    for prompt in said:
        session.apply(prompt)
    expected = session.logits(0)
    assert expected is not None
    assert torch.equal(found[0, 0] > 0, expected > 0)
    assert found.shape[1] == len(session.classes)
    if volumes:
        assert bool((found[0, 1:] < -10).all())  # nobody asked for the others


def test_other_classes_keep_their_automatic_masks_where_a_server_asks_for_them(make: Any) -> None:
    inferer, segmenter, image = make(True, others="automatic")
    found = inferer(with_user_prompts(image, [click(4, 5, 1, index=1)])[None], NETWORK)[0]
    automatic = segmenter.automatic(image)
    assert torch.equal(found[0], automatic[0])
    assert torch.equal(found[2], automatic[2])
    own = found[1] > 0
    assert bool((found.argmax(0)[own] == 1).all())  # where both are, the one that was clicked


def test_a_request_that_goes_on_costs_one_answer_and_an_undo_none(make: Any) -> None:
    inferer, segmenter, image = make(True)
    said = [click(4, 5, 1), click(2, 2, 3, label=0), click(6, 3, 2)]
    masks = []
    for count in (1, 2, 3):
        masks.append(inferer(with_user_prompts(image, said[:count])[None], NETWORK))
        assert segmenter.decoded == count
    assert torch.equal(inferer(with_user_prompts(image, said[:2])[None], NETWORK), masks[1])
    assert segmenter.decoded == 3
    assert not torch.equal(masks[1], masks[2])
    fresh, _, _ = make(True)
    assert torch.equal(fresh(with_user_prompts(image, said)[None], NETWORK), masks[2])  # nothing depends on the past


def test_clicks_are_taken_in_the_order_in_which_requests_brought_them(make: Any) -> None:
    inferer, _, image = make(True)
    first, second, against = click(4, 5, 1), click(6, 3, 2), click(2, 2, 3, label=0)
    for listed in ([first], [first, against], [first, second, against]):  # a request lists foreground first
        found = inferer(with_user_prompts(image, listed)[None], NETWORK)
    other, _, _ = make(True)
    for listed in ([first], [first, second], [first, second, against]):
        there = other(with_user_prompts(image, listed)[None], NETWORK)
    assert not torch.equal(found, there)
    again, _, _ = make(True)
    assert torch.equal(again(with_user_prompts(image, [first, against, second])[None], NETWORK), found)


def drawing(*voxels: tuple[int, int, int], label: int = 1) -> UserPrompt:
    return UserPrompt("scribble", 0, 0, 0.0, np.array(voxels, dtype=float), label=label)


def test_a_drawing_that_grows_is_a_new_scribble_and_one_that_shrinks_an_undo(make: Any, stand_in: type) -> None:
    inferer, segmenter, image = make(True)
    first, more = ((4, 5, 1), (4, 6, 1)), ((1, 1, 1), (4, 5, 1), (4, 6, 1))
    against = drawing((2, 2, 3), label=0)
    maps = [[drawing(*first)], [drawing(*more)], [drawing(*more), against]]  # as a label map lists them
    masks = []
    for count, said in enumerate(maps, start=1):
        masks.append(inferer(with_user_prompts(image, said)[None], NETWORK))
        assert segmenter.decoded == count
    session = InteractiveSession(stand_in(volumes=True))
    session.open(image)
    for scribble in (drawing(*first), drawing((1, 1, 1)), against):
        session.apply(scribble)
    expected = session.logits(0)
    assert expected is not None
    assert torch.equal(masks[2][0, 0] > 0, expected > 0)
    assert torch.equal(inferer(with_user_prompts(image, maps[1])[None], NETWORK), masks[1])
    assert torch.equal(inferer(with_user_prompts(image, maps[0])[None], NETWORK), masks[0])
    assert segmenter.decoded == 3  # what was erased was taken back
    erased = [drawing((4, 5, 1)), drawing((4, 6, 1), label=0)]  # a part of the first stroke is something else now
    fresh, _, _ = make(True)
    found = inferer(with_user_prompts(image, erased)[None], NETWORK)
    assert torch.equal(found, fresh(with_user_prompts(image, erased)[None], NETWORK))


def test_two_users_of_an_image_do_not_see_each_other(make: Any) -> None:
    inferer, _, image = make(True)
    one, two = [click(4, 5, 1), click(2, 2, 3, label=0)], [click(4, 5, 1), click(7, 1, 2)]
    alone = []
    for said in (one, two):
        fresh, _, _ = make(True)
        alone.append(fresh(with_user_prompts(image, said)[None], NETWORK))
    for said in (one[:1], two[:1], two, one):
        found = inferer(with_user_prompts(image, said)[None], NETWORK)
    assert torch.equal(found, alone[0])
    assert torch.equal(inferer(with_user_prompts(image, two)[None], NETWORK), alone[1])


def test_few_sessions_are_kept(make: Any) -> None:
    inferer, segmenter, _ = make(True)
    for number in range(module.SESSIONS + 3):
        inferer(with_user_prompts(segmenter.open(f"image_{number}.png"), [click(4, 5, 1)])[None], NETWORK)
    assert len(inferer._sessions) == module.SESSIONS


def test_images_without_prompts_and_given_ones_go_to_the_inner_inferer(make: Any) -> None:
    inferer, segmenter, image = make(False)
    batch = list_data_collate([image, with_user_prompts(image, [])])
    assert inferer(batch, NETWORK).shape == (2, 1, 12, 12)
    given = Prompts(points=torch.zeros(1, 1, 2), labels=torch.ones(1, 1))
    said = with_user_prompts(image, [click(3, 3)])[None]
    inferer(said, NETWORK, prompts=given)
    inferer(said, torch.nn.Identity())  # an export
    assert inferer.inferer.asked == [None, given, None]
    assert segmenter.decoded == 0


def test_images_of_a_batch_have_sessions_of_their_own(make: Any) -> None:
    inferer, segmenter, image = make(False)
    other = segmenter.open("image_1.png")
    items = [with_user_prompts(image, [click(3, 3)]), with_user_prompts(other, [click(9, 2)])]
    both = inferer(list_data_collate(items), NETWORK)
    for found, alone in zip(both, items):
        assert torch.equal(found, inferer(alone[None], NETWORK)[0])


def test_others_are_absent_or_automatic() -> None:
    with pytest.raises(ValueError, match="others must be absent or automatic"):
        SessionInferer(Automatic(), ["lesion"], others="all")
