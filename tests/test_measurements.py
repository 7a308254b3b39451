from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from medsa_nets import measurements
from medsa_nets.measurements import cache_dir, forget, machine, measured


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of this test's own, and nothing in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "medsa" / "measurements.json"
    forget()


class Stopwatch:
    """Counts how often it is asked, and answers with that."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> dict[str, float]:
        self.asked += 1
        return {"fast": float(self.asked), "slow": 10.0}


def test_a_measurement_is_taken_once_and_kept_for_other_processes(cache):
    watch = Stopwatch()
    first = measured("products", watch)
    assert measured("products", watch) == first == {"fast": 1.0, "slow": 10.0}
    forget()  # as another process
    assert measured("products", watch) == first
    assert watch.asked == 1
    assert [path.name for path in cache.parent.iterdir()] == ["measurements.json"]


def test_a_file_serves_another_process(cache, forks):
    measured("products", Stopwatch())
    code = (
        "import json, torch; from medsa_nets.measurements import measured; "
        f"torch.set_num_threads({torch.get_num_threads()}); "
        "print(json.dumps(measured('products', lambda: {'anew': 1.0})))"
    )
    result = forks.run(["-c", code])
    assert json.loads(result.stdout.splitlines()[-1]) == {"fast": 1.0, "slow": 10.0}


def test_what_a_caller_does_to_an_answer_changes_nothing_kept(cache):
    watch = Stopwatch()
    measured("products", watch).clear()
    assert measured("products", watch) == {"fast": 1.0, "slow": 10.0}


def test_keys_have_measurements_of_their_own_in_one_file(cache):
    watch = Stopwatch()
    measured("products", watch)
    measured("convolutions", watch)
    forget()
    assert measured("products", watch)["fast"] == 1
    assert measured("convolutions", watch)["fast"] == 2
    assert watch.asked == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41"),
        lambda patch: patch.setenv("DNNL_MAX_CPU_ISA", "SSE41"),
        lambda patch: patch.setenv("ATEN_CPU_CAPABILITY", "other"),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
        lambda patch: patch.setattr(torch, "__version__", "99.0"),
        lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        lambda patch: patch.setattr(measurements, "processor", lambda: "another processor"),
    ],
    ids=["onednn", "dnnl", "aten", "threads", "version", "capability", "processor"],
)
def test_another_machine_measures_anew(cache, monkeypatch, change):
    watch = Stopwatch()
    measured("products", watch)
    change(monkeypatch)
    assert measured("products", watch)["fast"] == 2
    monkeypatch.undo()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: text.replace("10.0", '"ten"'),
        lambda text: text.replace("10.0", "Infinity"),
        lambda text: text.replace("10.0", "NaN"),
        lambda text: json.dumps({machine() + " | products": [1.0, 10.0]}),
        lambda text: "\x00\ufffd{",
    ],
    ids=["empty", "half", "list", "text", "infinite", "nan", "entry", "binary"],
)
def test_a_damaged_file_is_measured_anew_and_mended(cache, damage):
    watch = Stopwatch()
    measured("products", watch)
    cache.write_text(damage(cache.read_text(encoding="utf-8")), encoding="utf-8")
    forget()
    assert measured("products", watch)["fast"] == 2
    forget()
    assert measured("products", watch)["fast"] == 2


def test_a_file_that_is_no_text_is_measured_anew(cache):
    watch = Stopwatch()
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"\xff\xfe\x80")
    assert measured("products", watch)["fast"] == 1


@pytest.mark.parametrize("obstacle", ["file", "folder"])
def test_a_cache_that_can_not_be_written_breaks_nothing(tmp_path, monkeypatch, obstacle):
    if obstacle == "file":  # where the folder should be; root may write into every folder
        (tmp_path / "medsa").write_text("in the way")
    else:
        (tmp_path / "medsa" / "measurements.json").mkdir(parents=True)
    watch = Stopwatch()
    assert measured("products", watch)["fast"] == 1
    assert measured("products", watch)["fast"] == 1  # from memory
    forget()
    assert measured("products", watch)["fast"] == 2


def test_threads_that_ask_at_once_measure_once(cache):
    watch, barrier, answers = Stopwatch(), threading.Barrier(8), []

    def ask() -> None:
        barrier.wait()
        answers.append(measured("products", watch)["fast"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [1.0] * 8


def test_a_failed_measurement_is_not_kept(cache):
    def fail() -> dict[str, float]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        measured("products", fail)
    assert measured("products", Stopwatch())["fast"] == 1


def test_the_cache_lies_where_the_system_keeps_the_users_caches(tmp_path, monkeypatch):
    assert cache_dir() == tmp_path / "medsa"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "medsa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home" / ".cache" / "medsa"


def test_a_user_without_home_has_a_cache_all_the_same(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert os.path.isabs(cache_dir())
