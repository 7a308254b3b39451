"""Logs of sessions on disk, by which a client goes on after the server was killed, or after its own end.

A log holds what was said, packed masks of finished objects, and hashes: no image, no name, no key. Beside it, an answer
(logits and mask) is kept now and then, so that what was said before it need not be answered again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medsa_nets.checksums import tensor_sha256
from medsa_nets.data.atomic import make_writable, temporary_name

logger = logging.getLogger(__name__)
SCHEMA = 1
ANSWER = ".answer"
MAX_BYTES = 2**28  # of a log that is read
MAX_ALIKE = 64  # logs of one image without names
MAX_ANSWERS = 4 * 2**30  # bytes of all kept answers; the oldest are removed
ANSWER_RATE = 4 * 2**20  # bytes a second that answers of one session may write
ANSWER_PAUSE = 1.0  # seconds between two of them, at least


def hash_image(array: np.ndarray, affine: np.ndarray, network: Mapping[str, str], class_name: str) -> str:
    """What a session belongs to: image, place, network and the class that the client named, as one SHA-256."""
    digest = hashlib.sha256()
    about = [list(array.shape), str(array.dtype), affine.tolist(), dict(network), class_name]
    digest.update(json.dumps(about, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_said(index: int | None, entries: Sequence[Any]) -> str:
    """SHA-256 of what was said of an object of a class, as it stands in a log, without its numbers."""
    said = [{name: value for name, value in entry.items() if name != "number"} for entry in entries]
    return hashlib.sha256(json.dumps([index, said], sort_keys=True).encode()).hexdigest()


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
        self._next_answer = 0.0

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
                logger.warning("a session's log can't be written: %s", error)

    @property
    def wants_answer(self) -> bool:
        """Whether it is time to keep an answer."""
        return time.monotonic() >= self._next_answer and self.logs.holds(self)

    def write_answer(self, about: str, count: int, logits: Tensor, mask: np.ndarray) -> None:
        """Keep the answer to what was said so far, in place of the one before it.

        Args:
            about: SHA-256 of what is answered (:func:`hash_said`).
            count: prompts of it.
            logits: (spatial…).
            mask: (file's spatial…), boolean.
        """
        tensors = {"logits": logits.contiguous(), "mask": torch.from_numpy(np.packbits(mask))}
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._next_answer = time.monotonic() + max(ANSWER_PAUSE, size / ANSWER_RATE)
        facts = {"about": about, "count": str(count), "sha256": tensor_sha256(*tensors.values())}
        content = save(tensors, facts)
        with self.logs.writing:
            if not self.logs.holds(self):
                return
            try:
                with temporary_name(self._answer_path) as part:
                    part.write_bytes(content)
            except OSError as error:
                logger.warning("a session's answer can't be kept: %s", error)
                return
            self.logs.bound_answers()

    def read_answer(
        self, index: int | None, entries: Sequence[Any], shape: Sequence[int]
    ) -> tuple[int, Tensor, np.ndarray] | None:
        """The kept answer, where it is one to the first of some prompts.

        Args:
            index: id of their class, or none.
            entries: all of the log, oldest first, as they stand there.
            shape: of the file.

        Returns:
            How many of them it answers, its logits (spatial…) and its mask (file's spatial…); or none.
        """
        path = self._answer_path
        try:
            with safe_open(str(path), framework="pt") as opened:
                facts = opened.metadata() or {}
                count = int(facts["count"])
                if not 0 < count <= len(entries) or facts["about"] != hash_said(index, entries[:count]):
                    return None
                logits, bits = opened.get_tensor("logits"), opened.get_tensor("mask")
            if facts["sha256"] != tensor_sha256(logits, bits):
                raise ValueError("its SHA-256 is another one")
            size = int(np.prod(shape))
            mask = np.unpackbits(bits.numpy(), count=size).reshape(tuple(shape)).astype(bool)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            logger.warning("the answer %s can't be gone on with: %s", path.name, error)
            return None
        return count, logits, mask

    @property
    def _answer_path(self) -> Path:
        return self.path.with_suffix(ANSWER)

    def close(self, done: bool = False) -> None:
        """Let another client have it; one that is ``done``, and has no name to ask for it again, is removed."""
        with self.logs.lock:
            held = self.logs.holds(self)
            if done and not self.named and held:
                self.path.unlink(missing_ok=True)
            self.logs.give_back(self)
        if done and not self.named and held:
            with self.logs.writing:  # what is being written is there by then
                self._answer_path.unlink(missing_ok=True)


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
        self.writing = threading.Lock()  # an answer
        oldest = time.time() - 86400.0 * days
        for path in (*self.folder.glob("*.session"), *self.folder.glob(f"*{ANSWER}")):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
        self.bound_answers()

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

    def bound_answers(self) -> None:
        """Remove the oldest answers where they take too much."""
        found = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob(f"*{ANSWER}"))
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= MAX_ANSWERS:
                return
            path.unlink(missing_ok=True)
            total -= size

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
