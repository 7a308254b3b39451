"""Memory that a process has freed: kept for what it allocates next, or given back to the system."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory that it frees for what it allocates next, where the C library is glibc.

    Training on a CPU allocates and frees the same large blocks in each step; glibc gives each back to the system and
    asks for it anew, and the system clears it every time. ``tests/benchmarks/allocator.py`` measures what that costs.

    Args:
        keep: whether to keep it; else glibc's own thresholds (128 KiB) are set, without their growth with use.

    Returns:
        Whether the C library took the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    value = 2**31 - 1 if keep else 128 * 1024
    taken = bool(mallopt(mmap_threshold, value)) and bool(mallopt(trim_threshold, value))
    if not (taken and keep):
        _resident_after_release[0] = None
    elif _resident_after_release[0] is None:
        _resident_after_release[0] = _resident_bytes()
    return taken


_resident_after_release: list[int | None] = [None]  # none: freed memory is not kept


def _resident_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError, IndexError):  # no Linux
        return None


def release_freed_memory(growth: int = 2 * 2**30) -> bool:
    """Give freed memory that :func:`keep_freed_memory` kept back to the system, once the process has grown.

    Volumes of many sizes leave holes between them that the next one does not fit into; without this, a process that
    segments one after the other grows with their number.

    Args:
        growth: bytes by which the process has to have grown since it last gave memory back, or began to keep it.

    Returns:
        Whether memory was given back.
    """
    before, now = _resident_after_release[0], _resident_bytes()
    if before is None or now is None or now - before < growth:
        return False
    ctypes.CDLL(None).malloc_trim(0)  # portable: where mallopt took the setting, malloc_trim is there
    _resident_after_release[0] = _resident_bytes()
    return True
