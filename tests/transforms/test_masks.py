from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medsa_nets.errors import DataError
from medsa_nets.transforms import BinarizeMaskd


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
