from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import AsDiscreted
from PIL import Image

from medsa_nets.errors import DataError
from medsa_nets.transforms import BinarizeMaskd, ClassMapd, ClassMasksd, SeparateClassesd


def item(mask: torch.Tensor, size: tuple[int, ...] | None = None) -> dict[str, MetaTensor]:
    image = torch.zeros(3, *(size or mask.shape))
    return {
        "image": MetaTensor(image, meta={"filename_or_obj": "photo.jpg"}),
        "label": MetaTensor(mask[None].float(), meta={"filename_or_obj": "photo_mask.png"}),
    }


def disc(shape: tuple[int, ...] = (40, 50)) -> torch.Tensor:
    grid = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    return (sum(axis**2 for axis in grid) < 0.4).float()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255), (0, 200), (3, 250), (0, 2)])
@pytest.mark.parametrize("shape", [(40, 50), (12, 14, 9)])
def test_two_values_become_0_and_1(low, high, shape):
    mask = disc(shape)
    out = BinarizeMaskd("label")(item(low + mask * (high - low)))["label"]
    assert out.shape == (1, *shape)
    assert torch.equal(out.as_tensor()[0], mask)


def test_a_jpeg_mask_becomes_what_was_drawn():
    mask = disc((120, 160)).numpy().astype(np.uint8) * 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "JPEG", quality=75)
    decoded = np.asarray(Image.open(file))
    assert len(np.unique(decoded)) > 10
    out = BinarizeMaskd("label")(item(torch.from_numpy(decoded.astype(np.float32))))["label"]
    assert set(torch.unique(out).tolist()) == {0.0, 1.0}
    assert np.mean(out.numpy()[0] != mask / 255) < 0.001


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 1), (255, 1), (65535, 1)])
def test_a_mask_of_one_value_is_empty_or_full(value, expected):
    out = BinarizeMaskd("label")(item(torch.full((6, 8), float(value))))["label"]
    assert set(out.flatten().tolist()) == {float(expected)}


def test_a_mask_with_three_values_is_refused_with_its_values():
    mask = torch.zeros(20, 20)
    mask[5:15, :10], mask[5:15, 10:] = 1, 2
    with pytest.raises(DataError, match=r"photo_mask\.png: the mask has 3 values \(0, 1, 2") as caught:
        BinarizeMaskd("label")(item(mask))
    assert "expected two" in str(caught.value)


def test_a_grey_picture_is_no_mask():
    with pytest.raises(DataError, match="400 values"):
        BinarizeMaskd("label")(item(torch.arange(400.0).reshape(20, 20)))


def test_a_mask_of_another_size_is_refused_with_both_sizes_and_names():
    with pytest.raises(DataError) as caught:
        BinarizeMaskd("label")(item(disc((40, 50)), size=(80, 100)))
    message = str(caught.value)
    for part in ("photo_mask.png", "photo.jpg", "40 x 50", "80 x 100"):
        assert part in message


def test_a_missing_mask_is_passed_over_where_that_is_allowed():
    data = item(disc())
    del data["label"]
    assert BinarizeMaskd("label", allow_missing_keys=True)(data).keys() == {"image"}
    with pytest.raises(KeyError):
        BinarizeMaskd("label")(data)


def test_the_data_that_came_in_stay_as_they_are():
    data = item(disc() * 255)
    BinarizeMaskd("label")(data)
    assert float(data["label"].max()) == 255


def rings() -> torch.Tensor:
    """0 outside, 1 in a disc, 2 in a smaller one inside it."""
    grid = torch.meshgrid(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 50), indexing="ij")
    distance = grid[0] ** 2 + grid[1] ** 2
    return (distance < 0.6).float() + (distance < 0.2)


@pytest.mark.parametrize(
    ("outside", "outer", "inner", "settings"),
    [
        (0, 1, 2, {}),
        (0, 128, 255, {"values": [128, 255]}),
        (255, 128, 0, {"values": [128, 0], "background": [255]}),
    ],
)
def test_each_class_gets_a_mask_of_the_values_that_mark_it(outside, outer, inner, settings):
    part = rings()
    label = torch.tensor([outside, outer, inner], dtype=torch.float32)[part.long()]
    out = ClassMasksd("label", ["outer", "inner"], **settings)(item(label))["label"]
    assert out.shape == (2, 40, 50)
    assert out.meta["filename_or_obj"] == "photo_mask.png"
    assert torch.equal(out.as_tensor(), torch.stack([part == 1, part == 2]).float())


def test_a_value_of_two_classes_makes_them_overlap():
    part = rings()
    label = torch.tensor([255.0, 128.0, 0.0])[part.long()]
    out = ClassMasksd("label", ["disc", "cup"], values=[[0, 128], [0]], background=[255])(item(label))["label"]
    assert torch.equal(out.as_tensor(), torch.stack([part >= 1, part == 2]).float())


def test_one_class_without_values_is_any_two_valued_mask():
    mask = disc()
    out = ClassMasksd("label", ["lesion"])(item(3 + 200 * mask))["label"]
    assert torch.equal(out.as_tensor()[0], mask)


def test_a_class_that_is_not_there_is_empty():
    out = ClassMasksd("label", ["outer", "inner"])(item(disc()))["label"]
    assert out.flatten(1).any(-1).tolist() == [True, False]


def test_a_value_that_no_class_has_is_an_error_with_file_value_and_expected_values():
    label = rings()
    label[0, 0] = 7
    with pytest.raises(DataError) as caught:
        ClassMasksd("label", ["outer", "inner"])(item(label))
    message = str(caught.value)
    assert message.startswith("photo_mask.png: the map of classes holds 7; expected background: 0; outer: 1; inner: 2.")
    assert "class_values" in message
    with pytest.raises(DataError, match=r"the mask is 40 x 50 pixels, its image photo\.jpg is 41 x 50"):
        ClassMasksd("label", ["outer", "inner"])(item(rings(), (41, 50)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"values": [1]}, "values for 1 classes, but there are 2"),
        ({"values": [1, []]}, "the class inner has no value"),
        ({"values": [1, [2, 0]]}, "the class inner has 0, which is background too"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(settings, told):
    with pytest.raises(DataError, match=told):
        ClassMasksd("label", ["outer", "inner"], **settings)


def test_a_pixel_holds_its_most_probable_class_or_all_that_are_probable():
    logits = torch.tensor([[2.0, 1.0, -1.0, 40.0], [1.0, 3.0, -2.0, 50.0]]).reshape(2, 2, 2)
    held = SeparateClassesd("pred")({"pred": logits})["pred"]
    assert held.flatten(1).tolist() == [[1, 0, 0, 0], [0, 1, 0, 1]]
    held = SeparateClassesd("pred", overlap=True)({"pred": logits})["pred"]
    assert held.flatten(1).tolist() == [[1, 1, 0, 1], [1, 1, 0, 1]]


@pytest.mark.parametrize("overlap", [False, True])
def test_one_class_is_held_as_monai_tells_it(overlap):
    values = MetaTensor(torch.tensor([0.2, 0.5, 0.4999999, 0.9]).reshape(1, 2, 2), meta={"filename_or_obj": "a.png"})
    ours = SeparateClassesd("pred", overlap=overlap, threshold=0.5)({"pred": values})["pred"]
    theirs = AsDiscreted("pred", threshold=0.5)({"pred": values})["pred"]
    assert torch.equal(ours, theirs)
    assert (ours.dtype, ours.meta["filename_or_obj"]) == (theirs.dtype, theirs.meta["filename_or_obj"])


def test_masks_of_classes_become_one_map_and_of_those_that_overlap_the_last_is_seen():
    masks = MetaTensor(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]).reshape(2, 2, 2))
    out = ClassMapd("pred")({"pred": masks})["pred"]
    assert out.shape == (1, 2, 2)
    assert out.flatten().tolist() == [1, 2, 2, 0]
