"""Studies over several workers: each once, whole or absent, whatever happens to a worker or a study."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import run
from PIL import Image

from medsa_nets import build_medsa
from medsa_nets.bundles import Bundle
from medsa_nets.cluster import COLUMNS, PARTS, RECORDS, _list_studies, segment_all
from medsa_nets.data.phantoms import phantom
from medsa_nets.errors import ClusterError, DataError

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "medsa_isic"
CONFIG = BUNDLE / "configs" / "inference.yaml"


@pytest.fixture(scope="module")
def adapted(small_base: str, tmp_path_factory: pytest.TempPathFactory, perturb_adapters) -> Path:
    """A folder with an adapter of the small base, whose masks are not empty."""
    folder = tmp_path_factory.mktemp("adapted")
    torch.save(perturb_adapters(build_medsa(small_base)).state_dict(), folder / "model.pt")
    return folder


def settings_of(adapted: Path) -> dict[str, object]:
    return {"base": "small", "ckpt_dir": str(adapted), "image_size": 64}


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for seed in range(count):
        Image.fromarray(phantom(seed, 96)[0]).save(folder / f"study_{seed}.png")
    return folder


def command(studies: Path, out: Path, **settings: object) -> list[str]:
    options = {"config_file": CONFIG, "dataset_dir": studies, "output_dir": out, "workers": 2, **settings}
    return [sys.executable, "-m", "medsa_nets.cluster"] + [
        text for name, value in options.items() for text in (f"--{name}", str(value))
    ]


def summary(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["study"] for row in rows}) == len(rows)
    return {Path(row["study"]).stem: row for row in rows}


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in folder.glob("*_segmentation.png")}


def test_each_study_is_segmented_once_and_damaged_ones_are_reported(tmp_path, adapted, forks):
    distributed = pytest.importorskip("distributed")
    studies, out = photographs(tmp_path / "studies", 5), tmp_path / "out"
    whole = (studies / "study_3.png").read_bytes()
    (studies / "study_3.png").write_bytes(whole[: len(whole) // 2])
    first = forks.run(command(studies, out, **settings_of(adapted))[1:], timeout=300)
    assert first.returncode == 1, first.stderr[-3000:]
    rows = summary(out)
    assert tuple(next(iter(rows.values()))) == COLUMNS
    assert {name: row["status"] for name, row in rows.items()} == {
        **{f"study_{i}": "done" for i in (0, 1, 2, 4)},
        "study_3": "failed",
    }
    assert rows["study_3"]["message"].startswith(f"{studies}/study_3.png: not readable as an image")
    assert len({row["worker"] for row in rows.values()}) == 2
    assert "4 done, 0 skipped, 1 failed" in first.stdout
    assert "studies: 100%" in first.stderr
    written = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
    assert len(written) == 4

    (studies / "study_3.png").write_bytes(whole)
    # again, with the worker of a cluster that is there already: a thread of this process
    alone = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "protocol": "tcp", "dashboard_address": None}
    with distributed.LocalCluster(**alone) as cluster:
        again = command(studies, out, scheduler=cluster.scheduler_address, **settings_of(adapted))
        second = forks.run(again[1:], timeout=300)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "1 done, 4 skipped, 0 failed" in second.stdout
    assert summary(out)["study_3"]["worker"] not in {row["worker"] for row in rows.values()}
    assert written.items() <= {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}.items()
    assert {path.name for path in out.iterdir() if path.suffix != ".png"} == {RECORDS, "summary.csv"}

    run("inferring", config_file=str(CONFIG), bundle_root=str(BUNDLE), dataset_dir=str(studies),
        meta_file=str(BUNDLE / "configs" / "metadata.json"), output_dir=str(tmp_path / "alone"),
        **settings_of(adapted))  # fmt: skip
    alone, shared = masks(tmp_path / "alone"), masks(out)
    assert alone.keys() == shared.keys()
    assert len(alone) == 5
    assert any(0 < (mask > 0).mean() < 1 for mask in alone.values())
    assert all((alone[name] != shared[name]).mean() < 1e-4 for name in alone)


@pytest.mark.slow
def test_the_studies_of_a_killed_worker_are_done_again(tmp_path, adapted):
    pytest.importorskip("distributed")
    studies, out = photographs(tmp_path / "studies", 10), tmp_path / "out"
    process = subprocess.Popen(
        command(studies, out, **settings_of(adapted)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        killed = 0
        deadline = time.monotonic() + 240
        while not killed and process.poll() is None and time.monotonic() < deadline:
            for part in out.glob(f"{PARTS}*"):  # a worker is at work on a study
                killed = int(part.name.rpartition("_")[2])
                os.kill(killed, signal.SIGKILL)
                break
            time.sleep(0.01)
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert killed, output[-3000:]
    assert process.returncode == 0, output[-3000:]
    rows = summary(out)
    assert len(rows) == 10
    assert {row["status"] for row in rows.values()} == {"done"}
    assert len(masks(out)) == 10
    assert all(mask.shape == (96, 96) for mask in masks(out).values())
    assert not list(out.glob(f"{PARTS}*"))


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Workers are threads of this process; the number of each cluster's workers is noted."""
    distributed = pytest.importorskip("distributed")
    made: list[int] = []
    original = distributed.LocalCluster

    def in_threads(n_workers: int, **settings: object) -> object:
        made.append(n_workers)
        return original(n_workers=n_workers, **{**settings, "processes": False})

    monkeypatch.setattr(distributed, "LocalCluster", in_threads)
    return made


def test_a_finished_study_is_not_done_again_and_other_settings_do_it_anew(tmp_path, adapted, clusters):
    (tmp_path / "studies").mkdir()  # a link to a study, which keeps its own name
    (tmp_path / "studies" / "linked.png").symlink_to(photographs(tmp_path / "elsewhere", 1) / "study_0.png")
    studies = tmp_path / "studies"

    def once(threshold: float) -> str:
        settings = {**settings_of(adapted), "to_mask#threshold": threshold}
        (row,) = segment_all(config_file=str(CONFIG), dataset_dir=str(studies), output_dir=str(tmp_path / "out"),
                             **settings)  # fmt: skip
        return row["status"]

    assert [once(0.5), once(0.5), once(0.4)] == ["done", "skipped", "done"]
    (tmp_path / "out" / "linked_segmentation.png").unlink()
    assert once(0.4) == "done"
    assert clusters == [1, 1, 1]


def test_studies_of_one_name_are_refused(tmp_path):
    studies = photographs(tmp_path / "studies", 1)
    Image.fromarray(phantom(1, 96)[0]).save(studies / "study_0.jpg")
    with pytest.raises(DataError, match=r"study_0\.jpg and .*study_0\.png: their results would have one name"):
        segment_all(config_file=str(CONFIG), dataset_dir=str(studies), output_dir=str(tmp_path / "out"))


def test_studies_of_several_files_are_refused(tmp_path):
    for name in ("c_t1.nii.gz", "c_t2.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 2), np.float32), np.eye(4)), tmp_path / name)
    layout = {"training": {"image": {"t1": "{case}_t1.nii.gz", "t2": "{case}_t2.nii.gz"}, "label": "{case}.nii.gz"}}
    parser = Bundle.open(
        BUNDLE.parent / "medsa_btcv", settings={"dataset_dir": str(tmp_path), "layout": layout, "in_channels": 2}
    ).parser()
    with pytest.raises(DataError, match=r"c_t1\.nii\.gz: a study whose channels are files of their own"):
        _list_studies(parser)


def test_what_stands_in_the_way_is_said(tmp_path, monkeypatch):
    studies = photographs(tmp_path / "studies", 1)
    common = {"config_file": str(CONFIG), "dataset_dir": str(studies), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ClusterError, match="--workers must be 1 or more, got 0"):
        segment_all(workers=0, **common)
    with pytest.raises(DataError, match="no such folder"):
        segment_all(**{**common, "dataset_dir": str(tmp_path / "absent")})
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ClusterError, match=r"pip install 'medsa\[cluster\]'"):
        segment_all(**common)


def test_a_study_that_kills_its_workers_is_a_row_of_the_summary(tmp_path, monkeypatch, clusters):
    def kill(job, config, meta, entry, out):
        raise RuntimeError("KilledWorker")

    monkeypatch.setattr("medsa_nets.cluster.segment_study", kill)
    studies = photographs(tmp_path / "studies", 1)
    (row,) = segment_all(config_file=str(CONFIG), dataset_dir=str(studies), output_dir=str(tmp_path / "out"))
    assert tuple(row) == COLUMNS
    assert row["status"] == "failed"
    assert "its worker was lost each time it was tried" in row["message"]
    assert summary(tmp_path / "out")["study_0"]["message"] == row["message"]
