"""Sweeps: names are checked first, runs that ended are not repeated, one that was cut goes on, figures are theirs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medsa_nets.data.phantoms import write_phantoms
from medsa_nets.errors import SettingError
from medsa_nets.sweep import RESULT, combinations, draw, main, sweep

TRAIN = str(Path(__file__).resolve().parents[1] / "bundles" / "medsa_isic" / "configs" / "train.yaml")
SETTINGS: dict[str, Any] = {
    "config_file": TRAIN, "base": "small", "image_size": 64, "max_epochs": 2, "batch_size": 2, "num_workers": 0,
    "samples_interval": 0, "amp": False, "adapter_dim": 4, "prompt_draws": 1,
}  # fmt: skip
STEPS = 4  # of a run: 4 images in pairs, 2 epochs


class Killed(BaseException):
    """What no code here catches, as it catches no kill."""


@pytest.fixture
def steps(monkeypatch):
    """The steps of all optimizers; the one that ``kill`` names doesn't come back."""
    made: dict[str, int] = {"steps": 0, "kill": -1}
    step = torch.optim.AdamW.step

    def count(self: Any, *arguments: Any, **options: Any) -> Any:
        made["steps"] += 1
        if made["steps"] == made["kill"]:
            raise Killed
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", count)
    return made


def table(out: Path) -> list[dict[str, str]]:
    with open(out / "sweep.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_sweep_that_was_killed_goes_on_and_ends_in_a_table_and_a_plot(small_base, tmp_path, steps, capsys):
    data, out = write_phantoms(tmp_path / "data", training=4, validation=2, size=64), tmp_path / "out"
    options = {**SETTINGS, "dataset_dir": str(data), "output_dir": str(out), "vary": {"learning_rate": [0.01, 0.0001]}}
    steps["kill"] = STEPS + 3  # in the second epoch of the second run
    with pytest.raises(Killed):
        sweep(**options)
    (first,) = (out / "runs").glob(f"*/{RESULT}")
    before = first.read_text()
    steps["steps"] = 0
    steps["kill"] = -1
    rows = sweep(**options)
    assert steps["steps"] == STEPS // 2, "the second epoch of the second run, and nothing else"
    assert {row["status"] for row in rows} == {"done", "skipped"}
    assert first.read_text() == before
    assert [row["best"] for row in rows] == sorted((row["best"] for row in rows), reverse=True)
    for row in rows:
        folder = out / "runs" / row["run"]
        assert (folder / "models" / "model.pt").is_file()
        assert row["best"] == json.loads((folder / RESULT).read_text())["best"]
        log = (folder / "eval" / "training.log").read_text()
        assert f"best metric of {row['metric']}: {row['best']}" in log
    assert [float(row["best"]) for row in table(out)] == [row["best"] for row in rows]
    assert {row["learning_rate"] for row in table(out)} == {"0.01", "0.0001"}
    assert (out / "sweep.md").read_text().startswith("| learning_rate | run | status | metric | best ")
    with Image.open(out / "sweep.png") as picture:
        assert picture.size == (320, 320)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert main(arguments) == 0  # as a command, with nothing left to do
    assert capsys.readouterr().out.count("| skipped |") == 2
    assert steps["steps"] == STEPS // 2


def test_a_run_that_fails_does_not_stop_the_others(small_base, tmp_path, steps):
    data = write_phantoms(tmp_path / "data", training=2, validation=1, size=64)
    options = {**SETTINGS, "max_epochs": 1, "dataset_dir": str(data), "output_dir": str(tmp_path / "out")}
    rows = sweep(**options, vary={"adaptation": ["loha", "lora"]})
    assert [(row["adaptation"], row["status"]) for row in rows] == [("lora", "done"), ("loha", "failed")]
    assert "adaptation must be one of" in rows[1]["message"]
    assert not (tmp_path / "out" / "runs" / rows[1]["run"] / RESULT).exists()


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_workers_of_a_cluster_train(small_base, tmp_path, processes):
    distributed = pytest.importorskip("distributed")
    data = write_phantoms(tmp_path / "data", training=2, validation=1, size=64)
    options = {**SETTINGS, "max_epochs": 1, "dataset_dir": str(data), "output_dir": str(tmp_path / "out")}
    if processes:
        rows = sweep(**options, vary={"seed": [0, 1]}, workers=2)
    else:
        with distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
        ) as one:
            rows = sweep(**options, vary={"seed": [0, 1]}, scheduler=one.scheduler_address)
    assert [row["status"] for row in rows] == ["done", "done"], rows
    assert all(row["metric"] == "val_mean_dice" for row in rows)


@pytest.mark.parametrize(
    ("vary", "more", "message"),
    [
        ({"learning_rat": [1]}, {}, r"no setting 'learning_rat'.*Did you mean learning_rate"),
        ({"learning_rate": [1]}, {"max_epoch": 3}, r"no setting 'max_epoch'.*max_epochs"),
        ({"train#trainer#epochs": [1]}, {}, "no setting 'train#trainer#epochs'"),
        ({"ckpt_dir": ["a"]}, {}, "ckpt_dir is each run's own"),
        ({"learning_rate": 0.1}, {}, "learning_rate needs a list of values or a range"),
        ({"learning_rate": {"low": 1, "high": 2}}, {}, "a grid needs a list"),
        ({"learning_rate": {"low": 2, "high": 1}}, {"draws": 2}, "needs low < high"),
        ({"learning_rate": {"low": 0, "high": 1, "log": True}}, {"draws": 2}, "needs low above 0"),
        ("learning_rate", {}, "--vary: expected settings with values"),
        ({"learning_rate": [1]}, {"workers": 0}, "--workers must be 1 or more"),
    ],
)
def test_what_can_not_be_run_is_said_before_the_first_run(tmp_path, vary, more, message):
    with pytest.raises(SettingError, match=message):
        sweep(config_file=TRAIN, dataset_dir="nowhere", output_dir=str(tmp_path / "out"), vary=vary, **more)
    assert not (tmp_path / "out").exists()


def test_a_grid_holds_all_combinations_and_draws_stay_in_their_ranges():
    assert combinations({"a": [1, 2], "b": ["x"]}) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    vary = {"rate": {"low": 1e-4, "high": 1e-2, "log": True}, "dim": {"low": 4, "high": 9}, "name": ["x", "y"]}
    found = combinations(vary, draws=200, seed=1)
    assert found == combinations(vary, draws=200, seed=1) != combinations(vary, draws=200, seed=2)
    assert all(1e-4 <= one["rate"] <= 1e-2 for one in found)
    assert 60 < sum(one["rate"] < 1e-3 for one in found) < 140  # half of the logarithms
    assert {one["dim"] for one in found} == {4, 5, 6, 7, 8, 9}
    assert {one["name"] for one in found} == {"x", "y"}


def test_a_plot_draws_better_runs_higher():
    rows = [{"rate": 0.1, "best": 0.5, "metric": "dice"}, {"rate": 0.2, "best": 0.9, "metric": "dice"}]
    blue = (np.asarray(draw(rows, ["rate"])) == np.array([100, 149, 237])).all(-1)
    left, right = np.nonzero(blue[:, :170])[0], np.nonzero(blue[:, 190:])[0]
    assert len(left)
    assert len(right)
    assert right.max() < left.min()
