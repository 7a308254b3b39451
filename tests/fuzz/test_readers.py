"""No damaged file makes a reader hang, end in anything but one error of this package, or leave an output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medsa_nets.errors import DataError

pytest.importorskip("hypothesis", reason="hypothesis is not installed (the extra test)")


def fuzz(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run cases in a process of their own, which a damaged file may end."""
    command = [sys.executable, "-X", "faulthandler", str(Path(__file__).with_name("readers.py"))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], *sys.path]),
    }
    done = subprocess.run(
        [*command, "--keep", str(folder), *arguments],
        capture_output=True, text=True, errors="replace", check=False, env=environment,
    )  # fmt: skip
    assert done.stdout.strip(), f"ended with {done.returncode}: {done.stderr[-3000:]}"
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert summary["failures"] == {}, f"{summary}; the files are in {folder}"
    assert done.returncode == 0
    return summary


def judge(summary: dict[str, Any], cases: int) -> None:
    assert summary["cases"] >= cases
    assert summary["read"] > 0.05 * cases  # damage is small enough to pass some checks,
    assert summary["refused"] > 0.3 * cases  # and large enough to meet others
    assert min(summary["kinds"].values()) > 0.01 * cases
    assert summary["grown_mib"] < 1024


def test_two_thousand_damaged_files_give_an_image_or_one_error(tmp_path):
    judge(fuzz(tmp_path, "--cases", "2000"), 2000)


@pytest.mark.fuzz
def test_ten_thousand_damaged_files_give_an_image_or_one_error(tmp_path):
    judge(fuzz(tmp_path, "--cases", "10000", "--seed", "1"), 10_000)


@pytest.mark.parametrize("way", ["traceback", "two lines", "an output", "hang"])
def test_a_reader_that_does_otherwise_is_found(tmp_path, monkeypatch, way):
    from . import readers

    def run(path: Path, output: Path) -> None:
        if way == "traceback":
            raise KeyError("x")
        if way == "an output":
            (output / "mask.png").write_text("x")
        if way == "hang":
            time.sleep(0.4)
        raise DataError("one\ntwo" if way == "two lines" else "one")

    monkeypatch.setitem(readers.RUNS, "mask", run)
    if way == "hang":
        ended: list[float] = []
        monkeypatch.setattr(readers.faulthandler, "dump_traceback_later", lambda s, exit: ended.append(s))
    tally = readers.Tally()
    readers.run_case(readers.Seed("a.png", b"x", "mask"), b"x", tally, 0.2, tmp_path)
    if way == "hang":
        assert ended == [0.2]
        assert tally.slowest > 0.3
    else:
        assert len(tally.failures) == 1
        assert (tmp_path / "0_mask" / "a.png").read_bytes() == b"x"
