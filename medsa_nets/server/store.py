"""Embeddings of the images that clients have open, known by what the network sees, within a bound of memory."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from medsa_nets.inferers.queues import DeviceQueue

Key = tuple[str, int, int]  # image, one of its mirror images or positions, group of slabs


class Embeddings:
    """Embeddings of all images, bounded by bytes.

    An image is known by the SHA-256 of what the network sees: two clients that have the same one open share what is
    encoded, and one that comes back finds what is still there. Those of images that nobody has open leave first, then
    those that were used least recently.

    Args:
        max_bytes: most memory for all.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()
        self._open: Counter[str] = Counter()
        self._lock = threading.RLock()

    def open(self, image: str) -> None:
        """Somebody has an image open, until it is closed as often."""
        with self._lock:
            self._open[image] += 1

    def close(self, image: str, forget: bool = False) -> None:
        """Somebody needs an image no longer.

        Args:
            image: SHA-256 of it.
            forget: whether its embeddings go at once, where nobody else has it open.
        """
        with self._lock:
            self._open[image] -= 1
            if self._open[image] > 0:
                return
            del self._open[image]
            own = [key for key in self._kept if key[0] == image]
            for key in reversed(own):
                if forget:
                    self._remove(key)
                else:
                    self._kept.move_to_end(key, last=False)

    def get(self, key: Key) -> Tensor | None:
        """An embedding, or none."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None and key[0] in self._open:
                self._kept.move_to_end(key)
            return found

    def put(self, key: Key, embedding: Tensor) -> None:
        """Keep an embedding; nobody needs that of an image which was closed while it was computed."""
        with self._lock:
            self._remove(key)
            if key[0] not in self._open:
                return
            self._kept[key] = embedding
            self.bytes += embedding.nbytes
            while self.bytes > self.max_bytes and len(self._kept) > 1:
                self._remove(next(iter(self._kept)))

    def prepare(self, key: Key, encode: Callable[[], Any], queue: DeviceQueue, priority: int) -> None:
        """Wait until an embedding is there; what is being encoded already goes on, with this priority at least.

        Args:
            key: of the embedding.
            encode: computes it, and keeps it.
            queue: of the device.
            priority: in the queue.
        """

        def work() -> None:
            if key[0] in self._open and self.get(key) is None:
                encode()

        if self.get(key) is None:
            queue.share(key, work, priority).result()

    def _remove(self, key: Key) -> None:
        found = self._kept.pop(key, None)
        self.bytes -= 0 if found is None else found.nbytes
