"""AdaLoRA's training: ranks move to where they matter, and the factors stay orthogonal (arXiv 2303.10512)."""

from __future__ import annotations

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import Tensor, nn

from medsa_nets.layers import LowRank

STEPS = "rank_budget_steps"
SENSITIVITY, UNCERTAINTY = "rank_sensitivity", "rank_uncertainty"


def allowed_ranks(step: int, *, start: int, end: int, warmup: int, last: int) -> int:
    """How many singular values may differ from zero after a step, in all layers together.

    ``start`` until ``warmup``, then less by a cubic curve, ``end`` from ``last`` on.

    Source: arXiv 2303.10512, section 3.3, "Global budget scheduler".
    """
    if step < warmup:
        return start
    if step >= last:
        return end
    rest = 1.0 - (step - warmup) / (last - warmup)
    return end + round((start - end) * rest**3)


class RankBudget:
    """Handler of a trainer: takes singular values away where they matter least, and keeps factors orthogonal.

    What it knows of each parameter (smoothed sensitivity and uncertainty, and the number of steps) stands in the
    optimizer's state, so that a resumed run goes on with it.

    Args:
        network: the network, or a wrapper with it as ``module``; where nothing in it has singular values, nothing is
            done.
        rank: average rank of a layer's part at the end.
        total_steps: steps of the training.
        warmup: share of the steps before the first rank is taken.
        final: share of the steps after the last one is taken.
        interval: steps between two allocations while ranks are taken.
        orthogonality: weight of the regulariser, the sum of ``||P'P - I||^2 + ||QQ' - I||^2``.
        beta: share of the old sensitivity, and of the old uncertainty, in the new ones.

    Raises:
        ValueError: when a share lies outside of its range.

    Source: arXiv 2303.10512, algorithm 1 and equations 4, 8 to 12; beta and the regulariser's weight from its
    appendix.
    """

    every_process = True

    def __init__(
        self,
        network: nn.Module,
        *,
        rank: int,
        total_steps: int,
        warmup: float = 0.1,
        final: float = 0.5,
        interval: int = 10,
        orthogonality: float = 0.1,
        beta: float = 0.85,
    ) -> None:
        if not (warmup >= 0.0 and final >= 0.0 and warmup + final <= 1.0):
            raise ValueError(f"warmup and final are shares of the steps, together at most 1; got {warmup}, {final}.")
        if not 0.0 <= beta < 1.0 or interval < 1:
            raise ValueError(f"beta must lie in [0, 1) and interval be 1 or more, got {beta}, {interval}.")
        self.changes = [m for m in network.modules() if isinstance(m, LowRank) and m.E is not None]
        self.first, self.last = int(warmup * total_steps), total_steps - int(final * total_steps)
        self.start = sum(m.A.shape[0] * m.rank for m in self.changes)
        self.end = min(self.start, sum(m.A.shape[0] for m in self.changes) * rank)
        self.interval, self.orthogonality, self.beta = interval, orthogonality, beta
        self._products: dict[Tensor, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        """Follow each step of a trainer."""
        if self.changes:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.before_step)
            engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.after_step)
            engine.add_event_handler(Events.COMPLETED, self.check)

    def _trained(self) -> list[LowRank]:
        """Changes that train: none where the encoder rests."""
        return [m for m in self.changes if m.A.requires_grad]

    @torch.no_grad()
    def before_step(self, engine: Engine) -> None:
        """Add the regulariser's gradient, and note how much each parameter matters: ``|w dL/dw|``."""
        self._products = {}
        for change in self._trained():
            p, q = change.B, change.A.transpose(1, 2)  # (parts, features, rank), orthogonal columns
            for parameter, factor, flip in ((change.B, p, False), (change.A, q, True)):
                gram = factor.transpose(1, 2) @ factor - torch.eye(change.rank, device=factor.device)
                slope = 4.0 * self.orthogonality * (factor @ gram)
                slope = slope.transpose(1, 2) if flip else slope
                parameter.grad = slope.clone() if parameter.grad is None else parameter.grad + slope
            for parameter in (change.A, change.B, change.E):
                if parameter is not None and parameter.grad is not None:
                    self._products[parameter] = (parameter * parameter.grad).abs()

    @torch.no_grad()
    def after_step(self, engine: Engine) -> None:
        """Smooth what was noted; at an allocation, set the singular values beyond the budget to zero."""
        trained = self._trained()
        state = engine.optimizer.state
        # a step that overflowed in half precision is none
        if not trained or any(not bool(x.isfinite().all()) for x in self._products.values()):
            return
        for parameter, product in self._products.items():
            own = state[parameter]
            before = own.get(SENSITIVITY, torch.zeros_like(product))
            sensitivity = self.beta * before + (1.0 - self.beta) * product
            doubt = own.get(UNCERTAINTY, torch.zeros_like(product))
            own[UNCERTAINTY] = self.beta * doubt + (1.0 - self.beta) * (product - sensitivity).abs()
            own[SENSITIVITY] = sensitivity
        for change in trained:
            own = state[change.E]
            own[STEPS] = own.get(STEPS, torch.zeros((), device=change.A.device)) + 1.0
        step = int(state[trained[0].E][STEPS])
        allowed = allowed_ranks(step, start=self.start, end=self.end, warmup=self.first, last=self.last)
        if step >= self.last or (step >= self.first and step % self.interval == 0):
            self.allocate(trained, state, allowed)

    def allocate(self, changes: list[LowRank], state: dict[Tensor, dict[str, Tensor]], allowed: int) -> None:
        """Keep the ``allowed`` most important triplets (a singular value and its two vectors) of all layers."""

        def score(parameter: Tensor) -> Tensor:
            own = state[parameter]
            return own[SENSITIVITY] * own[UNCERTAINTY]

        scores = [score(m.E) + score(m.A).mean(2) + score(m.B).mean(1) for m in changes if m.E is not None]
        every = torch.cat([one.flatten() for one in scores])
        kept = torch.zeros_like(every, dtype=torch.bool)
        kept[torch.topk(every, min(allowed, len(every))).indices] = True
        for change, mask in zip(changes, kept.split([one.numel() for one in scores])):
            if change.E is not None:
                change.E.masked_fill_(~mask.reshape(change.E.shape), 0.0)

    def check(self, engine: Engine) -> None:
        """At the end of training, say in the log what ranks are left."""
        left = sum(int((m.E != 0).sum()) for m in self.changes if m.E is not None)
        engine.logger.info("AdaLoRA: %d of %d singular values are left (budget %d).", left, self.start, self.end)
