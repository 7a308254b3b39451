"""Masks as people save them; what they show is decided by the drawing, PIL writes the files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import Compose, LoadImaged
from PIL import Image

from medsa_nets.data import PhotographReader
from medsa_nets.data.masks import binarize_mask
from medsa_nets.errors import DataError, find_cause
from medsa_nets.transforms import BinarizeMaskd, ReadPromptsd

SHAPE = (60, 80)  # rows, columns


def drawing() -> np.ndarray:
    rows, columns = np.ogrid[: SHAPE[0], : SHAPE[1]]
    return (rows - 25) ** 2 + (columns - 45) ** 2 < 15**2


def rim() -> np.ndarray:
    return np.logical_xor(drawing(), np.roll(drawing(), 2, axis=1))


def palette(indices: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def load(path: Path) -> np.ndarray:
    """What the bundles' transforms make of a mask: (rows, columns), boolean."""
    Image.new("RGB", Image.open(path).size).save(path.parent / "photo.png")
    transforms = Compose(
        [
            LoadImaged("image", reader=PhotographReader(mode="RGB"), ensure_channel_first=True),
            LoadImaged("label", reader=PhotographReader(mode="L"), ensure_channel_first=True),
            BinarizeMaskd("label"),
        ]
    )
    out = transforms({"image": str(path.parent / "photo.png"), "label": str(path)})["label"]
    assert set(torch.unique(out).tolist()) <= {0.0, 1.0}
    return out[0].numpy().T > 0


def colour(background: tuple[int, ...], foreground: tuple[int, ...]) -> np.ndarray:
    return np.where(drawing()[..., None], np.array(foreground), np.array(background)).astype(np.uint8)


def of_jpeg(image: Image.Image, quality: int = 75) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
GREY = drawing().astype(np.uint8)
CLEAR = {
    "palette with colours": lambda: palette(GREY, VOC),
    "palette, class 2 alone": lambda: palette(GREY * 2, VOC),
    "palette without colours": lambda: palette(GREY, [(0, 0, 0)] * 3),
    "palette of black and white, white first": lambda: palette(1 - GREY, [(255, 255, 255), (0, 0, 0)]),
    "palette of red and black, red first": lambda: palette(1 - GREY, [(255, 0, 0), (0, 0, 0)]),
    "one bit": lambda: Image.fromarray(drawing()),
    "grey 1": lambda: Image.fromarray(GREY),
    "16 bits, 1": lambda: Image.fromarray(GREY.astype(np.uint16)),
    "16 bits, 65535": lambda: Image.fromarray(GREY.astype(np.uint16) * 65535),
    "RGB (1, 0, 0)": lambda: Image.fromarray(colour((0, 0, 0), (1, 0, 0))),
    "RGB green": lambda: Image.fromarray(colour((0, 0, 0), (0, 200, 30))),
    "LA": lambda: Image.fromarray(np.stack([GREY * 255, np.full_like(GREY, 255)], axis=2), mode="LA"),
    "LA, drawn in alpha": lambda: Image.fromarray(np.stack([GREY * 0, GREY * 255], axis=2), mode="LA"),
    "RGBA, drawn in alpha on white": lambda: Image.fromarray(colour((255, 255, 255, 0), (255, 255, 255, 255))),
    "RGBA, drawn in black on transparent": lambda: Image.fromarray(colour((0, 0, 0, 0), (0, 0, 0, 255))),
    "RGBA, red on transparent": lambda: Image.fromarray(colour((0, 0, 0, 0), (255, 0, 0, 255))),
    "RGBA, opaque": lambda: Image.fromarray(colour((0, 0, 0, 255), (1, 1, 1, 255))),
    "anti-aliased": lambda: (
        Image.fromarray(GREY * 255)
        .resize((320, 240), Image.Resampling.NEAREST)
        .resize((80, 60), Image.Resampling.LANCZOS)
    ),
}


@pytest.mark.parametrize("kind", list(CLEAR))
def test_what_is_clearly_two_valued_gives_what_was_drawn(tmp_path, kind):
    CLEAR[kind]().save(tmp_path / "mask.png")
    found = load(tmp_path / "mask.png")
    assert np.mean(found != drawing()) < (0.002 if kind == "anti-aliased" else 1e-9)


@pytest.mark.parametrize("high", [0.5, 1.0, 200.0])
def test_a_mask_of_floating_point_numbers_gives_what_was_drawn(tmp_path, high):
    Image.fromarray(drawing().astype(np.float32) * high).save(tmp_path / "mask.tif")
    np.testing.assert_array_equal(load(tmp_path / "mask.tif"), drawing())


@pytest.mark.parametrize("quality", [30, 75, 95, 100])
@pytest.mark.parametrize("foreground", [(255, 255, 255), (255, 0, 0)])
def test_a_jpeg_gives_what_was_drawn(tmp_path, quality, foreground):
    Image.fromarray(colour((0, 0, 0), foreground)).save(tmp_path / "mask.jpg", quality=quality, subsampling=0)
    assert np.mean(load(tmp_path / "mask.jpg") != drawing()) < 0.004


def voc_with_rim() -> Image.Image:
    return palette(np.where(rim(), 255, GREY), [*VOC, *[(7, 7, 7)] * 252, (224, 224, 192)])


def stray(fill: np.ndarray) -> Image.Image:
    fill = fill.astype(np.uint8)
    fill[20, 40] = 255
    return Image.fromarray(fill)


UNCLEAR = {
    "palette with a void rim": (voc_with_rim, "0, 1, 255"),
    "grey with a void rim": (lambda: Image.fromarray(np.where(rim(), 128, GREY * 255).astype(np.uint8)), "0, 128, 255"),
    "classes 1 and 2": (lambda: Image.fromarray(GREY + (np.arange(80) > 45) * GREY), "0, 1, 2"),
    "classes 1 and 2 without background": (lambda: Image.fromarray(GREY + np.uint8(1)), "1, 2"),
    "one stray 255": (lambda: stray(GREY), "0, 1, 255"),
    "one stray 255 on a full mask": (lambda: stray(np.ones(SHAPE)), "1, 255"),
    "constant 100": (lambda: Image.new("L", (80, 60), 100), "1 value (100)"),
    "constant 7": (lambda: Image.new("L", (80, 60), 7), "1 value (7)"),
    "two colours, neither black": (
        lambda: Image.fromarray(colour((0, 255, 0), (255, 0, 0))),
        "2 colours ((0, 255, 0), (255, 0, 0))",
    ),
    "three colours": (
        lambda: Image.fromarray(np.where(rim()[..., None], (0, 9, 9), colour((0, 0, 0), (255, 0, 0))).astype(np.uint8)),
        "(0, 0, 0), (0, 9, 9), (255, 0, 0)",
    ),
    "alpha that contradicts the colours": (
        lambda: Image.fromarray(np.dstack([colour((0, 0, 0), (255, 255, 255)), np.roll(GREY, 9, 1) * 255])),
        "colour and alpha channel",
    ),
    "a class of its own in a JPEG": (
        lambda: of_jpeg(
            Image.fromarray(np.where(np.roll(drawing(), 4, 1) & drawing(), 128, GREY * 255).astype("uint8"))
        ),
        "values",
    ),
}


@pytest.mark.parametrize("kind", list(UNCLEAR))
def test_what_is_not_clearly_two_valued_is_refused_with_its_values(tmp_path, kind):
    image, listed = UNCLEAR[kind]
    image().save(tmp_path / "lesion_mask.png")
    with pytest.raises((DataError, RuntimeError)) as caught:  # MONAI wraps what a transform raises
        load(tmp_path / "lesion_mask.png")
    error = find_cause(caught.value)
    assert isinstance(error, DataError)
    assert "lesion_mask.png: " in str(error)
    assert listed in str(error)


def test_the_same_holds_for_the_mask_of_a_prompt(tmp_path):
    Image.new("RGB", (80, 60)).save(tmp_path / "photo.png")
    image = LoadImaged("image", reader=PhotographReader(), ensure_channel_first=True)({"image": tmp_path / "photo.png"})
    (tmp_path / "prompts.json").write_text('{"photo.png": {"mask": "mask.png"}}', encoding="utf-8")
    read = ReadPromptsd(str(tmp_path / "prompts.json"))
    Image.fromarray(GREY).save(tmp_path / "mask.png")  # 0 and 1
    read(image)
    stray(GREY).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"mask\.png: the mask has 3 values \(0, 1, 255\)"):
        read(image)


@pytest.mark.parametrize("values", [[0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [-1, 0, 1], [0.0, np.nan], []])
def test_values_of_any_number_and_kind_are_judged(values):
    with pytest.raises(DataError, match="case"):
        binarize_mask(np.array(values), "case")


def test_noise_and_a_photograph_are_no_mask():
    random = np.random.default_rng(0)
    smooth = np.kron(random.integers(0, 255, (8, 10)), np.ones((8, 8))).astype(np.uint8)
    for picture in (random.integers(0, 256, SHAPE), smooth, np.asarray(of_jpeg(Image.fromarray(smooth)))):
        with pytest.raises(DataError, match="values"):
            binarize_mask(picture, "photo", lossy=True)
