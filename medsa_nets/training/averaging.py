"""Exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from medsa_nets.errors import SettingError, WeightsError
from medsa_nets.layers import LowRank
from medsa_nets.runtime import unwrap


class WeightAverage:
    """Handler of a trainer: validations see, and adapters hold, an exponential moving average of the weights.

    Ignite's ``EMAHandler`` and torch's ``AveragedModel`` keep a copy of the whole network; here the frozen base, most
    of it, has no second copy. After step n the average is ``d * average + (1 - d) * weights`` with
    ``d = min(decay, (1 + n) / (10 + n))``, so that a short training does not average its start.

    :class:`~medsa_nets.training.TrainingCheckpoint`, to which it is given, attaches it: the best and the last adapter
    then are averages, and an unfinished run keeps both. Attach that after the ``ValidationHandler``.

    Args:
        network: the network, or a wrapper with it as ``module``.
        decay: share of the old average in the new one, from 0 on and below 1; with 0 the handler does nothing.
        evaluator: validates during training; none where nothing does.

    Raises:
        SettingError: when ``decay`` is out of its range, or the network is adapted by AdaLoRA, whose ranks end by
            singular values that become 0: an average of them does not.
    """

    every_process = True

    def __init__(self, network: nn.Module, *, decay: float = 0.0, evaluator: Engine | None = None) -> None:
        if not 0.0 <= decay < 1.0:
            raise SettingError(f"ema_decay must be 0 (no average) or more and less than 1, as 0.99; got {decay}.")
        if decay and any(isinstance(m, LowRank) and m.E is not None for m in unwrap(network).modules()):
            raise SettingError(
                "ema_decay and adaptation: adalora do not go together: an average keeps the ranks that AdaLoRA takes "
                "away. Set ema_decay to 0, or adaptation to lora."
            )
        self.network = network
        self.decay = decay
        self.evaluator = evaluator
        self.steps = 0
        self._average: dict[str, Tensor] = {}
        self._aside: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        if not self.decay:
            return
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.put_back)
        engine.add_event_handler(Events.COMPLETED, self.put_in)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.STARTED, self.put_in_for_validation, engine)

    def _weights(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in unwrap(self.network).named_parameters() if p.requires_grad}

    def begin(self, engine: Engine) -> None:
        """The average before the first step: the weights. A resumed run has had its average restored after this."""
        if not self.steps:
            self._average = {name: weight.clone() for name, weight in self._weights().items()}

    def update(self, engine: Engine) -> None:
        """Take the weights after a step into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        weights = self._weights()
        get_ema_multi_avg_fn(decay)([self._average[n] for n in weights], list(weights.values()), self.steps)

    def put_in_for_validation(self, evaluator: Engine, trainer: Engine) -> None:
        """Validate the average, where this validation is one of the training."""
        if self._average and trainer.state.iteration:
            self.put_in(trainer)

    @torch.no_grad()
    def put_in(self, engine: Engine) -> None:
        """Give the network the average; its own weights are kept aside."""
        if self._aside:
            return
        weights = self._weights()
        self._aside = {name: weight.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self._average[name])

    @torch.no_grad()
    def put_back(self, engine: Engine) -> None:
        """Give the network its own weights again, to go on with the training."""
        weights = self._weights()
        for name, weight in self._aside.items():
            weights[name].copy_(weight)
        self._aside = {}

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of steps in it, for an unfinished run."""
        return {"average": {n: w.clone() for n, w in self._average.items()}, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            WeightsError: when it is the average of another network.
        """
        weights = self._weights()
        if {n: tuple(w.shape) for n, w in state["average"].items()} != {n: tuple(w.shape) for n, w in weights.items()}:
            raise WeightsError("the state's average of weights is one of another network.")
        self._average = {name: state["average"][name].to(weight) for name, weight in weights.items()}
        self.steps = int(state["steps"])
