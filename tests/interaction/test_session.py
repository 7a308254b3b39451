"""Sessions: what holds after every verb, whatever the network answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from medsa_nets.errors import DataError
from medsa_nets.interaction.answers import RULES, AnswerSettings
from medsa_nets.interaction.session import InteractiveSession

SESSIONS = 1000  # of images, and as many of volumes
SETTINGS = [AnswerSettings(rule=rule, reach=reach) for rule, reach in itertools.product(RULES, (None, 2.0))]
Said = dict[tuple[int, tuple[int, ...]], tuple[int, int]]


@pytest.fixture(scope="module", params=[False, True], ids=["image", "volume"])
def segmenter(request: pytest.FixtureRequest, stand_in: Callable[..., Any]) -> Any:
    """A stand-in that opens each of a few images once."""
    found = stand_in(volumes=request.param)
    opened: dict[str, Any] = {}
    original, automatic, on_file = found.open, found.automatic, found.on_file
    found.open = lambda source: opened.setdefault(source, original(source))
    answers: dict[int, Any] = {}
    found.automatic = lambda image: answers.setdefault(id(image), automatic(image))
    masks: dict[int, Any] = {}
    found.on_file = lambda logits, image: masks.setdefault(id(image), on_file(logits, image))
    return found


def begin(segmenter: Any, seed: int = 0, **options: Any) -> InteractiveSession:
    session = InteractiveSession(segmenter, **options)
    session.open(f"image_{seed % 5}")
    return session


def draw(session: InteractiveSession, random: np.random.Generator) -> tuple[str, tuple[Any, ...]]:
    """A verb and its arguments."""
    shape = session.file_shape
    index, label = int(random.integers(len(session.classes))), int(random.integers(2))
    verb = str(random.choice(["point", "scribble", "box", "lasso", "start_from"], p=[0.6, 0.15, 0.08, 0.1, 0.07]))
    if verb == "point":
        return verb, ([int(random.integers(n)) for n in shape], label, index)
    if verb == "scribble":
        return verb, (
            [[int(random.integers(n)) for n in shape] for _ in range(int(random.integers(1, 9)))],
            label,
            index,
        )
    if verb == "box":
        return verb, ([int(random.integers(n)) for n in shape], [int(random.integers(n)) for n in shape], index)
    if verb == "lasso":
        corners = np.stack([random.integers(0, n, 5) for n in shape], axis=1)
        if len(shape) == 3:
            axis = int(random.integers(3))
            corners[:, axis] = corners[0, axis]
        return verb, (corners.tolist(), label, index)
    return verb, (random.random(shape) > 0.5, index)


def check_obedience(session: InteractiveSession) -> None:
    """Every statement that nothing newer contradicts holds in the masks."""
    shape = session.file_shape
    owner: dict[tuple[int, ...], int] = {}  # of a voxel that was marked as foreground, the newest class
    wanted = [np.full(shape, -1, dtype=np.int8) for _ in session.classes]
    accepted = np.zeros(shape, dtype=bool)
    for prompt in session.prompts():
        said = wanted[prompt.index]
        if prompt.kind == "mask":
            said[...] = -1
        elif prompt.kind == "accept":
            accepted |= session.mask(prompt.index)
        elif prompt.marks:
            for voxel in map(tuple, prompt.voxels().tolist()):
                said[voxel] = prompt.label
                if prompt.label:
                    owner[voxel] = prompt.index
        else:
            everything = np.ones(shape, dtype=bool)
            prompt.enforce(everything)
            said[~everything] = 0
    for index, said in enumerate(wanted):
        mask = session.mask(index)
        assert not mask[said == 0].any()
        for voxel in map(tuple, np.argwhere(said == 1).tolist()):
            taken = session.segmenter.exclusive and (owner[voxel] != index or (accepted[voxel] and not mask[voxel]))
            assert mask[voxel] or taken, f"{session.classes[index]} lost {voxel}"


def snapshot(session: InteractiveSession) -> list[Any]:
    logits = [session.logits(index) for index in range(len(session.classes))]
    return [*(session.mask(index) for index in range(len(session.classes))), *logits]


def assert_same(before: list[Any], after: list[Any]) -> None:
    for one, other in zip(before, after, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert (one is None and other is None) or np.array_equal(one, other)


def test_random_sessions_obey_keep_what_is_accepted_and_undo_exactly(segmenter: Any) -> None:
    refused: list[str] = []
    for seed in range(SESSIONS):
        random = np.random.default_rng(seed)
        options = {"settings": SETTINGS[seed % len(SETTINGS)], "start": ("automatic", "nothing")[seed % 7 == 0]}
        session = begin(segmenter, seed, **options)
        before: list[list[Any]] = []
        kept: dict[int, np.ndarray] = {}
        for _ in range(int(random.integers(2, 7))):
            shown = snapshot(session)
            index = int(random.integers(len(session.classes)))
            if random.random() < 0.1 and index not in kept:
                kept[index] = session.accept(index)
                before.append(shown)
            elif random.random() < 0.15 and before:
                taken = session.undo()
                if taken.kind == "accept":
                    kept.pop(taken.index)
                assert_same(before.pop(), snapshot(session))
            else:
                verb, arguments = draw(session, random)
                try:
                    getattr(session, verb)(*arguments)
                    before.append(shown)
                except DataError as error:
                    refused.append(str(error))
                    assert_same(shown, snapshot(session))
            for accepted, mask in kept.items():
                assert np.array_equal(session.mask(accepted), mask)
            check_obedience(session)
            if session.segmenter.exclusive:
                assert np.stack([session.mask(i) for i in range(len(session.classes))]).sum(0).max() <= 1
        while before:
            session.undo()
            assert_same(before.pop(), snapshot(session))
    assert all("accepted" in reason for reason in refused)
    assert 0 < len(refused) < SESSIONS


def test_an_answer_does_not_depend_on_other_sessions_or_on_the_order_of_other_classes(segmenter: Any) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        alone, other = begin(segmenter, seed), begin(segmenter, seed)
        mixed = begin(segmenter, seed)
        verbs = [draw(alone, random) for _ in range(6)]
        ordered = sorted(verbs, key=lambda verb: verb[1][-1])
        for verb, arguments in verbs:
            other.point([int(random.integers(n)) for n in alone.file_shape], 1, 0)  # another user at work
            getattr(alone, verb)(*arguments)
        for verb, arguments in ordered:
            getattr(mixed, verb)(*arguments)
        for index in range(len(alone.classes)):
            one, two = alone.logits(index), mixed.logits(index)
            assert one is not None
            assert two is not None
            assert torch.equal(one, two)


def test_undo_of_a_class_leaves_the_others_as_they_are(stand_in: Callable[..., Any]) -> None:
    session = begin(stand_in(volumes=True))
    session.point([1, 1, 1], 1, "spleen")
    after_spleen = session.logits("spleen")
    session.point([6, 5, 3], 1, "liver")
    session.point([2, 2, 2], 0, "spleen")
    liver = session.logits("liver")
    session.undo("spleen")
    assert_same([after_spleen, liver], [session.logits("spleen"), session.logits("liver")])
    session.undo("spleen")
    session.undo("liver")
    assert_same(snapshot(begin(stand_in(volumes=True))), snapshot(session))


def test_undo_asks_the_network_nothing(segmenter: Any) -> None:
    session = begin(segmenter)
    for _ in range(3):
        session.point([2] * len(session.file_shape), 1, 0)
    asked = segmenter.decoded
    session.undo()
    session.undo()
    assert segmenter.decoded == asked


def test_a_session_starts_from_the_automatic_masks_or_from_nothing(segmenter: Any) -> None:
    session = begin(segmenter)
    expected = segmenter.on_file(segmenter.automatic(session.image), session.image)
    assert np.array_equal(np.stack([session.mask(i) for i in range(len(session.classes))]), expected)
    assert not begin(segmenter, start="nothing").mask(0).any()


@pytest.mark.parametrize("rule", ["connected", "monotone"])
def test_a_click_changes_nothing_that_is_neither_connected_nor_in_its_reach(segmenter: Any, rule: str) -> None:
    for seed in range(30):
        random = np.random.default_rng(seed)
        session = begin(segmenter, seed, settings=AnswerSettings(rule=rule, reach=1.5))
        before = session.logits(0)
        voxel = [int(random.integers(n)) for n in session.file_shape]
        session.point(voxel, int(random.integers(2)), 0)
        after = session.logits(0)
        assert before is not None
        assert after is not None
        there = session.grids.voxels(np.array([voxel]))[0]
        place = (np.indices(before.shape).T * session.grids.spacing).T
        away = np.linalg.norm((place.T - there * session.grids.spacing).T, axis=0)
        changed = ((before > 0) != (after > 0)).numpy()
        parts, _ = ndimage.label(
            changed | (np.abs(np.indices(before.shape).T - there).max(-1).T <= 1),
            np.ones((3,) * 3 if before.dim() == 3 else (3, 3)),
        )
        assert not (changed & (away > 1.5) & (parts != parts[tuple(there)])).any()
        if rule == "monotone":
            label = session.prompts()[0].label
            assert (((after > 0) == bool(label)) | ~torch.from_numpy(changed & (away > 1.5))).all()


def test_a_mask_to_start_from_is_the_mask_until_a_prompt_changes_it(segmenter: Any) -> None:
    session = begin(segmenter)
    mask = np.zeros(session.file_shape, dtype=bool)
    mask[2:6, 1:5] = True
    assert np.array_equal(session.start_from(mask, 0), mask)
    assert np.array_equal(session.start_from(mask[None].astype(np.uint8), 0), mask)


def test_of_two_classes_that_claim_a_voxel_the_newest_mark_wins(stand_in: Callable[..., Any]) -> None:
    session = begin(stand_in(volumes=True))
    session.point([3, 3, 2], 1, "liver")
    session.point([3, 3, 2], 1, "aorta")
    session.point([7, 6, 4], 1, "liver")
    assert session.mask("aorta")[3, 3, 2]
    assert not session.mask("liver")[3, 3, 2]
    session.undo("aorta")
    assert session.mask("liver")[3, 3, 2]


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("point", ([99, 0, 0], 1, "liver"), r"point: \[99\.0, 0\.0, 0\.0\] lies outside the image, which is 9 x 7 x 5"),
        ("point", ([0, 0], 1, "liver"), "expected positions of 3 voxel indices"),
        ("point", (["a", 0, 0], 1, "liver"), "expected positions of 3 voxel indices"),
        ("point", ([float("nan"), 0, 0], 1, "liver"), "expected positions of 3 voxel indices"),
        ("point", ([0, 0, 0], 2, "liver"), "label: expected 1"),
        ("point", ([0, 0, 0], 1, "heart"), "class 'heart' is unknown; expected one of liver, spleen, aorta"),
        ("point", ([0, 0, 0], 1, None), "class None is unknown"),
        ("scribble", ([], 1, "liver"), "expected positions"),
        ("scribble", ([[0, 0, 0], [0, -3, 0]], 1, "liver"), "lies outside"),
        ("box", ([0, 0, 0], [9, 1, 1], "liver"), "lies outside"),
        ("lasso", ([[0, 0, 0], [1, 0, 0]], 1, "liver"), "3 or more corners"),
        ("lasso", ([[0, 0, 0], [1, 2, 3], [4, 1, 2]], 1, "liver"), "lie in no slice"),
        ("start_from", (np.zeros((9, 7, 4)), "liver"), "its size is 9 x 7 x 4, that of the image 9 x 7 x 5"),
        ("accept", ("heart",), "unknown"),
        ("undo", ("spleen",), "nothing to take back"),
        ("mask", (3,), "class 3 is unknown"),
    ],
)
def test_bad_input_is_one_error_and_changes_nothing(
    stand_in: Callable[..., Any], verb: str, arguments: tuple[Any, ...], said: str
) -> None:
    session = begin(stand_in(volumes=True))
    session.point([1, 2, 3], 1, "liver")
    before, prompts = snapshot(session), session.prompts()
    with pytest.raises(DataError, match=said):
        getattr(session, verb)(*arguments)
    assert_same(before, snapshot(session))
    assert [p.number for p in session.prompts()] == [p.number for p in prompts]


def test_an_accepted_class_takes_no_prompt_and_gives_no_voxel_away(stand_in: Callable[..., Any]) -> None:
    session = begin(stand_in(volumes=True))
    session.point([3, 3, 2], 1, "liver")
    session.accept("liver")
    for arguments in (([0, 0, 0], 1, "liver"), ([3, 3, 2], 1, "spleen")):
        with pytest.raises(DataError, match="accepted"):
            session.point(*arguments)
    assert session.undo().kind == "accept"
    assert session.point([3, 3, 2], 1, "spleen")[3, 3, 2]


def test_verbs_before_open_say_what_to_do(stand_in: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"Call open\(path\) first"):
        InteractiveSession(stand_in(volumes=False)).point([0, 0])


def test_an_image_that_cannot_be_opened_leaves_the_session_as_it_was(stand_in: Callable[..., Any]) -> None:
    session = begin(stand_in(volumes=False))
    session.point([3, 3])
    before = snapshot(session)
    with pytest.raises(ValueError, match="invalid literal"):
        session.open("none")
    assert_same(before, snapshot(session))


def test_a_network_that_fails_leaves_the_session_as_it_was(stand_in: Callable[..., Any]) -> None:
    segmenter = stand_in(volumes=False)
    session = begin(segmenter)
    session.point([3, 3])
    before = snapshot(session)

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("no memory")

    segmenter.decode = fail
    with pytest.raises(RuntimeError, match="no memory"):
        session.point([4, 4])
    assert_same(before, snapshot(session))
    assert len(session.prompts()) == 1


def test_reset_forgets_a_class_or_all(stand_in: Callable[..., Any]) -> None:
    fresh, session = begin(stand_in(volumes=True)), begin(stand_in(volumes=True))
    session.point([3, 3, 2], 1, "liver")
    session.point([1, 1, 1], 1, "aorta")
    session.reset("liver")
    assert [prompt.index for prompt in session.prompts()] == [2]
    session.reset()
    assert_same(snapshot(fresh), snapshot(session))


@pytest.mark.parametrize("start", ["automatic", "nothing"])
def test_undo_is_exact_where_the_history_is_short(segmenter: Any, start: str) -> None:
    for seed in range(12):
        random = np.random.default_rng(seed)
        sessions = [begin(segmenter, seed, start=start, history=size) for size in (2**30, 0)]
        for _ in range(8):
            verb, arguments = draw(sessions[0], random)
            for session in sessions:
                with suppress(DataError):
                    getattr(session, verb)(*arguments)
        held = [step.held for state in sessions[1]._known.values() for step in state.steps]
        assert held.count(True) <= 1
        while sessions[0].prompts():
            assert_same(*map(snapshot, sessions))
            fork = sessions[1].fork()
            for session in (*sessions, fork):
                session.undo()
            assert_same(snapshot(sessions[1]), snapshot(fork))
        assert_same(*map(snapshot, sessions))


def test_the_history_is_bounded(segmenter: Any) -> None:
    session = begin(segmenter, history=3000)
    random = np.random.default_rng(3)
    for _ in range(12):
        session.start_from(random.random(session.file_shape) > 0.5, 0)
    steps = session._known[0].steps
    assert sum(step.bytes for step in steps) <= max(3000, steps[-1].bytes)
    assert not steps[0].held
    assert steps[-1].held
