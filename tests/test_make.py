"""The script that sets up environments and runs in them, without setting any up."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("make", ROOT / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run; a call of ``venv`` makes the folder."""
    made: list[list[str]] = []

    def call(*command: object, **variables: object) -> int:
        made.append([*map(str, command), *(f"{name}={value}" for name, value in variables.items())])
        if "venv" in made[-1]:
            Path(made[-1][-1]).mkdir(exist_ok=True)
        return 0

    monkeypatch.setattr(make, "call", call)
    return made


def test_an_environment_is_made_once_and_again_when_its_versions_change(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_text((ROOT / file).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    venv = tmp_path / "v"
    assert make.main(["set-up", "--venv", str(venv)]) == 0
    assert [command[1:4] for command in calls] == [["-m", "venv", str(venv)], *[["-m", "pip", "install"]] * 2]
    assert "constraints.txt" in calls[1]
    del calls[:]
    assert make.main(["demo", "--minutes", "2", "--venv", str(venv)]) == 0
    assert [command[1:] for command in calls] == [["-m", "medsa_nets.demo", "--minutes", "2"]]
    stamp = (venv / ".installed").stat().st_mtime
    os.utime(tmp_path / "constraints.txt", (stamp + 9, stamp + 9))
    del calls[:]
    assert make.main(["set-up", "--venv", str(venv)]) == 0
    assert len(calls) == 3


def test_the_tests_that_need_a_server_run_beside_its_environment(tmp_path: Path, calls: list[list[str]]) -> None:
    venv = tmp_path / "v"
    assert make.main(["test-label", "--venv", str(venv)]) == 0
    label = make.python_of(tmp_path / "v-label")
    chosen = ["-n", "2", "--dist", "loadfile", "-m", "label", "tests/label"]
    assert calls[-1][1:] == ["-m", "pytest", *chosen, f"MEDSA_LABEL_PYTHON={label}"]
    assert [str(label), "constraints-label.txt", ".[label]"] == [
        part for command in calls for part in command if part in (str(label), "constraints-label.txt", ".[label]")
        and command[0] == str(label) and "-c" in command
    ]  # fmt: skip


def test_a_step_that_fails_ends_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make, "call", lambda *command, **variables: int("pip" in command))
    assert make.main(["demo", "--venv", str(tmp_path / "v")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'v'} could not be set up: this failed: ")
    assert not (tmp_path / "v" / ".installed").exists()


def test_a_failure_of_any_run_of_the_tests_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "set_up", lambda venv, name: Path("python"))
    monkeypatch.setattr(
        make, "call", lambda *command, **variables: 3 if command[-1] == make.TESTS["test"][-1][-1] else 0
    )
    assert make.main(["test", "--venv", str(tmp_path / "v")]) == 3


def test_the_commands_of_the_makefile_are_those_of_the_python_script() -> None:
    line = next(line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "TASKS :=" in line)
    assert line.split(":=")[1].split() == list(make.TASKS)


@pytest.mark.parametrize(("version", "right"), [((3, 9), False), ((3, 10), True), ((3, 13), True), ((4, 0), False)])
def test_a_python_that_is_not_supported_is_named_before_anything_is_made(version: tuple, right: bool) -> None:
    if right:
        make.check_python(version)
    else:
        with pytest.raises(make.SetUpError, match=rf"this is Python {version[0]}\.{version[1]}, MedSA needs 3\.10 to"):
            make.check_python(version)


@pytest.mark.parametrize("system", ["nt", "posix"])
def test_the_interpreter_of_an_environment_lies_where_the_system_puts_it(
    monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    folder = Path("venv")
    with monkeypatch.context() as context:
        context.setattr(make.os, "name", system)
        found = make.python_of(folder)
    assert found == folder / ("Scripts/python.exe" if system == "nt" else "bin/python")
