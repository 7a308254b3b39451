"""Sessions of a simulated user that a refinement of clicks learns from, or is measured by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage

from medsa_nets.interaction.answers import AnswerSettings, Draft, draft_answer, finish_answer
from medsa_nets.interaction.grids import Grids, bounding_place
from medsa_nets.interaction.refinement.base import Refinement, refine
from medsa_nets.interaction.segmenters import Segmenter
from medsa_nets.interaction.users import SimulatedUser
from medsa_nets.prompts.user import UserPrompt


@dataclass
class Case:
    """A class of an image: what a session needs, all on the network's grid.

    Attributes:
        name: of the image.
        image: (C, spatial…), as the network sees it.
        grids: of that image.
        index: id of the class.
        first: automatic logits (spatial…).
        target: mask (spatial…) that the user wants.
        whole: whether the network can be asked about it; a part of an image is nothing that it knows.
    """

    name: str
    image: MetaTensor
    grids: Grids
    index: int
    first: torch.Tensor
    target: np.ndarray
    whole: bool = True

    def part(self, margin: float) -> Case:
        """The box around the class and its automatic mask, so that practice on it costs less than on the whole.

        Args:
            margin: by which the box is wider on each side, in the unit of the grid's spacing.
        """
        margins = np.ceil(margin / np.asarray(self.grids.spacing)).astype(int).tolist()
        place = bounding_place(self.target | (self.first > 0).numpy(), margins)
        if place is None:
            return self
        there = (slice(None), *place)
        return replace(
            self, image=self.image[there].clone(), grids=self.grids.part(place),
            first=self.first[place].clone(), target=self.target[place].copy(), whole=False,
        )  # fmt: skip


class PracticeSession:
    """A simulated user who corrects the mask of a class, on the network's grid.

    Args:
        segmenter: asks the network.
        case: the class of an image.
        user: places the clicks.
        random: source of randomness.
        settings: how answers are made, without refinement.
        start: logits (spatial…) to begin with.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        case: Case,
        user: SimulatedUser,
        random: np.random.Generator,
        settings: AnswerSettings,
        start: np.ndarray,
    ) -> None:
        self.segmenter, self.case, self.user, self.random, self.settings = segmenter, case, user, random, settings
        self.current = start
        self.prompts: list[UserPrompt] = []

    @property
    def dice(self) -> float:
        """Of the mask that the user sees."""
        mask, target = self.current > 0, self.case.target
        return float(2.0 * (mask & target).sum() / max(1, mask.sum() + target.sum()))

    def click(self) -> Draft | None:
        """The user's next click and its answer before it is refined.

        Returns:
            None where nothing is wrong, or nothing is left that can be corrected without the network.
        """
        if not self.case.whole and not (self.current > 0).any():
            return None
        found = self.user.click(self.current > 0, self.case.target, self.random)
        if found is None:
            return None
        voxel, label = found
        grids, index = self.case.grids, self.case.index
        position = voxel @ grids.to_file[:-1, :-1].T + grids.to_file[:-1, -1]
        self.prompts.append(UserPrompt("point", index, len(self.prompts) + 1, 0.0, position[None], label))
        return draft_answer(
            self.segmenter, self.case.image, grids, index, torch.from_numpy(self.current), self.prompts, self.settings
        )

    def answer(self, draft: Draft, refinement: Refinement | None = None) -> None:
        """Show the user a draft's answer, refined first where there is a refinement and something to correct."""
        if refinement is not None and draft.corrects:
            assert draft.previous is not None
            draft.values = refine(
                refinement, draft.previous, draft.values, self.case.image.numpy(), draft.voxels, draft.labels,
                len(draft.newest), self.case.grids.spacing,
            )  # fmt: skip
        self.current = finish_answer(draft, self.case.grids, self.settings)


def bend(logits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Automatic logits with errors of other kinds: as they are (half of them), too wide or narrow, shifted, or wavy."""
    kind = random.random()
    if kind < 0.15:
        return logits + np.float32(1.5 * random.normal())
    if kind < 0.25:
        shift = tuple(int(s) for s in random.integers(-3, 4, logits.ndim))
        return np.roll(logits, shift, tuple(range(logits.ndim)))
    if kind < 0.5:
        return logits + np.float32(random.uniform(0.5, 2.5)) * waves(logits.shape, (8.0, 24.0), random)
    return logits.copy()


def waves(shape: tuple[int, ...], lengths: tuple[float, float] | np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A smooth random field (shape) of mean 0 and a standard deviation of about 1.

    Args:
        shape: of the field.
        lengths: from which to which length, in voxels, it is drawn anew: (2,), or (2, dims) for each axis.
        random: source of randomness.
    """
    low, high = np.broadcast_to(np.asarray(lengths, dtype=np.float64).reshape(2, -1), (2, len(shape)))
    coarse = [max(2, round(n / random.uniform(a, b))) for n, a, b in zip(shape, low, high)]
    field = random.normal(size=coarse).astype(np.float32)
    zoom = [n / c for n, c in zip(shape, coarse)]
    found = ndimage.zoom(field, zoom, order=1, grid_mode=True, mode="nearest")
    return np.asarray(found[tuple(slice(0, n) for n in shape)])
