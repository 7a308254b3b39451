"""The annotation loop through a real server: look, click, correct, save, train, look again."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
from scipy.ndimage import distance_transform_edt

from .conftest import HIPPOCAMPUS, SIDES, UNSEEN
from .server import Server

pytestmark = pytest.mark.label
SCRIBBLES = HIPPOCAMPUS.replace("_deepedit", "_scribbles")


def click_in(truth: Path, value: int) -> list[int]:
    """A voxel well within a class: the deepest one of its largest slice."""
    mask = np.asarray(nib.load(truth).dataobj) == value
    return [int(i) for i in np.unravel_index(distance_transform_edt(mask).argmax(), mask.shape)]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * (a & b).sum() / max(1, a.sum() + b.sum())


def test_the_server_offers_the_bundle_with_clicks_and_training(server: Server) -> None:
    models = server.info["models"]
    assert set(models) == {HIPPOCAMPUS, f"{HIPPOCAMPUS}_seg", SCRIBBLES}
    assert models[SCRIBBLES]["type"] == "scribbles"
    assert models[SCRIBBLES]["labels"] == {"anterior": 1, "posterior": 2}
    assert models[HIPPOCAMPUS]["type"] == "deepedit"
    assert models[HIPPOCAMPUS]["labels"] == {"background": 0, "anterior": 1, "posterior": 2}
    assert models[f"{HIPPOCAMPUS}_seg"]["dimension"] == 3
    assert set(server.info["trainers"]) == {HIPPOCAMPUS}


@pytest.mark.parametrize("side", SIDES)
def test_automatic_masks_lie_on_the_grid_of_their_study(server: Server, studies: Path, side: str) -> None:
    mask = server.mask(f"{HIPPOCAMPUS}_seg", side)
    source, truth = (nib.load(studies / folder / f"{side}.nii.gz") for folder in ("studies", "truth"))
    assert mask.shape == source.shape
    np.testing.assert_allclose(mask.affine, source.affine, atol=1e-3)
    values, expected = np.asarray(mask.dataobj), np.asarray(truth.dataobj)
    assert dice(values > 0, expected > 0) > (0.6 if side == "anisotropic" else 0.75)


@pytest.mark.parametrize(("side", "value"), list(zip(SIDES, (1, 2, 1, 2))))
def test_a_clicked_voxel_is_inside_the_mask(server: Server, studies: Path, side: str, value: int) -> None:
    names = {1: "anterior", 2: "posterior"}
    click = click_in(studies / "truth" / f"{side}.nii.gz", value)
    other = names[3 - value]
    # the form of 3D Slicer's and OHIF's plugins: a list for each label
    mask = server.mask(HIPPOCAMPUS, side, **{names[value]: [click], other: [], "background": [], "label": names[value]})
    source = nib.load(studies / "studies" / f"{side}.nii.gz")
    assert mask.shape == source.shape
    np.testing.assert_allclose(mask.affine, source.affine, atol=1e-3)
    assert np.asarray(mask.dataobj)[tuple(click)] == value
    # what was not clicked stays, but for voxels that the clicked one took
    automatic = np.asarray(server.mask(f"{HIPPOCAMPUS}_seg", side).dataobj)
    values = np.asarray(mask.dataobj)
    changed = (values != automatic) & (values != value) & (automatic != value)
    assert not changed.any()


@pytest.mark.parametrize("side", ["anisotropic", "LAS", "oblique"])
def test_scribbles_as_slicer_sends_them_are_obeyed_and_taken_back(
    server: Server, studies: Path, tmp_path: Path, side: str
) -> None:
    source = nib.load(studies / "studies" / f"{side}.nii.gz")
    automatic = np.asarray(server.mask(f"{HIPPOCAMPUS}_seg", side).dataobj)
    wrong = np.argwhere(automatic == 1)[:40]  # a part of the mask that the user takes for none of it
    beside = np.argwhere(automatic == 0)[:3]
    # all segments of the viewer in one map: its masks, and two layers that are drawn on
    info = [{"name": name, "id": i + 1} for i, name in enumerate(
        ["background", "anterior", "posterior", "background_scribbles", "foreground_scribbles"])]  # fmt: skip
    shown = np.where(automatic == 1, 2, np.where(automatic == 2, 3, 0)).astype(np.uint8)

    def answer(against: np.ndarray, of_it: np.ndarray) -> np.ndarray:
        values = shown.copy()
        values[tuple(against.T)], values[tuple(of_it.T)] = 4, 5
        nib.save(nib.Nifti1Image(values, source.affine), tmp_path / "label.nii.gz")
        params = {"label_info": info, "selected_label_name": "anterior", "roi": []}
        mask = server.mask(SCRIBBLES, side, drawn=tmp_path / "label.nii.gz", **params)
        assert mask.shape == source.shape
        np.testing.assert_allclose(mask.affine, source.affine, atol=1e-3)
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}
        return np.asarray(mask.dataobj) > 0

    none = np.empty((0, 3), dtype=int)
    one = answer(wrong, none)
    assert not one[tuple(wrong.T)].any()
    assert dice(one, automatic == 1) > 0.5  # the rest stays
    both = answer(wrong, beside)
    assert not both[tuple(wrong.T)].any()
    assert both[tuple(beside.T)].all()
    np.testing.assert_array_equal(answer(wrong, none), one)  # what was drawn last was erased
    np.testing.assert_array_equal(answer(none, none), automatic == 1)


def test_the_second_click_runs_the_decoder_alone(server: Server, studies: Path) -> None:
    click = click_in(studies / "truth" / "RAS.nii.gz", 1)
    encoded = [server.lines("medsa_nets.inferers", "encode")]
    for shift in (0, 0, 1):
        reply = server.infer(HIPPOCAMPUS, UNSEEN, "json", anterior=[[click[0], click[1], click[2] + shift]])
        assert reply.status_code == 200, server.tail()
        encoded.append(server.lines("medsa_nets.inferers", "encode"))
    assert encoded[1] > encoded[0]
    assert encoded[1:] == [encoded[1]] * 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gallbladder": [[1, 2, 3]]}, "gallbladder: unknown label"),
        ({"anterior": [[999, 2, 3]]}, "lies outside the image"),
        ({"foreground": [[9, 9, 9]], "label": "liver"}, "'liver' is unknown"),
    ],
)
def test_a_wrong_click_is_answered_with_a_message(server: Server, params: dict, message: str) -> None:
    reply = server.infer(HIPPOCAMPUS, "RAS", "json", **params)
    assert reply.status_code == 200
    assert message in " ".join(reply.json()["messages"])


def test_saved_labels_train_the_model_and_the_next_inference_uses_it(server: Server, studies: Path) -> None:
    before = np.asarray(server.mask(f"{HIPPOCAMPUS}_seg", "oblique").dataobj)
    model = studies / "app" / "model" / HIPPOCAMPUS / "models" / "model.pt"
    old = model.read_bytes()
    for side in ("RAS", "anisotropic"):
        reply = server.save_label(side, studies / "truth" / f"{side}.nii.gz")
        assert reply.status_code == 200, reply.text
    sample = requests.post(f"{server.url}/activelearning/random", json={}, timeout=60).json()
    assert sample["id"] in ("LAS", "oblique", UNSEEN)  # what has no label yet
    assert server.train(HIPPOCAMPUS, max_epochs=2) == "DONE", server.tail()
    assert model.read_bytes() != old
    after = np.asarray(server.mask(f"{HIPPOCAMPUS}_seg", "oblique").dataobj)
    assert after.shape == before.shape
    assert not np.array_equal(after, before)
    assert dice(after > 0, np.asarray(nib.load(studies / "truth" / "oblique.nii.gz").dataobj) > 0) > 0.6
