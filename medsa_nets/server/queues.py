"""A queue per device: small pieces of work, one at a time, answers before what is only computed ahead."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
ANSWER, AHEAD = 0, 1  # which of two pieces of work is done first


class DeviceQueue:
    """Runs pieces of work in one thread, so that a device and its memory serve one at a time.

    A piece is the encoding or the decoding of one slab: whoever waits, waits for the pieces of others before it, and
    never for a whole answer. Pieces of one priority are done in their order.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str = "device") -> None:
        self._waiting: list[tuple[int, int, Future[Any], Callable[[], Any]]] = []
        self._numbers = itertools.count()
        self._change = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Result], priority: int = ANSWER) -> Future[Result]:
        """Have something done; it must not wait for other pieces of this queue."""
        future: Future[Result] = Future()
        with self._change:
            if self._stopped:
                raise RuntimeError("the queue was stopped")
            heapq.heappush(self._waiting, (priority, next(self._numbers), future, work))
            self._change.notify()
        return future

    def run(self, work: Callable[[], Result], priority: int = ANSWER) -> Result:
        """Have something done, and wait for it; what it raises is raised here."""
        return self.submit(work, priority).result()

    def stop(self) -> None:
        """Drop what waits, and end the thread."""
        with self._change:
            self._stopped = True
            waiting, self._waiting = self._waiting, []
            self._change.notify()
        for _, _, future, _ in waiting:
            future.cancel()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._stopped:
                    self._change.wait()
                if self._stopped:
                    return
                _, _, future, work = heapq.heappop(self._waiting)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with torch.no_grad():
                    future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del future, work  # what they hold would stay until the next piece
