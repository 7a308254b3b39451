from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medsa_nets import measurements, precision
from medsa_nets.errors import MedSAError
from medsa_nets.inferers import PromptInferer, SlabInferer
from medsa_nets.precision import Precision, agree, autocast, choose_amp, gain, measure_bfloat16, read_amp
from medsa_nets.prompts import PromptSampler
from medsa_nets.training import PromptedIteration, VolumeIteration

FASTER = {"float32 forward": 2.0, "bfloat16 forward": 1.0, "float32 training": 3.0, "bfloat16 training": 2.0}
SLOWER = {"float32 forward": 0.005, "bfloat16 forward": 0.061}
FLOAT16 = Precision(torch.float16, scale=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of this test's own, and nothing chosen or measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    precision.forget()
    measurements.forget()
    yield
    precision.forget()
    measurements.forget()


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch):
    """Let the measurement find given times."""
    return lambda found: monkeypatch.setattr(precision, "measure_bfloat16", lambda: found)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Let there be a GPU of a compute capability."""

    def make(major: int, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {major}")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.version, "hip", hip)

    return make


@pytest.mark.parametrize(
    ("given", "meant"),
    [(True, True), (False, False), ("true", True), ("False", False), ("no", False), (1, True), ("auto", "auto"),
     (" Auto ", "auto"), (FLOAT16, FLOAT16)],
)  # fmt: skip
def test_settings_are_read_as_configurations_and_command_lines_give_them(given, meant):
    assert read_amp(given) == meant
    assert type(read_amp(given)) is type(meant)


@pytest.mark.parametrize("given", ["fast", "", None, 2, "bfloat16"])
@pytest.mark.parametrize(
    "make",
    [
        read_amp,
        PromptInferer,
        lambda amp: SlabInferer(amp=amp),
        lambda amp: PromptedIteration(sampler=PromptSampler(), amp=amp),
        lambda amp: VolumeIteration(sampler=PromptSampler(), num_classes=1, amp=amp),
    ],
)
def test_another_setting_is_refused_by_name_at_once(make, given):
    with pytest.raises(MedSAError, match=r"^amp must be auto, true or false, got .*--amp auto"):
        make(given)


def test_a_cpu_that_is_faster_in_bfloat16_takes_it(times):
    times(FASTER)
    chosen = choose_amp("auto", "cpu")
    assert (chosen.dtype, chosen.scale) == (torch.bfloat16, False)
    assert chosen.reason == "1.5 times as fast as float32 on this processor"  # training gains less


@pytest.mark.parametrize(
    "found", [SLOWER, {**FASTER, "bfloat16 training": 3.1}, {**FASTER, "bfloat16 forward": 2.1}],
    ids=["both", "training", "forward"],
)  # fmt: skip
def test_a_cpu_that_is_slower_in_bfloat16_takes_float32(times, found):
    times(found)
    chosen = choose_amp("auto", "cpu")
    assert (chosen.dtype, chosen.scale) == (None, False)
    assert "times as long on this processor" in chosen.reason


def test_bfloat16_that_is_asked_for_where_it_is_slow_is_warned_of_with_both_times(times, caplog):
    times(SLOWER)
    assert choose_amp("true", "cpu").dtype == torch.bfloat16
    warning = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warning) == 1
    assert "61.0 ms in bfloat16, 5.0 ms in float32. Pass --amp auto or --amp false." in warning[0]


def test_bfloat16_that_is_asked_for_where_it_is_fast_is_not_warned_of(times, caplog):
    times(FASTER)
    assert choose_amp(True, "cpu").dtype == torch.bfloat16
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_log_says_once_what_was_chosen_and_why(times, caplog):
    times(FASTER)
    with caplog.at_level(logging.INFO, "medsa_nets.precision"):
        for _ in range(3):
            choose_amp("auto", "cpu")
            choose_amp("auto", torch.device("cpu"))
    assert caplog.messages == ["precision: bfloat16 (1.5 times as fast as float32 on this processor)"]


@pytest.mark.parametrize("amp", [False, "false", FLOAT16])
def test_nothing_is_measured_unless_it_is_needed(monkeypatch, amp):
    monkeypatch.setattr(precision, "measure_bfloat16", lambda: pytest.fail("measured"))
    inferers = [PromptInferer("auto"), SlabInferer(amp="auto")]  # they choose when they are used
    assert choose_amp(amp, "cpu").dtype == (None if amp in (False, "false") else torch.float16)
    assert [inferer.amp for inferer in inferers] == ["auto", "auto"]


@pytest.mark.parametrize("amp", ["auto", True])
@pytest.mark.parametrize(
    ("major", "hip", "dtype", "scale"),
    [(7, None, torch.float16, True), (8, None, torch.bfloat16, False), (9, None, torch.bfloat16, False),
     (7, "6.0", torch.bfloat16, False)],
)  # fmt: skip
def test_a_gpu_without_bfloat16_takes_float16_with_a_scaler(gpu, amp, major, hip, dtype, scale):
    gpu(major, hip)
    chosen = choose_amp(amp, "cuda")
    assert (chosen.dtype, chosen.scale) == (dtype, scale)
    assert f"GPU {major}" in chosen.reason
    assert choose_amp(amp, "cuda:0") is chosen


def test_other_devices_compute_in_float32_unless_told_otherwise():
    assert choose_amp("auto", "mps").dtype is None
    assert choose_amp("true", "mps").dtype == torch.bfloat16


@pytest.mark.parametrize("chosen", [Precision(), Precision(torch.bfloat16), FLOAT16])
def test_networks_compute_in_what_was_chosen(chosen):
    with autocast(chosen, "cpu"):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == (chosen.dtype or torch.float32)


def test_the_choice_agrees_with_what_this_machine_measures():
    found = measure_bfloat16()
    assert all(0 < seconds < 1 for seconds in found.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "measure_bfloat16", lambda: found)
        chosen = choose_amp("auto", "cpu")
    faster = min(gain(found, "forward"), gain(found, "training")) >= precision.FASTER
    assert chosen.dtype == (torch.bfloat16 if faster else None)


def test_measuring_leaves_threads_and_random_numbers_as_they_are():
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):  # as where an evaluator asks first
        found = measure_bfloat16()
    assert gain(found, "forward") > 0
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


AVX2 = """
import time, torch
from medsa_nets.precision import choose_amp, measure_bfloat16
start = time.process_time()
times = measure_bfloat16()
print("seconds", time.process_time() - start)
print("dtype", choose_amp("auto", "cpu").dtype, times["bfloat16 forward"] > times["float32 forward"])
"""


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="the limits are x86-64's")
def test_a_processor_that_emulates_bfloat16_takes_float32_and_finds_out_in_a_second(tmp_path):
    limited = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", AVX2], capture_output=True, text=True, check=True, env={**os.environ, **limited}
    )
    said = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert said["dtype"] == "None True"
    assert float(said["seconds"]) < 1


def test_processes_that_choose_differently_compute_in_float32(monkeypatch, caplog):
    def gather(others: list[str], own: str) -> None:
        others[:] = [own, f"{other.name} {other.scale}"]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    other = FLOAT16
    assert agree(FLOAT16) is FLOAT16
    other = Precision(torch.bfloat16)
    assert (agree(FLOAT16).dtype, agree(FLOAT16).scale) == (None, False)
    assert "chose differently" in caplog.text


def test_a_process_alone_keeps_its_choice():
    assert agree(FLOAT16) is FLOAT16
