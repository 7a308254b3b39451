"""Commands of Python for tests, without importing MONAI anew for each, which takes most of a short one's time.

A process that has imported it forks for every command; the fork runs what ``python -m`` or ``python -c`` would. Where
the system can't fork, each command gets a process of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEPT = 2  # processes that wait for commands, each with an environment of its own


class Forks:
    """Runs commands in forks of processes that wait, one for each environment."""

    def __init__(self) -> None:
        self.waiting: dict[str, subprocess.Popen[str]] = {}

    def run(
        self, arguments: Sequence[str], cwd: Path | None = None, timeout: float = 600.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """The same as ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True)``.

        Args:
            arguments: ``-m``, a module and its arguments, or ``-c`` and code.
            cwd: folder to run in; none takes this one.
            timeout: seconds.
            environment: variables that it reads while it runs; what Python reads at its start does nothing here.

        Raises:
            subprocess.TimeoutExpired: when it takes longer.
            RuntimeError: when the process that waits has ended, as where it can't import MONAI.
        """
        command, cwd = [sys.executable, *arguments], cwd or Path.cwd()
        if not hasattr(os, "fork"):
            env = {**os.environ, **environment}
            return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
        process = self._process()
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder) / "out", Path(folder) / "err"]
            request = {
                "arguments": list(arguments), "cwd": str(cwd), "said": [str(path) for path in said],
                "environment": environment,
            }  # fmt: skip
            assert process.stdin is not None and process.stdout is not None  # noqa: PT018
            print(json.dumps(request), file=process.stdin, flush=True)
            late = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
            late.start()
            answer = process.stdout.readline()
            late.cancel()
            out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in said)
        if not answer and (status := process.wait()) == -signal.SIGKILL:
            raise subprocess.TimeoutExpired(command, timeout, out, err)
        if not answer:
            raise RuntimeError(f"the process that forks for {command} ended with {status}: {err}")
        return subprocess.CompletedProcess(command, json.loads(answer), out, err)

    def close(self) -> None:
        """End what waits."""
        while self.waiting:
            self._end(next(iter(self.waiting)))

    def _process(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        key = json.dumps(environment, sort_keys=True)
        if key in self.waiting and self.waiting[key].poll() is not None:
            self._end(key)
        if key not in self.waiting:
            while len(self.waiting) >= KEPT:
                self._end(next(iter(self.waiting)))
            self.waiting[key] = subprocess.Popen(
                [sys.executable, __file__], env=environment, text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        return self.waiting[key]

    def _end(self, key: str) -> None:
        process = self.waiting.pop(key)
        process.kill()
        process.communicate()


def wait() -> None:
    """Fork for each command that comes in, and answer with its exit status."""
    import monai.bundle  # noqa: F401

    import medsa_nets  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may speak there
    for line in sys.stdin:
        child = os.fork()
        if not child:
            answers.close()
            execute(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def execute(request: dict[str, Any]) -> None:
    """Run a module or code as Python does, and end the process."""
    for number, path in enumerate(request["said"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    sys.path[0] = request["cwd"]
    kind, what, *sys.argv[1:] = request["arguments"]
    status = 0
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    wait()
