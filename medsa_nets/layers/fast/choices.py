"""Chooses the fastest of several equivalent computations: measured once on each machine, then remembered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks

# By how much another way has to be faster than the usual one, so that chance does not choose. What is chosen here are
# parts of a network, so that the whole loses less than this.
MARGIN = 1.05
ROUNDS = 5  # of which the fastest counts
MEASURED = "time of one thread"  # what is kept from now on; earlier versions kept times of a clock on the wall

Ways = Mapping[str, Callable[[], object]]


class Choice:
    """Which of several ways is the fastest on this processor, for one kind of input at a time.

    The first question for a kind measures each way on a small example, in a few hundredths of a second; the answer is
    kept in the user's cache (:mod:`medsa_nets.measurements`), so that two processes of one machine compute alike.

    Args:
        name: of what is computed; it stands in the cache.
        examples: gives, for a kind, the ways by name, each as a call that computes an example; the usual way first.
    """

    def __init__(self, name: str, examples: Callable[[str], Ways]) -> None:
        self.name = name
        self.examples = examples
        self.answers: dict[tuple[str, int], str] = {}
        self.forced: str | None = None
        CHOICES[name] = self

    def __call__(self, kind: str) -> str:
        """Name of the way to take for inputs of a kind."""
        if self.forced is not None:
            return self.forced
        known = (kind, torch.get_num_threads())  # another number is another measurement
        if known not in self.answers:
            self.answers[known] = self._fastest(kind)
        return self.answers[known]

    def _fastest(self, kind: str) -> str:
        from medsa_nets.measurements import measured  # which reads and writes files, as layers do only here

        seconds = measured(f"{self.name}, {MEASURED} | {kind}", lambda: self.measure(kind))
        usual, fastest = next(iter(seconds)), min(seconds, key=lambda way: seconds[way])
        return fastest if MARGIN * seconds[fastest] < seconds[usual] else usual

    def measure(self, kind: str) -> dict[str, float]:
        """Seconds of each way on the example of a kind."""
        # the question may come from within inference mode or autocast; the example says itself what it computes
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), _own_graph():
            return race(self.examples(kind))

    @contextmanager
    def force(self, way: str | None) -> Iterator[None]:
        """Take one way as long as the block runs, measured or not; none: the fastest."""
        before, self.forced = self.forced, way
        try:
            yield
        finally:
            self.forced = before


CHOICES: dict[str, Choice] = {}


def _own_graph() -> saved_tensors_hooks:
    """Keep the example's tensors from those of a checkpoint around it, which recomputes without an example."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def own_time() -> float:
    """Seconds that this thread has computed, where the system counts them finely (Windows does not).

    A clock on the wall would count what the machine does meanwhile for others, which can be ten times as much; and an
    answer that chance gave would stay.
    """
    return time.thread_time() if time.get_clock_info("thread_time").resolution < 1e-4 else time.perf_counter()


def race(ways: Ways) -> dict[str, float]:
    """Seconds of each way: the least of several rounds, in which the ways take turns."""
    seconds = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        way()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = own_time()
            way()
            seconds[name] = min(seconds[name], own_time() - start)
    return seconds
