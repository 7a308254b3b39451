"""Leases end by two clocks, and never while a request is being answered."""

from __future__ import annotations

import pytest

from medsa_nets.server.errors import CapacityError, LeaseOverError
from medsa_nets.server.leases import Leases


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dropped() -> list[object]:
    return []


@pytest.fixture
def leases(clock: Clock, dropped: list[object]) -> Leases[object]:
    return Leases(object, dropped.append, most=2, idle=100.0, liveness=10.0, clock=clock)


def test_heartbeats_keep_a_client_but_not_an_idle_user(
    leases: Leases[object], clock: Clock, dropped: list[object]
) -> None:
    lease = leases.claim()
    for _ in range(12):
        clock.now += 8.0
        assert leases.get(lease.token) is lease
    assert leases.remaining(lease) == pytest.approx(4.0)
    assert leases.get(lease.token, acts=True) is lease
    assert leases.remaining(lease) == 100.0
    for _ in range(12):
        clock.now += 8.0
        leases.get(lease.token)
    clock.now += 8.0
    with pytest.raises(LeaseOverError):
        leases.get(lease.token)
    assert dropped == [lease.held]


def test_client_that_is_not_heard_of_loses_its_place(
    leases: Leases[object], clock: Clock, dropped: list[object]
) -> None:
    first, second = leases.claim(), leases.claim()
    with pytest.raises(CapacityError):
        leases.claim()
    clock.now += 6.0
    leases.get(second.token)
    clock.now += 6.0
    assert leases.claim().token not in (first.token, second.token)
    assert dropped == [first.held]
    with pytest.raises(LeaseOverError):
        leases.peek(first.token)


def test_looking_puts_nothing_off(leases: Leases[object], clock: Clock) -> None:
    lease = leases.claim()
    clock.now += 9.0
    assert leases.peek(lease.token) is lease
    clock.now += 9.0
    with pytest.raises(LeaseOverError):
        leases.peek(lease.token)


def test_request_that_is_being_answered_keeps_its_lease(leases: Leases[object], clock: Clock) -> None:
    lease = leases.claim()
    leases.begin(lease)
    clock.now += 1000.0
    leases.reap()
    assert len(leases) == 1
    leases.finish(lease)
    clock.now += 9.0
    assert leases.peek(lease.token) is lease


@pytest.mark.parametrize("token", [None, "", "another", "é"])
def test_no_lease_has_another_token(leases: Leases[object], token: str | None) -> None:
    leases.claim()
    with pytest.raises(LeaseOverError):
        leases.get(token)
    leases.release(token)
    assert len(leases) == 1
