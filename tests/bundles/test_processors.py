"""The demo's training on a processor that has AVX2 alone, as most laptops: their environment variables stand in."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medsa_nets.data.phantoms import write_phantoms

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_isic"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.usefixtures("lite_medsam_file")
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="needs an x86 processor")
def test_with_avx2_alone_training_takes_single_precision_and_learns(tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", training=8, validation=2, size=96)
    options = {
        "config_file": "configs/train.yaml", "dataset_dir": data, "ckpt_dir": tmp_path, "output_dir": tmp_path,
        "image_size": 96, "batch_size": 4, "max_epochs": 6, "val_interval": 6, "warmup_steps": 1,
        "learning_rate": 0.002, "samples_interval": 0, "num_workers": 0,
    }  # fmt: skip
    command = [sys.executable, "-m", "monai.bundle", "run", "training"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, **AVX2, "XDG_CACHE_HOME": str(tmp_path / "cache")}  # nothing is measured yet
    done = subprocess.run(command, cwd=BUNDLE, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"precision: float32 \(.*bfloat16", done.stdout + done.stderr)
    losses = [float(loss) for loss in re.findall(r"train_loss: ([0-9.]+)", (tmp_path / "training.log").read_text())]
    assert len(losses) == 6
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])
    assert (tmp_path / "model.pt").is_file()
