"""Training with two processes: the losses of one process with twice the batch, whatever is killed on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medsa_nets.data.phantoms import write_phantoms

from ..forks import Forks

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_isic"
TRAIN, OVERLAY = (BUNDLE / "configs" / f"{name}.yaml" for name in ("train", "multi_gpu_train"))
EPOCHS = 6
# A process pairs images of its own batch, and a correcting click falls on an error as rounding leaves it.
COMPARABLE = {"prompt_pairs": 0, "prompt_correction": 0}

pytestmark = pytest.mark.usefixtures("small_base")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), training=8, validation=2, size=64)


def command(data: Path, folder: Path, processes: int, *launcher: str) -> list[str]:
    """Training with 4 images a step, whatever the number of processes."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *launcher]
    options = {
        **COMPARABLE,
        "config_file": f"['{TRAIN}','{OVERLAY}']" if processes > 1 else TRAIN,
        "bundle_root": BUNDLE, "dataset_dir": data, "ckpt_dir": folder, "output_dir": folder, "image_size": 64,
        "base": "small",
        "batch_size": 4 // processes, "max_epochs": EPOCHS, "val_interval": EPOCHS, "warmup_steps": 1, "amp": False,
        "num_workers": 0, "samples_interval": 0, "learning_rate": 0.002,
    }  # fmt: skip
    return [sys.executable, *(start if processes > 1 else []), "-m", "monai.bundle", "run", "training"] + [
        text for name, value in options.items() for text in (f"--{name}", str(value))
    ]


def begin(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment, start_new_session=True)  # fmt: skip


def end(process: subprocess.Popen[str]) -> str:
    """What a run that should go well has printed."""
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    return output


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not file.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0][-4000:]


def losses(folder: Path) -> dict[int, float]:
    """Loss of each epoch, as the log has it; each epoch is logged by one process."""
    found = re.findall(r"Epoch\[(\d+)\] Metrics -- train_loss: ([0-9.]+)", (folder / "training.log").read_text())
    assert len(found) == len({epoch for epoch, _ in found})
    return {int(epoch): float(value) for epoch, value in found}


@pytest.fixture(scope="module")
def alone(small_base: str, phantoms: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, not interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    done = forks.run(command(phantoms, folder, 1)[1:], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(losses(folder)) == EPOCHS
    return folder


def assert_alike(folder: Path, alone: Path) -> None:
    expected, found = losses(alone), losses(folder)
    assert found == pytest.approx({epoch: expected[epoch] for epoch in found}, abs=1e-4)
    assert max(found) == EPOCHS
    assert expected[EPOCHS] < expected[1] - 0.01, "the curve must have somewhere to differ"
    assert {path.name for path in folder.glob("*.pt")} == {"model.pt", "model_last.pt"}
    for a, b in zip(*(torch.load(f / "model_last.pt", weights_only=True).values() for f in (folder, alone))):
        torch.testing.assert_close(a.float(), b.float(), atol=2e-3, rtol=0)


def test_two_processes_have_the_losses_of_one_with_twice_the_batch(phantoms: Path, alone: Path, tmp_path: Path) -> None:
    end(begin(command(phantoms, tmp_path, 2)))
    assert len(losses(tmp_path)) == EPOCHS
    assert_alike(tmp_path, alone)


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_the_training_ends(phantoms: Path, alone: Path, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    process = begin(command(phantoms, tmp_path, 2, "--max-restarts=1"))
    wait_for(tmp_path / "training_state.pt", process)
    workers = [p for p in psutil.Process(process.pid).children() if "monai.bundle" in p.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    assert "Resuming from" in end(process)
    assert_alike(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_training_goes_on_with_another_number_of_processes(
    phantoms: Path, alone: Path, tmp_path: Path, before: int, after: int
) -> None:
    process = begin(command(phantoms, tmp_path, before))
    wait_for(tmp_path / "training_state.pt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "Resuming from" in end(begin(command(phantoms, tmp_path, after)))
    assert_alike(tmp_path, alone)
