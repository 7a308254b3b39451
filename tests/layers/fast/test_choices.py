from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from medsa_nets import measurements
from medsa_nets.layers import attend
from medsa_nets.layers.fast import attention, choices
from medsa_nets.layers.fast.linear import linear_library


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "CHOICES", {})
    measurements.forget()
    yield tmp_path
    measurements.forget()


def compute(seconds: float) -> None:
    """Keep this thread busy for so long."""
    end = choices.own_time() + seconds
    while choices.own_time() < end:
        pass


def choice(seconds: dict[str, float], calls: list[str]) -> choices.Choice:
    def way(name: str):
        return lambda: calls.append(name) or compute(seconds[name])

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


def test_time_that_others_take_on_a_busy_machine_does_not_count():
    ways = {"usual": lambda: compute(0.004), "other": lambda: (compute(0.001), time.sleep(0.006))}
    assert choices.Choice("test", lambda kind: ways)("float32") == "other"


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
        linear_library: ["torch.float32"],
        attention.attention_way: [
            "torch.float32, training, biased, 8 x 8",
            "torch.float32, inference, biased, 256 x 256",
            "torch.float32, training, plain, 8 x 256",
        ],
        attention.map_way: ["torch.float32, small", "torch.float32, large"],
    }
    with mode():
        for asked, names in kinds.items():
            for kind in names:
                ways = asked.measure(kind)
                assert len(ways) == 2
                assert all(0.0 < seconds < 10.0 for seconds in ways.values())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("queries", "keys", "biased", "training", "kind"),
    [
        (6, 6, True, False, "inference, biased, 8 x 8"),  # a slab's columns
        (9, 9, True, False, "inference, biased, 16 x 16"),
        (49, 49, True, True, "training, biased, 64 x 64"),  # windows
        (196, 196, True, True, "training, biased, 256 x 256"),
        (5, 576, False, True, "training, plain, 8 x 256"),  # the decoder's tokens, and the image that answers
        (576, 5, False, True, "training, plain, 256 x 8"),
    ],
)
def test_attention_is_measured_by_what_makes_another_way_the_faster(monkeypatch, queries, keys, biased, training, kind):
    asked = []
    monkeypatch.setattr(attention.attention_way, "answers", {})
    monkeypatch.setattr(attention.attention_way, "measure", lambda kind: asked.append(kind) or {"fused": 1.0})
    q, k, v = (torch.rand(2, 4, n, 8, requires_grad=training) for n in (queries, keys, keys))
    attend(q, k, v, torch.rand(1, 4, queries, keys) if biased else None)
    assert asked == [f"torch.float32, {kind}"]


@pytest.mark.parametrize("size", ["biased, 8 x 8", "biased, 16 x 24", "biased, 64 x 64", "plain, 8 x 256"])
def test_the_ways_of_attention_that_are_measured_give_the_same(size):
    for use, kind in (("inference", torch.Tensor), ("training", tuple)):  # of the gradients, which training computes
        fused, explicit = (way() for way in attention.attention_way.examples(f"torch.float32, {use}, {size}").values())
        assert isinstance(fused, kind)
        torch.testing.assert_close(fused, explicit)


def test_a_first_question_from_within_a_checkpoint_leaves_its_gradients_as_they_are(monkeypatch):
    monkeypatch.setattr(attention.attention_way, "answers", {})
    bias = torch.rand(1, 5, 6, 6)

    def gradient(attend) -> torch.Tensor:
        q = torch.linspace(-1.0, 1.0, 4 * 5 * 6 * 8).view(4, 5, 6, 8).requires_grad_()
        return torch.autograd.grad(attend(q, q, q, bias).square().sum(), q)[0]

    found = gradient(lambda *args: checkpoint(attend, *args, use_reentrant=False))  # which measures
    torch.testing.assert_close(found, gradient(attend))
    assert attention.attention_way.answers
