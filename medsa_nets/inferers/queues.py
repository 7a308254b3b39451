"""A queue per device: small pieces of work, in the order in which somebody waits for them.

Decoding comes first, then the encoding of what a first answer shows, of what whole answers need, and of what is only
computed ahead.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Result = TypeVar("Result")
DECODE, NEAREST, ENCODE, AHEAD = 0, 1, 2, 3  # which of several pieces of work is done first


@dataclass(order=True)
class Piece:
    """Something to be done.

    Attributes:
        priority: of it; lower ones are done first.
        number: in the order of coming.
        work: what is done.
        future: its result.
    """

    priority: int
    number: int
    work: Callable[[], Any] = field(compare=False)
    future: Future[Any] = field(compare=False, default_factory=Future)


class DeviceQueue:
    """Runs pieces of work in one thread, so that a device and its memory serve one at a time.

    A piece is the encoding or the decoding of one slab. Pieces of one priority are done in their order. Where a network
    is watched (:meth:`watch`), the encoding of a slab stops between two blocks of the encoder while more urgent pieces
    are done, and goes on after them; two slabs are half encoded at most. So whoever decodes waits for the decoding of
    others before it, and never for the encoding of a slab or for a whole answer.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str = "device") -> None:
        self._waiting: list[Piece] = []
        self._running: list[Piece] = []  # the last one runs, those before it wait for it
        self._numbers = itertools.count()
        self._change = threading.Condition()
        self._shared: dict[Hashable, Future[Any]] = {}  # of pieces that are not done yet
        self._sharing = threading.Lock()
        self._stopped = False
        self._hooks: list[RemovableHandle] = []
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Result], priority: int = DECODE) -> Future[Result]:
        """Have something done; it must not wait for other pieces of this queue."""
        with self._change:
            if self._stopped:
                raise RuntimeError("the queue was stopped")
            piece = Piece(priority, next(self._numbers), work)
            heapq.heappush(self._waiting, piece)
            self._change.notify()
        return piece.future

    def run(self, work: Callable[[], Result], priority: int = DECODE) -> Result:
        """Have something done, and wait for it; what it raises is raised here."""
        return self.submit(work, priority).result()

    def share(self, key: Hashable, work: Callable[[], Result], priority: int = DECODE) -> Future[Result]:
        """Have something done that others may ask for meanwhile: it is done once, as urgently as the most urgent asks.

        Args:
            key: of what is done.
            work: does it.
            priority: of this asker.
        """

        def once() -> Result:
            try:
                return work()
            finally:
                with self._sharing:
                    self._shared.pop(key, None)

        with self._sharing:
            coming = self._shared.get(key)
            if coming is None or coming.cancelled():
                coming = self._shared[key] = self.submit(once, priority)
            else:
                self.hasten(coming, priority)
        return coming

    def hasten(self, future: Future[Any], priority: int) -> None:
        """Give a piece that was submitted before a higher priority, whether it waits or runs."""
        with self._change:
            for piece in (*self._waiting, *self._running):
                if piece.future is future:
                    piece.priority = min(piece.priority, priority)
            heapq.heapify(self._waiting)

    def watch(self, encoder: nn.Module) -> None:
        """Let urgent pieces in between the blocks of an encoder (the members of its module lists)."""
        for parts in encoder.modules():
            if isinstance(parts, nn.ModuleList):
                self._hooks += [part.register_forward_pre_hook(self._between) for part in parts]

    def stop(self) -> None:
        """Drop what waits, and end the thread."""
        with self._change:
            self._stopped = True
            waiting, self._waiting = self._waiting, []
            self._change.notify()
        for piece in waiting:
            piece.future.cancel()
        self._thread.join()
        for hook in self._hooks:
            hook.remove()

    def _between(self, *_: Any) -> None:
        if threading.current_thread() is not self._thread or not self._running:
            return
        while True:
            with self._change:
                if not self._waiting or self._waiting[0].priority >= self._running[-1].priority:
                    return
                if self._waiting[0].priority > DECODE and len(self._running) > 1:
                    return  # each slab that is half encoded takes memory: two at most
                piece = heapq.heappop(self._waiting)
                self._running.append(piece)
            self._do(piece)
            del piece

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._stopped:
                    self._change.wait()
                if self._stopped:
                    return
                piece = heapq.heappop(self._waiting)
                self._running.append(piece)
            self._do(piece)
            del piece  # what it holds would stay until the next piece

    def _do(self, piece: Piece) -> None:
        try:
            if piece.future.set_running_or_notify_cancel():
                with torch.no_grad():
                    result = piece.work()
                piece.future.set_result(result)
        except BaseException as error:
            piece.future.set_exception(error)
        finally:
            with self._change:
                self._running.remove(piece)


@functools.cache
def shared_queue() -> DeviceQueue:
    """The queue that all inferers of the process share."""
    return DeviceQueue()
