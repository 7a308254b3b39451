from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medsa_nets.prompts import Prompts
from medsa_nets.visualize import (
    BOX_COLOUR,
    LABEL_COLOUR,
    LINE_COLOURS,
    NEGATIVE_COLOUR,
    POSITIVE_COLOUR,
    PREDICTION_COLOUR,
    contact_sheet,
    draw_curves,
    overlay,
    overlay_sample,
    overlay_volume,
    side_by_side,
    tint,
)

WIDTH, HEIGHT = 80, 50
GREY = 102  # 0.4 of 255


@pytest.fixture
def image() -> np.ndarray:
    return np.full((3, WIDTH, HEIGHT), 0.4, dtype=np.float32)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """Mask (W, H) that is true from (x0, y0) to (x1, y1), both inclusive."""
    mask = np.zeros((WIDTH, HEIGHT), dtype=bool)
    mask[x0 : x1 + 1, y0 : y1 + 1] = True
    return mask


def places(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(x, y) of the pixels of a colour."""
    return np.argwhere((np.asarray(picture) == colour).all(axis=-1))[:, ::-1]


def extent(picture: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    found = places(picture, colour)
    return [*found.min(0).tolist(), *found.max(0).tolist()]


def test_a_picture_without_marks_is_the_image_upright():
    gradient = np.zeros((3, WIDTH, HEIGHT), dtype=np.float32)
    gradient[0] = np.linspace(0, 1, WIDTH)[:, None]  # red grows to the right
    gradient[1] = np.linspace(0, 1, HEIGHT)[None]  # green grows downwards
    picture = overlay(gradient)
    assert picture.size == (WIDTH, HEIGHT)
    assert picture.mode == "RGB"
    array = np.asarray(picture).astype(int)
    assert tuple(array[0, -1]) == (255, 0, 0)
    assert tuple(array[-1, 0]) == (0, 255, 0)


def test_intensities_outside_the_range_are_cut(image):
    image[:, :5], image[:, 5:10] = -3.0, 7.0
    array = np.asarray(overlay(image))
    assert set(array[:, :5].flatten().tolist()) == {0}
    assert set(array[:, 5:10].flatten().tolist()) == {255}


@pytest.mark.parametrize(("name", "colour"), [("prediction", PREDICTION_COLOUR), ("label", LABEL_COLOUR)])
def test_the_outline_of_a_mask_lies_on_its_edge(image, name, colour):
    picture = overlay(image, **{name: rectangle(20, 10, 59, 39)})
    found = extent(picture, colour)
    np.testing.assert_allclose(found, [20, 10, 59, 39], atol=1)
    assert tuple(np.asarray(picture)[2, 2]) == (GREY,) * 3
    inside = tuple(np.asarray(picture)[25, 40].tolist())
    assert (inside != (GREY,) * 3) is (name == "prediction")  # only predictions are tinted
    assert inside != colour


@pytest.mark.parametrize("name", ["prediction", "label"])
def test_an_empty_mask_draws_nothing(image, name):
    picture = overlay(image, **{name: np.zeros((WIDTH, HEIGHT), dtype=bool)})
    assert np.array_equal(np.asarray(picture), np.asarray(overlay(image)))


def test_points_are_drawn_at_their_place_in_the_colour_of_their_label(image):
    points, labels = np.array([[10.0, 40.0], [60.0, 8.0], [40.0, 25.0]]), np.array([1.0, 0.0, -1.0])
    picture = overlay(image, point_coords=points, point_labels=labels)
    for point, colour in ((points[0], POSITIVE_COLOUR), (points[1], NEGATIVE_COLOUR)):
        np.testing.assert_allclose(places(picture, colour).mean(0), point, atol=0.6)
    assert tuple(np.asarray(picture)[25, 40]) == (GREY,) * 3  # padding is not drawn


def test_boxes_are_drawn_at_their_corners(image):
    picture = overlay(image, boxes=np.array([[12, 5, 70, 44]]))
    assert extent(picture, BOX_COLOUR) == [12, 5, 70, 44]
    assert tuple(np.asarray(picture)[25, 40]) == (GREY,) * 3


def test_a_sample_of_tensors_gives_the_picture_of_its_arrays(image):
    prediction, label = rectangle(20, 10, 59, 39), rectangle(30, 10, 50, 45)
    prompts = Prompts(
        points=torch.tensor([[[10.0, 40.0]]]),
        labels=torch.tensor([[1.0]]),
        boxes=torch.tensor([[12.0, 5.0, 70.0, 44.0]]),
    )
    picture = overlay_sample(
        torch.from_numpy(image),
        prediction=torch.from_numpy(prediction)[None].float(),
        label=torch.from_numpy(label)[None],
        prompts=prompts,
    )
    expected = overlay(
        image,
        prediction=prediction,
        label=label,
        point_coords=np.array([[10.0, 40.0]]),
        point_labels=np.array([1.0]),
        boxes=np.array([[12, 5, 70, 44]]),
    )
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    bare = overlay_sample(torch.from_numpy(image), prompts=Prompts())
    assert np.array_equal(np.asarray(bare), np.asarray(overlay(image)))


def test_a_contact_sheet_holds_a_cell_for_each_picture(tmp_path):
    red, blue = Image.new("RGB", (40, 20), (255, 0, 0)), Image.new("RGB", (20, 40), (0, 0, 255))
    rows = [("first", [("a", red), ("b", blue)]), ("second", [("a", blue)])]
    path = contact_sheet(rows, tmp_path / "page.png", title="Title", cell=64)
    assert path == tmp_path / "page.png"
    page = Image.open(path)
    found_red, found_blue = places(page, (255, 0, 0)), places(page, (0, 0, 255))
    assert len(found_red) == 64 * 32
    assert len(found_blue) == 2 * 64 * 32
    # the blue picture of the second row stands below the red one, in the same column
    assert found_red[:, 0].min() == found_blue[found_blue[:, 1] > found_red[:, 1].max() + 40][:, 0].min()


def volume(shape=(40, 30, 20), spacing=(1.0, 1.0, 2.0)) -> MetaTensor:
    return MetaTensor(torch.full((1, *shape), 0.4), affine=torch.diag(torch.tensor([*spacing, 1.0])))


def test_three_planes_meet_in_the_click_as_a_radiologist_sees_them():
    image = volume()
    prompts = Prompts(points=torch.tensor([[[10.0, 5.0, 15.0]]]), labels=torch.ones(1, 1))
    page = overlay_volume(image, torch.full((2, 40, 30, 20), -1.0), prompts=prompts, height=120)
    # planes of 40 x 30, 40 x 20 and 30 x 20 voxels, of 40 x 30, 40 x 40 and 30 x 40 mm, all at 3 pixels per mm
    widths, heights = [120, 120, 90], [90, 120, 120]
    assert page.size == (sum(widths) + 8, 120)
    left = 0
    right_to_left, back_to_front, head_to_feet = 1 - 10.5 / 40, 1 - 5.5 / 30, 1 - 15.5 / 20
    centres = [(right_to_left, back_to_front), (right_to_left, head_to_feet), (back_to_front, head_to_feet)]
    for width, height, (x, y) in zip(widths, heights, centres):
        found = places(page.crop((left, 0, left + width, 120)), POSITIVE_COLOUR).mean(axis=0)
        np.testing.assert_allclose(found, [x * width - 0.5, y * height - 0.5], atol=1.5)
        left += width + 4


def test_volumes_show_masks_of_every_class_and_boxes_of_their_plane():
    image = volume()
    logits = torch.full((2, 40, 30, 20), -1.0)
    logits[0, 5:10, 5:10, 5:10] = logits[1, 10:15, 5:10, 5:10] = 1.0
    label = torch.zeros(1, 40, 30, 20)
    label[0, 25:35, 15:25, 5:10] = 2
    box = torch.tensor([[5.0, 5.0, 5.0, 9.0, 9.0, 9.0]])
    page = overlay_volume(image, logits, label=label, prompts=Prompts(boxes=box), height=120)
    for colour in (PREDICTION_COLOUR, LABEL_COLOUR, BOX_COLOUR):
        assert len(places(page, colour)) > 50
    # two classes side by side keep an outline between them
    axial = page.crop((0, 0, 120, 90))
    row = np.asarray(axial)[round(90 * (1 - 7.5 / 30))]
    border = round(120 * (1 - 10 / 40))
    assert any(tuple(row[x]) == PREDICTION_COLOUR for x in range(border - 3, border + 3))
    # a few slices of a wide volume make a low picture, not an endless one
    thin = overlay_volume(volume((60, 40, 3)), torch.full((1, 60, 40, 3), -1.0), prompts=Prompts(), height=120)
    assert thin.size == (3 * (60 + 60 + 40) + 8, 120)
    nothing = overlay_volume(image, torch.full((1, 40, 30, 20), -1.0), prompts=Prompts(), height=60)
    assert len(places(nothing, PREDICTION_COLOUR)) == 0


def test_curves_rise_where_their_values_do():
    picture = np.asarray(draw_curves({"a": [0.5, 0.7, 0.9], "b": [float("nan"), 0.6, 0.6]}, "clicks", "Dice"))
    heights = {}
    for number, name in enumerate("ab"):
        rows, columns = np.nonzero((picture[:280] == LINE_COLOURS[number]).all(-1))  # the legend lies below
        rows, columns = rows[columns < 230], columns[columns < 230]
        heights[name] = [rows[columns == c].mean() for c in (columns.min(), columns.max())]
    assert heights["a"][1] < heights["a"][0] - 30
    assert heights["b"][1] == pytest.approx(heights["b"][0], abs=2)


def test_pictures_beside_each_other_have_one_height():
    page = side_by_side([Image.new("RGB", (100, 50)), Image.new("RGB", (30, 60))], "two", height=120)
    assert page.size == (6 + 246 + 66, 148)


def test_a_mask_is_tinted_and_its_outline_drawn():
    canvas = np.full((4, 5, 3), 100.0, dtype=np.float32)
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 1:4] = True
    line = np.zeros_like(mask)
    line[1, 1] = True
    tint(canvas, mask, (200, 0, 100), line)
    assert canvas[1, 1].tolist() == [200, 0, 100]
    assert canvas[2, 3].tolist() == [125, 75, 100]
    assert (canvas[~mask] == 100).all()
