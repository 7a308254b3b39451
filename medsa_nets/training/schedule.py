"""Which parameters train, the order of the data, and when a training ends."""

from __future__ import annotations

import math
from typing import Any

import ignite.handlers
from ignite.engine import Engine, Events
from torch import nn


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer gets: adapters, class embeddings, and norms where they train."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


class EpochSeed:
    """Tells the sampler, and through it the dataset, which epoch's random numbers to draw.

    Args:
        sampler: with ``set_epoch``, as :class:`medsa_nets.data.EpochSampler`.
    """

    every_process = True

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self.sampler.set_epoch(e.state.epoch))


class EarlyStop:
    """Ends a training that no longer gains, judged by the evaluator's best metric, which a resumed run keeps.

    MONAI's ``EarlyStopHandler`` counts in memory, so that a resumed run would stop later than an uninterrupted one.

    Args:
        evaluator: validates during training.
        patience: epochs without a better metric; 0 never stops.
    """

    every_process = True

    def __init__(self, evaluator: Engine, patience: int = 0) -> None:
        self.evaluator = evaluator
        self.patience = patience

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, after the ``ValidationHandler``."""
        if self.patience > 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Stop the trainer if the best metric is too old."""
        best = self.evaluator.state.best_metric_epoch
        if best > 0 and engine.state.epoch - best >= self.patience:
            engine.logger.info(f"Stopping early: the best metric is {self.patience} epochs old.")
            engine.terminate()


class TimeLimit:
    """Ignite's ``TimeLimit`` as a handler that a configuration can switch off.

    Args:
        seconds: the trainer stops after the iteration in which this much time has passed; 0 never stops it.
    """

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        if self.seconds > 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, ignite.handlers.TimeLimit(math.ceil(self.seconds)))
