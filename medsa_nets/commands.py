"""How a function becomes a command: its arguments are the options, its docstring the help, its errors one line."""

from __future__ import annotations

import inspect
import io
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFns
from monai.utils import str2bool

from medsa_nets.errors import MedSAError, SettingError, print_anything

SEVERAL = "\n"  # between the values of an option that was given more than once


def command(
    function: Callable[..., Any],
    arguments: Sequence[str] | None = None,
    *,
    name: str,
    short: Mapping[str, str] | None = None,
) -> int:
    """Run a function as a command.

    Options are the function's arguments, of the types that it says: a text stays a text (``--name 007``), an option
    without value is true, and one that takes several values (``Sequence``) may be given more than once.

    Args:
        function: what is run; what it returns, where that is a number, is the exit status.
        arguments: of the command line; none takes the process's own.
        name: of the command, for its help.
        short: short forms of options, as ``{"-o": "--output"}``.

    Returns:
        The exit status: 0, 1 after an error of this package, which is printed, or what the function returned.

    Raises:
        SystemExit: with status 2 and the usage, when the options are not those of the function; 0 after ``--help``.
    """
    print_anything()
    given = list(sys.argv[1:] if arguments is None else arguments)
    types = typing.get_type_hints(function)
    several = [option for option, kind in types.items() if typing.get_origin(kind) in (list, Sequence)]
    given = _gather([(short or {}).get(argument, argument) for argument in given], several)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def read(*own: Any, **settings: Any) -> None:
        calls.append((own, settings))  # what is left over, which Fire finds afterwards, must stop it before it runs

    read.__doc__ = inspect.getdoc(function)
    read.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    readers = {option: _reader(option, kind) for option, kind in types.items() if option != "return"}
    try:
        if not {"--help", "-h"} & set(given):
            read = SetParseFns(*(readers[option] for option in inspect.signature(function).parameters), **readers)(read)
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                fire.Fire(read, given, name=name)
        except SystemExit as error:
            if not error.code:
                print(said.getvalue(), end="", file=sys.stderr)
                raise
            wrong = next((line for line in said.getvalue().splitlines() if line.startswith("ERROR")), "ERROR")
            print(f"{wrong}\nusage: {name} --help says what there is.", file=sys.stderr)
            raise SystemExit(2) from None
        result = [function(*own, **settings) for own, settings in calls]
    except MedSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return result[0] if result and isinstance(result[0], int) else 0


def command_with_settings(function: Callable[..., int], arguments: Sequence[str] | None = None, *, name: str) -> int:
    """Run a function as a command whose further options are settings of a configuration, of types that Fire guesses.

    Args:
        function: what is run; it returns the exit status.
        arguments: of the command line; none takes the process's own.
        name: of the command, for its help.

    Returns:
        The exit status; 2 after an error of this package, which is printed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = ["--", "--help"] if "--help" in given else given
    try:
        status = fire.Fire(function, given, name=name, serialize=lambda _: None)
    except MedSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def _gather(arguments: Sequence[str], several: Sequence[str]) -> list[str]:
    """Put the values of each option that may be given more than once into one."""
    values: dict[str, list[str]] = {}
    out = []
    left = iter(arguments)
    for argument in left:
        option, equals, value = argument.partition("=")
        key = option.lstrip("-").replace("-", "_")
        if not option.startswith("--") or key not in several:
            out.append(argument)
            continue
        values.setdefault(key, []).append(value if equals else next(left, ""))
    return [*out, *(f"--{key}={SEVERAL.join(own)}" for key, own in values.items())]


def _reader(option: str, kind: Any) -> Callable[[str], Any]:
    """Reads the text of an option as its type."""
    kinds = [part for part in typing.get_args(kind) or (kind,) if part is not type(None)]
    if typing.get_origin(kind) in (list, Sequence):
        return lambda text: [part for part in text.split(SEVERAL) if part]
    first = kinds[0]
    if first not in (bool, int, float, Path):
        return str

    def read(text: str) -> Any:
        try:
            return str2bool(text) if first is bool else first(text)
        except ValueError as error:
            raise SettingError(f"--{option} {text}: expected a value of the type {first.__name__}.") from error

    return read
