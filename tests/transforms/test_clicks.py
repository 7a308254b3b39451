"""Requests of annotation tools: which clicks become which prompts, and what the reply says of the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Spacingd

from medsa_nets.prompts import Prompts, prompts_of, prompts_of_batch
from medsa_nets.transforms import PromptsToNetworkd, ReadClicksd

CLASSES = ["Spleen", "left kidney", "liver"]


def image(shape: tuple[int, ...] = (20, 24, 9), affine: np.ndarray | None = None) -> MetaTensor:
    affine = np.eye(4) if affine is None else affine
    return MetaTensor(torch.zeros(1, *shape), affine=affine, meta={"original_affine": affine})


def read(request: dict, classes: list[str] = CLASSES, shape: tuple[int, ...] = (20, 24, 9)) -> dict:
    return ReadClicksd(classes)({"image": image(shape), **request})


def sets(data: dict) -> dict[int, list[tuple[list[float], int]]]:
    """Clicks and their labels of each class, without padding."""
    out, prompts = {}, prompts_of(data["image"])
    for index, points, labels in zip(prompts.classes.tolist(), prompts.points, prompts.labels):
        out[index] = [(p.tolist(), int(v)) for p, v in zip(points, labels) if v >= 0]
    return out


def test_lists_per_class_as_slicer_and_ohif_send_them() -> None:
    data = read({"spleen": [[14, 10, 6]], "left kidney": [], "liver": [[1, 2, 3], [4, 5, 6]], "label": "spleen",
                 "background": [[2, 2, 2]], "device": "cpu", "result_extension": ".nrrd"})  # fmt: skip
    assert sets(data) == {
        0: [([14.0, 10.0, 6.0], 1), ([2.0, 2.0, 2.0], 0)],  # the negative click is about the label in focus
        2: [([1.0, 2.0, 3.0], 1), ([4.0, 5.0, 6.0], 1)],
    }
    assert "result" not in data


def test_negative_clicks_are_about_every_clicked_class_where_none_is_in_focus() -> None:
    data = read({"spleen": [[1, 1, 1]], "liver": [[3, 3, 3]], "background": [[2, 2, 2]]})
    assert list(sets(data).values()) == [
        [([1.0, 1.0, 1.0], 1), ([2.0, 2.0, 2.0], 0)],
        [([3.0, 3.0, 3.0], 1), ([2.0, 2.0, 2.0], 0)],
    ]


def test_foreground_and_background_as_deepgrow_sends_them() -> None:
    data = read({"foreground": [[5, 6, 7]], "background": [[1, 1, 1]], "label": "Liver"})
    assert sets(data) == {2: [([5.0, 6.0, 7.0], 1), ([1.0, 1.0, 1.0], 0)]}
    data = read({"foreground": [[5, 6]]}, ["lesion"], (20, 24))
    assert sets(data) == {0: [([5.0, 6.0], 1)]}
    data = read({"foreground": [[5, 6, 0]]}, ["lesion"], (20, 24))  # a photograph's clicks may have a third number
    assert sets(data) == {0: [([5.0, 6.0], 1)]}


def test_a_negative_click_alone_is_about_the_label_in_focus() -> None:
    assert sets(read({"background": [[1, 1, 1]], "label": "liver"})) == {2: [([1.0, 1.0, 1.0], 0)]}


@pytest.mark.parametrize("request_", [{}, {"spleen": []}, {"label": "spleen"}, {"background": []}])
def test_without_clicks_there_is_no_prompt(request_: dict) -> None:
    data = read(request_)
    assert set(data) == {"image", *request_}
    assert prompts_of(data["image"]) == Prompts()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"gallbladder": [[1, 2, 3]]}, "gallbladder: unknown label; expected one of spleen, left kidney, liver"),
        ({"spleen": [[20, 1, 1]]}, "spleen: the click [20, 1, 1] lies outside the image, which is 20 x 24 x 9"),
        ({"spleen": [[-1, 1, 1]]}, "lies outside the image"),
        ({"spleen": [[1, 1]]}, "spleen: [1, 1] is no click; expected 3 voxel indices"),
        ({"spleen": "here"}, "spleen: 'here' is no click"),
        ({"spleen": [None]}, "spleen: None is no click"),
        ({"spleen": [[1, float("nan"), 1]]}, "is no click"),
        ({"foreground": [[1, 1, 1]]}, "label: expected the class that is clicked on, one of spleen"),
        ({"foreground": [[1, 1, 1]], "label": "heart"}, "label: 'heart' is unknown"),
        ({"background": [[1, 1, 1]]}, "label: expected the class that is clicked on"),
    ],
)
def test_what_cannot_be_used_is_said_in_the_reply(request_: dict, message: str) -> None:
    data = read({**request_, "liver": []})
    assert message in " ".join(data["result"]["messages"])
    assert prompts_of(data["image"]) == Prompts()


def test_usable_clicks_count_although_others_are_wrong() -> None:
    data = read({"spleen": [[99, 1, 1], [3, 3, 3]], "heart": [[1, 1, 1]], "result": {"earlier": 1}})
    assert sets(data) == {0: [([3.0, 3.0, 3.0], 1)]}
    assert len(data["result"]["messages"]) == 2
    assert data["result"]["earlier"] == 1


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, 1)])
def test_prompts_travel_with_the_image_to_the_inferer(signs: tuple[int, int, int]) -> None:
    affine = np.diag([*(np.array([2.0, 1.5, 3.0]) * signs), 1.0])
    affine[:3, 3] = [5, -9, 30]
    source = image(affine=affine)
    click = [14, 10, 6]
    source[0, 14, 10, 6] = 1.0
    transforms = Compose([
        ReadClicksd(CLASSES), Orientationd("image", "RAS", labels=None),
        Spacingd("image", (1.0, 1.0, 1.0)), PromptsToNetworkd(),
    ])  # fmt: skip
    batch = transforms({"image": source, "liver": [click]})["image"][None].to("cpu")
    (prompts,) = prompts_of_batch(batch)
    assert prompts.classes.tolist() == [2]
    assert prompts.points.shape == (1, 1, 3)
    place = prompts.points[0, 0].round().long().tolist()
    assert batch[0, 0][tuple(place)] > 0.5 * batch.max()
    without = transforms({"image": source})["image"][None]
    assert prompts_of_batch(without) == [Prompts()]
