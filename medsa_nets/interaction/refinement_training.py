"""Training of a refinement of clicks, on sessions of a simulated user who sees its answers."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from tqdm import tqdm

from medsa_nets.checksums import file_sha256
from medsa_nets.data import save_png, stable_seed
from medsa_nets.data.atomic import make_folder, temporary_name
from medsa_nets.errors import DataError, WeightsError
from medsa_nets.inferers import PromptInferer, VolumeInferer
from medsa_nets.interaction.answers import AnswerSettings
from medsa_nets.interaction.evaluation import target_masks
from medsa_nets.interaction.grids import Grids
from medsa_nets.interaction.refinement import CropRefinement, Refinement, VoxelRefinement, place_beside
from medsa_nets.interaction.refinement.learning import SAMPLES, CropLearner, Learner, Practice, Samples, VoxelLearner
from medsa_nets.interaction.refinement.practice import Case, PracticeSession, bend
from medsa_nets.interaction.segmenters import NetworkSegmenter, load_adapter
from medsa_nets.interaction.users import SimulatedUser
from medsa_nets.runtime import unwrap
from medsa_nets.visualize import draw_curves

__all__ = ["RefinementTraining", "Samples", "bend"]
logger = logging.getLogger(__name__)
STATE = "refinement_state.pt"
MARGIN = 3.0  # around a class and its mask, as a multiple of the reach: what practice without the network sees
HARMFUL = 0.005  # loss of Dice from which on a click did harm
CERTAINTIES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
REACH = {"voxels": {2: 40.0, 3: 10.0}, "crops": {2: 40.0, 3: 8.0}}
WIDTH = {"voxels": 96, "crops": 16}


class RefinementTraining:
    """Trains a :class:`~medsa_nets.interaction.refinement.Refinement` for an adapter and its data.

    In each round a simulated user corrects masks, and sees the answers that the refinement gives (so it learns from
    what it brings about itself, as in Ross et al. 2011, DAgger). Sessions begin with automatic masks, as they are,
    bent, shifted or with errors drawn at random. A share of the images is left out and tells which round's was the
    best. ``voxels`` fits a perceptron to single voxels around the clicks of every image, ``crops`` teaches a U-Net on
    the crops around them, a few sessions at a time.

    Beside the adapter it writes the refinement; to ``output_dir`` ``refinement.png``, mean Dice over clicks on the
    images left out, for ``voxels`` ``samples.pt`` of the last rounds, from which the training for another adapter may
    learn too, and while it lasts ``refinement_state.pt``: a training that was stopped goes on after its last round.

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
        start_from: file of a refinement to start from; it stays the best until a round is better. Its ``width``,
            ``reach`` and ``step`` hold where none are given here; with another reach or step, its weights go on in
            that geometry.
        others: files of samples of other trainings, to be learnt as well (voxels).
        kind: ``voxels`` or ``crops``.
        rounds: how often sessions are run and learnt from.
        clicks: of a session.
        epochs: in which all samples are shown, in each round; twice as many in the last one (voxels).
        samples_per_click: voxels around a click that are learnt from (voxels).
        steps: of the optimizer in each round (crops).
        batch: sessions beside each other (crops).
        flip_axes: along which crops are mirrored by chance, and answers are means over mirror images (crops).
        held_out: share of the images that chooses the round.
        width: of the hidden layers (voxels), feature maps of the U-Net's first level (crops); none takes 96 and 16.
        reach: up to which logits change, in steps of the smallest spacing (voxels; none takes 40 in images, 10 in
            volumes), in pixels or mm (crops; none takes 40 in images, 8 in volumes).
        step: size of a crop's voxels, in pixels or mm (crops); none takes 1.
        certainty: logit that a voxel must have on its new side to change sides (see
            :class:`~medsa_nets.interaction.refinement.Refinement`); none chooses the smallest of
            :data:`CERTAINTIES` that keeps ``harmful`` on the images left out, or harms least.
        harmful: share of clicks that may lower Dice by more than 0.005.
        learning_rate: of AdamW, which a cosine takes to 0 in each round (voxels) or over all (crops).
        seed: of all that is drawn.

    Raises:
        ValueError: when ``kind`` is another, ``rounds``, ``clicks`` or another number is below 1, or ``held_out`` or
            ``harmful`` lies not within 0 and 1.
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
        kind: str = "voxels",
        rounds: int = 6,
        clicks: int = 10,
        epochs: int = 5,
        samples_per_click: int = 500,
        steps: int = 500,
        batch: int = 8,
        flip_axes: Sequence[int] = (0,),
        held_out: float = 0.2,
        width: int | None = None,
        reach: float | None = None,
        step: float | None = None,
        certainty: float | None = None,
        harmful: float = 0.02,
        learning_rate: float = 2e-3,
        seed: int = 0,
    ) -> None:
        if kind not in Refinement.kinds:
            raise ValueError(f"kind must be one of {', '.join(Refinement.kinds)}, got {kind!r}.")
        if min(rounds, clicks, epochs, samples_per_click, steps, batch) < 1 or not 0 < held_out < 1:
            raise ValueError(
                "rounds, clicks, epochs, samples_per_click, steps and batch are 1 or more, held_out lies in (0, 1)."
            )
        if not 0 <= harmful <= 1:
            raise ValueError(f"harmful is a share of clicks, within 0 and 1, got {harmful}.")
        self.network, self.inferer, self.dataset = network, inferer, dataset
        self.classes = list(classes)
        self.output_dir, self.checkpoint = Path(output_dir), checkpoint
        self.path = Path(path or place_beside(checkpoint or self.output_dir / "refinement.pt"))
        self.user = user or SimulatedUser(0.8, 0.15, 0.05)
        self.settings = settings
        self.start_from, self.others = start_from, list(others)
        self.kind, self.rounds, self.clicks, self.epochs = kind, rounds, clicks, epochs
        self.samples_per_click, self.steps, self.batch = samples_per_click, steps, batch
        self.flip_axes, self.held_out = list(flip_axes), held_out
        self.width, self.reach, self.step, self.certainty, self.harmful = width, reach, step, certainty, harmful
        self.learning_rate, self.seed = learning_rate, seed

    def run(self) -> dict[str, float]:
        """Train, write the files, and return what was measured on the images left out.

        Raises:
            DataError: when fewer than two images hold one of the classes, the adapter finds none of them (crops), or a
                file of samples can't be used.
            WeightsError: when the adapter or a refinement is missing, damaged or another one's.
        """
        network: Any = unwrap(self.network)
        if self.checkpoint:
            load_adapter(network, self.checkpoint)
        segmenter = NetworkSegmenter(network, None, self.classes, self.inferer)
        if self.settings is None:
            self.settings = AnswerSettings(network="first" if segmenter.volumes else "always")
        start = Refinement.load(self.start_from) if self.start_from else None
        make_folder(self.output_dir)
        make_folder(self.path.parent)
        learnt, checked = self._split(list(self._cases(segmenter)))
        learner = self._learner(3 if segmenter.volumes else 2, learnt[0].image.shape[0], start)
        if isinstance(learner, CropLearner) and not learner.refinement.asks:
            learnt = self._parts(learnt, MARGIN * learner.refinement.reach)
        practice = Practice(segmenter, learnt, self.user, self.settings, self.clicks)
        progress = self._resumed(learner)
        if not progress["lines"]:
            progress["lines"]["without"] = self._curve(segmenter, checked, None)[0]
            if start is not None:  # a round that is worse does not take its place
                self._judge(segmenter, checked, learner.refinement, 0, progress)
                progress["lines"]["before"] = progress["lines"]["with"]
        for number in range(progress["rounds"], self.rounds):
            loss = learner.learn(practice, number, self.rounds, np.random.default_rng([self.seed, number]))
            curve, harmful = self._judge(segmenter, checked, learner.refinement, number + 1, progress)
            logger.info(
                "round %d: loss %.4f to %.4f; Dice %s after 0 to %d clicks, without %s; harmful %.3f",
                number + 1, *loss, _listed(curve), self.clicks, _listed(progress["lines"]["without"]), harmful,
            )  # fmt: skip
            progress["rounds"] = number + 1
            self._keep(learner, progress)
            if isinstance(learner, VoxelLearner):
                Samples.joined(learner.rounds).save(self.output_dir / SAMPLES)
            self._draw(checked, progress)
        if self.certainty is None:
            self._choose_certainty(segmenter, checked, progress)
            self._draw(checked, progress)
        (self.output_dir / STATE).unlink(missing_ok=True)
        if progress["best"][1]:
            logger.info("wrote %s, of round %d", self.path, progress["best"][1])
        else:
            logger.info("no round was better: %s is %s", self.path, self.start_from)
        figures: dict[str, float] = progress["figures"]
        return figures

    def _parts(self, cases: Sequence[Case], margin: float) -> list[Case]:
        """What is around the masks that can be corrected.

        Raises:
            DataError: when there is none.
        """
        out = [case.part(margin) for case in cases if bool((case.first > 0).any())]
        if not out:
            raise DataError(
                f"The adapter finds none of the classes {', '.join(self.classes)} in the images to learn from: there "
                "is no mask to correct. Train the adapter first, or name another one (--checkpoint_filename)."
            )
        return out

    def _learner(self, dims: int, channels: int, start: Refinement | None) -> Learner:
        """What learns, from its start or from a refinement that is there.

        Raises:
            WeightsError: when that one is of another kind or for other images.
        """
        assert self.settings is not None
        asks = self.settings.network == "always"
        reach, step, width = self.reach or REACH[self.kind][dims], self.step or 1.0, self.width or WIDTH[self.kind]
        certainty = self.certainty or 0.0
        if start is not None:
            if (start.kind, start.dims) != (self.kind, dims):
                raise WeightsError(
                    f"{self.start_from}: a refinement of {start.kind} in {start.dims} dimensions; expected one of "
                    f"{self.kind} in {dims}. Name another one, or set refine_kind."
                )
            assert isinstance(start, VoxelRefinement | CropRefinement)
            if self.width not in (None, start.width):
                raise WeightsError(
                    f"{self.start_from}: its hidden layers are {start.width} wide, not {self.width} (refine_width). "
                    "Leave refine_width out, or refine_from."
                )
            if isinstance(start, CropRefinement):
                if start.channels != channels:
                    raise WeightsError(
                        f"{self.start_from}: it sees images of {start.channels} channels, not of {channels}."
                    )
                step = self.step or start.step
            reach, width = self.reach or start.reach, start.width
        torch.manual_seed(self.seed)  # of the weights that it begins with
        if self.kind == "voxels":
            voxels = VoxelRefinement(dims, reach, width, asks, certainty)
            if start is not None:
                voxels.load_state_dict(start.state_dict())
            return VoxelLearner(
                voxels, start is None, self.others, self.epochs, self.samples_per_click, self.learning_rate
            )
        crops = CropRefinement(dims, reach, step, channels, width, asks, certainty, self.flip_axes)
        if start is not None:
            crops.load_state_dict(start.state_dict())
        return CropLearner(crops, self.steps, self.batch, self.flip_axes, self.learning_rate)

    def _judge(
        self,
        segmenter: NetworkSegmenter,
        checked: Sequence[Case],
        refinement: Refinement,
        number: int,
        progress: dict[str, Any],
    ) -> tuple[list[float], float]:
        """Measure the refinement after a round, and keep it where it is the best so far."""
        curve, harmful = self._curve(segmenter, checked, refinement)
        gain = float(np.mean(curve[1:])) - harmful * HARMFUL
        if gain > progress["best"][0]:
            refinement.save(self.path)
            progress["best"] = (gain, number)
            progress["lines"]["with"] = curve
            progress["figures"] = _figures(curve, harmful)
        if number == 0:
            logger.info("%s: Dice %s; harmful %.3f", self.start_from, _listed(curve), harmful)
        return curve, harmful

    def _choose_certainty(self, segmenter: NetworkSegmenter, checked: Sequence[Case], progress: dict[str, Any]) -> None:
        """Set the smallest certainty with which few enough clicks do harm on the images left out."""
        refinement = Refinement.load(self.path)
        found = [(progress["figures"]["harmful"], 0.0, progress["lines"]["with"])]  # rounds are judged without one
        for certainty in CERTAINTIES[1:]:
            if found[-1][0] <= self.harmful:
                break
            refinement.certainty = certainty
            curve, harmful = self._curve(segmenter, checked, refinement)
            logger.info("certainty %g: Dice %s; harmful %.3f", certainty, _listed(curve), harmful)
            found.append((harmful, certainty, curve))
        harmful, refinement.certainty, curve = found[-1] if found[-1][0] <= self.harmful else min(found)
        refinement.save(self.path)
        progress["lines"]["with"] = curve
        progress["figures"] = _figures(curve, harmful)

    def _draw(self, checked: Sequence[Case], progress: dict[str, Any]) -> None:
        picture = draw_curves(progress["lines"], "clicks", f"mean Dice of {len(checked)} masks")
        save_png(picture, self.output_dir / "refinement.png")

    def _setting(self) -> str:
        """What a training must share with one that it goes on from."""
        files = [file_sha256(path) for path in (self.checkpoint, self.start_from, *self.others) if path]
        settings = [
            self.kind, self.rounds, self.clicks, self.epochs, self.samples_per_click, self.steps, self.batch,
            self.flip_axes, self.held_out, self.width, self.reach, self.step, self.certainty, self.harmful,
            self.learning_rate, self.seed, len(self.dataset), self.classes, self.user.shares.tolist(), self.user.jitter,
            str(self.settings), str(self.path),
        ]  # fmt: skip
        return str([files, settings])

    def _keep(self, learner: Learner, progress: dict[str, Any]) -> None:
        """Write what a training that is stopped goes on from."""
        with temporary_name(self.output_dir / STATE) as part:
            torch.save({"setting": self._setting(), "progress": progress, "learner": learner.state()}, part)

    def _resumed(self, learner: Learner) -> dict[str, Any]:
        """Progress of a training of these settings that was stopped, with what it learned; else of a new one."""
        path = self.output_dir / STATE
        progress: dict[str, Any] = {"rounds": 0, "best": (-math.inf, 0), "lines": {}, "figures": {}}
        if not path.is_file():
            return progress
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
            if kept["setting"] != self._setting() or not self.path.is_file():
                logger.info("%s is of a training with other settings or files: this one begins anew", path)
                return progress
            learner.restore(kept["learner"])
        except Exception as error:  # torch names damaged files in many ways
            raise DataError(f"{path}: it can't be gone on from ({error}). Delete it to begin anew.") from error
        logger.info("going on after round %d of %s", kept["progress"]["rounds"], path)
        found: dict[str, Any] = kept["progress"]
        return found

    def _cases(self, segmenter: NetworkSegmenter) -> Iterator[Case]:
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
                yield Case(name, image, grids, index, own.clone(), target)

    def _split(self, cases: list[Case]) -> tuple[list[Case], list[Case]]:
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
        self, segmenter: NetworkSegmenter, cases: Sequence[Case], refinement: Refinement | None
    ) -> tuple[list[float], float]:
        """Mean Dice after 0 to all clicks, and the share of clicks that lowered it."""
        assert self.settings is not None
        rows: list[list[float]] = []
        harmful: list[bool] = []
        for case in tqdm(cases, desc="images left out"):
            random = np.random.default_rng(stable_seed(self.seed, case.name, str(case.index)))
            session = PracticeSession(segmenter, case, SimulatedUser(), random, self.settings, case.first.numpy())
            row = [session.dice]
            while len(row) <= self.clicks and (draft := session.click()) is not None:
                session.answer(draft, refinement)
                row.append(session.dice)
            harmful.extend(after < before - HARMFUL for before, after in itertools.pairwise(row))
            rows.append(row + row[-1:] * (self.clicks + 1 - len(row)))
        return [float(value) for value in np.mean(rows, 0)], float(np.mean(harmful)) if harmful else 0.0


def _figures(curve: Sequence[float], harmful: float) -> dict[str, float]:
    return {f"dice_after_{n}": value for n, value in enumerate(curve)} | {"harmful": harmful}


def _listed(curve: Sequence[float]) -> str:
    return " ".join(f"{dice:.4f}" for dice in curve)
