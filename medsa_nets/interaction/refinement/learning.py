"""How refinements of clicks learn from practice: in rounds, on the answers that they give themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from medsa_nets.data.atomic import temporary_name
from medsa_nets.errors import DataError
from medsa_nets.errors import describe as error_text
from medsa_nets.interaction.answers import AnswerSettings, Draft
from medsa_nets.interaction.refinement.base import LIMIT, Click, Refinement, add
from medsa_nets.interaction.refinement.crops import CropRefinement
from medsa_nets.interaction.refinement.practice import Case, PracticeSession, bend, waves
from medsa_nets.interaction.refinement.voxels import NAMES, VoxelRefinement, describe
from medsa_nets.interaction.segmenters import Segmenter
from medsa_nets.interaction.users import SimulatedUser

SAMPLES = "samples.pt"
BATCH = 4096  # voxels that are fitted to at once
WARM_UP = 50  # steps
TRIES = 1000  # clicks until one corrects something
CONTRAST = 0.2  # standard deviation of the logarithm of what intensities are raised to
AVERAGE = 0.997  # of the weights' average: what of it a step keeps
BENT = 0.2  # share of the sessions that begin with bent masks, the others with waves
ROUGH = (4.0, 14.0)  # lengths of the waves, in voxels of the crop
HEIGHT = 3.0  # standard deviation of the waves, at most
ENTROPY = 5.0  # weight of the cross-entropy beside the Dice loss


@dataclass
class Samples:
    """Voxels around clicks: features (M, F), logit and truth (M,), both 1 where the click's label is."""

    features: Tensor
    logits: Tensor
    targets: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """All of several."""
        names = ("features", "logits", "targets")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def packed(self) -> dict[str, Any]:
        """They, as a file holds them."""
        kept = {"features": self.features.half(), "logits": self.logits.half(), "targets": self.targets.bool()}
        return {"names": list(NAMES), **kept}

    @classmethod
    def unpacked(cls, kept: dict[str, Any]) -> Samples:
        """What :meth:`packed` gave.

        Raises:
            ValueError: when it is of another version.
        """
        if kept["names"] != list(NAMES):
            raise ValueError("its features are others")
        return cls(kept["features"].float(), kept["logits"].float(), kept["targets"].float())

    def save(self, path: Path) -> None:
        """Write them to a file, whole or not at all."""
        with temporary_name(path) as part:
            torch.save(self.packed(), part)

    @classmethod
    def load(cls, path: str | Path) -> Samples:
        """Read samples that another training left.

        Raises:
            DataError: when the file is missing, damaged or of another version.
        """
        try:
            return cls.unpacked(torch.load(path, weights_only=True))
        except Exception as error:  # torch names damaged files in many ways
            raise DataError(
                f"{path}: no samples of this version ({error_text(error)}). Expected the {SAMPLES} that the "
                "training of a refinement leaves."
            ) from error


class Learner(Protocol):
    """A refinement that learns in rounds."""

    @property
    def refinement(self) -> Refinement:
        """As learned so far, in eval mode without gradients."""

    def learn(self, practice: Practice, number: int, rounds: int, random: np.random.Generator) -> tuple[float, float]:
        """One round: run sessions and learn from them.

        Args:
            practice: makes sessions.
            number: of the round, from 0.
            rounds: of the whole training.
            random: of all that is drawn.

        Returns:
            Mean loss without and with the refinement.
        """

    def state(self) -> dict[str, Any]:
        """What a training that goes on needs."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""


@dataclass
class Practice:
    """Makes sessions on images: the user, how answers are made, and how masks are spoilt before.

    Attributes:
        segmenter: asks the network.
        cases: that sessions are about.
        user: places the clicks.
        settings: how answers are made, without refinement.
        clicks: of a session.
    """

    segmenter: Segmenter
    cases: Sequence[Case]
    user: SimulatedUser
    settings: AnswerSettings
    clicks: int

    def session(self, case: Case, start: np.ndarray, random: np.random.Generator) -> PracticeSession:
        """A session on a case that begins with logits (spatial…)."""
        return PracticeSession(self.segmenter, case, self.user, random, self.settings, start)


class VoxelLearner:
    """Fits a :class:`VoxelRefinement` to voxels around clicks, each round to those of the last three rounds.

    Args:
        refinement: to go on from; its features are standardised by the first samples where ``fresh``.
        fresh: whether it has learned nothing yet: then the first round's sessions go without.
        others: files of samples of other trainings, to be learnt as well.
        epochs: in which all samples are shown, in each round; twice as many in the last one.
        samples_per_click: voxels around a click that are learnt from.
        learning_rate: of AdamW, which a cosine takes to 0 in each round.

    Raises:
        DataError: when a file of samples can't be used.
        ValueError: when ``epochs`` or ``samples_per_click`` is below 1.
    """

    def __init__(
        self,
        refinement: VoxelRefinement,
        fresh: bool,
        others: Sequence[str | Path] = (),
        epochs: int = 5,
        samples_per_click: int = 500,
        learning_rate: float = 2e-3,
    ) -> None:
        if min(epochs, samples_per_click) < 1:
            raise ValueError(f"epochs and samples_per_click are 1 or more, got {epochs} and {samples_per_click}.")
        self.refinement, self.fresh = refinement, fresh
        self.others = [Samples.load(path) for path in others]
        self.epochs, self.samples_per_click, self.learning_rate = epochs, samples_per_click, learning_rate
        self.rounds: list[Samples] = []

    def learn(self, practice: Practice, number: int, rounds: int, random: np.random.Generator) -> tuple[float, float]:
        """See :meth:`Learner.learn`."""
        new = self.fresh and number == 0
        parts: list[Samples] = []
        for case in tqdm(practice.cases, desc=f"sessions, round {number + 1} of {rounds}"):
            session = practice.session(case, bend(case.first.numpy(), random), random)
            for _ in range(practice.clicks):
                draft = session.click()
                if draft is None:
                    break
                if draft.corrects and draft.previous is not None:
                    clicked = Click(
                        draft.voxels[-1], draft.label, draft.previous, draft.values, case.image.numpy(),
                        draft.voxels[:-1], draft.labels[:-1], case.grids.spacing,
                    )  # fmt: skip
                    place, inside, features = describe(self.refinement.reach, clicked)
                    parts.append(
                        _drawn(
                            features, draft.values[place][inside], case.target[place][inside], draft.label,
                            self.samples_per_click, random,
                        )
                    )  # fmt: skip
                session.answer(draft, None if new else self.refinement)
        self.rounds = [*self.rounds[-2:], Samples.joined(parts)]
        epochs = self.epochs * (2 if number == rounds - 1 else 1)
        samples = Samples.joined([*self.rounds, *self.others])
        return fit(self.refinement, samples, epochs, self.learning_rate, random, standardise=new)

    def state(self) -> dict[str, Any]:
        """See :meth:`Learner.state`."""
        return {"weights": self.refinement.state_dict(), "samples": [samples.packed() for samples in self.rounds]}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`Learner.restore`."""
        self.refinement.load_state_dict(state["weights"])
        self.rounds = [Samples.unpacked(samples) for samples in state["samples"]]


class CropLearner:
    """Teaches a :class:`CropRefinement` while sessions go on, several beside each other: a step for each click of all.

    What it gives is the average of its weights over the last steps.

    Args:
        refinement: to go on from.
        steps: of the optimizer, in each round.
        batch: sessions beside each other.
        flip_axes: along which crops are mirrored by chance: those along which images have no fixed direction.
        learning_rate: of AdamW at its highest; it rises in the first 50 steps and falls by a cosine to 0.

    Raises:
        ValueError: when ``steps`` or ``batch`` is below 1, or an axis is none of the image's.
    """

    def __init__(
        self,
        refinement: CropRefinement,
        steps: int = 500,
        batch: int = 8,
        flip_axes: Sequence[int] = (0,),
        learning_rate: float = 2e-3,
    ) -> None:
        if min(steps, batch) < 1 or not set(flip_axes) <= set(range(refinement.dims)):
            raise ValueError(
                f"steps and batch are 1 or more, flip_axes below {refinement.dims}; got {steps}, {batch}, {flip_axes}."
            )
        self.live, self.steps, self.batch, self.flip_axes = refinement, steps, batch, list(flip_axes)
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.AdamW(refinement.parameters(), lr=learning_rate, weight_decay=1e-3)
        self.average = AveragedModel(refinement, avg_fn=_average)
        self.average.eval().requires_grad_(False)

    @property
    def refinement(self) -> CropRefinement:
        """See :attr:`Learner.refinement`."""
        module = self.average.module
        assert isinstance(module, CropRefinement)
        return module

    def learn(self, practice: Practice, number: int, rounds: int, random: np.random.Generator) -> tuple[float, float]:
        """See :meth:`Learner.learn`."""
        pool = [self._begun(practice, random) for _ in range(self.batch)]
        losses = []
        self.live.train().requires_grad_(True)
        for step in tqdm(range(self.steps), desc=f"practice, round {number + 1} of {rounds}"):
            done = number * self.steps + step
            falling = 0.5 * (1.0 + math.cos(math.pi * done / (rounds * self.steps)))
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * falling * min(1.0, (done + 1) / WARM_UP)
            drafts = [self._clicked(practice, pool, index, random) for index in range(self.batch)]
            losses.append(self._step([session for session, _ in pool], drafts, random))
        self.live.eval().requires_grad_(False)
        before, after = np.mean(losses, 0)
        return float(before), float(after)

    def _begun(self, practice: Practice, random: np.random.Generator) -> tuple[PracticeSession, int]:
        """A session of a case at random, and how many clicks it will have."""
        case = practice.cases[int(random.integers(len(practice.cases)))]
        start = bend(case.first.numpy(), random) if random.random() < BENT else self._roughened(case, random)
        return practice.session(case, start, random), int(random.integers(practice.clicks // 3, practice.clicks + 3))

    def _roughened(self, case: Case, random: np.random.Generator) -> np.ndarray:
        """Automatic logits with waves: an adapter does better on the images that taught it than on others."""
        lengths = np.outer(ROUGH, self.live.step / np.asarray(case.grids.spacing, dtype=np.float64))
        field = waves(case.target.shape, lengths, random)
        shift = np.float32(0.5 * random.normal())
        return case.first.numpy() + np.float32(random.uniform(0.0, HEIGHT)) * field + shift

    def _clicked(
        self, practice: Practice, pool: list[tuple[PracticeSession, int]], index: int, random: np.random.Generator
    ) -> Draft:
        """The next click that corrects something, in the session of the pool or in a new one that takes its place."""
        for _ in range(TRIES):
            session, most = pool[index]
            draft = session.click() if len(session.prompts) < most else None
            if draft is None:
                pool[index] = self._begun(practice, random)
            elif draft.corrects:
                return draft
            else:
                session.answer(draft)
        raise DataError(
            f"{TRIES} clicks of simulated users corrected nothing: the masks are as the labels want them. Name a data "
            "set whose masks can be corrected."
        )

    def _step(
        self, sessions: Sequence[PracticeSession], drafts: Sequence[Draft], random: np.random.Generator
    ) -> tuple[float, float]:
        """Learn from a click of each session, and show each user the answer; returns losses without and with it."""
        refinement = self.live
        crops: list[Tensor] = []
        truths: list[Tensor] = []
        starts: list[Tensor] = []
        weights: list[Tensor] = []
        turned: list[list[int]] = []
        for session, draft in zip(sessions, drafts):
            assert draft.previous is not None
            case = session.case
            image = case.image.numpy().clip(0.0, 1.0) ** math.exp(CONTRAST * random.normal())
            click, spacing = draft.voxels[-1], case.grids.spacing
            others = draft.voxels[:-1], draft.labels[:-1]
            crop = refinement.crop(Click(click, draft.label, draft.previous, draft.values, image, *others, spacing))
            axes = [axis for axis in self.flip_axes if random.random() < 0.5]
            truth = refinement.around(case.target[None], click, spacing)
            start = refinement.around(draft.values[None].clip(-LIMIT, LIMIT) + LIMIT, click, spacing) - LIMIT
            weight = crop[case.image.shape[0]][None] * refinement.within_reach()
            crops.append(crop.flip([1 + axis for axis in axes]))
            for parts, tensor in zip((truths, starts, weights), (truth, start, weight)):
                parts.append(tensor)
            turned.append(axes)
        targets, base, weight = (torch.cat(parts) for parts in (truths, starts, weights))
        found = torch.stack([own.flip(axes) for own, axes in zip(refinement(torch.stack(crops)), turned)])
        added = found * refinement.get_buffer("nearness")
        loss = _loss(base + added, targets, weight)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(refinement.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(refinement)
        with torch.no_grad():
            before = _loss(base, targets, weight)
            for session, draft, own in zip(sessions, drafts, found):
                place, inside, new = refinement.spread(
                    own, draft.voxels[-1], session.case.grids.spacing, draft.values.shape
                )
                draft.values = add(draft.values, place, inside, new)
                session.answer(draft)
        return before.item(), loss.item()

    def state(self) -> dict[str, Any]:
        """See :meth:`Learner.state`."""
        return {
            "live": self.live.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`Learner.restore`."""
        self.live.load_state_dict(state["live"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])


def _average(average: Tensor, now: Tensor, number: Tensor | int) -> Tensor:
    """Weights averaged over steps; in the first ones, those of the start count little."""
    return average.lerp(now, 1.0 - min(AVERAGE, (1.0 + float(number)) / (10.0 + float(number))))


def _loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy and Dice loss of crops (B, side…), where they have a weight."""
    axes = tuple(range(1, logits.dim()))
    entropy = (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weight).sum(axes)
    shown = logits.sigmoid() * weight
    dice = (2.0 * (shown * targets).sum(axes) + 1.0) / (shown.sum(axes) + (targets * weight).sum(axes) + 1.0)
    return (ENTROPY * entropy / weight.sum(axes).clamp_min(1.0) + 1.0 - dice).mean()


def fit(
    refinement: Refinement,
    samples: Samples,
    epochs: int,
    learning_rate: float,
    random: np.random.Generator,
    standardise: bool = False,
) -> tuple[float, float]:
    """Fit a refinement to samples.

    Args:
        refinement: it is changed, and left in eval mode without gradients.
        samples: to learn.
        epochs: how often all are shown.
        learning_rate: of AdamW, with a cosine to 0.
        random: of the order.
        standardise: take mean and spread of the features from the samples.

    Returns:
        Mean binary cross-entropy of the samples without and with the refinement.
    """
    if standardise:
        refinement.get_buffer("mean").copy_(samples.features.mean(0))
        refinement.get_buffer("std").copy_(samples.features.std(0).clamp_min(1e-3))
    refinement.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(refinement.parameters(), lr=learning_rate, weight_decay=1e-3)
    batches = max(1, len(samples.logits) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in tqdm(range(epochs), desc="fitting"):
        order = torch.from_numpy(random.permutation(len(samples.logits)))
        for batch in order[: batches * BATCH].split(BATCH):
            logits = samples.logits[batch] + refinement(samples.features[batch])
            loss = F.binary_cross_entropy_with_logits(logits, samples.targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    refinement.eval().requires_grad_(False)
    before = F.binary_cross_entropy_with_logits(samples.logits, samples.targets)
    after = F.binary_cross_entropy_with_logits(samples.logits + refinement(samples.features), samples.targets)
    return float(before), float(after)


def _drawn(
    features: np.ndarray, logits: np.ndarray, target: np.ndarray, label: int, most: int, random: np.random.Generator
) -> Samples:
    """Some of the voxels around a click, more often those that are in doubt."""
    logits = np.float32(2 * label - 1) * logits.clip(-LIMIT, LIMIT)
    doubt = np.exp(-np.minimum(np.abs(logits), np.abs(features[:, 0])) / 3.0) + 0.05
    chosen = random.choice(len(logits), min(most, len(logits)), replace=False, p=doubt / doubt.sum())
    right = target[chosen] == bool(label)
    return Samples(
        torch.from_numpy(features[chosen]).half().float(), torch.from_numpy(logits[chosen]).half().float(),
        torch.from_numpy(right.astype(np.float32)),
    )  # fmt: skip
