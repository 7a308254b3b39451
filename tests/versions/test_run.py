"""The script of the versions: what can't be made is named, and never passes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("versions_run", Path(__file__).with_name("run.py"))
versions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(versions)
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two cells: one of no Python that there is, one of this Python; and a suite of one test, which passes."""
    (tmp_path / "cells.cfg").write_text(f"[none]\npython = 3.99\n[this]\npython = {HERE}\n", encoding="utf-8")
    (tmp_path / "short.py").write_text("def test_it():\n    pass\n", encoding="utf-8")
    monkeypatch.setattr(versions, "HERE", tmp_path)
    return tmp_path


def test_a_cell_without_its_python_is_not_made_and_does_not_pass(cells: Path) -> None:
    assert versions.main(["--cells", "none", "--envs", str(cells), "--output", str(cells / "table.md")]) == 1
    assert "| not made (no Python 3.99 on this machine) |" in (cells / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("passes", "strict", "status"), [(True, False, 0), (True, True, 1), (False, False, 1)])
def test_the_table_says_what_ran_in_which_versions(cells: Path, passes: bool, strict: bool, status: int) -> None:
    if not passes:
        (cells / "short.py").write_text("def test_it():\n    assert False\n", encoding="utf-8")
    arguments = ["--python", f"this={sys.executable}", "--output", str(cells / "table.md")]
    assert versions.main([*arguments, *(["--strict"] if strict else [])]) == status
    row = (cells / "table.md").read_text(encoding="utf-8").splitlines()[-1]
    assert row.startswith(f"| this | {HERE}.")
    assert ("| passed |" in row) == passes
    assert ("FAILED (1 failed" in row) != passes


def test_an_environment_that_pip_can_not_fill_is_named_with_its_error(cells: Path) -> None:
    with open(cells / "cells.cfg", "a", encoding="utf-8") as file:
        file.write(f"[wrong]\npython = {HERE}\nrequires = ./no_such_wheel.whl\n")
    assert versions.main(["--cells", "wrong", "--envs", str(cells / "e"), "--output", str(cells / "table.md")]) == 1
    row = (cells / "table.md").read_text(encoding="utf-8").splitlines()[-1]
    assert "not made (ERROR: " in row
    assert "no_such_wheel.whl" in row


def test_an_unknown_cell_is_named_with_those_that_there_are(cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        versions.main(["--cells", "newer"])
    assert "cells.cfg has no cell newer; expected none, this" in capsys.readouterr().err
