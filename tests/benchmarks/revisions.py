"""Speed of two revisions of this project, side by side: did a change make anything slower?

    OMP_NUM_THREADS=1 python tests/benchmarks/revisions.py 6b36b4e --output revisions

Checks the named revision out into a temporary worktree, and starts a process for it and one for this working tree. In
each round both compute the same contender of ``speed.py`` (MedSA's own; each revision by its own ``speed.py``), one
after the other, and the order changes from round to round. A row's figure is the median over rounds of
time(working tree) / time(revision), in process time of one thread, so that other work on the machine counts little;
beside it stands half the distance of the quartiles. ``--apart`` starts both anew for each call, one at a time, where
memory is short for two. Rows above ``--bound`` are named at the end; so are rows that one of both lacks. Sections that
OUTPUT.json holds are kept. Writes OUTPUT.md and OUTPUT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = (
    "encoder 256", "encoder 512", "encoder 1024", "LiteMedSAM encoder 256", "training 2D", "training 3D",
    "space-depth block", "volume", "click",
)  # fmt: skip
NOT_OURS = ("segment-anything", "transformers", "LiteMedSAM's own code", "UNet", "SwinUNETR", "OpenVINO")


def work() -> None:
    """Answer requests from standard input: a section prepares its contenders, a contender is timed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import speed
    import torch

    import medsa_nets

    for module in (speed, medsa_nets):
        if not Path(module.__file__).is_relative_to(Path.cwd()):
            raise ImportError(f"{module.__file__} is not the code of {Path.cwd()}")
    speed.keep_freed_memory()
    calls: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "section" in request:
            torch.manual_seed(0)
            calls.clear()
            calls |= {
                name: call
                for name, call in speed.SECTIONS[request["section"]]().items()
                if not any(other in name for other in NOT_OURS)
            }
            answer: Any = list(calls)
        else:
            start = time.process_time()
            calls[request["call"]]()
            answer = time.process_time() - start
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that computes a section of ``speed.py`` of the project at ``tree``; it starts when it is asked."""

    def __init__(self, tree: Path, section: str) -> None:
        self.tree = tree
        self.section = section
        self._process: subprocess.Popen[str] | None = None
        self._warm: set[str] = set()

    def contenders(self) -> list[str]:
        """MedSA's own contenders of the section."""
        self._start()
        found: list[str] = self._ask({"section": self.section})
        self.end()
        return found

    def time(self, name: str) -> float:
        """Process time of one call, in seconds; what a first call prepares does not count."""
        if self._process is None:
            self._start()
            self._ask({"section": self.section})
        if name not in self._warm:
            self._ask({"call": name})
            self._warm.add(name)
        return float(self._ask({"call": name}))

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
        self._process = None
        self._warm.clear()

    def _start(self) -> None:
        path = os.pathsep.join(map(str, (self.tree / "tests/benchmarks", self.tree)))
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), "--worker"], cwd=self.tree, text=True,
            env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def _ask(self, request: dict[str, str]) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            status = self._process.wait()
            short = " Memory may be short for two processes: pass --apart." if status == -9 else ""
            raise RuntimeError(f"{self.section} of {self.tree}: the process ended with status {status}.{short}")
        return json.loads(answer)


def table(report: dict[str, Any], bound: float) -> str:
    """The rows, then those above ``bound``."""
    lines = [f"`{report['command']}`", "", report["machine"], ""]
    lines += ["| | seconds of the revision | time of the working tree / time of the revision | half of the quartiles' "
              "distance |", "| --- | --- | --- | --- |"]  # fmt: skip
    slower = []
    for section, rows in report["sections"].items():
        for name, (before, after) in rows["times"].items():
            ratios = [b / a for a, b in zip(before, after)]
            low, median, high = statistics.quantiles(ratios, n=4)
            lines.append(f"| {section}: {name} | {statistics.median(before):.3f} | {median:.3f} | "
                         f"{(high - low) / 2:.3f} |")  # fmt: skip
            slower += [f"{section}: {name}"] if median > bound else []
        lines += [f"| {section}: {name} | | only one of both has it | |" for name in rows["alone"]]
    return "\n".join([*lines, "", f"Above {bound:g}: {', '.join(slower) or 'none'}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", help="the revision to compare with, as git names it")
    parser.add_argument("--output", type=Path, default=Path("revisions"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for a row, in which rounds go on past that")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to measure")
    parser.add_argument("--bound", type=float, default=1.03)
    parser.add_argument("--apart", action="store_true", help="keep one process at a time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    if options.revision is None:
        parser.error("name a revision to compare with")
    state = options.output.with_suffix(".json")
    report = json.loads(state.read_text()) if state.is_file() else {"sections": {}}
    report |= {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}",
    }
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "revision")
        subprocess.run(["git", "worktree", "add", "--detach", "-q", tree, options.revision], cwd=ROOT, check=True)
        try:
            for section in options.only:
                if section in report["sections"]:
                    continue
                workers = [Worker(path, section) for path in (tree, ROOT)]
                before, after = (worker.contenders() for worker in workers)
                times: dict[str, tuple[list[float], list[float]]] = {}
                for name in (name for name in before if name in after):
                    times[name] = ([], [])
                    start, round_ = time.monotonic(), 0
                    while round_ < options.rounds or time.monotonic() - start < options.seconds:
                        for i in (0, 1) if round_ % 2 else (1, 0):
                            times[name][i].append(workers[i].time(name))
                            if options.apart:
                                workers[i].end()
                        round_ += 1
                for worker in workers:
                    worker.end()
                report["sections"][section] = {"times": times, "alone": sorted(set(before) ^ set(after))}
                print(table({**report, "sections": {section: report["sections"][section]}}, options.bound), flush=True)
                state.write_text(json.dumps(report, indent=1))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    options.output.with_suffix(".md").write_text(table(report, options.bound))
    print(table(report, options.bound))


if __name__ == "__main__":
    main()
