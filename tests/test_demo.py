from __future__ import annotations

import csv
import logging
import re
from pathlib import Path

import pytest
from PIL import Image

from medsa_nets import demo as module
from medsa_nets import precision
from medsa_nets.demo import GOOD, PLANS, PROMPTS, Demo, Plan, Speed, announce, choose_plan, judge, main
from medsa_nets.precision import choose_amp

FAST = Speed(step=0.1, encode=0.2, start=1.0)
SLOW = Speed(step=0.75, encode=1.6, start=3.0)
HOPELESS = Speed(step=5.0, encode=10.0, start=5.0)
ENOUGH = 270.0  # seconds


@pytest.mark.parametrize(("speed", "plan", "fits"), [(FAST, 0, True), (SLOW, 1, True), (HOPELESS, 1, False)])
def test_a_slow_machine_takes_smaller_pictures_and_fewer_steps(speed, plan, fits):
    assert choose_plan(speed, ENOUGH) is PLANS[plan]
    assert (PLANS[plan].seconds(speed) <= ENOUGH) is fits


def test_what_will_be_done_is_said():
    text = announce(Plan(image_size=256, steps=150), FAST, ENOUGH)
    assert "0.40 s a step: about 1.0 minutes for 150 steps of 4 pictures of 256 x 256" in text
    assert "--minutes" not in text


def test_a_machine_that_is_too_slow_is_told_before_the_training():
    text = announce(PLANS[-1], HOPELESS, ENOUGH)
    minutes = int(text.rpartition("--minutes ")[2].split()[0])
    assert choose_plan(HOPELESS, 60.0 * minutes).seconds(HOPELESS) <= 60.0 * minutes
    assert "may not be good" in text


@pytest.mark.parametrize("low", [*PROMPTS, None])
def test_masks_that_are_not_good_are_named_with_the_command_that_goes_on(low):
    after = {prompt: 0.5 if prompt == low else 0.95 for prompt in PROMPTS}
    text = judge(after, out_of_time=True, command="GO ON")
    assert ("NOT GOOD" in text) is (low is not None)
    assert ("GO ON" in text) is (low is not None)
    assert low is None or f"0.500 for prompt {low}" in text
    assert "NOT GOOD" in judge({**after, "box": float("nan")}, out_of_time=False, command="")


@pytest.fixture
def bundle(monkeypatch, tmp_path):
    """Stands for the bundle's commands: the calls, and the Dice that they give, by stage."""
    calls = []
    dice = {"before": 0.1, "after": 0.95}

    def run(command, output_dir, **settings):
        calls.append((command, settings))
        if command == "evaluating":
            folder = Path(output_dir)
            (folder / "overlays").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "overlays" / "a_overlay.png")
            with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(["val_mean_dice", dice[folder.parent.name]])

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(Demo, "time_steps", lambda self: SLOW)
    monkeypatch.setattr(module, "limit_threads", lambda: 1)
    return calls, dice, ["--dataset_dir", str(tmp_path), "--output_dir", str(tmp_path / "demo")]


def test_the_demo_trains_what_was_chosen_in_the_time_that_is_left(bundle, capsys):
    calls, _, arguments = bundle
    assert main(arguments) == 0
    (training,) = (settings for command, settings in calls if command == "training")
    assert training["image_size"] == PLANS[1].image_size
    assert training["samples_per_epoch"] * training["max_epochs"] == 4 * PLANS[1].steps
    assert [Path(file).name for file in training["config_file"]] == ["train.yaml", "decoder.yaml"]
    assert 200.0 < training["time_limit"] <= ENOUGH
    assert training["start_from"] is None
    assert {s["image_size"] for command, s in calls if command == "evaluating"} == {training["image_size"]}
    out = capsys.readouterr().out
    assert f"prompt none     {0.1:.3f}   {0.95:.3f}" in out
    assert "The adapter is good" in out


@pytest.fixture
def own_logging():
    """Handlers of the root logger are those of before, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_the_demo_says_what_it_computes_in(monkeypatch, tmp_path, capsys, own_logging):
    def steps(demo: Demo) -> list[float]:
        choose_amp("auto", "cpu")  # as a training step does first
        return [0.3, 0.1]

    monkeypatch.setattr(Demo, "take_steps", steps)
    precision.forget()
    Demo(Path(__file__).parents[1] / "bundles" / "medsa_isic", tmp_path, tmp_path).time_steps()
    assert re.search(r"precision: (bfloat16|float32) \(.* on this processor\)", capsys.readouterr().out)


def test_an_untrained_adapter_is_not_left_in_silence(bundle, capsys):
    _, dice, arguments = bundle
    dice["after"] = GOOD - 0.01
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "NOT GOOD" in out
    command = out.rpartition("medsa_nets.demo ")[2].split()
    assert command[:3] == ["--go_on", "--minutes", "9"]
    assert command[3:] == arguments


def test_a_demo_that_goes_on_begins_with_the_adapter_of_the_one_before(bundle):
    calls, _, arguments = bundle
    main([*arguments, "--go_on"])
    (training,) = (settings for command, settings in calls if command == "training")
    assert training["start_from"].endswith("model.pt")


def test_without_its_bundle_the_demo_says_where_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    assert "medsa_isic: there is no configs/train.yaml" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
