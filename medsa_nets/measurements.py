"""A cache of measured times: which way of computing is the fastest on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import torch

from medsa_nets.data.atomic import temporary_name

logger = logging.getLogger(__name__)
FILENAME = "measurements.json"
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # environment that holds a processor back

_known: dict[str, dict[str, float]] = {}
_lock = threading.RLock()


def cache_dir() -> Path:
    """This package's folder in the user's cache: ``$XDG_CACHE_HOME/medsa``, else ``~/.cache/medsa``.

    Where the user has no home, it lies in the folder of temporary files. It need not exist, or be writable.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the specification ignores others
        return Path(named) / "medsa"
    try:
        return Path.home() / ".cache" / "medsa"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "medsa"


def measured(key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measure once on this machine; from then on, answer from memory or from a file in :func:`cache_dir`.

    What is kept holds for one :func:`machine`. A file that can't be read or written, and an entry of another form, are
    no errors: the measurement is taken anew. Only one thread of the process measures at a time.

    Args:
        key: says what is measured; another measurement, or another form of the same, takes another key.
        measure: gives times by name, in seconds (or other finite numbers).

    Returns:
        What ``measure`` gave, now or earlier.
    """
    key = f"{machine()} | {key}"
    with _lock:
        if key not in _known:
            found = _read().get(key)
            if _is_measurement(found):
                _known[key] = found
            else:
                _known[key] = measure()
                _keep(key, _known[key])
        return dict(_known[key])


def forget() -> None:
    """Forget what this process remembers; files stay."""
    with _lock:
        _known.clear()


def machine() -> str:
    """What a measurement depends on: processor, what holds it back, threads, version of torch."""
    limits = [f"{name}={os.environ[name].upper()}" for name in LIMITS if os.environ.get(name)]
    return ", ".join(
        [
            processor(),
            torch.backends.cpu.get_cpu_capability(),
            *limits,
            f"{torch.get_num_threads()} threads",
            f"torch {torch.__version__}",
        ]
    )


@lru_cache(maxsize=1)
def processor() -> str:
    """Name of the processor, with a checksum of its instruction sets where the system lists them."""
    named = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        return named
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or " ".join(fields.get(f"CPU {name}", "") for name in ("implementer", "part"))
    abilities = fields.get("flags") or fields.get("Features") or ""  # virtual machines hide some
    return f"{model.strip() or named} {hashlib.sha256(abilities.encode()).hexdigest()[:8]}"


def _is_measurement(found: Any) -> TypeGuard[dict[str, float]]:
    return isinstance(found, dict) and all(
        isinstance(number, (int, float)) and math.isfinite(number) for number in found.values()
    )


def _read() -> dict[str, Any]:
    try:
        found = json.loads((cache_dir() / FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or damaged
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key: str, measurement: dict[str, float]) -> None:
    path = cache_dir() / FILENAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_name(path) as part:
            part.write_text(json.dumps({**_read(), key: measurement}, indent=1), encoding="utf-8")
    except OSError as error:  # a home that is absent, full or read-only
        logger.debug("%s: measurements are not kept (%s)", path, error)
