"""Data sets as they are published: a task of a few lines reads each, on a small tree of the same shape."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from medsa_nets.bundles import Bundle
from medsa_nets.errors import DataError

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


def picture(path: Path, number: int, mask: bool = False, size: tuple[int, int] = (40, 30)) -> None:
    """A photograph, or the mask of a square of 8 x 8 pixels, written as ``path`` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
    if mask:
        values = np.zeros((size[1], size[0]), np.uint8)
        values[10:18, 4 + number : 12 + number] = 255
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    Image.fromarray(values).save(plain)
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


def ddti(root: Path) -> None:
    for split, count in (("Training", 6), ("Test", 2)):
        for i in range(count):
            picture(root / split / "images" / f"{i}_1.PNG", i)
            picture(root / split / "masks" / f"{i}_1.PNG", i, mask=True)


def stare(root: Path) -> None:
    for i in range(10):
        picture(root / "images" / f"im{i:04d}.ppm{'.gz' if i % 2 else ''}", i)
        if i < 8:
            picture(root / "masks" / f"im{i:04d}.ah.ppm{'.gz' if i % 2 else ''}", i, mask=True)


def pendal(root: Path) -> None:
    for i in range(8):
        picture(root / "Images" / f"{i}.bmp", i)
        for folder in ("Segmentation1", "Segmentation2"):
            picture(root / folder / f"{i}.bmp", i, mask=True)


# task: what makes a tree of its shape, entries of training, validation and testing, what a wrong folder is told
PHOTOGRAPHS: dict[str, tuple[Callable[[Path], None], tuple[int, int, int], str]] = {
    "ddti": (ddti, (5, 1, 2), "Training/images/{case}.* with Training/masks/{case}.* (training)"),
    "stare": (stare, (5, 1, 2), "images/{case}.ppm or images/{case}.ppm.gz with masks/{case}.ah.ppm or"),
    "pendal": (pendal, (5, 1, 2), "Images/{case}.* with Segmentation1/{case}.*"),
}
TASKS = [("medsa_isic", name) for name in PHOTOGRAPHS]


def open_task(bundle: str, task: str, root: Path, split: str = "training") -> Bundle:
    overlays = [] if split == "training" else ["evaluate.yaml"]
    settings = {"task": task, "dataset_dir": str(root), **({} if split == "training" else {"split": split})}
    return Bundle.open(BUNDLES / bundle, overlays, settings=settings, config="train.yaml")


def entries(bundle: str, task: str, root: Path, split: str) -> list[dict[str, Any]]:
    key = {"medsa_isic": "{}#dataset#data", "medsa_btcv": "{}#data"}[bundle]
    found = open_task(bundle, task, root, split).value(key.format("train" if split == "training" else "validate"))
    return list(found)


@pytest.mark.parametrize(("bundle", "task"), TASKS)
def test_a_data_set_is_read_as_it_comes(bundle: str, task: str, tmp_path: Path) -> None:
    make, counts, _ = PHOTOGRAPHS[task]
    make(tmp_path)
    found = {split: entries(bundle, task, tmp_path, split) for split in ("training", "validation", "testing")}
    assert tuple(map(len, found.values())) == counts
    images = [str(item["image"]) for items in found.values() for item in items]
    assert len(set(images)) == len(images)
    item = open_task(bundle, task, tmp_path).value("train#dataset")[0]
    assert torch.isfinite(item["image"]).all()
    assert item["image"].shape[1:] == item["label"].shape[1:]
    assert set(torch.unique(torch.as_tensor(item["label"])).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("bundle", "task"), TASKS)
def test_a_mask_lies_where_it_was_drawn(bundle: str, task: str, tmp_path: Path) -> None:
    PHOTOGRAPHS[task][0](tmp_path)
    evaluated = open_task(bundle, task, tmp_path, "testing").value("validate#dataset")
    for i, entry in enumerate(evaluated.data):
        number = int("".join(filter(str.isdigit, Path(entry["image"]).name.split("_")[0])))
        expected = torch.zeros(40, 30)
        expected[4 + number : 12 + number, 10:18] = 1
        assert torch.equal(torch.as_tensor(evaluated[i]["label"])[0], expected)


@pytest.mark.parametrize(("bundle", "task"), TASKS)
def test_a_wrong_folder_is_told_what_was_expected(bundle: str, task: str, tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "a.png", 1)
    with pytest.raises(DataError) as caught:
        entries(bundle, task, tmp_path, "training")
    message = str(caught.value)
    assert PHOTOGRAPHS[task][2] in message
    assert "Found photos/." in message
    assert "--datalist" in message


@pytest.mark.parametrize(("bundle", "task"), TASKS)
def test_a_task_is_a_few_lines_and_names_where_its_layout_is_from(bundle: str, task: str) -> None:
    path = BUNDLES / bundle / "configs" / "tasks" / f"{task}.yaml"
    assert len(ConfigParser.load_config_file(path)) <= 14
    assert "0add836" in path.read_text().split("like:")[0]


def test_a_packed_picture_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medsa_nets.data import photographs

    stare(tmp_path)
    monkeypatch.setattr(photographs, "_MOST_UNPACKED", 1000)
    with pytest.raises(DataError, match=r"im0001\.ppm\.gz: it holds more than"):
        photographs.read_photograph(tmp_path / "images" / "im0001.ppm.gz")
    (tmp_path / "cut.ppm.gz").write_bytes((tmp_path / "images" / "im0001.ppm.gz").read_bytes()[:-200])
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"cut\.ppm\.gz: not readable as an image"):
        photographs.read_photograph(tmp_path / "cut.ppm.gz")
