"""Accuracy of the committed adapters on held-out real images: ``pytest -m accuracy``."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from monai.bundle import run

pytestmark = pytest.mark.accuracy
ISIC = Path(__file__).resolve().parents[1] / "bundles" / "medsa_isic"


@pytest.mark.parametrize(("prompt", "least"), [("none", 0.85), ("point", 0.89), ("box", 0.94)])
def test_lesions_of_the_validation_split(shared_data: Path, tmp_path: Path, prompt: str, least: float) -> None:
    configs = [str(ISIC / "configs" / name) for name in ("train.yaml", "evaluate.yaml")]
    run("evaluating", config_file=configs, bundle_root=str(ISIC), meta_file=str(ISIC / "configs/metadata.json"),
        dataset_dir=str(shared_data / "isic2017"), prompt=prompt, output_dir=str(tmp_path), num_workers=0)  # fmt: skip
    with open(tmp_path / "metrics.csv", newline="") as file:
        metrics = dict(csv.reader(file))
    assert float(metrics["val_mean_dice"]) >= least
