"""Measuring by sessions: figures, files, and what a run that goes on repeats."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from PIL import Image

from medsa_nets.errors import DataError
from medsa_nets.interaction import evaluation
from medsa_nets.interaction.evaluation import SessionEvaluation
from medsa_nets.interaction.grids import Grids

Evaluate = Callable[..., SessionEvaluation]


def items(network: Any, count: int) -> list[dict[str, MetaTensor]]:
    """Images of the stand-in with labels of their own grid, which volumes' labels show in another orientation."""
    out = []
    for number in range(count):
        image = network.open(f"image_{number}.png")
        image.meta["filename_or_obj"] = f"/data/image_{number}.nii"
        random = np.random.default_rng(number)
        shape = Grids(image).file_shape
        coarse = random.integers(0, 3, [-(-n // 4) for n in shape])
        values = np.kron(coarse, np.ones((4,) * len(shape)))[tuple(slice(0, n) for n in shape)]
        if network.volumes:
            affine = np.asarray(image.meta["original_affine"])
            label = MetaTensor(torch.from_numpy(values)[None].float(), affine=affine)
            label.meta["original_affine"] = affine
            label = Orientation("RAS", labels=None)(label)
        else:
            label = MetaTensor(torch.from_numpy(values > 1)[None].float())
        out.append({"image": image, "label": label, "values": values})
    return out


@pytest.fixture
def evaluate(stand_in: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    def make(volumes: bool, count: int = 2, name: str = "one", **settings: Any) -> SessionEvaluation:
        network = stand_in(volumes=volumes, name=name)
        network.inferer = type("Inferer", (), {"amp": False})()
        monkeypatch.setattr(evaluation, "NetworkSegmenter", lambda *arguments: network)
        classes = network.classes[:2] if volumes else network.classes
        return SessionEvaluation(
            network, network.inferer, items(network, count), classes, tmp_path, **{"clicks": 4, **settings}
        )

    return make


@pytest.mark.parametrize("volumes", [False, True])
def test_the_figures_have_the_names_that_tables_are_made_of(evaluate: Evaluate, tmp_path: Path, volumes: bool) -> None:
    figures = evaluate(volumes).run()
    wanted = {f"val_dice_after_{n}" for n in (0, 1, 2, 3, 5, 10)} | {f"val_dice_from_nothing_{n}" for n in (1, 2, 3)}
    assert wanted | {"val_dsc_auc", "val_nsd_auc", "val_harmful_clicks", "val_obeyed"} <= set(figures)
    assert figures["val_obeyed"] == figures["val_obeyed_from_nothing"] == 1.0
    assert "val_dice_from_nothing_0" not in figures
    with open(tmp_path / "metrics.csv") as file:
        written = {name: float(value) for name, value in csv.reader(file)}
    assert written == pytest.approx(figures, nan_ok=True)
    with open(tmp_path / "sessions.csv") as file:
        rows = list(csv.DictReader(file))
    sessions = 2 * 2 * (2 if volumes else 1)
    assert len(rows) == sessions
    first = [float(row["dice_after_1"]) for row in rows if row["start"] == "automatic"]
    assert np.mean(first) == pytest.approx(figures["val_dice_after_1"], abs=1e-4)
    with Image.open(tmp_path / "sessions.png") as picture:
        assert picture.width > 3 * 300


def test_masks_are_compared_on_the_grid_of_the_file(evaluate: Evaluate) -> None:
    made = evaluate(True)
    for number in range(2):
        _, _, targets = made._targets(number)
        for k, target in targets.items():
            assert np.array_equal(target, made.dataset[number]["values"] == k + 1)


def test_a_run_that_goes_on_repeats_no_session(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []
    run = evaluation.run_simulated

    def counted(*arguments: Any, **settings: Any) -> Any:
        began.append(1)
        if len(began) == 6:
            raise KeyboardInterrupt
        return run(*arguments, **settings)

    monkeypatch.setattr(evaluation, "run_simulated", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(True).run()  # in the second image
    assert not (tmp_path / "metrics.csv").exists()
    there = evaluate(True).run()
    assert len(began) == 6 + 4 + 1  # the second image's, and the worst one for the picture
    (tmp_path / "sessions.json").unlink()
    assert evaluate(True).run() == pytest.approx(there, nan_ok=True)
    known = len(began)
    evaluate(True, name="another").run()
    assert len(began) == known + 9  # another adapter's sessions are others


def test_a_data_set_without_the_classes_is_an_error(evaluate: Evaluate) -> None:
    made = evaluate(False)
    for item in made.dataset:
        item["label"] = item["label"] * 0
    with pytest.raises(DataError, match="no image holds any of the classes lesion"):
        made.run()


@pytest.mark.parametrize("settings", [{"clicks": 0}, {"starts": ["box"]}, {"starts": []}])
def test_settings_that_make_no_sense_are_an_error(evaluate: Evaluate, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        evaluate(False, **settings)
