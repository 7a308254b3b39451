"""Training of a refinement of clicks, on sessions of a simulated user who sees its answers."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from medsa_nets.data import save_png, stable_seed
from medsa_nets.data.atomic import make_folder, temporary_name
from medsa_nets.errors import DataError
from medsa_nets.errors import describe as error_text
from medsa_nets.inferers import PromptInferer, VolumeInferer
from medsa_nets.interaction.answers import AnswerSettings, draft_answer, finish_answer
from medsa_nets.interaction.evaluation import target_masks
from medsa_nets.interaction.grids import Grids
from medsa_nets.interaction.refinement import LIMIT, NAMES, Refinement, describe, place_beside, refine
from medsa_nets.interaction.segmenters import NetworkSegmenter, load_adapter
from medsa_nets.interaction.users import SimulatedUser
from medsa_nets.prompts.user import UserPrompt
from medsa_nets.runtime import unwrap
from medsa_nets.visualize import draw_curves

logger = logging.getLogger(__name__)
SAMPLES = "samples.pt"
HARMFUL = 0.005  # loss of Dice from which on a click did harm
BATCH = 4096
REACH = {2: 40.0, 3: 10.0}


@dataclass
class _Case:
    """A class of an image: what a session needs, all on the network's grid."""

    name: str
    image: MetaTensor
    grids: Grids
    index: int
    first: Tensor
    target: np.ndarray


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

    def save(self, path: Path) -> None:
        """Write them to a file, whole or not at all."""
        with temporary_name(path) as part:
            kept = {"features": self.features.half(), "logits": self.logits.half(), "targets": self.targets.bool()}
            torch.save({"names": list(NAMES), **kept}, part)

    @classmethod
    def load(cls, path: str | Path) -> Samples:
        """Read samples that another training left.

        Raises:
            DataError: when the file is missing, damaged or of another version.
        """
        try:
            kept = torch.load(path, weights_only=True)
            if kept["names"] != list(NAMES):
                raise ValueError("its features are others")
            return cls(kept["features"].float(), kept["logits"].float(), kept["targets"].float())
        except Exception as error:  # torch names damaged files in many ways
            raise DataError(
                f"{path}: no samples of this version ({error_text(error)}). Expected the {SAMPLES} that the "
                "training of a refinement leaves."
            ) from error


class RefinementTraining:
    """Trains a :class:`~medsa_nets.interaction.refinement.Refinement` for an adapter and its data.

    In each round a simulated user corrects masks of every image, and sees the answers that the refinement of the round
    before gives (so it learns from what it brings about itself, as in Ross et al. 2011, DAgger); what is known of the
    voxels around each click, and their truth, is what it is then fitted to, by binary cross-entropy. Sessions begin
    with automatic masks, as they are, bent, shifted or with errors drawn at random. A share of the images is left out
    and tells which round's was the best.

    Beside the adapter it writes the refinement; to ``output_dir`` ``samples.pt`` of the last rounds, from which the
    training for another adapter may learn too, and ``refinement.png``, mean Dice over clicks on the images left out.

    Args:
        network: the network.
        inferer: the bundle's.
        dataset: items with ``image`` as the network sees it, and ``label``, not resampled.
        classes: names of the classes, in the order of their ids.
        output_dir: folder of the results.
        checkpoint: file of the adapter, which :meth:`run` loads; none or empty takes the network as it is.
        path: file of the refinement; none takes its place beside the adapter, without one
            ``refinement.clicks.pt`` in ``output_dir``.
        user: places the clicks of the sessions that are learnt from.
        settings: how answers are made, without refinement; none takes the usual ones, and in images asks the
            network again for each click, in volumes does not.
        start_from: file of a refinement to start from; it stays the best until a round is better.
        others: files of samples of other trainings, to be learnt as well.
        rounds: how often sessions are run and learnt from.
        clicks: of a session.
        epochs: in which all samples are shown, in each round; twice as many in the last one.
        samples_per_click: voxels around a click that are learnt from.
        held_out: share of the images that chooses the round.
        width: of the hidden layers.
        reach: up to which logits change, in steps; none takes 40 in images, 10 in volumes.
        learning_rate: of AdamW, which a cosine takes to 0 in each round.
        seed: of all that is drawn.

    Raises:
        ValueError: when ``rounds``, ``clicks``, ``epochs`` or ``samples_per_click`` is below 1, or ``held_out`` lies
            not within 0 and 1.
    """

    def __init__(
        self,
        network: Any,
        inferer: PromptInferer | VolumeInferer,
        dataset: Any,
        classes: Sequence[str],
        output_dir: str | Path,
        checkpoint: str | Path | None = None,
        path: str | Path | None = None,
        user: SimulatedUser | None = None,
        settings: AnswerSettings | None = None,
        start_from: str | Path | None = None,
        others: Sequence[str | Path] = (),
        rounds: int = 6,
        clicks: int = 10,
        epochs: int = 5,
        samples_per_click: int = 500,
        held_out: float = 0.2,
        width: int = 96,
        reach: float | None = None,
        learning_rate: float = 2e-3,
        seed: int = 0,
    ) -> None:
        if min(rounds, clicks, epochs, samples_per_click) < 1 or not 0 < held_out < 1:
            raise ValueError("rounds, clicks, epochs and samples_per_click are 1 or more, held_out lies in (0, 1).")
        self.network, self.inferer, self.dataset = network, inferer, dataset
        self.classes = list(classes)
        self.output_dir, self.checkpoint = Path(output_dir), checkpoint
        self.path = Path(path or place_beside(checkpoint or self.output_dir / "refinement.pt"))
        self.user = user or SimulatedUser(0.8, 0.15, 0.05)
        self.settings = settings
        self.start_from, self.others = start_from, list(others)
        self.rounds, self.clicks, self.epochs = rounds, clicks, epochs
        self.samples_per_click, self.held_out = samples_per_click, held_out
        self.width, self.reach, self.learning_rate, self.seed = width, reach, learning_rate, seed

    def run(self) -> dict[str, float]:
        """Train, write the files, and return what was measured on the images left out.

        Raises:
            DataError: when fewer than two images hold one of the classes, or a file of samples can't be used.
            WeightsError: when the adapter or a refinement is missing, damaged or another one's.
        """
        network: Any = unwrap(self.network)
        if self.checkpoint:
            load_adapter(network, self.checkpoint)
        segmenter = NetworkSegmenter(network, None, self.classes, self.inferer)
        dims = 3 if segmenter.volumes else 2
        if self.settings is None:
            self.settings = AnswerSettings(network="first" if segmenter.volumes else "always")
        others = [Samples.load(path) for path in self.others]
        asks = self.settings.network == "always"
        refinement = Refinement(dims, self.reach or REACH[dims], self.width, asks)
        if self.start_from:
            refinement = Refinement.load(self.start_from)
        fresh = not self.start_from
        make_folder(self.output_dir)
        make_folder(self.path.parent)
        learnt, checked = self._split(list(self._cases(segmenter)))
        lines = {"without": self._curve(segmenter, checked, None)[0]}
        best = (-math.inf, 0)
        rounds: list[Samples] = []
        figures: dict[str, float] = {}

        def judge(number: int) -> tuple[list[float], float]:
            """Measure the refinement, and keep it where it is the best so far."""
            nonlocal best, figures
            curve, harmful = self._curve(segmenter, checked, refinement)
            gain = float(np.mean(curve[1:])) - harmful * HARMFUL
            if gain > best[0]:
                best = (gain, number)
                refinement.save(self.path)
                lines["with"] = curve
                figures = {f"dice_after_{n}": value for n, value in enumerate(curve)} | {"harmful": harmful}
            return curve, harmful

        if self.start_from:  # a round that is worse does not take its place
            curve, harmful = judge(0)
            lines["before"] = curve
            logger.info("%s: Dice %s; harmful %.3f", self.start_from, _listed(curve), harmful)
        for number in range(self.rounds):
            random = np.random.default_rng([self.seed, number])
            asked = None if fresh and number == 0 else refinement
            parts: list[Samples] = []
            for case in tqdm(learnt, desc=f"sessions, round {number + 1} of {self.rounds}"):
                for _ in self._session(segmenter, case, asked, self.user, random, parts):
                    pass
            rounds = [*rounds[-2:], Samples.joined(parts)]
            samples = Samples.joined([*rounds, *others])
            epochs = self.epochs * (2 if number == self.rounds - 1 else 1)
            loss = fit(refinement, samples, epochs, self.learning_rate, random, standardise=fresh and number == 0)
            curve, harmful = judge(number + 1)
            logger.info(
                "round %d: loss %.4f to %.4f; Dice %s after 0 to %d clicks, without %s; harmful %.3f",
                number + 1, *loss, _listed(curve), self.clicks, _listed(lines["without"]), harmful,
            )  # fmt: skip
            Samples.joined(rounds).save(self.output_dir / SAMPLES)
            save_png(draw_curves(lines, "clicks", f"mean Dice of {len(checked)} masks"),
                     self.output_dir / "refinement.png")  # fmt: skip
        if best[1]:
            logger.info("wrote %s, of round %d", self.path, best[1])
        else:
            logger.info("no round was better: %s is %s", self.path, self.start_from)
        return figures

    def _cases(self, segmenter: NetworkSegmenter) -> Iterator[_Case]:
        """All classes of all images, with their automatic logits."""
        for number in tqdm(range(len(self.dataset)), desc="automatic masks"):
            item = self.dataset[number]
            image: MetaTensor = item["image"]
            grids = Grids(image)
            targets = target_masks(item["label"], len(self.classes), segmenter.volumes)
            if not targets:
                continue
            logits = segmenter.automatic(image)
            for index, mask in targets.items():
                own = logits[index]
                if segmenter.exclusive and len(logits) > 1:
                    others = torch.cat([logits[:index], logits[index + 1 :]]).amax(0)
                    own = own - others.clamp_min(0.0)
                target = grids.on_tensor(mask).numpy() > 0.5
                name = str(image.meta.get("filename_or_obj", number))
                yield _Case(name, image, grids, index, own.clone(), target)

    def _split(self, cases: list[_Case]) -> tuple[list[_Case], list[_Case]]:
        names = sorted({case.name for case in cases})
        if len(names) < 2:
            raise DataError(
                f"{len(names)} images hold one of the classes {', '.join(self.classes)}; expected two or more, to "
                "learn from and to choose by. Name a data set with more (--dataset_dir)."
            )
        count = max(1, round(self.held_out * len(names)))
        order = np.random.default_rng(self.seed).permutation(len(names))
        chosen = {names[i] for i in order[:count]}
        return [c for c in cases if c.name not in chosen], [c for c in cases if c.name in chosen]

    def _curve(
        self, segmenter: NetworkSegmenter, cases: Sequence[_Case], refinement: Refinement | None
    ) -> tuple[list[float], float]:
        """Mean Dice after 0 to all clicks, and the share of clicks that lowered it."""
        rows: list[list[float]] = []
        harmful: list[bool] = []
        for case in tqdm(cases, desc="images left out"):
            random = np.random.default_rng(stable_seed(self.seed, case.name, str(case.index)))
            row = list(self._session(segmenter, case, refinement, SimulatedUser(), random, None))
            harmful.extend(after < before - HARMFUL for before, after in itertools.pairwise(row))
            rows.append(row + row[-1:] * (self.clicks + 1 - len(row)))
        return [float(value) for value in np.mean(rows, 0)], float(np.mean(harmful)) if harmful else 0.0

    def _session(
        self,
        segmenter: NetworkSegmenter,
        case: _Case,
        refinement: Refinement | None,
        user: SimulatedUser,
        random: np.random.Generator,
        parts: list[Samples] | None,
    ) -> Iterator[float]:
        """Dice before and after each click; with ``parts``, from a bent start, and with samples."""
        assert self.settings is not None
        current = case.first if parts is None else torch.from_numpy(bend(case.first.numpy(), random))
        prompts: list[UserPrompt] = []
        yield _dice(current.numpy() > 0, case.target)
        for number in range(self.clicks):
            click = user.click(current.numpy() > 0, case.target, random)
            if click is None:
                return
            voxel, label = click
            position = voxel @ case.grids.to_file[:-1, :-1].T + case.grids.to_file[:-1, -1]
            prompts.append(UserPrompt("point", case.index, number + 1, 0.0, position[None], label))
            draft = draft_answer(segmenter, case.image, case.grids, case.index, current, prompts, self.settings)
            if draft.corrects and draft.previous is not None:
                image, spacing = case.image.numpy(), case.grids.spacing
                if parts is not None:
                    place, inside, features = describe(
                        self.reach or REACH[case.target.ndim], draft.previous, draft.values, image,
                        draft.voxels[:-1], draft.labels[:-1], draft.voxels[-1], draft.label, spacing,
                    )  # fmt: skip
                    parts.append(self._drawn(features, draft.values[place][inside], case.target[place][inside],
                                             draft.label, random))  # fmt: skip
                if refinement is not None:
                    draft.values = refine(refinement, draft.previous, draft.values, image, draft.voxels, draft.labels,
                                          len(draft.newest), spacing)  # fmt: skip
            current = torch.from_numpy(finish_answer(draft, case.grids, self.settings))
            yield _dice(current.numpy() > 0, case.target)

    def _drawn(
        self, features: np.ndarray, logits: np.ndarray, target: np.ndarray, label: int, random: np.random.Generator
    ) -> Samples:
        """Some of the voxels around a click, more often those that are in doubt."""
        logits = np.float32(2 * label - 1) * logits.clip(-LIMIT, LIMIT)
        doubt = np.exp(-np.minimum(np.abs(logits), np.abs(features[:, 0])) / 3.0) + 0.05
        count = min(self.samples_per_click, len(logits))
        chosen = random.choice(len(logits), count, replace=False, p=doubt / doubt.sum())
        right = target[chosen] == bool(label)
        return Samples(
            torch.from_numpy(features[chosen]).half().float(), torch.from_numpy(logits[chosen]).half().float(),
            torch.from_numpy(right.astype(np.float32)),
        )  # fmt: skip


def bend(logits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Automatic logits with errors of other kinds: as they are (half of them), too wide or narrow, shifted, or wavy."""
    kind = random.random()
    if kind < 0.15:
        return logits + np.float32(1.5 * random.normal())
    if kind < 0.25:
        shift = tuple(int(s) for s in random.integers(-3, 4, logits.ndim))
        return np.roll(logits, shift, tuple(range(logits.ndim)))
    if kind < 0.5:
        coarse = [max(2, round(n / random.uniform(8, 24))) for n in logits.shape]
        field = random.normal(size=coarse).astype(np.float32)
        zoom = [n / c for n, c in zip(logits.shape, coarse)]
        waves = ndimage.zoom(field, zoom, order=1, grid_mode=True, mode="nearest")
        return logits + np.float32(random.uniform(0.5, 2.5)) * waves[tuple(slice(0, n) for n in logits.shape)]
    return logits.copy()


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


def _dice(mask: np.ndarray, target: np.ndarray) -> float:
    return float(2.0 * (mask & target).sum() / max(1, mask.sum() + target.sum()))


def _listed(curve: Sequence[float]) -> str:
    return " ".join(f"{dice:.4f}" for dice in curve)
