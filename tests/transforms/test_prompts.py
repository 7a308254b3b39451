from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.transforms import (
    Compose,
    Flipd,
    Lambdad,
    LoadImaged,
    Orientationd,
    Resized,
    Rotate90d,
    Spacingd,
)
from PIL import Image

from medsa_nets.data import PhotographReader
from medsa_nets.errors import DataError
from medsa_nets.inferers import PromptInferer
from medsa_nets.prompts import Prompts, UserPrompt, prompts_of, user_prompts_of, with_prompts, with_user_prompts
from medsa_nets.transforms import (
    EnforceUserPromptsd,
    PromptsToNetworkd,
    ReadClassPromptsd,
    ReadPromptsd,
    SamplePromptsd,
    check_prompt_keys,
    to_source_grid,
    to_tensor_grid,
)


def item(name: str = "a.jpg", size: tuple[int, ...] = (60, 40)) -> dict[str, MetaTensor]:
    label = torch.zeros(1, *size)
    label[(0, *(slice(n // 4, n // 2) for n in size))] = 1
    return {"image": MetaTensor(torch.zeros(3, *size), meta={"filename_or_obj": f"/folder/{name}"}), "label": label}


@pytest.mark.parametrize("prompt", ["point", "points3", "box50", "box75"])
def test_drawn_prompts_depend_on_name_and_seed_alone(prompt):
    kind = "boxes" if prompt.startswith("box") else "points"
    names = [f"{i}.jpg" for i in range(6)]

    def draw(seed: int, order: list[str]) -> torch.Tensor:
        transform = SamplePromptsd("label", prompt=prompt, seed=seed)
        drawn = {name: getattr(prompts_of(transform(item(name))["image"]), kind) for name in order}
        return torch.cat([drawn[name] for name in names])

    first = draw(1, names)
    assert torch.equal(first, draw(1, names[::-1]))
    assert len(first.flatten(1).unique(dim=0)) > 3
    assert not torch.equal(first, draw(2, names))


def test_drawn_prompts_do_not_depend_on_the_folder():
    moved = item("a.jpg")
    moved["image"].meta["filename_or_obj"] = "/another/place/a.jpg"
    draw = SamplePromptsd("label", prompt="points3")
    assert prompts_of(draw(item("a.jpg"))["image"]) == prompts_of(draw(moved)["image"]) != Prompts()


def test_the_exact_box_is_drawn_in_the_grid_of_the_label():
    drawn = prompts_of(SamplePromptsd("label", prompt="box")(item())["image"])
    assert drawn.boxes.tolist() == [[15, 10, 29, 19]]


def test_without_prompt_nothing_is_added():
    out = SamplePromptsd("label", prompt="none")(item())
    assert out.keys() == {"image", "label"}
    assert prompts_of(out["image"]) == Prompts()


@pytest.fixture
def write_prompts(tmp_path: Path):
    def write(content) -> str:
        path = tmp_path / "prompts.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_prompts_are_read_for_the_image_that_is_named(write_prompts):
    path = write_prompts(
        {
            "a.jpg": {"points": [[12, 30], [59, 0]], "labels": [1, 0], "box": [1, 2, 30, 39]},
            "b.jpg": {"points": [[5, 6]]},
            "c.jpg": {"box": [0, 0, 59, 39]},
        }
    )
    read = ReadPromptsd(path)
    a, b, c = (prompts_of(read(item(name))["image"]) for name in ("a.jpg", "b.jpg", "c.jpg"))
    assert a.points.tolist() == [[[12, 30], [59, 0]]]
    assert a.labels.tolist() == [[1, 0]]
    assert a.boxes.tolist() == [[1, 2, 30, 39]]
    assert b.labels.tolist() == [[1]]
    assert b.kinds == {"points"}
    assert c.boxes.tolist() == [[0, 0, 59, 39]]
    assert c.kinds == {"boxes"}


@pytest.mark.parametrize("given", [True, False])
def test_an_image_that_is_not_named_is_left_as_it_is(write_prompts, given):
    read = ReadPromptsd(write_prompts({"a.jpg": {"points": [[1, 1]]}}) if given else None)
    out = read(item("unnamed.jpg"))
    assert out.keys() == {"image", "label"}
    assert prompts_of(out["image"]) == Prompts()


def test_a_batch_of_an_image_with_and_one_without_prompts_is_refused(write_prompts):
    read = ReadPromptsd(write_prompts({"a.jpg": {"points": [[1, 1]]}}))
    batch = list_data_collate([read(item("unnamed.jpg")), read(item("a.jpg"))])
    with pytest.raises(ValueError, match=r"got 0 of nothing, 1 of points\. Take batches of one"):
        PromptInferer()(batch["image"], None)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"points": [[60, 10]]}, r"\[60\.0, 10\.0\] lies outside.*60 x 40"),
        ({"points": [[5, 5], [10, -1]], "labels": [1, 1]}, r"\[10\.0, -1\.0\] lies outside"),
        ({"box": [0, 0, 30, 40]}, r"\[30\.0, 40\.0\] lies outside"),
        ({"points": [[5, 5], [6, 6]], "labels": [1]}, "2 points but 1 labels"),
        ({"points": [[5, 5]], "labels": [2]}, "labels other than 1"),
        ({"points": [[5, 5, 5]]}, "points: expected positions of 2 voxel indices"),
        ({"points": "5, 5"}, "points: expected positions of 2 voxel indices"),
        ({"box": [1, 2, 3]}, r"box: expected 4 numbers, got \[1, 2, 3\]"),
        ({"point": [[5, 5]]}, "found point; expected some of mask, box, lasso, points"),
        ({"points": [[5, 5]], "boxes": [1, 2, 3, 4]}, "found points, boxes; expected some of"),
        ({}, "found nothing; expected some of"),
        ([[5, 5]], "expected some of mask, box"),
        ({"labels": [1]}, "expected some of mask, box"),
        ({"scribbles": [[[1, 1], [2, 2]]]}, "scribbles: expected points and label"),
        ({"scribbles": [{"points": [[1, 1]], "label": 2}]}, "label 2 other than 1"),
        ({"scribbles": [{"points": [[1, 1], [99, 1]]}]}, r"\[99\.0, 1\.0\] lies outside"),
        ({"lasso": {"points": [[1, 1], [2, 2]]}}, "3 or more corners, got 2"),
        ({"mask": "absent.png"}, r"absent\.png: there is no such file"),
    ],
)
def test_a_prompt_that_cannot_be_used_names_file_and_image(write_prompts, entry, told):
    path = write_prompts({"a.jpg": entry})
    with pytest.raises(DataError, match=told) as caught:
        ReadPromptsd(path)(item("a.jpg"))
    assert path in str(caught.value)
    assert "a.jpg" in str(caught.value)


@pytest.mark.parametrize(("content", "told"), [("{", "not readable as JSON"), ("[1]", "maps file names to prompts")])
def test_a_file_of_prompts_that_is_no_table_is_refused(write_prompts, content, told):
    path = write_prompts(content)
    with pytest.raises(DataError, match=told) as caught:
        ReadPromptsd(path)
    assert path in str(caught.value)


def test_a_missing_file_of_prompts_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json"):
        ReadPromptsd(str(tmp_path / "absent.json"))


def brightest(image: torch.Tensor) -> np.ndarray:
    """Index of the brightest voxel of the first channel."""
    return np.array(np.unravel_index(int(image[0].argmax()), image.shape[1:]))


def bright_photograph(path: Path, place: tuple[int, int], size: tuple[int, int] = (90, 60)) -> None:
    """A black photograph of ``size`` (width, height) with a bright spot of 3 x 3 pixels, brightest in its middle."""
    array = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    array[place[1] - 1 : place[1] + 2, place[0] - 1 : place[0] + 2] = 120
    array[place[1], place[0]] = 255
    Image.fromarray(array).save(path)


PHOTOGRAPH_CHAINS = {
    "none": [],
    "resized up": [Resized("image", (256, 256), mode="bilinear", anti_aliasing=True)],
    "resized down": [Resized("image", (30, 30), mode="bilinear", anti_aliasing=True)],
    "rotated": [Rotate90d("image", k=1)],
    "rotated thrice": [Rotate90d("image", k=3)],
    "flipped": [Flipd("image", spatial_axis=0)],
    "all": [
        Resized("image", (128, 96), mode="bilinear"),
        Rotate90d("image", k=1),
        Flipd("image", spatial_axis=1),
        Resized("image", (200, 160), mode="bilinear"),
    ],
}


@pytest.mark.parametrize("place", [(20, 10), (70, 48), (1, 1)])
@pytest.mark.parametrize("chain", PHOTOGRAPH_CHAINS)
def test_a_point_of_a_photograph_goes_where_its_pixel_goes(tmp_path, place, chain):
    bright_photograph(tmp_path / "a.png", place)
    (tmp_path / "prompts.json").write_text(json.dumps({"a.png": {"points": [place]}}))
    transform = Compose(
        [
            LoadImaged("image", reader=PhotographReader(), ensure_channel_first=True),
            ReadPromptsd(str(tmp_path / "prompts.json")),
            *PHOTOGRAPH_CHAINS[chain],
            PromptsToNetworkd(),
        ]
    )
    out = transform({"image": str(tmp_path / "a.png")})
    prompts = prompts_of(out["image"])
    np.testing.assert_allclose(prompts.points[0, 0].numpy(), brightest(out["image"]), atol=1.0)
    assert prompts.labels.tolist() == [[1.0]]


@pytest.mark.parametrize("chain", PHOTOGRAPH_CHAINS)
def test_a_box_of_a_photograph_stays_around_its_object_with_ordered_corners(tmp_path, chain):
    array = np.zeros((60, 90, 3), dtype=np.uint8)
    array[12:28, 50:80] = 255  # rows, columns
    Image.fromarray(array).save(tmp_path / "a.png")
    (tmp_path / "prompts.json").write_text(json.dumps({"a.png": {"box": [50, 12, 79, 27]}}))
    transform = Compose(
        [
            LoadImaged("image", reader=PhotographReader(), ensure_channel_first=True),
            ReadPromptsd(str(tmp_path / "prompts.json")),
            *PHOTOGRAPH_CHAINS[chain],
            PromptsToNetworkd(),
        ]
    )
    out = transform({"image": str(tmp_path / "a.png")})
    object_ = (out["image"][0] > 127).nonzero().numpy()
    # Corners are voxel centres: where pixels grow, the object's last pixel reaches half a grown pixel further.
    grown = max(1.0, *(n / m for n, m in zip(sorted(out["image"].shape[1:]), (60, 90))))
    box = prompts_of(out["image"]).boxes[0]
    np.testing.assert_allclose(box.numpy(), [*object_.min(0), *object_.max(0)], atol=0.5 + 0.5 * grown)


ROTATION = np.array([[0.9363, -0.2896, 0.1987], [0.3130, 0.9447, -0.0980], [-0.1593, 0.1540, 0.9752]])
AFFINES = {
    "RAS anisotropic": np.diag([0.8, 1.1, 2.5, 1.0]),
    "LAS": np.diag([-0.9, 0.9, 2.0, 1.0]),
    "LPS": np.diag([-1.0, -1.0, 3.0, 1.0]),
    "permuted": np.array([[0, 0, 2.0, 0], [1.0, 0, 0, 0], [0, -1.2, 0, 0], [0, 0, 0, 1]]),
    "oblique": np.block([[ROTATION @ np.diag([0.9, 1.1, 2.0]), np.zeros((3, 1))], [np.zeros((1, 3)), 1]]),
}
VOLUME_CHAINS = {
    "orientation": [Orientationd("image", axcodes="RAS", labels=None)],
    "spacing": [Spacingd("image", pixdim=(1.5, 1.5, 1.5), mode="bilinear")],
    "all": [
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=(1.0, 1.0, 1.0), mode="bilinear"),
        Rotate90d("image", k=1),
        Flipd("image", spatial_axis=2),
        Resized("image", (40, 44, 48), mode="trilinear"),
    ],
}


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("chain", VOLUME_CHAINS)
def test_a_point_of_a_volume_goes_where_its_voxel_goes(tmp_path, affine, chain):
    place, size = np.array([6, 15, 9]), (18, 22, 14)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1)
    volume = np.exp(-((grid - place) ** 2).sum(-1) / 8.0).astype(np.float32)
    matrix = AFFINES[affine].copy()
    matrix[:3, 3] = (-30, 12, 7)
    nib.save(nib.Nifti1Image(volume, matrix), tmp_path / "a.nii.gz")
    given = Prompts(
        points=torch.tensor([[place.tolist()]], dtype=torch.float32),
        labels=torch.ones(1, 1),
        boxes=torch.tensor([[*(place - 3), *(place + 3)]], dtype=torch.float32),
    )
    give = Lambdad("image", lambda image: with_prompts(image, given))
    transform = Compose(
        [LoadImaged("image", ensure_channel_first=True), give, *VOLUME_CHAINS[chain], PromptsToNetworkd()]
    )
    out = transform({"image": str(tmp_path / "a.nii.gz")})
    peak, prompts = brightest(out["image"]), prompts_of(out["image"])
    np.testing.assert_allclose(prompts.points[0, 0].numpy(), peak, atol=1.0)
    first, last = prompts.boxes[0, :3].numpy(), prompts.boxes[0, 3:].numpy()
    np.testing.assert_allclose((first + last) / 2, peak, atol=1.0)
    assert (last > first).all()


def test_positions_come_back_from_the_network_grid(tmp_path):
    bright_photograph(tmp_path / "a.png", (20, 10))
    load = LoadImaged("image", reader=PhotographReader(), ensure_channel_first=True)
    image = Compose([load, *PHOTOGRAPH_CHAINS["all"]])({"image": str(tmp_path / "a.png")})["image"]
    places = torch.tensor([[0.0, 0.0], [20.0, 10.0], [89.0, 59.0]])
    back = to_source_grid(to_tensor_grid(places, image), image)
    torch.testing.assert_close(back, places, atol=1e-3, rtol=0)
    assert not torch.allclose(to_tensor_grid(places, image), places, atol=5.0)


def test_a_batch_without_prompts_is_left_as_it_is():
    given = item()
    assert PromptsToNetworkd()(given) == given


def test_all_kinds_of_prompts_are_read_in_the_order_of_a_session(write_prompts, tmp_path):
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:20, 30:50] = 255  # rows, columns
    Image.fromarray(mask).save(tmp_path / "before.png")
    entry = {
        "points": [[3, 4], [5, 6]], "labels": [1, 0], "scribbles": [{"points": [[10, 10], [13, 16]], "label": 0}],
        "lasso": {"points": [[1, 1], [20, 1], [20, 20]]}, "box": [30, 35, 2, 1], "mask": "before.png",
    }  # fmt: skip
    given = user_prompts_of(ReadPromptsd(write_prompts({"a.jpg": entry}))(item())["image"])
    assert [(one.kind, one.label) for one in given] == [
        ("mask", 1), ("box", 1), ("lasso", 1), ("point", 1), ("point", 0), ("scribble", 0)
    ]  # fmt: skip
    assert np.array_equal(given[0].mask, mask.T > 0)
    assert given[1].positions.tolist() == [[2, 1], [30, 35]]
    line = given[5].voxels()
    assert line[0].tolist() == [10, 10]
    assert line[-1].tolist() == [13, 16]
    assert np.abs(np.diff(line, axis=0)).max() == 1  # without gaps


def test_a_mask_of_another_size_is_named_with_both(write_prompts, tmp_path):
    Image.fromarray(np.zeros((5, 7), dtype=np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match=r"small\.png: its size is 7 x 5, that of the image 60 x 40"):
        ReadPromptsd(write_prompts({"a.jpg": {"mask": "small.png"}}))(item())


def test_a_mask_of_a_volume_is_read_in_the_volume_s_axes(write_prompts, tmp_path):
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    volume = MetaTensor(torch.zeros(1, 8, 6, 5), affine=affine, meta={"filename_or_obj": "/ct.nii.gz"})
    mask = np.zeros((8, 6, 5), dtype=np.uint8)
    mask[1:3, 2:5, 4] = 1
    turned = affine @ np.array([[-1.0, 0, 0, 7], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(mask[::-1].copy(), turned), tmp_path / "liver.nii.gz")
    table = {"ct.nii.gz": {"liver": {"mask": "liver.nii.gz", "lasso": {"points": [[0, 3, 0], [5, 3, 0], [5, 3, 4]]}}}}
    read = ReadClassPromptsd(write_prompts(table), ["spleen", "liver"])
    start, lasso = user_prompts_of(read({"image": volume})["image"])
    assert np.array_equal(start.mask, mask > 0)
    assert (start.index, lasso.index, lasso.axis, lasso.slice_index) == (1, 1, 1, 3)
    nib.save(nib.Nifti1Image(mask, np.diag([2.0, 1.0, 2.0, 1.0])), tmp_path / "liver.nii.gz")
    with pytest.raises(DataError, match=r"liver\.nii\.gz: its grid is 8 x 6 x 5 voxels of 2 x 1 x 2 mm.*2 x 1 x 3 mm"):
        read({"image": volume})


def test_classes_of_one_volume_may_have_prompts_of_different_kinds(write_prompts):
    volume = MetaTensor(torch.zeros(1, 8, 6, 5), meta={"filename_or_obj": "/ct.nii.gz"})
    table = {"ct.nii.gz": {"liver": {"box": [0, 0, 0, 3, 3, 3]}, "spleen": {"points": [[1, 2, 3]]}}}
    out = ReadClassPromptsd(write_prompts(table), ["spleen", "liver"])({"image": volume})["image"]
    assert [(one.kind, one.index) for one in user_prompts_of(out)] == [("point", 0), ("box", 1)]
    assert prompts_of(out).kinds == {"points", "classes"}  # what a picture shows


def marked(kind: str, positions: list, label: int = 1, index: int = 0) -> UserPrompt:
    return UserPrompt(kind, index, 0, 0.0, np.array(positions, dtype=float), label=label)


def test_masks_of_the_file_become_what_their_user_said():
    image = with_user_prompts(
        MetaTensor(torch.zeros(3, 8, 9)),
        [marked("box", [[2, 2], [5, 6]]), marked("point", [[0, 0]]), marked("scribble", [[3, 3], [3, 4]], label=0)],
    )
    pred = torch.zeros(1, 8, 9)
    pred[0, 1:6, 1:6] = 1
    out = EnforceUserPromptsd("pred")({"image": image, "pred": pred})["pred"]
    wanted = torch.zeros(1, 8, 9)
    wanted[0, 2:6, 2:6] = 1
    wanted[0, 0, 0] = 1
    wanted[0, 3, 3:5] = 0
    assert torch.equal(out, wanted)
    assert pred[0, 1, 1] == 1  # what was given stays
    untouched = {"image": MetaTensor(torch.zeros(3, 8, 9)), "pred": pred}
    assert EnforceUserPromptsd("pred")(untouched)["pred"] is pred


def test_a_class_of_a_label_map_leaves_the_others_alone():
    said = [marked("point", [[1, 1, 1]], index=1), marked("point", [[2, 2, 2], [0, 0, 0]], label=0, index=0)]
    image = with_user_prompts(MetaTensor(torch.zeros(1, 4, 4, 4)), said)
    label = torch.full((1, 4, 4, 4), 1.0)
    label[0, 0] = 3
    out = EnforceUserPromptsd("pred", label_map=True)({"image": image, "pred": label})["pred"][0]
    assert out[1, 1, 1] == 2
    assert out[2, 2, 2] == 0
    assert out[0, 0, 0] == 3  # never was of class 0
    assert (out != label[0]).sum() == 2


def test_keys_that_name_no_image_are_refused_before_the_first_one(write_prompts, tmp_path):
    for name in ("ISIC_1.jpg", "ISIC_2.jpg"):
        (tmp_path / name).touch()
    entries = [{"image": str(tmp_path / name)} for name in ("ISIC_1.jpg", "ISIC_2.jpg")]
    point = {"points": [[1, 2]]}
    path = write_prompts({"ISIC_1.jpg": point, "ISIC_2": point, "x/ISIC_1.jpg": point})
    with pytest.raises(DataError) as caught:
        check_prompt_keys(path, entries)
    told = str(caught.value)
    assert told.startswith(f"prompts {path}: no image has the name 'ISIC_2', 'x/ISIC_1.jpg'")
    assert "as 'ISIC_2.jpg'" in told
    check_prompt_keys(write_prompts({"ISIC_1.jpg": point}), entries)
    check_prompt_keys(write_prompts({"ISIC_1.jpg": point, "ISIC_2.jpg": point}), entries[:1])  # one of the folder
    check_prompt_keys(None, entries)
    check_prompt_keys("", entries)


def test_prompts_of_several_classes_are_drawn_for_those_that_are_there():
    one = item()
    masks = torch.zeros(3, *one["label"].shape[1:])
    masks[0] = one["label"][0]
    masks[2, 40:44, 5:9] = 1
    one["label"] = masks
    drawn = prompts_of(SamplePromptsd("label", prompt="box")(one)["image"])
    assert drawn.classes.tolist() == [0, 2]
    assert drawn.boxes.tolist() == [[15, 10, 29, 19], [40, 5, 43, 8]]
    assert prompts_of(SamplePromptsd("label", prompt="none")(one)["image"]) == Prompts()
    one["label"] = 0 * masks
    assert prompts_of(SamplePromptsd("label", prompt="point")(one)["image"]) == Prompts()


def test_prompts_of_several_classes_are_read_by_their_names(write_prompts):
    path = write_prompts({"a.jpg": {"cup": {"points": [[12, 30]]}, "disc": {"points": [[5, 6]]}}})
    read = prompts_of(ReadPromptsd(path, classes=["disc", "cup"])(item("a.jpg"))["image"])
    assert read.classes.tolist() == [0, 1]
    assert read.points.tolist() == [[[5, 6]], [[12, 30]]]
    for entry, found in (({"points": [[1, 1]]}, "points"), ({"liver": {}}, "liver"), ({}, "nothing"), ([], "\\[\\]")):
        with pytest.raises(DataError, match=f"a.jpg: found {found}; expected classes out of disc, cup, each with"):
            ReadPromptsd(write_prompts({"a.jpg": entry}), classes=["disc", "cup"])(item("a.jpg"))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_marked_pixel_holds_its_class_and_no_other_unless_they_overlap(write_prompts, overlap):
    entry = {"disc": {"points": [[3, 4], [5, 6]], "labels": [1, 0]}, "cup": {"points": [[7, 8]]}}
    data = ReadPromptsd(write_prompts({"a.jpg": entry}), classes=["disc", "cup"])(item("a.jpg"))
    data["pred"] = MetaTensor(torch.zeros(2, *data["image"].shape[1:]))
    data["pred"][0, 5:9, 6:10] = 1
    data["pred"][1, 3, 4] = 1
    out = EnforceUserPromptsd("pred", overlap=overlap)(data)["pred"]
    assert out[:, 3, 4].tolist() == [1, float(overlap)]
    assert out[:, 5, 6].tolist() == [0, 0]
    assert out[:, 7, 8].tolist() == [float(overlap), 1]
    assert out[:, 6, 7].tolist() == [1, 0]
