"""How many processors and how much memory this process may use, under the limits of a container."""

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


def usable_memory(root: str | Path = "/") -> int:
    """Bytes of memory that this process may use: at most what the machine has, its cgroups and its limits allow.

    The limits are those of ``ulimit -v`` and ``ulimit -d``, where the system has them.

    Args:
        root: where ``proc`` and ``sys`` lie.

    Returns:
        Bytes; 8 GiB where the system does not say.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        memory = 8 * 2**30
    try:
        import resource

        limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        memory = min([memory, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])
    except ImportError:  # Windows
        pass
    for folder, version in _cgroups(Path(root), "memory"):
        limit = _number(_read(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")))
        memory = min(memory, int(limit)) if limit > 0 else memory
    return memory


def _cgroup_limits(root: Path) -> list[float]:
    """Limits of processors, in processors."""
    limits = []
    for folder, version in _cgroups(root, "cpu"):
        if version == 2:
            quota, _, period = _read(folder / "cpu.max").partition(" ")  # "200000 100000", or "max 100000"
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")  # -1: no limit
        if _number(quota) > 0 and _number(period) > 0:
            limits.append(_number(quota) / _number(period))
    return limits


def _cgroups(root: Path, controller: str) -> list[tuple[Path, int]]:
    """Folders of this process's cgroups and of those above them, with their version, 1 or 2."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            version, mounts = 2, ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            version, mounts = 1, [f"sys/fs/cgroup/{controllers}", f"sys/fs/cgroup/{controller}"]
        else:
            continue
        # a container's own view may show its cgroup as the root of the mount, whatever its path on the host
        places = {"/", path, *map(str, PurePosixPath(path).parents)}
        found += [(folder, version) for folder in {root / m / p.lstrip("/") for m in mounts for p in places}]
    return found


def _number(text: str) -> float:
    return float(text) if text.strip().isdecimal() else 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
