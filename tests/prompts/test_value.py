"""Prompts as a value: its rules, and what becomes of each tensor when it is cut, joined, moved or batched."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from monai.data import MetaTensor

from medsa_nets.prompts import Prompts, bounding_box

SIZE = (6, 7, 8)


def volume_prompts(sets: int = 2, points: int = 3, depth: int = 8) -> Prompts:
    """Prompts of every kind for a volume, no two sets alike."""
    places = torch.arange(sets * points * 3, dtype=torch.float32).reshape(sets, points, 3) % 5
    boxes = torch.tensor([[0.0, 1, 2, 3, 4, 5]]) + torch.arange(sets).reshape(-1, 1)
    return Prompts(
        points=places, labels=torch.arange(sets * points).reshape(sets, points) % 2.0, boxes=boxes,
        masks=torch.randn(sets, 8, 8, depth), classes=torch.arange(sets) + 4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"points": torch.zeros(1, 1, 2)}, "points came without labels"),
        ({"labels": torch.zeros(1, 1)}, "labels came without points"),
        ({"points": torch.zeros(1, 1, 1, 2), "labels": torch.zeros(1, 1, 1)}, r"points must be \(K, P, dims\)"),
        ({"points": torch.zeros(1, 2, 2), "labels": torch.zeros(1, 1)}, r"got \(1, 2, 2\) and \(1, 1\)"),
        ({"points": torch.zeros(1, 1, 4), "labels": torch.zeros(1, 1)}, "2 or 3 dimensions, got 4"),
        ({"boxes": torch.zeros(1, 1, 4)}, r"boxes must be \(K, 2 \* dims\), got \(1, 1, 4\)"),
        ({"boxes": torch.zeros(1, 5)}, "boxes must be"),
        ({"masks": torch.zeros(8, 8)}, r"masks must be \(K, 4 h, 4 w\)"),
        ({"classes": torch.zeros(1, 2)}, r"classes must be \(K,\)"),
        ({"boxes": torch.zeros(2, 4), "classes": torch.arange(3)}, "number of sets, got boxes 2, classes 3"),
        ({"boxes": torch.zeros(1, 4), "masks": torch.zeros(1, 8, 8, 3)}, "dimensions, got boxes 2, masks 3"),
    ],
)
def test_what_does_not_fit_together_is_named(tensors, message):
    with pytest.raises(ValueError, match=message):
        Prompts(**tensors)


def test_a_value_is_frozen_and_equal_by_its_tensors():
    prompts = volume_prompts()
    with pytest.raises(FrozenInstanceError):
        prompts.boxes = None
    assert prompts == copy.deepcopy(prompts) == pickle.loads(pickle.dumps(prompts))
    assert prompts != replace(prompts, boxes=prompts.boxes + 1)
    assert prompts != replace(prompts, classes=None)
    assert prompts != "prompts"


@pytest.mark.parametrize(
    ("prompts", "true", "automatic", "sets"),
    [
        (Prompts(), False, True, 0),
        (Prompts(classes=torch.tensor([3, 1])), True, True, 2),
        (Prompts(boxes=torch.zeros(1, 4)), True, False, 1),
        (Prompts(masks=torch.zeros(3, 8, 8)), True, False, 3),
        (Prompts(points=torch.zeros(2, 1, 3), labels=torch.ones(2, 1), classes=torch.arange(2)), True, False, 2),
    ],
)
def test_a_value_knows_what_it_asks_for(prompts, true, automatic, sets):
    assert (bool(prompts), prompts.automatic, prompts.sets) == (true, automatic, sets)


def test_sets_are_selected_by_place_or_class_with_all_that_belongs_to_them():
    prompts = volume_prompts(sets=3)
    for part in (prompts.select([2, 0]), prompts.select(classes=[6, 4])):
        assert part.classes.tolist() == [6, 4]
        for name in ("points", "labels", "boxes", "masks"):
            assert torch.equal(getattr(part, name), getattr(prompts, name)[[2, 0]])
    with pytest.raises(ValueError, match=r"no prompts for class 9; the classes are \[4, 5, 6\]"):
        prompts.select(classes=[9])
    with pytest.raises(ValueError, match="no prompt set 3; there are 3"):
        prompts.select([3])
    with pytest.raises(ValueError, match="either sets or classes"):
        prompts.select()


def test_joined_sets_have_padding_where_they_had_fewer_points():
    long, short = volume_prompts(1, 3), volume_prompts(2, 1)
    joined = Prompts.join([short, long])
    assert joined.classes.tolist() == [4, 5, 4]
    assert joined.labels.tolist() == [[0, -1, -1], [1, -1, -1], [0, 1, 0]]
    assert torch.equal(joined.points[:2, :1], short.points)
    assert torch.equal(joined.points[2:], long.points)
    assert torch.equal(joined.select([2]).masks, long.masks)
    assert Prompts.join([long.select([0])]) == long
    with pytest.raises(ValueError, match="same kinds can be joined, got boxes, classes"):
        Prompts.join([Prompts(boxes=torch.zeros(1, 4)), Prompts(classes=torch.zeros(1))])
    with pytest.raises(ValueError, match="got nothing"):
        Prompts.join([])


def test_points_are_kept_in_the_order_in_which_they_were_given():
    prompts = Prompts(classes=torch.tensor([1]))
    for step in range(3):
        prompts = prompts.with_points(torch.full((1, 1, 2), float(step)), torch.tensor([[step % 2]]))
    assert prompts.points.tolist() == [[[0, 0], [1, 1], [2, 2]]]
    assert prompts.labels.tolist() == [[0, 1, 0]]
    assert prompts.classes.tolist() == [1]
    assert prompts.until(2).points.tolist() == [[[0, 0], [1, 1]]]
    assert prompts.until(2).labels.tolist() == [[0, 1]]
    assert prompts.until(3) == prompts
    assert prompts.until(0) == Prompts(classes=torch.tensor([1]))
    for points in (torch.zeros(2, 1, 2), torch.zeros(1, 1, 3)):
        with pytest.raises(ValueError, match=r"number of sets|K and dims as in"):
            prompts.with_points(points, torch.ones(points.shape[:2]))


def test_a_slab_counts_its_slices_from_its_first():
    points = torch.tensor([[[1.0, 2.0, 9.0], [3.0, 4.0, 2.0]]])
    prompts = Prompts(
        points=points, labels=torch.ones(1, 2), boxes=torch.tensor([[0.0, 1.0, 4.0, 5.0, 6.0, 8.0]]),
        masks=torch.randn(1, 8, 8, 10), classes=torch.tensor([4]),
    )  # fmt: skip
    moved = prompts.shift(5, 3)
    assert moved.points.tolist() == [[[1, 2, 4], [3, 4, -3]]]
    assert moved.boxes.tolist() == [[0, 1, -1, 5, 6, 3]]
    assert torch.equal(moved.masks, prompts.masks[..., 5:8])
    assert torch.equal(prompts.shift(5).masks, prompts.masks[..., 5:])
    assert moved.labels is prompts.labels
    assert moved.classes is prompts.classes
    assert prompts.boxes[0, 2] == 4, "the volume's own prompts stay"
    with pytest.raises(ValueError, match="only prompts of volumes have slices"):
        Prompts(boxes=torch.zeros(1, 4)).shift(1)


@pytest.mark.parametrize("axes", [[], [0], [2], [0, 1, 2]])
def test_prompts_of_a_mirrored_image_lie_where_its_mirror_image_has_them(axes):
    mark = torch.zeros(1, *SIZE)
    mark[0, 1:3, 2:6, 5:7] = 1
    prompts = Prompts(
        points=torch.tensor([[[1.0, 2.0, 5.0]]]), labels=torch.ones(1, 1), boxes=bounding_box(mark[0])[None],
        masks=mark, classes=torch.tensor([2]),
    )  # fmt: skip
    found = prompts.mirror(axes, SIZE)
    there = mark.flip([axis + 1 for axis in axes])
    assert torch.equal(found.masks, there)
    assert torch.equal(found.boxes[0], bounding_box(there[0]))
    assert there[0][tuple(found.points.long().flatten().tolist())] == 1
    assert found.mirror(axes, SIZE) == prompts


@pytest.mark.parametrize("dims", [2, 3])
def test_positions_go_through_an_affine_and_corners_stay_in_order(dims):
    affine = torch.eye(4, dtype=torch.float64)
    affine[:dims, :dims] = torch.diag(torch.tensor([-2.0, 0.5, 3.0][:dims], dtype=torch.float64))
    affine[:dims, -1] = torch.tensor([20.0, 1.0, -4.0][:dims])
    point, corner = [1.0, 2.0, 3.0][:dims], [4.0, 4.0, 5.0][:dims]
    prompts = Prompts(
        points=torch.tensor([[point]]), labels=torch.ones(1, 1), boxes=torch.tensor([[*point, *corner]]),
        classes=torch.tensor([1]),
    )  # fmt: skip
    moved = prompts.through(affine)
    assert moved.points.tolist() == [[[18.0, 2.0, 5.0][:dims]]]
    assert moved.boxes.tolist() == [[*[12.0, 2.0, 5.0][:dims], *[18.0, 3.0, 11.0][:dims]]]
    assert moved.through(torch.linalg.inv(affine)) == prompts
    with pytest.raises(ValueError, match="before masks are added"):
        replace(prompts, boxes=None, masks=torch.zeros(1, *[8] * dims)).through(affine)


def test_a_batch_has_the_form_that_the_network_takes():
    one, other = volume_prompts(2, 1), volume_prompts(2, 3)
    found = Prompts.batched([one, other])
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "point_coords": (2, 2, 3, 3), "point_labels": (2, 2, 3), "boxes": (2, 2, 6), "masks": (2, 2, 8, 8, 8),
        "classes": (2,),
    }  # fmt: skip
    assert found["point_labels"][0].tolist() == [[0, -1, -1], [1, -1, -1]]
    assert torch.equal(found["point_coords"][1], other.points)
    alone = one.arguments()
    assert torch.equal(alone["point_coords"], one.points[None])
    assert torch.equal(alone["classes"], one.classes)
    assert Prompts().arguments() == {}
    assert Prompts.batched([Prompts()] * 2) == {}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Prompts(), "got 1 of boxes, 0 of nothing"),
        (Prompts(boxes=torch.zeros(2, 4)), "got 1 of boxes, 2 of boxes"),
    ],
)
def test_a_batch_asks_the_same_of_each_image(other, message):
    with pytest.raises(ValueError, match=message):
        Prompts.batched([Prompts(boxes=torch.zeros(1, 4)), other])
    with pytest.raises(ValueError, match=r"same classes, got \[1\], \[2\]"):
        Prompts.batched([Prompts(classes=torch.tensor([i])) for i in (1, 2)])


def test_tensors_with_metadata_become_plain_ones() -> None:
    boxes = MetaTensor(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert type(Prompts(boxes=boxes).boxes) is torch.Tensor
    assert type(Prompts.batched([Prompts(boxes=boxes)])["boxes"]) is torch.Tensor


@pytest.mark.parametrize("quarters", range(5))
@pytest.mark.parametrize("size", [(5, 8), SIZE])
def test_prompts_of_a_turned_image_lie_where_the_turned_image_has_them(quarters, size):
    mark = torch.zeros(1, *size)
    mark[0, 1:3, 2:6] = 1
    corner = [1.0, 2.0, 0.0][: len(size)]
    prompts = Prompts(
        points=torch.tensor([[corner]]), labels=torch.ones(1, 1), boxes=bounding_box(mark[0])[None],
        masks=mark, classes=torch.tensor([2]),
    )  # fmt: skip
    number = torch.arange(mark.numel()).reshape(mark.shape)
    found, there = prompts.turn(quarters, size), torch.rot90(mark, quarters, (1, 2))
    place = tuple(found.points.long().flatten().tolist())
    assert torch.equal(found.masks, there)
    assert torch.equal(found.boxes[0], bounding_box(there[0]))
    assert torch.rot90(number, quarters, (1, 2))[0][place] == number[0][tuple(int(c) for c in corner)]
    assert found.turn(-quarters, there.shape[1:]) == prompts
    assert Prompts(classes=torch.tensor([2])).turn(quarters, size) == Prompts(classes=torch.tensor([2]))
