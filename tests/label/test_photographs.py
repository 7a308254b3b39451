"""Photographs through a real server: the annotation loop, and what goes wrong on the way."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
from PIL import Image

from .conftest import LESION
from .server import Server

pytestmark = pytest.mark.label
AUTOMATIC = f"{LESION}_seg"


def truth_of(photographs: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(photographs / "truth" / f"{name}.png")) > 127


def names(photographs: Path) -> list[str]:
    return sorted(path.stem for path in (photographs / "studies").glob("*.jpg"))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * (a & b).sum() / max(1, a.sum() + b.sum())


def model_of(photographs: Path) -> Path:
    return photographs / "app" / "model" / LESION / "models"


@pytest.fixture
def own(photographs: Path, tmp_path: Path) -> Path:
    """An app and studies of its own, for tests that break something."""
    for folder in ("app", "studies", "truth"):
        shutil.copytree(photographs / folder, tmp_path / folder)
    shutil.rmtree(tmp_path / "studies" / "labels", ignore_errors=True)
    (tmp_path / "studies" / "datastore_v2.json").unlink(missing_ok=True)
    return tmp_path


@pytest.fixture
def serve(label_python: Path) -> Iterator:
    """Start servers, which end with the test."""
    running: list[Server] = []

    def start(folder: Path, **settings: Any) -> Server:
        running.append(Server(label_python, folder, str(folder / "studies"), LESION, **settings))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def save_labels(server: Server, folder: Path, count: int = 2) -> None:
    for name in names(folder)[:count]:
        assert server.save_label(name, folder / "truth" / f"{name}.png").status_code == 200


def wait_until_it_trains(server: Server, folder: Path, seconds: float = 300) -> None:
    """Until the first step is done: the training's log has its first epoch."""
    log = folder / "app" / "model" / LESION / "eval" / "training.log"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if log.is_file() and "train_loss" in log.read_text():
            return
        assert server.training_status()["status"] in ("SUBMITTED", "RUNNING"), server.tail()
        time.sleep(0.5)
    raise AssertionError("no epoch was trained")


def test_photographs_are_segmented_clicked_and_learned_from(own: Path, serve) -> None:
    server = serve(own)
    models = server.info["models"]
    assert models[LESION]["dimension"] == 2
    scribbles = LESION.replace("_deepedit", "_scribbles")
    assert set(models) == {LESION, AUTOMATIC, scribbles}
    for name in names(own):
        truth = truth_of(own, name)
        automatic = server.picture(AUTOMATIC, name) > 0
        assert automatic.shape == truth.shape  # rows and columns, as the photograph
        assert dice(automatic, truth) > 0.6
    row, column = (int(np.median(v)) for v in np.nonzero(truth))
    clicked = server.picture(LESION, name, lesion=[[column, row]], background=[[3, 3]], label="lesion") > 0
    assert clicked[row, column]
    assert not clicked[3, 3]
    in_three = server.picture(LESION, name, foreground=[[column, row, 0]], background=[])  # DeepGrow's form, as OHIF's
    assert in_three[row, column] > 0
    drawn = np.zeros((*truth.T.shape, 1), dtype=np.uint8)  # background 2 and foreground 3, as where nothing names them
    drawn[column, row - 2 : row + 3], drawn[1:9, 3] = 2, 3
    nib.save(nib.Nifti1Image(drawn, np.eye(4)), own / "label.nii.gz")
    answered = server.picture(scribbles, name, drawn=own / "label.nii.gz").T > 0
    assert not answered[drawn[..., 0] == 2].any()
    assert answered[drawn[..., 0] == 3].all()
    outside = server.infer(LESION, name, "json", lesion=[[column, 99999]])
    assert "lies outside the image" in " ".join(outside.json()["messages"])
    save_labels(server, own, 1)
    sample = requests.post(f"{server.url}/activelearning/random", json={}, timeout=60).json()
    assert sample["id"] in names(own)[1:]
    before = (model_of(own) / "model.pt").read_bytes()
    assert server.train(LESION, max_epochs=1) == "DONE", server.tail()  # one case, and none to validate
    assert (model_of(own) / "model.pt").read_bytes() != before
    assert dice(server.picture(AUTOMATIC, name) > 0, truth) > 0.6


def test_photographs_are_scored_by_uncertainty(own: Path, serve) -> None:
    server = serve(own, epistemic_model=LESION, epistemic_simulation_size="3", epistemic_max_samples="2")
    assert server.info["scoring"], server.info
    # the server begins to score when it starts
    end = time.monotonic() + 300
    while requests.get(f"{server.url}/scoring/", timeout=60).json()["status"] in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < end, server.tail()
        time.sleep(1.0)
    assert requests.get(f"{server.url}/scoring/", timeout=60).json()["status"] == "DONE", server.tail()
    images = requests.get(f"{server.url}/datastore/", params={"output": "all"}, timeout=60).json()["objects"]
    scores = [entry["image"]["info"].get("epistemic_entropy") for entry in images.values()]
    known = [score for score in scores if score is not None]
    assert len(known) == 2
    assert all(0.0 < score < 1.0 for score in known)
    assert len(set(known)) == 2


def test_a_server_killed_in_training_serves_the_old_model_and_goes_on(own: Path, serve) -> None:
    server = serve(own)
    name = names(own)[3]
    save_labels(server, own)
    old = server.picture(AUTOMATIC, name)
    before = (model_of(own) / "model.pt").read_bytes()
    assert server.start_training(LESION, max_epochs=400).status_code == 200
    wait_until_it_trains(server, own)
    # beside a training: clicks are answered, a second training is refused
    assert server.picture(LESION, name, lesion=[[10, 10]]).shape == old.shape
    second = server.start_training(LESION, max_epochs=1)
    assert second.status_code == 429
    assert "Already Running" in second.text
    assert (model_of(own) / "model.pt").read_bytes() == before
    server.stop()
    again = serve(own)
    np.testing.assert_array_equal(again.picture(AUTOMATIC, name), old)
    assert again.train(LESION, max_epochs=1) == "DONE", again.tail()


def test_a_damaged_label_is_named_and_the_old_model_stays(own: Path, serve) -> None:
    server = serve(own)
    name = names(own)[3]
    save_labels(server, own, 1)
    damaged = own / "damaged.png"
    damaged.write_bytes((own / "truth" / f"{names(own)[1]}.png").read_bytes()[:300])
    assert server.save_label(names(own)[1], damaged).status_code == 200
    old = server.picture(AUTOMATIC, name)
    before = (model_of(own) / "model.pt").read_bytes()
    assert server.train(LESION, max_epochs=1) == "ERROR"
    told = "\n".join(server.training_status()["details"])
    assert f"labels/final/{names(own)[1]}.png" in told
    assert (model_of(own) / "model.pt").read_bytes() == before
    np.testing.assert_array_equal(server.picture(AUTOMATIC, name), old)


def test_a_full_disk_ends_a_training_and_the_old_model_stays(own: Path, serve) -> None:
    size = (model_of(own) / "model.pt").stat().st_size
    server = serve(own, largest_file=size // 2)
    name = names(own)[3]
    save_labels(server, own, 1)
    before = {path.name: path.read_bytes() for path in model_of(own).iterdir()}
    old = server.picture(AUTOMATIC, name)
    assert server.train(LESION, max_epochs=1) == "ERROR"
    told = "\n".join(server.training_status()["details"])
    assert "it can't be written (File too large). Make room in" in told
    assert {path.name: path.read_bytes() for path in model_of(own).iterdir()} == before  # nothing half written
    np.testing.assert_array_equal(server.picture(AUTOMATIC, name), old)
