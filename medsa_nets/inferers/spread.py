"""Propagates prompts of volumes: slabs with prompts are answered first, then their neighbours outwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from monai.metrics import compute_dice
from scipy import ndimage
from torch import Tensor

from medsa_nets.inferers.slabs import Around, SlabInferer, Slabs, VolumeInferer, slab_inferer
from medsa_nets.prompts import Prompts

AGREEMENT = 0.5  # Dice from which an automatic mask and that of clicks show the same
Look: TypeAlias = Callable[[range], Tensor]  # a mask (H, W, slices) on some slices


class SpreadInferer(Around):
    """Answers prompts from the slabs that hold them outwards, each class as long as its mask reaches the last slice.

    A click then costs as many slabs as the organ has. The next slab gets a click of its own, in the middle of what the
    one before it found where the two meet.

    Args:
        inferer: in slabs.
        automatic_masks: whether automatic masks are looked at: a mask of clicks on a class then goes on only where the
            automatic mask of that class shows it too (Dice of 0.5 or more where two slabs meet), unless that shows
            nothing of it at the clicks. ``never``; ``near``, only in the slabs that a click spreads to; or ``whole``,
            in the whole volume, where all of them are asked for anyway.

    Raises:
        ValueError: when ``automatic_masks`` has another value.
    """

    def __init__(self, inferer: VolumeInferer, automatic_masks: str = "never") -> None:
        super().__init__(inferer)
        if automatic_masks not in ("never", "near", "whole"):
            raise ValueError(f"automatic_masks must be never, near or whole, got {automatic_masks!r}.")
        self.automatic_masks = automatic_masks

    @property
    def base(self) -> SlabInferer:
        """The inferer in slabs."""
        return slab_inferer(self)

    def answer(self, images: list[Slabs], prompts: Prompts) -> Tensor:
        """Logits of the prompts, from their own slabs outwards; without any, of every class from every slab."""
        if not prompts or prompts.automatic:
            return self.inferer.answer(images, prompts)
        (slabs,) = images
        return self._spread_sets(slabs, prompts)

    def _spread_sets(self, slabs: Slabs, prompts: Prompts) -> Tensor:
        """Answer each prompt set from its own slabs outwards."""
        logits = torch.cat([self._spread(slabs, prompts.select([k])) for k in range(prompts.sets)], dim=1)
        slabs.finish()
        return logits

    def _spread(self, slabs: Slabs, prompts: Prompts) -> Tensor:
        """Decode the slabs that hold prompts, then their neighbours as long as the mask goes on there."""
        waiting = [(g, prompts) for g in slabs.holding(prompts)]
        answers: dict[int, Tensor] = {}
        automatic: Look | None = None
        while waiting:
            g, own = waiting.pop()
            if g in answers:
                continue
            logits = self.base.decode(slabs, g, own)
            if not answers:
                automatic = self._known(slabs, prompts, logits, g)
            answers[g] = logits
            for n, edge in ((g - 1, logits[0, ..., 0]), (g + 1, logits[-1, ..., -1])):
                if not 0 <= n < len(slabs.groups) or not bool((edge > 0).any()):
                    continue
                if automatic is None or self._goes_on(slabs, logits, automatic, g, n):
                    waiting.append((n, hand_on(slabs, prompts, logits, g, n)))
        return self.base.blend(slabs, sorted(answers.items()))

    def _known(self, slabs: Slabs, prompts: Prompts, logits: Tensor, g: int) -> Look | None:
        """Automatic mask of the class that was clicked; none where it knows nothing of what the clicks show.

        A click that is handed on from slab to slab says that the organ is there; without another opinion, a mask that
        leaves the organ once would follow whatever it has got into through the whole volume.
        """
        if (
            self.automatic_masks == "never"
            or prompts.boxes is not None
            or prompts.points is None
            or prompts.classes is None
        ):
            return None
        index = int(prompts.classes[0])
        if index < 0:
            return None
        mask = self._automatic_mask(slabs, index)
        own = torch.stack([mask(range(start, start + slabs.depth)) for start in slabs.groups[g]])
        return mask if bool((own & (logits[:, 0] > 0)).any()) else None

    def _automatic_mask(self, slabs: Slabs, index: int) -> Look:
        """Automatic mask (H, W, slices) of a class on some slices; where it is all that is asked for, no more of it is
        computed than the slabs that hold these slices."""
        if self.automatic_masks == "whole":
            whole = self.inferer.automatic([slabs])[0, index] > 0
            return lambda slices: whole[..., slices.start : slices.stop]
        known: dict[int, Tensor] = {}

        def look(slices: range) -> Tensor:
            groups = [g for g in range(len(slabs.groups)) if slabs.holds(g, slices)]
            for g in groups:
                if g not in known:
                    known[g] = self.base.automatic_slabs(slabs, g, index)
            logits = self.base.blend(slabs, [(g, known[g]) for g in groups])
            return logits[0, 0, ..., slices.start : slices.stop] > 0

        return look

    def _goes_on(self, slabs: Slabs, logits: Tensor, automatic: Look, g: int, n: int) -> bool:
        """Whether the automatic mask shows what slabs ``g`` found where they meet slabs ``n``."""
        s, here, shared = meeting(slabs, g, n)
        found = logits[s, 0, :, :, shared.start - here : shared.stop - here] > 0
        there = automatic(shared)
        return float(compute_dice(found[None, None], there[None, None], ignore_empty=False)) >= AGREEMENT


def meeting(slabs: Slabs, g: int, n: int) -> tuple[int, int, range]:
    """Slab of ``g`` beside ``n``: its place, its first slice, and its slices where the two overlap, or touch."""
    s, here = (0, slabs.groups[g][0]) if n < g else (-1, slabs.groups[g][-1])
    shared = range(max(here, slabs.groups[n][0]), min(here, slabs.groups[n][-1]) + slabs.depth)
    if not shared:
        edge = here if n < g else here + slabs.depth - 1
        shared = range(edge, edge + 1)
    return s, here, shared


def hand_on(slabs: Slabs, prompts: Prompts, logits: Tensor, g: int, n: int) -> Prompts:
    """Prompts of the neighbouring slabs ``n``: clicks, and one more in the middle of what slabs ``g`` found there.

    A slab far from the user's clicks would have to trace an organ from a click that lies many slices away.
    """
    if prompts.boxes is not None or prompts.points is None or prompts.labels is None:
        return prompts
    s, here, shared = meeting(slabs, g, n)
    z = shared[len(shared) // 2]
    plane = (logits[s, 0, :, :, z - here] > 0).cpu().numpy()
    if not plane.any():
        return prompts
    depth = ndimage.distance_transform_edt(np.pad(plane, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return prompts.with_points(prompts.points.new_tensor([[[row, column, z]]]), prompts.labels.new_ones(1, 1))
