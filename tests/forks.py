"""Commands of Python for tests, without importing MONAI anew for each, which takes most of a short one's time.

A process that has imported it forks for every command; the fork runs what ``python -m`` or ``python -c`` would. Where
the system can't fork, each command gets a process of its own.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN = Path(__file__).parent / "started" / "sitecustomize.py"


class Forks:
    """Runs commands in forks of a process that waits for them.

    Args:
        python: that runs it; its environment has to hold the package.
    """

    def __init__(self, python: Path | str = sys.executable) -> None:
        self.python = str(python)
        self.waiting: subprocess.Popen[str] | None = None

    def run(
        self,
        arguments: Sequence[str],
        cwd: Path | None = None,
        timeout: float = 600.0,
        processes: int = 1,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """The same as ``subprocess.run([python, *arguments], capture_output=True, text=True)``.

        Args:
            arguments: ``-m``, a module and its arguments, or ``-c`` and code.
            cwd: folder to run in; none takes this one.
            timeout: seconds.
            processes: that run it together, as torchrun starts them: the environment tells each its rank.
            environment: variables beside those of this process; what Python and torch read at their start does nothing.

        Raises:
            subprocess.TimeoutExpired: when it takes longer.
            RuntimeError: when the process that waits has ended, as where it can't import MONAI.
        """
        command, cwd = [self.python, *arguments], cwd or Path.cwd()
        env = {**os.environ, **environment}
        env.pop("PYTEST_CURRENT_TEST", None)
        if not hasattr(os, "fork"):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            started = command if processes == 1 else [self.python, *launcher, *arguments]
            return subprocess.run(started, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
        process = self._process()
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder) / "out", Path(folder) / "err"]
            request = {
                "arguments": list(arguments), "cwd": str(cwd), "said": [str(path) for path in said],
                "environments": [{**env, **rank} for rank in ranks(processes)],
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
        if self.waiting is not None:
            self.waiting.kill()
            self.waiting.communicate()
        self.waiting = None

    def _process(self) -> subprocess.Popen[str]:
        if self.waiting is not None and self.waiting.poll() is not None:
            self.close()
        if self.waiting is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.waiting = subprocess.Popen([self.python, __file__], text=True, start_new_session=True, **pipes)
        return self.waiting


def ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each of some processes."""
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = str(processes)
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def wait() -> None:
    """Fork for each command that comes in, and answer with its exit status."""
    import monai.bundle  # noqa: F401

    import medsa_nets  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may speak there
    for line in sys.stdin:
        request = json.loads(line)
        children = set()
        for environment in request["environments"]:
            child = os.fork()
            if not child:
                answers.close()
                execute(request, environment)
            children.add(child)
        failed = 0
        while children:
            child, status = os.wait()
            children.remove(child)
            if status and not failed:
                failed = os.waitstatus_to_exitcode(status)
                for other in children:  # which would wait for that one
                    os.kill(other, signal.SIGKILL)
        print(failed, file=answers, flush=True)


def execute(request: dict[str, Any], environment: dict[str, str]) -> None:
    """Run a module or code as Python does, and end the process."""
    for number, path in enumerate(request["said"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    sys.path[:1] = [request["cwd"], *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    importlib.invalidate_caches()
    kind, what, *sys.argv[1:] = request["arguments"]
    status = 0
    try:
        runpy.run_path(str(BEGIN))
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
