from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from medsa_nets import measurements
from medsa_nets.layers import choices, common, linear


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "CHOICES", {})
    measurements.forget()
    yield tmp_path
    measurements.forget()


def choice(seconds: dict[str, float], calls: list[str]) -> choices.Choice:
    def way(name: str):
        return lambda: calls.append(name) or time.sleep(seconds[name])

    return choices.Choice("test", lambda kind: {name: way(name) for name in seconds})


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"usual": 0.01, "other": 0.002}, "other"),
        ({"usual": 0.002, "other": 0.01}, "usual"),
        ({"usual": 0.0100, "other": 0.0099}, "usual"),  # within chance
    ],
)
def test_the_faster_way_is_taken_and_at_a_draw_the_usual_one(seconds, expected):
    assert choice(seconds, [])("float32") == expected


def test_a_measurement_is_kept_for_the_next_process():
    first, second = [], []
    asked = choice({"usual": 0.004, "other": 0.001}, first)
    assert asked("float32") == asked("float32") == "other"
    assert len(first) == 2 * (choices.ROUNDS + 1)
    measurements.forget()  # as a new process
    assert choice({"usual": 0.001, "other": 0.004}, second)("float32") == "other"
    assert not second
    assert choice({"usual": 0.001, "other": 0.004}, second)("bfloat16") == "usual"
    assert second


def test_a_forced_way_is_taken_unmeasured_as_long_as_the_block_runs():
    calls: list[str] = []
    asked = choice({"usual": 0.0, "other": 0.003}, calls)
    with asked.force("other"):
        assert asked("float32") == "other"
        assert not calls
    assert asked("float32") == "usual"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_each_way_of_the_layers_can_be_measured_in_any_mode_and_random_numbers_stay(mode):
    state = torch.get_rng_state()
    kinds = {
        linear.linear_library: ["torch.float32"],
        common.attention_way: ["torch.float32, training, few", "torch.float32, inference, many"],
        common.map_way: ["torch.float32, small", "torch.float32, large"],
    }
    with mode():
        for asked, names in kinds.items():
            for kind in names:
                ways = asked.measure(kind)
                assert len(ways) == 2
                assert all(0.0 < seconds < 10.0 for seconds in ways.values())
    assert torch.equal(torch.get_rng_state(), state)
