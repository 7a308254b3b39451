"""Functions as commands, and the list of the package's commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from medsa_nets.__main__ import COMMANDS, main
from medsa_nets.commands import command
from medsa_nets.errors import DataError

calls: list[dict[str, Any]] = []


def paint(
    wall: Path,
    *,
    name: str = "",
    coats: int = 1,
    share: float | None = None,
    dry: bool = False,
    hue: Sequence[str] = (),
) -> int:
    """Paint a wall.

    Args:
        wall: the wall.
        name: of the paint.
        coats: how many.
        share: of the wall.
        dry: wait until it is.
        hue: a colour; may be given more than once.
    """
    calls.append({"wall": wall, "name": name, "coats": coats, "share": share, "dry": dry, "hue": list(hue)})
    if name == "none":
        raise DataError("there is no paint.")
    return 2


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a"], {}),
        (["a", "--name", "007"], {"name": "007"}),
        (["a", "--name=red, blue"], {"name": "red, blue"}),
        (["a", "-n", "red", "--coats", "3", "--share", "0.5"], {"name": "red", "coats": 3, "share": 0.5}),
        (["a", "--dry"], {"dry": True}),
        (["a", "--dry", "false"], {"dry": False}),
        (["--hue", "b", "a", "--hue=c,d"], {"hue": ["b", "c,d"]}),
        (["--wall", "a"], {}),
    ],
)
def test_options_have_the_types_that_the_function_says(arguments: list[str], expected: dict[str, Any]) -> None:
    assert command(paint, arguments, name="paint", short={"-n": "--name"}) == 2
    usual = {"wall": Path("a"), "name": "", "coats": 1, "share": None, "dry": False, "hue": []}
    assert calls == [usual | expected]


@pytest.mark.parametrize("arguments", [[], ["a", "--colour", "red"], ["a", "b"]])
def test_wrong_options_stop_a_command_before_it_runs(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        command(paint, arguments, name="paint")
    assert caught.value.code == 2
    assert "usage: paint --help" in capsys.readouterr().err
    assert calls == []


def test_errors_are_one_line(capsys: pytest.CaptureFixture) -> None:
    assert command(paint, ["a", "--name", "none"], name="paint") == 1
    assert capsys.readouterr().err == "error: there is no paint.\n"
    assert command(paint, ["a", "--coats", "many"], name="paint") == 1
    assert capsys.readouterr().err == "error: --coats many: expected a value of the type int.\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_takes(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGER", "cat")
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    said = "".join(capsys.readouterr())
    assert f"medsa_nets {name}" in said or f"medsa_nets.{name}" in said


def test_unknown_commands_are_answered_by_the_list(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    assert all(f"  {name} " in capsys.readouterr().out for name in ["serve"])
    assert main(["paint"]) == 2
    said = capsys.readouterr().err
    assert "there is no command 'paint'" in said
    assert all(f"  {name} " in said for name in COMMANDS)
