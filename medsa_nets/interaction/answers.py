"""Makes one answer of a session: asks the network, corrects by the clicks, and limits what may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import Tensor

from medsa_nets.errors import WeightsError
from medsa_nets.interaction.grids import Grids, Place, bounding_place
from medsa_nets.interaction.refinement import Refinement, kept, refine
from medsa_nets.interaction.segmenters import Asked, Segmenter
from medsa_nets.prompts.observations import MARGIN, Kernel, newest_labels, observe
from medsa_nets.prompts.user import UserPrompt

RULES = ("free", "directed", "connected", "monotone")
# Chosen by tests/benchmarks/sessions.py on validation images: lesions 100 to 115 (certainty: the first 24),
# hippocampi 20 to 28.
USUAL: dict[int, dict[str, Any]] = {
    2: {"kernel": Kernel(length=8.0, contrast=0.3), "rule": "free", "certainty": 1.0, "depth": 2.0},
    3: {"kernel": Kernel(length=2.5, contrast=0.3, margin=2.0), "rule": "connected", "certainty": 0.0, "depth": 0.0},
}
SLACK = 2.0  # voxels by which a change may go deeper than a click says
AGREEMENT = 0.5  # Dice from which a mask and the answer to clicks on it show the same
TOKENS = 8  # points of a scribble that the network is told


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are made.

    Args:
        rule: what a click may change where a mask stood before it; none takes that of :data:`USUAL`. ``free``:
            everything. ``directed``: a foreground click takes nothing away beyond ``reach``, and a background click
            adds nothing there. ``connected``: what is connected with the click (26 neighbours), and what lies within
            ``reach`` of it. ``monotone``: both.
        reach: in mm (volumes) or pixels of the network's grid (images); none takes the kernel's radius.
        kernel: how far a click speaks for others; none takes that of :data:`USUAL`.
        certainty: logit that a voxel beyond ``reach`` must have on its new side to change sides: at borders that are
            far from a click, answers differ by chance. None takes that of :data:`USUAL`.
        depth: how far from the border of the mask before a voxel may change sides, as a multiple of how far the click
            lies from it (the deepest voxel of a scribble), and ``SLACK`` voxels: people click in the middle of what is
            wrong. 0 bounds nothing; none takes that of :data:`USUAL`.
        interpolate: whether clicks speak for other voxels at all; false lets them set their own voxel alone.
        refinement: file of a :class:`~medsa_nets.interaction.refinement.Refinement`, which says what a click means for
            the voxels around it; none takes the one that belongs to the adapter, an empty name goes without.
        click_certainty: logit that a voxel within the refinement's reach must have on its new side to change sides;
            none takes the refinement's own. A lower one lets clicks do more on masks that are far off.
        network: ``always`` asks the network again for each answer, ``first`` where there was no mask before; ``auto``
            does as the refinement learnt it; without one, it asks again in images, and in volumes where the adapter was
            trained with earlier masks. Where it does not ask again, it does so for a click farther than a quarter of
            ``reach`` and ``SLACK`` voxels from the mask's border, and takes an answer that shows something else than
            the mask before.

    Raises:
        ValueError: when a setting has another value.
    """

    rule: str | None = None
    reach: float | None = None
    kernel: Kernel | None = None
    certainty: float | None = None
    depth: float | None = None
    interpolate: bool = True
    refinement: str | None = None
    click_certainty: float | None = None
    network: str = "auto"

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}.")
        if self.network not in ("auto", "always", "first"):
            raise ValueError(f"network must be auto, always or first, got {self.network!r}.")
        for name in ("reach", "certainty", "depth", "click_certainty"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}.")

    def of(self, dims: int) -> AnswerSettings:
        """Settings for images of 2 or volumes of 3 dimensions, with the usual values where there are none."""
        usual = {name: value for name, value in USUAL[dims].items() if getattr(self, name) is None}
        out = replace(self, **usual)
        return out if out.reach is not None or out.kernel is None else replace(out, reach=out.kernel.radius)


def refinement_of(settings: AnswerSettings, segmenter: Segmenter) -> Refinement | None:
    """The refinement of clicks that answers are made with, or none.

    Raises:
        WeightsError: when its file is missing, damaged or for other dimensions.
    """
    if settings.refinement is None:
        return segmenter.refinement
    if settings.refinement == "":
        return None
    found, dims = kept(settings.refinement), 3 if segmenter.volumes else 2
    if found.dims != dims:
        raise WeightsError(f"{settings.refinement}: it refines clicks in {found.dims} dimensions, not in {dims}.")
    return found


def answer_identity(settings: AnswerSettings, segmenter: Segmenter) -> dict[str, str]:
    """What answers depend on beside image and settings: the network, and SHA-256 of the refinement or nothing."""
    refinement = refinement_of(settings, segmenter)
    return {**segmenter.identity(), "refinement_sha256": "" if refinement is None else refinement.sha256}


@dataclass
class Draft:
    """An answer before it is refined and bounded.

    Attributes:
        previous: logits (spatial…) that the user saw, or none.
        values: logits (spatial…) of the network, with the clicks as measurements.
        voxels: (N, dims) that are marked, oldest first.
        labels: (N,) of these.
        bounds: voxels (spatial…) that nothing may lie in, or none, of each prompt.
        newest: voxels (M, dims) that the newest prompt marked: the last ones of ``voxels``; empty for other prompts,
            and where there was no mask to correct.
        label: of the newest prompt.
    """

    previous: np.ndarray | None
    values: np.ndarray
    voxels: np.ndarray
    labels: np.ndarray
    bounds: list[np.ndarray | None]
    newest: np.ndarray
    label: int

    @property
    def corrects(self) -> bool:
        """Whether the newest prompt marks voxels that the mask before had wrong."""
        if self.previous is None or not len(self.newest):
            return False
        return bool(((self.previous[tuple(self.newest.T)] > 0) != bool(self.label)).any())


def make_answer(
    segmenter: Segmenter,
    image: MetaTensor,
    grids: Grids,
    index: int,
    previous: Tensor | None,
    prompts: Sequence[UserPrompt],
    settings: AnswerSettings,
) -> Tensor:
    """Logits that answer the prompts of a class.

    Args:
        segmenter: asks the network.
        image: (C, spatial…), as the network sees it.
        grids: of that image.
        index: id of the class.
        previous: logits (spatial…) of the answer before this one, or none.
        prompts: of the class, oldest first; the last one is new.
        settings: see there.

    Returns:
        Logits (spatial…): every marked voxel, and every bound, holds.
    """
    draft = draft_answer(segmenter, image, grids, index, previous, prompts, settings)
    refinement = refinement_of(settings, segmenter)
    if refinement is not None and draft.corrects:
        assert draft.previous is not None
        draft.values = refine(
            refinement, draft.previous, draft.values, image.numpy(), draft.voxels, draft.labels, len(draft.newest),
            grids.spacing, settings.click_certainty,
        )  # fmt: skip
    return torch.from_numpy(finish_answer(draft, grids, settings))


def draft_answer(
    segmenter: Segmenter,
    image: MetaTensor,
    grids: Grids,
    index: int,
    previous: Tensor | None,
    prompts: Sequence[UserPrompt],
    settings: AnswerSettings,
) -> Draft:
    """Ask the network where that is due, and take clicks as measurements (arguments as of :func:`make_answer`)."""
    settings = settings.of(grids.dims)
    assert settings.kernel is not None
    assert settings.reach is not None
    refinement = refinement_of(settings, segmenter)
    usual = (segmenter.feedback or not segmenter.volumes) if refinement is None else refinement.asks
    again = settings.network == "always" or (settings.network == "auto" and usual)
    # Where there is no mask yet, there is nothing to keep, and nothing that clicks alone could mend. A box says where
    # the whole class is, whatever there was.
    empty = previous is None or not bool((previous > 0).any())
    anew = _surrounds(prompts[-1], grids.dims)
    if empty or again or anew:
        logits = segmenter.decode(image, index, ask(grids, prompts), None if anew else previous)
    else:
        assert previous is not None
        logits = previous
        distance = max(settings.reach / 4.0, SLACK * float(min(grids.spacing)))
        far = _far_from_border(previous, grids, prompts[-1], distance)
        if settings.network == "auto" and segmenter.prompted and far:
            # Where clicks show something else than the mask, it was a wrong one, and no border of it to be moved.
            other = segmenter.decode(image, index, ask(grids, prompts), None)
            if _dice(other > 0, previous > 0) < AGREEMENT and _agrees(other.numpy(), grids, prompts[-1]):
                logits, empty = other, True
    values = logits.numpy()
    bounds = [bound_on_tensor(grids, prompt) for prompt in prompts]
    voxels, labels = marked_voxels(grids, prompts, bounds)
    if settings.interpolate:
        values = observe(values, image.numpy(), voxels, labels, grids.spacing, settings.kernel)
    newest = np.empty((0, grids.dims), dtype=np.int64)
    if previous is not None and not empty and prompts[-1].marks:
        newest = np.unique(grids.voxels(prompts[-1].voxels()), axis=0)
    before = None if previous is None else previous.numpy()
    return Draft(before, values, voxels, labels, bounds, newest, prompts[-1].label)


def finish_answer(draft: Draft, grids: Grids, settings: AnswerSettings) -> np.ndarray:
    """Logits (spatial…) of a draft, other than before only where its newest prompt may change them; all marks hold."""
    settings, values = settings.of(grids.dims), draft.values
    if draft.previous is not None and len(draft.newest):
        values = keep_local(draft.previous, values, draft.newest, draft.label, grids.spacing, settings)
    return hold(values, draft.voxels, draft.labels, draft.bounds)


def ask(grids: Grids, prompts: Sequence[UserPrompt]) -> Asked:
    """What prompts ask of the network: clicks, a few points of each scribble, and the newest box or outline.

    An outline in a slice of a volume does not surround the class: it is a box of one slice, where nothing else shows
    what is meant.
    """
    points: list[np.ndarray] = []
    labels: list[int] = []
    box = outline = None
    for prompt in prompts:
        if prompt.marks:
            own = grids.positions(prompt.positions)
            own = own[np.unique(np.linspace(0, len(own) - 1, TOKENS).round().astype(int))] if len(own) > TOKENS else own
            points.extend(own)
            labels.extend([prompt.label] * len(own))
        elif prompt.kind == "box" or (prompt.kind == "lasso" and prompt.label == 1):
            corners = grids.positions(np.stack([prompt.positions.min(0), prompt.positions.max(0)]))
            outline = np.concatenate([corners.min(0), corners.max(0)])
            box = outline if _surrounds(prompt, grids.dims) else box
    if box is None and not points:
        box = outline
    return Asked(np.array(points).reshape(-1, grids.dims), np.array(labels), box)


def _dice(one: Tensor, other: Tensor) -> float:
    return float(2.0 * (one & other).sum() / (one.sum() + other.sum()).clamp_min(1))


def _agrees(values: np.ndarray, grids: Grids, prompt: UserPrompt) -> bool:
    """Whether logits carry the label of what a prompt marked."""
    return bool(((values[tuple(grids.voxels(prompt.voxels()).T)] > 0) == bool(prompt.label)).all())


def _far_from_border(previous: Tensor, grids: Grids, prompt: UserPrompt, distance: float) -> bool:
    """Whether a prompt marks a voxel farther than ``distance`` from all on the other side of a mask's border."""
    if not prompt.marks:
        return False
    half = np.floor(distance / np.asarray(grids.spacing)).astype(int)
    for voxel in grids.voxels(prompt.voxels()):
        place = tuple(slice(max(0, v - h), v + h + 1) for v, h in zip(voxel, half))
        side = previous[place] > 0
        if bool((side == side[tuple(int(v) - s.start for v, s in zip(voxel, place))]).all()):
            return True
    return False


def _surrounds(prompt: UserPrompt, dims: int) -> bool:
    """Whether it lies around the whole class: a lasso in a volume does so in one slice alone."""
    return prompt.kind == "box" or (prompt.kind == "lasso" and prompt.label == 1 and dims == 2)


def bound_on_tensor(grids: Grids, prompt: UserPrompt) -> np.ndarray | None:
    """Voxels of the network's grid (spatial…) in which a prompt lets nothing of the class be; none for other kinds."""
    if prompt.kind not in ("box", "lasso"):
        return None
    indices = np.indices(grids.shape).reshape(grids.dims, -1).T
    positions = indices @ grids.to_file[:-1, :-1].T + grids.to_file[:-1, -1]
    return prompt.bound(list(positions.T)).reshape(grids.shape)


def marked_voxels(
    grids: Grids, prompts: Sequence[UserPrompt], bounds: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (N, dims) of the network's grid that were marked and labels (N,), where nothing newer contradicts them."""
    voxels = np.empty((0, grids.dims), dtype=np.int64)
    labels = np.empty(0, dtype=np.int64)
    for prompt, bound in zip(prompts, bounds):
        if prompt.marks:
            own = grids.voxels(prompt.voxels())
            voxels = np.concatenate([voxels, own])
            labels = np.concatenate([labels, np.full(len(own), prompt.label)])
        elif bound is not None:
            kept = ~bound[tuple(voxels.T)] | (labels == 0)
            voxels, labels = voxels[kept], labels[kept]
    return newest_labels(voxels, labels) if len(voxels) else (voxels, labels)


def hold(values: np.ndarray, voxels: np.ndarray, labels: np.ndarray, bounds: Sequence[np.ndarray | None]) -> np.ndarray:
    """Logits with every bound, and the label of every marked voxel."""
    out = values.copy()
    for bound in bounds:
        if bound is not None:
            np.minimum(out, -MARGIN, out=out, where=bound)
    place = tuple(voxels.T)
    out[place] = np.where(labels > 0, np.maximum(out[place], MARGIN), np.minimum(out[place], -MARGIN))
    return out


def keep_local(
    previous: np.ndarray,
    values: np.ndarray,
    newest: np.ndarray,
    label: int,
    spacing: np.ndarray,
    settings: AnswerSettings,
) -> np.ndarray:
    """Let new logits stand only where a click or scribble may change them, and the previous ones elsewhere.

    A mark that the mask carried already only adds (foreground) or only takes away (background), whatever the rule.

    Args:
        previous: logits (spatial…) before.
        values: logits after.
        newest: voxels (N, dims) that were marked.
        label: of them.
        spacing: size of a voxel along each axis.
        settings: with all of ``rule``, ``reach``, ``certainty`` and ``depth``.
    """
    right = (values > 0) == bool(label)
    if bool(((previous[tuple(newest.T)] > 0) == bool(label)).all()):
        # A mark on what the mask holds already says that it is right: it is no reason to take away what is like it.
        values = np.where(right | (previous <= 0 if label else previous > 0), values, previous)
    rule, reach, certainty, depth = settings.rule, settings.reach, settings.certainty, settings.depth
    assert reach is not None
    if rule == "free" and not certainty and not depth:
        return values
    if depth:
        mask = previous > 0
        sampling = list(spacing)
        deep = ndimage.distance_transform_edt(mask, sampling) + ndimage.distance_transform_edt(~mask, sampling)
        most = depth * float(deep[tuple(newest.T)].max()) + SLACK * float(min(spacing))
        values = np.where((deep > most) & ((values > 0) != mask), previous, values)
    near = within(previous.shape, newest, spacing, reach)
    changed = (values > 0) != (previous > 0)
    if certainty:
        values = np.where(near | ~changed | (np.abs(values) >= certainty), values, previous)
        changed = (values > 0) != (previous > 0)
    if rule == "free":
        return values
    if rule == "directed":
        return np.where(near | ~changed | ((values > 0) == bool(label)), values, previous)
    if rule == "monotone":
        changed &= near | ((values > 0) == bool(label))
    parts, count = ndimage.label(changed, np.ones((3,) * changed.ndim))
    touched = np.zeros(count + 1, dtype=bool)
    for voxel in newest:
        touched[np.unique(parts[tuple(slice(max(0, v - 1), v + 2) for v in voxel)])] = True
    touched[0] = False
    return np.where(near | touched[parts], values, previous)


def within(shape: tuple[int, ...], voxels: np.ndarray, spacing: np.ndarray, reach: float) -> np.ndarray:
    """Voxels (shape), boolean, at most ``reach`` away from one of ``voxels`` (N, dims)."""
    out = np.zeros(shape, dtype=bool)
    margin = np.ceil(reach / np.asarray(spacing)).astype(int)
    low = np.maximum(voxels.min(0) - margin, 0)
    high = np.minimum(voxels.max(0) + margin + 1, shape)
    away = np.ones(high - low, dtype=bool)
    away[tuple((voxels - low).T)] = False
    place: Place = tuple(slice(int(a), int(b)) for a, b in zip(low, high))
    out[place] = ndimage.distance_transform_edt(away, sampling=list(spacing)) <= reach
    return out


def change(previous: Tensor | None, values: Tensor) -> Place | None:
    """Box of the network's grid that holds every voxel whose logit is another; none where none is."""
    if previous is None:
        return tuple(slice(0, n) for n in values.shape)
    return bounding_place((previous != values).numpy())
