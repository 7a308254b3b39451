from __future__ import annotations

import os
import subprocess
import sys

import pytest

from medsa_nets.errors import BackendError, DataError, MedSAError, WeightsError, find_cause

ENGINE = """
from medsa_nets.errors import DataError, WeightsError, report_plainly
report_plainly()

class Engine:
    def run(self):
        try:
            {action}
        except {caught} as error:
            raise RuntimeError("applying transform LoadImaged") from error

try:
    Engine().run()
except RuntimeError as error:
    raise RuntimeError("bundle failed") from error
"""
WORKERS = """
from monai.data import DataLoader
from monai.transforms import Compose, LoadImaged
from medsa_nets.data import PhotographReader, SeededDataset
from medsa_nets.errors import report_plainly
report_plainly()
load = Compose([LoadImaged("image", reader=PhotographReader())])
list(DataLoader(SeededDataset([{{"image": "{path}"}}], load), batch_size=1, num_workers={workers}))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "MONAI_DEBUG": "0", **environment},
        check=False,
        timeout=300,
    )


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("kind", ["DataError", "WeightsError"])
def test_an_error_of_the_package_is_one_line(kind):
    result = run(ENGINE.format(action=f"raise {kind}('a.jpg: not readable; replace it.')", caught=kind))
    assert result.returncode == 1
    assert lines(result.stderr) == ["error: a.jpg: not readable; replace it."]
    assert result.stdout == ""


def test_an_unrelated_error_keeps_its_traceback():
    result = run(ENGINE.format(action="{}['missing']", caught="KeyError"))
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "KeyError: 'missing'" in result.stderr
    assert "error: " not in [line[:7] for line in lines(result.stderr)]


def test_debugging_shows_everything():
    result = run(ENGINE.format(action="raise DataError('a.jpg')", caught="DataError"), MONAI_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "medsa_nets.errors.DataError: a.jpg" in result.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_data_loader_is_one_line_too(tmp_path, workers):
    path = tmp_path / "lesion.jpg"
    path.write_bytes(b"")
    result = run(WORKERS.format(path=path, workers=workers))
    assert result.returncode == 1
    errors = [line for line in lines(result.stderr) if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {path}: not readable as an image")
    assert "Traceback" not in result.stderr


def test_the_cause_is_found_however_deep_it_lies():
    cause, context, outer = DataError("deep"), KeyError("in between"), RuntimeError("outer")
    context.__context__ = cause  # raised while the other was handled
    outer.__cause__ = context  # raise … from …
    assert find_cause(outer) is cause
    assert find_cause(cause) is cause
    assert find_cause(ValueError("unrelated")) is None
    assert find_cause(None) is None


@pytest.mark.parametrize(
    ("kind", "base"), [(BackendError, RuntimeError), (DataError, ValueError), (WeightsError, RuntimeError)]
)
def test_errors_are_caught_by_their_general_kind_too(kind, base):
    assert issubclass(kind, MedSAError)
    assert issubclass(kind, base)
