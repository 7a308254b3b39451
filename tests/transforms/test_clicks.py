"""Requests of annotation tools: which clicks become which prompts, and what the reply says of the others."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Spacingd

from medsa_nets.prompts import Prompts, prompts_of, prompts_of_batch, user_prompts_of
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
        ({"foreground": [[1, 1, 1]], "label": "h" * 5000}, "is unknown"),
        ({"foreground": [[1, 1, 1]], "label": "h\0"}, "is unknown"),
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


def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: np.ndarray, affine: np.ndarray) -> str:
    """A label map that came with a request, in the folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    nib.save(nib.Nifti1Image(values.astype(np.uint8), affine), tmp_path / "label.nii.gz")
    return str(tmp_path / "label.nii.gz")


def marks(data: dict) -> list[tuple[int, str, int, list[list[float]]]]:
    said = user_prompts_of(data["image"])
    return [(p.index, p.kind, p.label, sorted(p.positions.tolist())) for p in said]


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_label_map_of_scribbles_marks_voxels_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirrored: bool
) -> None:
    values, affine = np.zeros((20, 24, 9)), np.diag([2.0, 1.5, 3.0, 1.0])
    values[4, 5, 6] = values[4, 6, 6] = 9
    values[1, 2, 3] = 8
    values[7] = 1  # a mask that the viewer shows
    source = image(affine=affine)
    if mirrored:  # the same places, written along an axis that runs the other way
        values = values[::-1]
        affine = affine @ np.array([[-1, 0, 0, 19], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    path = drawn(tmp_path, monkeypatch, values, affine)
    info = [{"name": "liver", "id": 1}, {"name": "background_scribbles", "id": 8},
            {"name": "foreground_scribbles", "id": 9}]  # fmt: skip
    request_ = {"image": source, "label": path, "label_info": info, "selected_label_name": "Liver", "roi": []}
    expected = [(2, "scribble", 1, [[4, 5, 6], [4, 6, 6]]), (2, "scribble", 0, [[1, 2, 3]])]
    data = ReadClicksd(CLASSES)(request_)
    assert marks(data) == expected
    assert "result" not in data
    boxed = ReadClicksd(CLASSES)({**request_, "roi": [0, 12, 2, 20, 30, 1]})
    assert marks(boxed) == [(2, "box", 1, [[0, 2, 1], [12, 20, 8]]), *expected]


def test_without_names_scribbles_have_the_values_after_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.zeros((20, 24, 9))
    values[1, 1, 1], values[2, 2, 2], values[3, 3, 3] = 1, 2, 3
    path = drawn(tmp_path, monkeypatch, values, np.eye(4))
    data = ReadClicksd(["lesion"])({"image": image(), "label": path, "lesion": [[5, 5, 5]]})
    expected = [(0, "point", 1, [[5, 5, 5]]), (0, "scribble", 1, [[3, 3, 3]]), (0, "scribble", 0, [[2, 2, 2]])]
    assert marks(data) == expected
    flat = drawn(tmp_path, monkeypatch, values[:, :, 2:4].sum(2, keepdims=True), np.eye(4))
    photograph = MetaTensor(torch.zeros(3, 20, 24), affine=np.eye(4), meta={"original_affine": np.eye(4)})
    data = ReadClicksd(["lesion"])({"image": photograph, "label": flat})
    assert marks(data) == [(0, "scribble", 1, [[3, 3]]), (0, "scribble", 0, [[2, 2]])]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"selected_label_name": "heart"}, "selected_label_name: 'heart' is unknown; expected one of spleen"),
        ({}, "selected_label_name: expected one of spleen"),
        ({"selected_label_name": "liver", "shape": (10, 12, 9)}, "label: the scribbles (20 x 24 x 9 voxels) do not"),
        ({"selected_label_name": "liver", "roi": [1, 2, 3]}, "roi: expected 6 voxel indices"),
        ({"selected_label_name": "liver", "roi": [30, 40, 1, 2, 3, 4]}, "roi: [30, 40, 1, 2, 3, 4] lies outside"),
    ],
)
def test_scribbles_that_cannot_be_used_are_said_in_the_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: dict, message: str
) -> None:
    values = np.zeros((20, 24, 9))
    values[15, 15, 5] = 5
    path = drawn(tmp_path, monkeypatch, values, np.eye(4))
    source = image(request_.pop("shape", (20, 24, 9)))
    data = ReadClicksd(CLASSES)({"image": source, "label": path, **request_})
    assert message in " ".join(data["result"]["messages"])
    assert prompts_of(data["image"]) == Prompts()


def test_files_that_did_not_come_with_a_request_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.full((20, 24, 9), 3)
    path = drawn(tmp_path, monkeypatch, values, np.eye(4))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    data = ReadClicksd(["lesion"])({"image": image(), "label": path, "lesion": [[5, 5, 5]]})
    assert marks(data) == [(0, "point", 1, [[5, 5, 5]])]
    assert "is unknown" in " ".join(data["result"]["messages"])
