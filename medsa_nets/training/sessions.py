"""A training step of whole sessions: click after click on one encoding, each answer made from the one before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from monai.engines import SupervisedTrainer
from scipy import ndimage
from torch import Tensor

from medsa_nets.interaction.users import SimulatedUser
from medsa_nets.networks import MedSA
from medsa_nets.prompts import Prompts, bounding_box, class_masks, jitter_box
from medsa_nets.prompts.earlier import as_earlier
from medsa_nets.training.step import PromptedIteration, call_through, choose_classes
from medsa_nets.training.volume_step import VolumeIteration

STARTS = ("nothing", "automatic", "wrong", "box")


SPOILT = ("eroded", "dilated", "shifted", "leaked", "other")


def spoil(mask: np.ndarray, random: np.random.Generator, kind: str | None = None) -> np.ndarray:
    """A mask as another tool may have left it: too small, too large, moved, leaked, or of something else.

    Args:
        mask: boolean (spatial…).
        random: source of randomness.
        kind: one of ``SPOILT``; none draws one.

    Returns:
        Boolean, of the same shape.
    """
    kind = random.choice(SPOILT) if kind is None else kind
    extent = max(2.0, float(mask.sum()) ** (1.0 / mask.ndim))  # side of a cube as large
    if kind in ("eroded", "dilated") and mask.any():
        width = extent * random.uniform(0.05, 0.3)
        if kind == "eroded":
            return ndimage.distance_transform_edt(mask) > width
        return ndimage.distance_transform_edt(~mask) <= width
    if kind == "shifted":
        moves = random.uniform(-0.4, 0.4, mask.ndim) * extent
        return ndimage.shift(mask.astype(np.float32), moves, order=0) > 0.5
    # A blob: beside the mask's border where it leaks, else anywhere.
    border = np.argwhere(mask ^ ndimage.binary_erosion(mask)) if kind == "leaked" else np.empty((0, mask.ndim))
    centre = border[random.integers(len(border))] if len(border) else random.uniform(0, 1, mask.ndim) * mask.shape
    radii = extent * random.uniform(0.2, 0.7, mask.ndim)
    axes = np.ogrid[tuple(slice(0, n) for n in mask.shape)]
    blob = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii)) <= 1.0
    return mask | blob if kind == "leaked" else np.broadcast_to(blob, mask.shape).copy()


class SessionSampler:
    """Draws what the sessions of a training step are like.

    Args:
        nothing: weight of sessions that begin with the first click.
        automatic: of those that begin with the network's own automatic mask.
        wrong: of those that begin with a wrong mask (:func:`spoil`).
        box: of those that begin with a jittered box.
        max_answers: most answers of a session; about half of the sessions have at most half as many.
        box_jitter: largest move of a box's side, as a share of the box's extent.
        unnamed: share of sessions that do not say which class is meant, of those that do not begin automatically.

    Raises:
        ValueError: when weights are negative or all zero, or ``max_answers`` is below 1.
    """

    def __init__(
        self,
        *,
        nothing: float = 0.3,
        automatic: float = 0.4,
        wrong: float = 0.2,
        box: float = 0.1,
        max_answers: int = 11,
        box_jitter: float = 0.1,
        unnamed: float = 0.25,
    ) -> None:
        weights = torch.tensor([nothing, automatic, wrong, box], dtype=torch.float64)
        if bool((weights < 0).any()) or float(weights.sum()) <= 0:
            raise ValueError(
                f"nothing, automatic, wrong and box must be 0 or more and not all 0, got {weights.tolist()}."
            )
        if max_answers < 1:
            raise ValueError(f"max_answers must be 1 or more, got {max_answers}.")
        self.weights = weights
        self.max_answers = max_answers
        self.box_jitter = box_jitter
        self.unnamed = unnamed

    def starts(self, count: int, generator: torch.Generator) -> list[str]:
        """What ``count`` sessions begin with, evenly spread over the weights (systematic sampling)."""
        positions = (torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)) / count
        chosen = torch.searchsorted((self.weights / self.weights.sum()).cumsum(0), positions, right=True)
        return [STARTS[int(i)] for i in chosen.clamp_max(len(STARTS) - 1)]

    def answers(self, generator: torch.Generator) -> int:
        """How many answers a session has: 1 to ``max_answers``, few more often than many."""
        share = float(torch.rand(1, generator=generator)) ** 1.5
        return 1 + int(share * self.max_answers * 0.9999)

    def named(self, generator: torch.Generator) -> bool:
        """Whether a session says which class is meant."""
        return float(torch.rand(1, generator=generator)) >= self.unnamed


def run_session(
    network: MedSA,
    embedding: Tensor,
    target: Tensor,
    start: str,
    automatic: Tensor,
    answers: int,
    classes: Tensor | None,
    user: SimulatedUser,
    places: Sequence[torch.Generator],
    box_jitter: float = 0.1,
) -> list[tuple[Tensor, Tensor]]:
    """Answer click after click, all on one embedding.

    Args:
        network: the network.
        embedding: of the images (B, 256, …).
        target: (B, K, spatial…) boolean: what a session is to reach.
        start: one of :data:`STARTS`.
        automatic: logits of the automatic masks of these classes (B, K, spatial…).
        answers: answers of the session.
        classes: (K,) ids that are named, or none.
        user: places the clicks.
        places: a source of randomness for each image.
        box_jitter: largest move of a box's side, as a share of its extent.

    Returns:
        For each answer logits (B, K, spatial…) and how near each voxel is to the newest click, in [0, 1].
    """
    batch, sets, shape = target.shape[0], target.shape[1], tuple(target.shape[2:])
    masks = list(zip(target.flatten(0, 1), [source for source in places for _ in range(sets)]))
    prompts = [Prompts(classes=classes)] * batch
    earlier: Tensor | None = None
    if start == "automatic":
        earlier = automatic.detach().float()
    elif start == "wrong":
        spoilt = []
        for mask, source in masks:
            random = np.random.default_rng(int(torch.randint(2**31, (1,), generator=source)))
            wrong = torch.from_numpy(spoil(mask.cpu().numpy(), random)).to(target.device)
            spoilt.append((2.0 * wrong.float() - 1.0) * random.uniform(2.0, 8.0))
        earlier = torch.stack(spoilt).unflatten(0, (batch, sets))
    elif start == "box":
        boxes = [
            jitter_box(found, shape, box_jitter, source)
            if (found := bounding_box(mask)) is not None
            else torch.zeros(2 * len(shape))
            for mask, source in masks
        ]
        corners = torch.stack([box.to(target.device) for box in boxes]).unflatten(0, (batch, sets))
        prompts = [replace(one, boxes=own) for one, own in zip(prompts, corners)]
    out: list[tuple[Tensor, Tensor]] = []
    for number in range(answers):
        if start == "box" and number == 0:
            logits = network.decode(embedding, **Prompts.batched(prompts))
            out.append((logits, torch.zeros_like(logits)))
            earlier = logits.detach()
            continue
        before = torch.zeros_like(target) if earlier is None else earlier > 0
        coords, labels = user.clicks(before, target, places)
        prompts = [one.with_points(*own) for one, *own in zip(prompts, coords.unsqueeze(2), labels.unsqueeze(2))]
        if earlier is not None:
            prompts = [replace(one, masks=own) for one, own in zip(prompts, as_earlier(earlier, embedding.shape[2:4]))]
        logits = network.decode(embedding, **Prompts.batched(prompts))
        out.append((logits, nearness(coords, labels, shape)))
        earlier = logits.detach()
    return out


def nearness(coords: Tensor, labels: Tensor, shape: tuple[int, ...], radius: float = 8.0) -> Tensor:
    """Gaussian (standard deviation ``radius`` voxels) around clicks (B, K, dims), zero for padding: (B, K, shape)."""
    near = (labels >= 0).float().reshape(*labels.shape, *[1] * len(shape))
    for axis, size in enumerate(shape):
        steps = torch.arange(size, device=coords.device, dtype=torch.float32)
        line = torch.exp(-0.5 * ((steps - coords[..., axis : axis + 1]) / radius).square())
        near = near * line.reshape(*labels.shape, *[size if a == axis else 1 for a in range(len(shape))])
    return near


class SessionIteration(PromptedIteration):
    """A training step on sessions of clicks on images, for ``monai.engines.SupervisedTrainer``.

    Each step encodes the images once and runs ``draws`` sessions on them; every answer has a loss, beside that of the
    automatic mask. The loss function is called with logits, target and nearness to the newest click
    (:class:`~medsa_nets.losses.NearClickLoss`).

    Args:
        sessions: draws what sessions are like.
        user: places the clicks.
        settings: see :class:`~medsa_nets.training.PromptedIteration`; ``sampler`` and ``pairs`` are not used.
    """

    def __init__(self, *, sessions: SessionSampler, user: SimulatedUser, **settings: Any) -> None:
        super().__init__(**settings)
        self.sessions = sessions
        self.user = user

    def answer(
        self,
        engine: SupervisedTrainer,
        batchdata: Mapping[str, Any],
        kinds: torch.Generator,
        places: Sequence[torch.Generator],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Run the step's sessions: the image, and for each answer logits, target and nearness to the newest click."""
        image, label = self.prepare(engine, batchdata)
        with self.precision(image.device).autocast(image.device):
            return image, call_through(engine.network, self.answer_sessions, image, label > 0.5, kinds, places)

    def answer_sessions(
        self,
        network: MedSA,
        image: Tensor,
        target: Tensor,
        kinds: torch.Generator,
        places: Sequence[torch.Generator],
    ) -> list[tuple[Tensor, ...]]:
        """Answers of a network: logits (B, K, H, W), target and nearness of the same shape.

        Of several classes, each session is about some that are in the images, and says which.
        """
        embedding = network.encode_image(image)
        automatic = network.decode(embedding)
        answers: list[tuple[Tensor, ...]] = [(automatic, target, torch.zeros_like(automatic))]
        for start in self.sessions.starts(self.draws, kinds):
            named = self.sessions.named(kinds) or start == "automatic" or target.shape[1] > 1
            chosen = torch.zeros(1, dtype=torch.long)
            if target.shape[1] > 1:
                chosen = choose_classes(target.float(), self.max_classes, places)
            chosen = chosen.to(image.device)
            own = target[:, chosen]
            session = run_session(
                network, embedding, own, start, automatic[:, chosen], self.sessions.answers(kinds),
                chosen if named else None, self.user, places, self.sessions.box_jitter,
            )  # fmt: skip
            answers += [(logits, own, near) for logits, near in session]
        return answers


class VolumeSessionIteration(VolumeIteration):
    """A training step on sessions of clicks on slabs of volumes; as :class:`SessionIteration`, several classes at once.

    The loss function is called with logits, masks, which classes are annotated, and nearness to the newest click.

    Args:
        sessions: draws what sessions are like.
        user: places the clicks.
        session_depth: slices of the slab that a step's sessions see, around a slice of one of the classes: fewer than
            the slab has take less time and memory for each answer. 0 takes all.
        settings: see :class:`~medsa_nets.training.VolumeIteration`.

    Raises:
        ValueError: when ``session_depth`` is below 0.
    """

    def __init__(
        self, *, sessions: SessionSampler, user: SimulatedUser, session_depth: int = 0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if session_depth < 0:
            raise ValueError(f"session_depth must be 0 (all slices) or more, got {session_depth}.")
        self.sessions = sessions
        self.user = user
        self.session_depth = session_depth

    def choose_slices(self, label: Tensor, kinds: torch.Generator) -> slice:
        """``session_depth`` slices of a slab's label (B, 1, H, W, D), around one that holds a class, if any does."""
        depth = label.shape[-1]
        if not 0 < self.session_depth < depth:
            return slice(0, depth)
        held = torch.nonzero((label > 0).flatten(0, -2).any(0)).flatten()
        count = len(held) or depth
        chosen = int(torch.randint(count, (1,), generator=kinds))
        middle = int(held[chosen]) if len(held) else chosen
        start = min(max(0, middle - self.session_depth // 2), depth - self.session_depth)
        return slice(start, start + self.session_depth)

    def answer_slab(
        self,
        network: MedSA,
        image: Tensor,
        label: Tensor,
        annotated: Tensor,
        kinds: torch.Generator,
        places: torch.Generator | Sequence[torch.Generator],
    ) -> list[tuple[Tensor, ...]]:
        """Answers of a network: logits (B, K, H, W, D), masks, annotated classes (B, K), and nearness."""
        places = [places] * len(image) if isinstance(places, torch.Generator) else places
        slab = self.choose_slab(image.shape[-1], kinds)
        image, label = image[..., slab], label[..., slab]
        shown = self.choose_slices(label, kinds)
        embedding, label = network.encode_image(image)[..., shown], label[..., shown]
        automatic = network.decode(embedding)
        every = torch.arange(self.num_classes)
        answers: list[tuple[Tensor, ...]] = [
            (automatic, class_masks(label, every), annotated, torch.zeros_like(automatic))
        ]
        for start in self.sessions.starts(self.draws, kinds):
            chosen = self.choose_classes(label, annotated, places[0])
            masks, known = class_masks(label, chosen), annotated[:, chosen.to(annotated.device)]
            named = self.sessions.named(kinds) or start == "automatic"
            session = run_session(
                network, embedding, masks, start, automatic[:, chosen], self.sessions.answers(kinds),
                chosen.to(image.device) if named else None, self.user, places, self.sessions.box_jitter,
            )  # fmt: skip
            answers += [(logits, masks, known, near) for logits, near in session]
        return answers
