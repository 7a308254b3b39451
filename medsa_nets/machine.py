"""How many processors this process may use, under the limits of a container."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

import torch

# the user's own word on threads, which OpenMP and MKL read at their start
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def usable_cpus(root: str | Path = "/") -> int:
    """Processors that this process may keep busy: at most those of the host, of its affinity, and of its cgroups.

    A container that is limited to two processors of a large host sees all of the host's; as many threads as these
    would wait for each other.

    Args:
        root: where ``proc`` and ``sys`` lie.

    Returns:
        A number of 1 or more; a share of a processor counts as one.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        count = os.cpu_count() or 1
    for limit in _cgroup_limits(Path(root)):
        count = min(count, math.ceil(limit))
    return max(1, count)


def limit_threads() -> int:
    """Let torch compute with no more threads than :func:`usable_cpus`, unless the user has chosen a number.

    Only ever lowers the number: one that was set before (``torch.set_num_threads``) stays where it is lower. Back ends
    take theirs from torch.

    Returns:
        The number of threads.
    """
    if not any(os.environ.get(name) for name in THREAD_VARIABLES) and torch.get_num_threads() > usable_cpus():
        torch.set_num_threads(usable_cpus())
    return torch.get_num_threads()


def _cgroup_limits(root: Path) -> list[float]:
    """Limits of processors, in processors, of this process's cgroups (version 2 and 1) and of those above them."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts, read = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], _version_2
        elif "cpu" in controllers.split(","):
            mounts, read = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"], _version_1
        else:
            continue
        # a container's own view may show its cgroup as the root of the mount, whatever its path on the host
        places = {PurePosixPath("/"), PurePosixPath(path), *PurePosixPath(path).parents}
        for folder in {root / mount / str(place).lstrip("/") for mount in mounts for place in places}:
            quota, period = read(folder)
            if quota > 0 and period > 0:
                limits.append(quota / period)
    return limits


def _version_2(folder: Path) -> tuple[float, float]:
    quota, _, period = _read(folder / "cpu.max").partition(" ")  # "200000 100000", or "max 100000"
    return _number(quota), _number(period)


def _version_1(folder: Path) -> tuple[float, float]:
    return _number(_read(folder / "cpu.cfs_quota_us")), _number(_read(folder / "cpu.cfs_period_us"))  # -1: no limit


def _number(text: str) -> float:
    return float(text) if text.strip().isdecimal() else 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
