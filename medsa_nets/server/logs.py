"""Logs of sessions on disk, by which a client goes on after the server was killed, or after its own end.

A log holds what was said, packed masks of finished objects, and hashes: no image, no name, no key.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medsa_nets.data.atomic import make_writable, temporary_name

logger = logging.getLogger(__name__)
SCHEMA = 1
MAX_BYTES = 2**28  # of a log that is read
MAX_ALIKE = 64  # logs of one image without names


def hash_image(array: np.ndarray, affine: np.ndarray, network: Mapping[str, str], class_name: str) -> str:
    """What a session belongs to: image, place, network and the class that the client named, as one SHA-256."""
    digest = hashlib.sha256()
    about = [list(array.shape), str(array.dtype), affine.tolist(), dict(network), class_name]
    digest.update(json.dumps(about, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class SessionLog:
    """The log of one session.

    Attributes:
        saved: what it held when it was opened, or none.
    """

    def __init__(self, logs: SessionLogs, path: Path, saved: dict[str, Any] | None) -> None:
        self.logs = logs
        self.path = path
        self.saved = saved
        self.named = False

    def write(self, state: Mapping[str, Any]) -> None:
        """Keep a state, in place of the one before it; a full disk is no reason to stop working."""
        text = json.dumps({"schema": SCHEMA, **state})
        with self.logs.lock:  # nobody takes the session while it is written: this would overwrite what they say
            if not self.logs.holds(self):
                return
            try:
                with temporary_name(self.path) as part:
                    part.write_text(text, encoding="utf-8")
            except OSError as error:
                logger.warning("a session's log can't be written (%s)", error.strerror)

    def close(self, done: bool = False) -> None:
        """Let another client have it; one that is ``done``, and has no name to ask for it again, is removed."""
        with self.logs.lock:
            if done and not self.named and self.logs.holds(self):
                self.path.unlink(missing_ok=True)
            self.logs.give_back(self)


class SessionLogs:
    """A folder of logs; one server uses it at a time.

    Args:
        folder: the folder; it is made where it is missing.
        days: after which a log that nobody asked for is removed.

    Raises:
        OutputError: when it can't be written to.
    """

    def __init__(self, folder: str | Path, days: float = 30.0) -> None:
        self.folder = make_writable(folder, "--sessions")
        self._held: dict[Path, SessionLog] = {}
        self.lock = threading.RLock()
        oldest = time.time() - 86400.0 * days
        for path in self.folder.glob("*.session"):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    def open(self, key: str, name: str = "") -> SessionLog | None:
        """The log of a session.

        Args:
            key: of the image and what else it belongs to (:func:`hash_image`).
            name: by which the client asks for the session, or empty. Without a name, the log of this image that no
                client holds is gone on with; where there are several, nobody can tell whose they are, and the session
                begins anew. With a name, it is taken from a client that still seems to hold it: one whose connection
                broke comes back before the server knows that it was gone.

        Returns:
            The log, or none where too many are kept.
        """
        stem = hashlib.sha256(f"{key} {name}".encode()).hexdigest()
        with self.lock:
            if name:
                path = self.folder / f"{stem}.session"
                out = SessionLog(self, path, self._read(path))
                out.named = True
                self._held[path] = out
                return out
            paths = [self.folder / f"{stem}-{number}.session" for number in range(MAX_ALIKE)]
            waiting = [path for path in paths if path not in self._held and path.is_file()]
            free = [path for path in paths if path not in self._held and not path.is_file()]
            if len(waiting) != 1 and not free:
                return None
            path = waiting[0] if len(waiting) == 1 else free[0]
            out = self._held[path] = SessionLog(self, path, self._read(path))
            return out

    def holds(self, log: SessionLog) -> bool:
        """Whether a log is still that of its client."""
        return self._held.get(log.path) is log

    def give_back(self, log: SessionLog) -> None:
        """A client holds a log no longer."""
        with self.lock:
            if self.holds(log):
                del self._held[log.path]

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError("it is too large")
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.get("schema") != SCHEMA:
                raise ValueError("it has another form")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("the log %s can't be gone on with: %s", path.name, error)
            return None
        return found
