from __future__ import annotations

from collections import Counter

import pytest
import torch

from medsa_nets.prompts import (
    PROTOCOLS,
    VOLUME_PROTOCOLS,
    Prompts,
    PromptSampler,
    add_correction,
    bounding_box,
    class_masks,
    class_protocol_prompts,
    error_point,
    jitter_box,
    overlapping_box,
    protocol_prompts,
    random_points,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rectangle(shape: tuple[int, ...], first: tuple[int, ...], last: tuple[int, ...]) -> torch.Tensor:
    """Boolean mask that is true from ``first`` to ``last``, both inclusive."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[tuple(slice(a, b + 1) for a, b in zip(first, last))] = True
    return mask


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    """Intersection over union of two boxes of voxels: a voxel reaches half a voxel to either side of its index."""
    dims = len(a) // 2
    shared = volume_a = volume_b = 1.0
    for axis in range(dims):
        a0, a1 = float(a[axis]) - 0.5, float(a[dims + axis]) + 0.5
        b0, b1 = float(b[axis]) - 0.5, float(b[dims + axis]) + 0.5
        shared *= max(0.0, min(a1, b1) - max(a0, b0))
        volume_a *= a1 - a0
        volume_b *= b1 - b0
    return shared / (volume_a + volume_b - shared)


RECTANGLES = [
    ((40, 60), (10, 20), (19, 50)),
    ((40, 60), (0, 0), (5, 3)),
    ((40, 60), (30, 58), (39, 59)),
    ((20, 24, 12), (4, 6, 3), (12, 15, 8)),
    ((20, 24, 12), (0, 0, 0), (3, 5, 2)),
]
# The whole image, or all of one axis: no shifted box fits.
FULL = [((16, 16), (0, 0), (15, 15)), ((30, 20), (5, 0), (14, 19)), ((8, 9, 10), (0, 0, 0), (7, 8, 9))]


@pytest.mark.parametrize(("shape", "first", "last"), RECTANGLES + FULL)
def test_the_box_of_a_rectangle_is_its_corners(shape, first, last):
    assert bounding_box(rectangle(shape, first, last)).tolist() == [*first, *last]


def test_the_box_of_scattered_voxels_holds_their_extremes():
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[2, 7] = mask[5, 1] = mask[3, 3] = True
    assert bounding_box(mask).tolist() == [2, 1, 5, 7]


def test_one_voxel_has_a_box_and_an_empty_mask_none():
    assert bounding_box(rectangle((5, 5, 5), (1, 2, 3), (1, 2, 3))).tolist() == [1, 2, 3, 1, 2, 3]
    assert bounding_box(torch.zeros(5, 5, dtype=torch.bool)) is None


@pytest.mark.parametrize("overlap", [0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize(("shape", "first", "last"), RECTANGLES + FULL)
def test_an_overlapping_box_has_the_wanted_overlap_and_stays_inside(shape, first, last, overlap):
    exact = torch.tensor([*first, *last], dtype=torch.float32)
    for seed in range(10):
        box = overlapping_box(exact, shape, overlap, generator(seed))
        assert iou(exact, box) == pytest.approx(overlap, abs=1e-5)
        dims = len(shape)
        assert bool((box[:dims] <= box[dims:]).all())
        assert bool((box[:dims] >= 0).all())
        assert bool((box[dims:] <= torch.tensor(shape) - 1).all())


@pytest.mark.parametrize(
    ("shape", "first", "last"), [((30, 30, 1), (5, 5, 0), (14, 24, 0)), ((1, 30), (0, 5), (0, 20))]
)
def test_an_overlapping_box_of_a_flat_image_has_ordered_corners(shape, first, last):
    exact = torch.tensor([*first, *last], dtype=torch.float32)
    box = overlapping_box(exact, shape, 0.5, generator())
    assert iou(exact, box) == pytest.approx(0.5, abs=1e-5)
    assert bool((box[: len(shape)] <= box[len(shape) :]).all())


def test_overlapping_boxes_go_in_different_directions():
    exact = torch.tensor([20.0, 20.0, 29.0, 39.0])
    boxes = torch.stack([overlapping_box(exact, (60, 60), 0.5, generator(seed)) for seed in range(30)])
    assert {tuple((box[:2] > exact[:2]).tolist()) for box in boxes} == {
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    }


@pytest.mark.parametrize(("shape", "first", "last"), RECTANGLES + FULL)
@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.5])
def test_jitter_moves_each_side_by_no_more_than_its_share_and_stays_inside(shape, first, last, jitter):
    exact = torch.tensor([*first, *last], dtype=torch.float32)
    dims = len(shape)
    most = jitter * torch.tensor([b - a + 1.0 for a, b in zip(first, last)]).repeat(2)
    moves = []
    for seed in range(20):
        box = jitter_box(exact, shape, jitter, generator(seed))
        moves.append((box - exact).abs())
        assert bool((moves[-1] <= most + 1e-4).all())
        assert bool((box >= 0).all())
        assert bool((box <= torch.tensor(shape).repeat(2) - 1).all())
        assert bool((box[:dims] <= box[dims:]).all())
    if jitter and first[0] > 0:
        assert float(torch.stack(moves).amax()) > 0.5 * float(most.amin())


@pytest.mark.parametrize("shape", [(12, 14), (6, 8, 5)])
def test_random_points_lie_in_the_mask_and_reach_all_of_it(shape):
    mask = torch.rand(shape, generator=generator()) > 0.9
    points = random_points(mask, 2000, generator())
    assert points.dtype == torch.float32
    found = {tuple(point) for point in points.long().tolist()}
    assert found == {tuple(voxel) for voxel in mask.nonzero().tolist()}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("shape", "first", "last"), [RECTANGLES[0], RECTANGLES[3]])
def test_a_protocol_gives_its_prompts(protocol, shape, first, last):
    mask = rectangle(shape, first, last)
    prompts = protocol_prompts(mask, protocol, generator())
    dims = len(shape)
    points = {"point": 1, "points3": 3}
    overlaps = {"box50": 0.5, "box75": 0.75, "box": 1.0}
    if protocol in points:
        assert prompts.kinds == {"points"}
        assert prompts.points.shape == (1, points[protocol], dims)
        assert prompts.labels.tolist() == [[1.0] * points[protocol]]
        assert all(bool(mask[tuple(point)]) for point in prompts.points[0].long().tolist())
    elif protocol in overlaps:
        assert prompts.kinds == {"boxes"}
        assert prompts.boxes.shape == (1, 2 * dims)
        exact = torch.tensor([*first, *last], dtype=torch.float32)
        assert iou(exact, prompts.boxes[0]) == pytest.approx(overlaps[protocol], abs=1e-5)
    else:
        assert prompts == Prompts()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_empty_mask_gives_no_prompts(protocol):
    assert protocol_prompts(torch.zeros(8, 8, dtype=torch.bool), protocol, generator()) == Prompts()


def test_an_unknown_protocol_lists_those_there_are():
    with pytest.raises(ValueError, match=r"none, point, points3, box50, box75, box.*'boxes'"):
        protocol_prompts(torch.ones(8, 8, dtype=torch.bool), "boxes", generator())


@pytest.mark.parametrize(
    "weights", [(0.3, 0.4, 0.3), (0.5, 0.0, 0.5), (0.0, 1.0, 0.0), (2.0, 1.0, 1.0), (0.0, 0.0, 3.0)]
)
@pytest.mark.parametrize("draws", [1, 2, 7, 20])
def test_kinds_of_prompts_keep_their_proportions_in_every_step(weights, draws):
    sampler = PromptSampler(none=weights[0], points=weights[1], boxes=weights[2])
    for seed in range(20):
        counts = Counter(sampler.modes(draws, generator(seed)))
        for mode, weight in zip(("none", "points", "boxes"), weights):
            # systematic sampling: as many as expected, or the next whole number to either side
            assert abs(counts[mode] - draws * weight / sum(weights)) < 1.0 + 1e-9


def test_kinds_of_prompts_have_their_proportions_over_many_steps():
    sampler, source = PromptSampler(none=0.2, points=0.5, boxes=0.3), generator()
    counts = Counter(mode for _ in range(2000) for mode in sampler.modes(1, source))
    assert {mode: count / 2000 for mode, count in counts.items()} == pytest.approx(
        {"none": 0.2, "points": 0.5, "boxes": 0.3}, abs=0.05
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_corrections_follow_their_share_of_draws(share):
    sampler, source = PromptSampler(correction=share), generator()
    assert sum(sampler.corrections(source) > 0 for _ in range(2000)) / 2000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    "settings", [{"none": -0.1}, {"max_corrections": 0}, {"none": 0.0, "points": 0.0, "boxes": 0.0}, {"max_points": 0}]
)
def test_impossible_proportions_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PromptSampler(**settings)


def test_drawn_points_have_the_label_of_the_place_they_lie_at():
    label = torch.zeros(3, 1, 20, 30)
    label[0, 0, 5:9, 3:20] = label[1, 0, 0, 0] = label[2, 0, 10:, :] = 1
    sampler, source, counts = PromptSampler(max_points=4), generator(), set()
    for _ in range(30):
        prompts = sampler.draw(label, "points", source)
        assert len(prompts) == 3
        for b, own in enumerate(prompts):
            counts.add(own.labels.shape[1])
            assert own.points.shape == (1, prompts[0].labels.shape[1], 2)
            assert own.labels[0, 0] == 1  # the first is positive
            for point, kind in zip(own.points[0].long().tolist(), own.labels[0].tolist()):
                assert label[b, 0, point[0], point[1]] == kind
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize(("value", "kind"), [(0.0, 0.0), (1.0, 1.0)], ids=["empty", "full"])
def test_points_of_a_mask_of_one_value_have_that_label(value, kind):
    sampler, source = PromptSampler(max_points=5), generator()
    for _ in range(10):
        drawn = sampler.draw(torch.full((2, 1, 6, 7, 4), value), "points", source)
        assert {label for own in drawn for label in own.labels.flatten().tolist()} == {kind}


@pytest.mark.parametrize("shape", [(20, 30), (10, 12, 8)])
def test_a_drawn_box_is_the_jittered_box_of_its_mask(shape):
    dims = len(shape)
    first, last = (3,) * dims, (6,) * dims
    label = rectangle(shape, first, last)[None, None].float()
    sampler, source = PromptSampler(box_jitter=0.25), generator()
    for _ in range(20):
        (drawn,) = sampler.draw(label, "boxes", source)
        assert drawn.boxes.shape == (1, 2 * dims)
        assert float((drawn.boxes[0] - torch.tensor([*first, *last])).abs().max()) <= 0.25 * 4 + 1e-4


def test_a_box_of_an_empty_mask_lies_anywhere_inside():
    sampler, source = PromptSampler(), generator()
    draws = [sampler.draw(torch.zeros(2, 1, 20, 30), "boxes", source) for _ in range(50)]
    boxes = torch.cat([own.boxes for drawn in draws for own in drawn])
    assert bool((boxes[:, :2] <= boxes[:, 2:]).all())
    assert bool((boxes >= 0).all())
    assert bool((boxes <= torch.tensor([19.0, 29.0, 19.0, 29.0])).all())
    assert float(boxes[:, 2:].amax()) > 20


def test_automatic_steps_have_no_prompt():
    assert PromptSampler().draw(torch.ones(1, 1, 4, 4), "none", generator()) == [Prompts()]


def test_draws_depend_on_the_generator_alone():
    label = rectangle((20, 20), (4, 5), (10, 15))[None, None].float()
    for mode in ("points", "boxes"):
        a, b = (PromptSampler().draw(label, mode, generator(3)) for _ in range(2))
        assert a == b
        assert a != PromptSampler().draw(label, mode, generator(4))


@pytest.mark.parametrize(("missed", "label"), [(True, 1), (False, 0)])
def test_a_correction_points_at_an_error_with_the_label_it_should_have(missed, label):
    small, large = rectangle((20, 20), (5, 5), (8, 8)), rectangle((20, 20), (5, 5), (8, 14))
    prediction, target = (small, large) if missed else (large, small)
    for seed in range(20):
        point, kind = error_point(prediction, target, generator(seed))
        assert kind == label
        assert 5 <= point[0] <= 8
        assert 9 <= point[1] <= 14


def test_a_right_mask_needs_no_correction():
    mask = rectangle((8, 8), (1, 1), (4, 4))
    assert error_point(mask, mask, generator()) is None


@pytest.mark.parametrize("kind", ["none", "points", "boxes"])
def test_corrections_are_added_after_the_prompts_that_are_there(kind):
    target = torch.stack([rectangle((16, 16), (2, 2), (9, 9))] * 3)[:, None]
    prediction = target.clone()
    prediction[0, 0, 5, 5] = False  # missed
    prediction[1, 0, 14, 15] = True  # false
    sampler = PromptSampler(max_points=3)
    prompts = sampler.draw(target.float(), kind, generator(1))
    corrected = add_correction(prompts, prediction, target.float(), generator())
    before = prompts[0].points.shape[1] if kind == "points" else 0
    assert [own.points.shape for own in corrected] == [(1, before + 1, 2)] * 3
    assert [own.points[0, -1].tolist() for own in corrected[:2]] == [[5, 5], [14, 15]]
    assert [float(own.labels[0, -1]) for own in corrected] == [1.0, 0.0, -1.0]  # the last has no error: padding
    for own, there in zip(corrected, prompts):
        if kind == "points":
            assert torch.equal(own.points[:, :-1], there.points)
            assert torch.equal(own.labels[:, :-1], there.labels)
            assert there.points.shape[1] == before  # the input is left alone
        if kind == "boxes":
            assert torch.equal(own.boxes, there.boxes)
            assert there.points is None


# ---------------------------------------------------------------- volumes of several classes


def organs() -> torch.Tensor:
    """Classes 1 (slices 1 to 3), 2 (one voxel) and 4, of 5."""
    label = torch.zeros(10, 12, 6)
    label[1:4, 2:5, 1:4] = 1
    label[7, 8, 5] = 2
    label[5:9, 1:4, :] = 4
    return label


def test_masks_of_classes_are_where_the_label_has_them():
    masks = class_masks(organs()[None, None], torch.tensor([3, 0, 2]))
    assert masks.shape == (1, 3, 10, 12, 6)
    assert torch.equal(masks[0, 0], organs() == 4)
    assert torch.equal(masks[0, 1], organs() == 1)
    assert not masks[0, 2].any()


@pytest.mark.parametrize("protocol", VOLUME_PROTOCOLS)
def test_a_volume_protocol_prompts_for_the_classes_that_are_there(protocol):
    label = organs()
    prompts = class_protocol_prompts(label, 5, protocol, generator())
    if protocol == "none":
        assert prompts == Prompts()
        return
    assert prompts.classes.tolist() == [0, 1, 3]
    if protocol.startswith("box"):
        assert prompts.boxes.shape == (3, 6)
        if protocol == "box":
            assert prompts.boxes[0].tolist() == [1, 2, 1, 3, 4, 3]
        return
    counts = {"point": [1, 1, 1], "points3": [3, 3, 3], "point_per_slice": [3, 1, 6]}[protocol]
    assert prompts.labels.shape == (3, max(counts))
    for k, value in enumerate((1, 2, 4)):
        assert (prompts.labels[k] == 1).sum() == counts[k]
        assert (prompts.labels[k] == -1).sum() == max(counts) - counts[k]
        for point in prompts.points[k, : counts[k]].long().tolist():
            assert label[tuple(point)] == value
    if protocol == "point_per_slice":
        assert prompts.points[2, :, 2].tolist() == [0, 1, 2, 3, 4, 5]


def test_an_unlabelled_volume_gives_no_prompts_and_an_unknown_protocol_is_named():
    assert class_protocol_prompts(torch.zeros(4, 4, 4), 3, "point", generator()) == Prompts()
    with pytest.raises(ValueError, match="point_per_slice"):
        class_protocol_prompts(organs(), 5, "points", generator())


def test_prompts_and_corrections_are_drawn_for_each_class_of_each_volume():
    masks = class_masks(torch.stack([organs(), organs().flip(0)]).unsqueeze(1), torch.tensor([0, 3, 2])).float()
    points = PromptSampler(max_points=3).draw(masks, "points", generator())
    count = points[0].labels.shape[1]
    for b, own in enumerate(points):
        assert own.points.shape == (3, count, 3)
        for k in range(3):
            for point, label in zip(own.points[k].long().tolist(), own.labels[k]):
                assert masks[b, k][tuple(point)] == label
        assert (own.labels[2] == 0).all(), "an absent class gets background points"
    boxes = PromptSampler(box_jitter=0.0).draw(masks, "boxes", generator())
    assert [own.boxes[0].tolist() for own in boxes] == [[1, 2, 1, 3, 4, 3], [6, 2, 1, 8, 4, 3]]
    corrected = add_correction(points, torch.zeros_like(masks) > 0, masks, generator())
    assert [own.points.shape for own in corrected] == [(3, count + 1, 3)] * 2
    assert [own.labels[:, -1].tolist() for own in corrected] == [[1, 1, -1]] * 2


@pytest.mark.parametrize("mode", ["points", "boxes"])
def test_with_a_generator_for_each_image_its_prompts_do_not_depend_on_the_batch(mode):
    label = torch.zeros(4, 2, 16, 16)
    label[:, :, 3:9, 5:13] = 1
    sampler = PromptSampler()

    def prompts(images: list[int]) -> list[Prompts]:
        generators = [torch.Generator().manual_seed(i) for i in images]
        drawn = sampler.draw(label[images], mode, generators, count=2)
        return add_correction(drawn, label[images] > 2, label[images], generators)

    together = prompts([0, 1, 2, 3])
    for images in ([0, 2], [1, 3]):
        assert prompts(images) == [together[i] for i in images]
    assert together[0] != together[1]
