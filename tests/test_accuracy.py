"""Accuracy of the committed adapters on held-out real images: ``pytest -m accuracy``."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import run

pytestmark = pytest.mark.accuracy
ISIC, BTCV = (Path(__file__).resolve().parents[1] / "bundles" / name for name in ("medsa_isic", "medsa_btcv"))


@pytest.mark.parametrize(("prompt", "least"), [("none", 0.85), ("point", 0.89), ("box", 0.94)])
def test_lesions_of_the_validation_split(shared_data: Path, tmp_path: Path, prompt: str, least: float) -> None:
    configs = [str(ISIC / "configs" / name) for name in ("train.yaml", "evaluate.yaml")]
    run("evaluating", config_file=configs, bundle_root=str(ISIC), meta_file=str(ISIC / "configs/metadata.json"),
        dataset_dir=str(shared_data / "isic2017"), prompt=prompt, output_dir=str(tmp_path), num_workers=0)  # fmt: skip
    with open(tmp_path / "metrics.csv", newline="") as file:
        metrics = dict(csv.reader(file))
    assert float(metrics["val_mean_dice"]) >= least


@pytest.mark.parametrize(("prompt", "least"), [("none", 0.86), ("point", 0.87), ("box", 0.88)])
def test_hippocampi_of_the_validation_split(shared_data: Path, tmp_path: Path, prompt: str, least: float) -> None:
    configs = [str(BTCV / "configs" / name) for name in ("train.yaml", "hippocampus.yaml", "evaluate.yaml")]
    run("evaluating", config_file=configs, bundle_root=str(BTCV), meta_file=str(BTCV / "configs/metadata.json"),
        dataset_dir=str(shared_data / "msd_hippocampus"), prompt=prompt, output_dir=str(tmp_path),
        num_workers=0)  # fmt: skip
    with open(tmp_path / "metrics.csv", newline="") as file:
        metrics = dict(csv.reader(file))
    assert float(metrics["val_mean_dice"]) >= least


@pytest.mark.parametrize("prompt", ["none", "point"])
def test_liver_and_spleen_in_a_ct_of_another_hospital(shared_data: Path, tmp_path: Path, prompt: str) -> None:
    scans = shared_data / "ct"
    found = nib.load(scans / "ct_b_totalsegmentator.nii.gz")
    label = np.zeros(found.shape, np.uint8)
    for index, value in ((1, 1), (6, 5)):  # spleen and liver, by the bundle's and TotalSegmentator's numbers
        label[np.asarray(found.dataobj) == value] = index
    nib.save(nib.Nifti1Image(label, found.affine), tmp_path / "label.nii.gz")
    case = {"image": str(scans / "ct_b_dicom"), "label": str(tmp_path / "label.nii.gz")}
    (tmp_path / "list.json").write_text(json.dumps({"training": [case], "validation": [case]}))
    configs = [str(BTCV / "configs" / name) for name in ("train.yaml", "evaluate.yaml")]
    run("evaluating", config_file=configs, bundle_root=str(BTCV), meta_file=str(BTCV / "configs/metadata.json"),
        dataset_dir=str(scans), datalist=str(tmp_path / "list.json"), prompt=prompt, output_dir=str(tmp_path),
        num_workers=0)  # fmt: skip
    with open(tmp_path / "val_mean_dice_raw.csv", newline="") as file:
        dice = [float(value) for value in list(csv.reader(file))[1][1:14]]
    assert dice[0] >= 0.9
    assert dice[5] >= 0.9
