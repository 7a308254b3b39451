"""Leases: who holds a session, and when it ends because its user is idle or its client is gone."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from medsa_nets.server.errors import CapacityError, LeaseOverError

Held = TypeVar("Held")


class Lease(Generic[Held]):
    """A client's hold on a session.

    Attributes:
        token: the secret that names it.
        held: what the client holds.
        acted: when the user last did something, on the leases' clock.
        seen: when the client last sent anything.
        busy: requests that are being answered.
        turn: requests of one lease are answered one after the other.
    """

    def __init__(self, held: Held, now: float) -> None:
        self.token = secrets.token_urlsafe(32)
        self.held = held
        self.acted = self.seen = now
        self.busy = 0
        self.turn = asyncio.Lock()


class Leases(Generic[Held]):
    """Leases that end by themselves: where a user did nothing, or where a client was not heard of, for some time.

    Args:
        make: makes what a lease holds.
        drop: is given what an ended lease held.
        most: leases at once.
        idle: seconds without an action of the user after which a lease ends.
        liveness: seconds without any request, heartbeats among them, after which it ends.
        clock: seconds.
    """

    def __init__(
        self,
        make: Callable[[], Held],
        drop: Callable[[Held], None],
        most: int,
        idle: float,
        liveness: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.make = make
        self.drop = drop
        self.most = most
        self.idle = idle
        self.liveness = liveness
        self.clock = clock
        self._leases: dict[str, Lease[Held]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._leases)

    def claim(self) -> Lease[Held]:
        """A new lease.

        Raises:
            CapacityError: when all are held.
        """
        self.reap()
        with self._lock:
            if len(self._leases) >= self.most:
                raise CapacityError(f"All {self.most} sessions of this server are in use. Try again in a while.")
            lease = Lease(self.make(), self.clock())
            self._leases[lease.token] = lease
            return lease

    def get(self, token: str | None, acts: bool = False) -> Lease[Held]:
        """The lease of a token.

        Args:
            token: from the client.
            acts: whether the request is an action of the user, which puts the end of an idle lease off.

        Raises:
            LeaseOverError: when there is none.
        """
        self.reap()
        with self._lock:
            lease = self._find(token)
            lease.seen = self.clock()
            if acts:
                lease.acted = lease.seen
            return lease

    def peek(self, token: str | None) -> Lease[Held]:
        """The lease of a token; nothing is put off.

        Raises:
            LeaseOverError: when there is none.
        """
        self.reap()
        with self._lock:
            return self._find(token)

    def _find(self, token: str | None) -> Lease[Held]:
        lease = self._leases.get(token or "")
        if lease is None:
            raise LeaseOverError
        return lease

    def remaining(self, lease: Lease[Held]) -> float:
        """Seconds until it ends unless the user does something."""
        return max(0.0, self.idle - (self.clock() - lease.acted))

    def release(self, token: str | None) -> None:
        """End a lease; one that is over already stays so."""
        with self._lock:
            lease = self._leases.pop(token or "", None)
        if lease is not None:
            self.drop(lease.held)

    def reap(self) -> None:
        """End leases whose time is over; none while a request of it is being answered."""
        now = self.clock()
        with self._lock:
            over = [
                lease
                for lease in self._leases.values()
                if not lease.busy and (now - lease.acted > self.idle or now - lease.seen > self.liveness)
            ]
            for lease in over:
                del self._leases[lease.token]
        for lease in over:
            self.drop(lease.held)

    def finish(self, lease: Lease[Held]) -> None:
        """A request of a lease was answered: its time begins now."""
        with self._lock:
            lease.busy -= 1
            lease.seen = lease.acted = self.clock()

    def begin(self, lease: Lease[Held]) -> None:
        """A request of a lease is being answered."""
        with self._lock:
            lease.busy += 1

    def clear(self) -> None:
        """End all."""
        for token in list(self._leases):
            self.release(token)
