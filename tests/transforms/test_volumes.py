from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, Spacingd
from scipy.spatial.transform import Rotation

from medsa_nets.errors import DataError, find_cause
from medsa_nets.prompts import prompts_of
from medsa_nets.transforms import (
    CheckLabelsd,
    LoadImageVolumed,
    MasksToSourceLabeld,
    MatchOrientationd,
    PromptsToNetworkd,
    SampleClassPromptsd,
    SpacingBesidePathsd,
    all_classes,
    keep_main_components,
)

CLASSES = ["spleen", "liver"]


def case(tmp_path, label=None, label_affine=None, affine=None):
    affine = np.diag([-2.0, -1.5, 3.0, 1.0]) if affine is None else affine
    label = np.zeros((12, 10, 8), np.uint8) if label is None else label
    if not label.any():
        label[2:5, 3:6, 1:4], label[7:9, 7:9, 6] = 1, 2
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).normal(size=(12, 10, 8)).astype(np.float32), affine),
        tmp_path / "i.nii.gz",
    )
    nib.save(nib.Nifti1Image(label, affine if label_affine is None else label_affine), tmp_path / "l.nii.gz")
    return {"image": str(tmp_path / "i.nii.gz"), "label": str(tmp_path / "l.nii.gz")}


LOAD = [LoadImageVolumed(["image", "label"]), Orientationd(["image", "label"], axcodes="RAS", labels=None)]


def test_image_and_label_stored_in_other_directions_pass_as_one_grid(tmp_path):
    item = case(tmp_path)
    label = nib.load(item["label"])
    flipped = label.as_reoriented(np.array([[0, 1], [1, -1], [2, 1]]))
    nib.save(flipped, tmp_path / "flipped.nii.gz")
    out = Compose([*LOAD, CheckLabelsd("label", CLASSES)])({**item, "label": str(tmp_path / "flipped.nii.gz")})
    straight = Compose(LOAD)(item)
    assert torch.equal(out["label"].as_tensor(), straight["label"].as_tensor())


def test_a_label_takes_the_axes_of_its_image_and_goes_back_to_its_grid(tmp_path):
    item = case(tmp_path)
    turned = nib.load(item["label"]).as_reoriented(np.array([[2, 1], [0, -1], [1, -1]]))
    nib.save(turned, tmp_path / "turned.nii.gz")
    transforms = Compose([LOAD[0], MatchOrientationd("label"), LOAD[1], CheckLabelsd("label", CLASSES)])
    out = transforms({**item, "label": str(tmp_path / "turned.nii.gz")})
    assert torch.equal(out["label"].as_tensor(), Compose(LOAD)(item)["label"].as_tensor())
    back = Invertd("label", transforms, orig_keys="label", nearest_interp=True)(out)["label"]
    image = nib.load(item["image"])
    np.testing.assert_allclose(back.affine, image.affine)
    assert np.array_equal(back[0].numpy(), np.asarray(nib.load(item["label"]).dataobj))


def test_another_grid_is_refused_with_both_grids(tmp_path):
    moved = np.diag([-2.0, -1.5, 3.0, 1.0])
    moved[2, 3] = 5.0
    with pytest.raises(RuntimeError) as caught:
        Compose([*LOAD, CheckLabelsd("label", CLASSES)])(case(tmp_path, label_affine=moved))
    text = str(find_cause(caught.value))
    assert "l.nii.gz: the label's grid is 12 x 10 x 8 voxels of 2 x 1.5 x 3 mm from" in text
    assert "i.nii.gz has 12 x 10 x 8 voxels" in text
    with pytest.raises(RuntimeError) as caught:
        Compose([*LOAD, CheckLabelsd("label", CLASSES)])(case(tmp_path, label=np.ones((12, 10, 7), np.uint8)))
    assert "12 x 10 x 7 voxels" in str(find_cause(caught.value))


def test_values_that_are_no_classes_are_listed(tmp_path):
    label = np.zeros((12, 10, 8), np.uint8)
    label[0, 0, :3] = [2, 3, 7]
    with pytest.raises(RuntimeError) as caught:
        Compose([*LOAD, CheckLabelsd("label", CLASSES)])(case(tmp_path, label=label))
    assert isinstance(find_cause(caught.value), DataError)
    assert "the label holds 3, 7; expected 0 (background) to 2 (spleen, liver)" in str(find_cause(caught.value))


@pytest.mark.parametrize("prompt", ["point", "points3", "point_per_slice"])
def test_clicks_lie_on_their_class_after_any_spatial_transforms(tmp_path, prompt):
    transforms = Compose(
        [
            *LOAD,
            SampleClassPromptsd("label", 2, prompt),
            Spacingd(["image", "label"], pixdim=(1.0, 1.0, 1.0), mode=("bilinear", "nearest")),
            PromptsToNetworkd(),
        ]
    )
    out = transforms(case(tmp_path))
    prompts = prompts_of(out["image"])
    assert prompts.classes.tolist() == [0, 1]
    for k in range(2):
        for point, label in zip(prompts.points[k], prompts.labels[k]):
            if label == 1:
                assert out["label"][0][tuple(point.round().long())] == k + 1
    assert prompts_of(transforms(case(tmp_path))["image"]) == prompts


def test_boxes_follow_flips_with_ordered_corners(tmp_path):
    out = Compose([*LOAD, SampleClassPromptsd("label", 2, "box"), PromptsToNetworkd()])(case(tmp_path))
    for k, box in enumerate(prompts_of(out["image"]).boxes):
        voxels = (out["label"][0] == k + 1).nonzero()
        assert box.tolist() == [*voxels.amin(0).tolist(), *voxels.amax(0).tolist()]


@pytest.mark.parametrize("pixdim", [(1.0, 1.0, 1.0), (3.1, 2.2, 4.0), (2.0, 1.5, 3.0)])
@pytest.mark.parametrize("turn", [0.0, 20.0])
def test_masks_on_the_files_grid_are_those_of_invertd(tmp_path, pixdim, turn):
    affine = np.diag([-2.0, -1.5, 3.0, 1.0])
    affine[:3, :3] = Rotation.from_euler("xyz", [turn, -turn / 2, turn], degrees=True).as_matrix() @ affine[:3, :3]
    item = case(tmp_path, affine=affine)
    transforms = Compose([LoadImageVolumed("image"), Orientationd("image", axcodes="RAS", labels=None),
                          Spacingd("image", pixdim=pixdim, mode="bilinear")])  # fmt: skip
    data = transforms({"image": item["image"]})
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, *[max(2, n // 3) for n in data["image"].shape[1:]], generator=generator)
    logits = torch.nn.functional.interpolate(coarse, size=data["image"].shape[1:], mode="trilinear")[0]
    logits[2] = -1.0  # a class that is nowhere
    pred = MetaTensor(logits, affine=data["image"].affine)
    inverted = Invertd("pred", transforms, orig_keys="image", nearest_interp=False)({**data, "pred": pred.clone()})
    highest, index = inverted["pred"].as_tensor().max(dim=0, keepdim=True)
    expected = torch.where(highest > 0, index + 1, 0)
    found = MasksToSourceLabeld("pred")({**data, "pred": pred})["pred"]
    source = nib.load(item["image"])
    assert found.shape[1:] == source.shape
    np.testing.assert_allclose(found.affine, source.affine, atol=1e-5)
    assert 0.05 < (expected == 0).float().mean() < 0.6
    assert (found != expected).float().mean() < 0.003  # ties and rounding


def test_masks_become_one_label_and_some_classes_all():
    logits = torch.tensor([[-1.0, 2.0, 3.0, -4.0], [-2.0, 1.0, 5.0, 0.5]]).reshape(2, 4, 1, 1)
    out = MasksToSourceLabeld("pred")({"image": MetaTensor(torch.zeros(1, 4, 1, 1)), "pred": logits})["pred"]
    assert isinstance(out, MetaTensor)
    assert out.flatten().tolist() == [0, 1, 2, 2]
    spread = all_classes(logits[None], torch.tensor([2, 0]), 4)
    assert torch.equal(spread[0, 2], logits[0])
    assert torch.equal(spread[0, 0], logits[1])
    assert (spread[0, [1, 3]] == -20).all()


def test_volumes_are_respaced_beside_entries_that_are_no_metadata(tmp_path: Path) -> None:
    """A server puts the path of the file beside the image."""
    path = tmp_path / "study.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(6, 5, 4)), np.diag([2.0, 2.0, 2.0, 1.0])), path)
    image = LoadImageVolumed("image")({"image": str(path)})["image"]
    request = {"image": image, "image_path": str(path), "label": "spleen"}
    out = SpacingBesidePathsd("image", pixdim=(1.0, 2.0, 4.0), mode="bilinear")(request)
    assert (out["image_path"], out["label"]) == (str(path), "spleen")
    expected = Spacingd("image", pixdim=(1.0, 2.0, 4.0), mode="bilinear")({"image": image})["image"]
    torch.testing.assert_close(out["image"].as_tensor(), expected.as_tensor())
    assert torch.equal(out["image"].affine, expected.affine)
    transforms = Compose(
        [LoadImageVolumed("image"), SpacingBesidePathsd("image", pixdim=(1.0, 2.0, 4.0), mode="nearest")]
    )
    moved = transforms({"image": str(path), "image_path": str(path)})
    back = Invertd("image", transforms, nearest_interp=True, to_tensor=True)(moved)["image"]
    assert back.shape == image.shape
    assert torch.equal(back.affine, image.affine)


def two_organs() -> torch.Tensor:
    """Logits of two classes: each has a large part, the first one a small part and a tiny one, far away."""
    logits = torch.full((1, 2, 12, 12, 8), -3.0)
    logits[0, 0, 1:6, 1:6, 1:5] = 4.0  # 100 voxels
    logits[0, 0, 9:11, 9:11, 1:6] = 4.0  # 20
    logits[0, 0, 9, 1, 7] = 4.0
    logits[0, 1, 7:12, 1:6, 1:5] = 4.0
    return logits


@pytest.mark.parametrize(("share", "small", "tiny"), [(0.0, True, True), (0.1, True, False), (0.5, False, False)])
def test_parts_that_are_small_beside_the_largest_are_dropped(share: float, small: bool, tiny: bool) -> None:
    logits = two_organs()
    out = keep_main_components(logits, share)
    assert bool((out[0, 0, 9:11, 9:11, 1:6] > 0).all()) == small
    assert bool((out[0, 0, 9:11, 9:11, 1:6] > 0).any()) == small
    assert bool(out[0, 0, 9, 1, 7] > 0) == tiny
    assert torch.equal(out[0, 0, :7], logits[0, 0, :7])
    assert torch.equal(out[0, 1], logits[0, 1])
    assert torch.equal(logits, two_organs())  # what was given stays


def test_a_voxel_of_a_dropped_part_falls_to_the_next_class() -> None:
    logits = two_organs()
    logits[0, 1, 9, 1, 7] = 1.0
    out = keep_main_components(logits, 0.005)
    assert out[0, :, 9, 1, 7].tolist() == [4.0, 1.0]  # nothing is as small as that
    assert keep_main_components(logits, 0.1)[0, :, 9, 1, 7].tolist() == [-4.0, 1.0]


def test_parts_that_touch_in_a_corner_are_one() -> None:
    logits = torch.full((1, 1, 6, 6, 6), -1.0)
    logits[0, 0, :3, :3, :3] = 1.0
    logits[0, 0, 3, 3, 3] = 1.0
    assert torch.equal(keep_main_components(logits, 1.0), logits)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_components_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        keep_main_components(two_organs(), share)
