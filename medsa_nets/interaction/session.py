"""An interactive session on one image: clicks, scribbles, boxes, undo. Every client and tool goes through it."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from medsa_nets.errors import DataError
from medsa_nets.interaction.answers import AnswerSettings, change, make_answer
from medsa_nets.interaction.grids import Grids, Place, bounding_place
from medsa_nets.interaction.record import replay_session, save_session
from medsa_nets.interaction.segmenters import NetworkSegmenter, Segmenter
from medsa_nets.prompts.user import UserPrompt, make_lasso, read_positions

STARTS = ("automatic", "nothing")
START_LOGIT = 4.0  # of a mask that came without logits: sure, but a click on it is no surprise
HISTORY = 2**30  # bytes by which prompts are taken back at once
FACE = 1e-3  # weight of a changed voxel from which on a voxel of the file may have changed


@dataclass
class _Step:
    """What a prompt changed: enough to take it back, bit for bit."""

    prompt: UserPrompt
    place: Place | None  # of the logits before, none where there were none
    logits: Tensor | None
    mask_place: Place | None  # where the mask was another, none where it was the same
    mask: np.ndarray | None
    held: bool = True  # else it was dropped: what there was before is computed again

    @property
    def bytes(self) -> int:
        """Memory that it takes, its prompt not among it."""
        return sum(part.nbytes for part in (self.logits, self.mask) if part is not None)

    def drop(self) -> None:
        """Forget what there was before."""
        self.place = self.logits = self.mask_place = self.mask = None
        self.held = False

    def mask_before(self, mask: np.ndarray) -> np.ndarray:
        """The mask that there was, given the one that followed."""
        if self.mask_place is None:
            return mask
        out = mask.copy()
        out[self.mask_place] = self.mask
        return out


@dataclass
class _Class:
    """State of one class: its prompts, and logits and mask of the last answer."""

    logits: Tensor | None
    mask: np.ndarray  # boolean, on the file's grid; never changed in place
    steps: list[_Step] = field(default_factory=list)

    @property
    def prompts(self) -> list[UserPrompt]:
        return [step.prompt for step in self.steps]

    @property
    def accepted(self) -> bool:
        return bool(self.steps) and self.steps[-1].prompt.kind == "accept"


class InteractiveSession:
    """A user's work on one image: prompts on classes, an answer to each, and undo.

    Positions are voxel indices of the image's own file, as viewers give them: (i, j, k) of a volume, (x, y) of a
    photograph. Masks come on the file's grid. An answer depends on the image, the adapter and the prompts of its class
    in their order, on nothing else; where classes exclude each other, a mask also leaves out what belongs to others.

    What holds after every verb:

    - Each marked voxel of the file carries its label in :meth:`mask`; each box and lasso bounds it. Of what
      contradicts each other, the newest holds.
    - :meth:`undo` gives back the masks that were there before, bit for bit.
    - An accepted mask stays as it is until its acceptance is undone.
    - A prompt that can't be used raises an error, and changes nothing.

    In volumes, and in images whose classes do not overlap, each voxel has one class at most. A voxel belongs to the
    accepted class that has it; else to the class that was last marked on it as foreground; else, of the classes with
    prompts whose mask has it, to the one whose newest prompt is the newest; else to the class whose automatic mask has
    it.

    Args:
        segmenter: asks the network.
        settings: how answers are made; none takes the usual ones.
        start: what a class starts from: its ``automatic`` mask, or ``nothing``.
        history: bytes that are kept to take prompts back at once. Taking back what is older computes the answers of
            the prompts before it once more, with the same masks.

    Raises:
        ValueError: when ``start`` is unknown.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        settings: AnswerSettings | None = None,
        start: str = "automatic",
        history: int = HISTORY,
    ) -> None:
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}.")
        self.segmenter = segmenter
        self.settings = settings or AnswerSettings()
        self.start = start
        self.history = history
        self.source: Any = None
        self._image: MetaTensor | None = None

    @classmethod
    def from_bundle(
        cls,
        bundle: str | Path,
        overlays: Sequence[str] = (),
        *,
        config: Mapping[str, Any] | None = None,
        settings: AnswerSettings | None = None,
        start: str = "automatic",
    ) -> InteractiveSession:
        """A session with a bundle's network and adapter.

        Args:
            bundle: folder of the bundle.
            overlays: files of its ``configs``, as ``hippocampus.yaml``.
            config: keys of the configuration to set, as ``device`` or ``amp``.
            settings: how answers are made.
            start: what a class starts from.

        Raises:
            DataError: when there is no such bundle or overlay.
            WeightsError: when the adapter is missing, damaged or another one's.
        """
        return cls(NetworkSegmenter.from_bundle(bundle, overlays, config), settings, start)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their ids."""
        return list(self.segmenter.classes)

    @property
    def image(self) -> MetaTensor:
        """The image as the network sees it (C, spatial…).

        Raises:
            DataError: when none is open.
        """
        if self._image is None:
            raise DataError("No image is open. Call open(path) first.")
        return self._image

    def open(self, source: Any) -> None:
        """Open an image; what the session held of another one is gone.

        Args:
            source: path of a photograph, of a volume, or of the folder of a DICOM series.

        Raises:
            DataError: when it can't be read; the session stays as it was.
        """
        image = self.segmenter.open(source)
        grids = Grids(image)
        automatic: Tensor | None = None
        masks = np.zeros((len(self.classes), *grids.file_shape), dtype=bool)
        if self.start == "automatic":
            automatic = self.segmenter.automatic(image)
            masks = self.segmenter.on_file(automatic, image)
        self.source, self._image, self.grids = source, image, grids
        self._automatic, self._first = automatic, masks
        self._known: dict[int, _Class] = {}
        self._count = 0

    def point(self, position: Sequence[float], label: int = 1, class_name: str | int | None = None) -> np.ndarray:
        """Click on a voxel.

        Args:
            position: (dims,), in voxels of the file.
            label: 1 where the class is there, 0 where it is not.
            class_name: name or id of the class; may be left out where there is one.

        Returns:
            The class's mask (file's spatial…), boolean.

        Raises:
            DataError: when the position lies outside, the class is unknown, or the voxel was accepted.
        """
        return self._mark("point", [position], label, class_name)

    def scribble(
        self, positions: Sequence[Sequence[float]], label: int = 1, class_name: str | int | None = None
    ) -> np.ndarray:
        """Draw with a brush.

        Args:
            positions: (N, dims): every voxel of the file that the brush touched.
            label: 1 where the class is there, 0 where it is not.
            class_name: see :meth:`point`.

        Returns:
            The class's mask.

        Raises:
            DataError: see :meth:`point`.
        """
        return self._mark("scribble", positions, label, class_name)

    def box(self, first: Sequence[float], last: Sequence[float], class_name: str | int | None = None) -> np.ndarray:
        """Draw a box around the class: nothing outside of it is of the class.

        Args:
            first: a corner (dims,), in voxels of the file.
            last: the opposite corner; both belong to the box.
            class_name: see :meth:`point`.

        Returns:
            The class's mask.

        Raises:
            DataError: when a corner lies outside, the class is unknown, or its mask was accepted.
        """
        index = self._index(class_name)
        corners = read_positions("box", [first, last], self.file_shape)
        return self._answer("box", index, np.stack([corners.min(0), corners.max(0)]))

    def lasso(
        self, corners: Sequence[Sequence[float]], label: int = 1, class_name: str | int | None = None
    ) -> np.ndarray:
        """Draw a closed line in a slice (in the image, where it has none).

        With label 1, nothing of the class is outside of the line in this slice; with label 0, nothing of it is inside.

        Args:
            corners: (N, dims) with N of 3 or more, in voxels of the file; in volumes one index is the same for all.
            label: 1 for a line around the class, 0 for one around what is not of it.
            class_name: see :meth:`point`.

        Returns:
            The class's mask.

        Raises:
            DataError: see :meth:`box`; also where the line lies in no slice.
        """
        index = self._index(class_name)
        self._check_label(label)
        lasso = make_lasso(corners, int(label), index, self.file_shape)
        return self._answer(
            "lasso", index, lasso.positions, label=lasso.label, axis=lasso.axis, slice_index=lasso.slice_index
        )

    def start_from(self, mask: Any, class_name: str | int | None = None) -> np.ndarray:
        """Start from a mask of another tool or of a file; prompts before it no longer count, until :meth:`undo`.

        Args:
            mask: (file's spatial…), foreground above 0.5.
            class_name: see :meth:`point`.

        Returns:
            The class's mask: this one, less what is accepted for other classes.

        Raises:
            DataError: when the mask is of another grid, the class is unknown, or its mask was accepted.
        """
        index = self._index(class_name)
        found = np.asarray(mask)
        if found.shape == (1, *self.file_shape):
            found = found[0]
        if found.shape != self.file_shape:
            sizes = [" x ".join(map(str, shape)) for shape in (found.shape, self.file_shape)]
            raise DataError(f"mask: its size is {sizes[0]}, that of the image {sizes[1]}. Resample it to the image.")
        return self._answer("mask", index, np.empty((0, self.grids.dims)), mask=found > 0.5)

    def accept(self, class_name: str | int | None = None) -> np.ndarray:
        """Accept the class's mask: it stays as it is, whatever is said of other classes; :meth:`undo` takes this back.

        Returns:
            The mask.

        Raises:
            DataError: when the class is unknown, or accepted already.
        """
        return self._answer("accept", self._index(class_name), np.empty((0, self.grids.dims)))

    def undo(self, class_name: str | int | None = None) -> UserPrompt:
        """Take back the newest prompt, of a class or of all.

        Returns:
            The prompt that was taken back.

        Raises:
            DataError: when there is none.
        """
        self._require_open()
        if class_name is None:
            known = [(state.steps[-1].prompt.number, index) for index, state in self._known.items() if state.steps]
            index = max(known)[1] if known else -1
        else:
            index = self._index(class_name)
        state = self._known.get(index)
        if state is None or not state.steps:
            raise DataError("undo: there is nothing to take back.")
        if not state.steps[-1].held:
            state = self._known[index] = self._again(index, state.prompts)
        step = state.steps.pop()
        state.mask = step.mask_before(state.mask)
        if step.logits is None or step.place is None:
            state.logits = step.logits
        else:
            restored = state.logits.clone() if state.logits is not None else torch.empty(0)
            restored[step.place] = step.logits
            state.logits = restored
        return step.prompt

    def reset(self, class_name: str | int | None = None) -> None:
        """Forget the prompts of a class, or of all; this can't be undone.

        Raises:
            DataError: when the class is unknown.
        """
        self._require_open()
        if class_name is None:
            self._known.clear()
        else:
            self._known.pop(self._index(class_name), None)

    def mask(self, class_name: str | int | None = None) -> np.ndarray:
        """The class's mask as it is now (file's spatial…), boolean.

        Raises:
            DataError: when the class is unknown.
        """
        index = self._index(class_name)
        if self.segmenter.exclusive:
            return self.label_map() == index + 1
        state = self._known.get(index)
        return self._first[index].copy() if state is None else state.mask.copy()

    @property
    def automatic(self) -> Tensor | None:
        """Logits (K, spatial…) without prompts on the network's grid; none where classes start from nothing."""
        self._require_open()
        return self._automatic

    def fork(self) -> InteractiveSession:
        """A second session in the same state, which goes its own way; what does not change is held once."""
        out = copy.copy(self)
        out._known = {index: replace(state, steps=list(state.steps)) for index, state in self._known.items()}
        return out

    def logits(self, class_name: str | int | None = None) -> Tensor | None:
        """Logits (spatial…) of the last answer on the network's grid, or none before the first one from nothing."""
        index = self._index(class_name)
        state = self._known.get(index)
        found = self._first_logits(index) if state is None else state.logits
        return None if found is None else found.clone()

    def prompts(self, class_name: str | int | None = None) -> list[UserPrompt]:
        """Prompts that hold, oldest first: of a class, or of all."""
        self._require_open()
        chosen = list(self._known) if class_name is None else [self._index(class_name)]
        found = [prompt for index in chosen if index in self._known for prompt in self._known[index].prompts]
        return sorted(found, key=lambda prompt: prompt.number)

    def restore(
        self, prompts: Sequence[UserPrompt], logits: Tensor, mask: np.ndarray, class_name: str | int | None = None
    ) -> None:
        """Go on where another session of the same image and network was, without answering its prompts again.

        Args:
            prompts: of the class, oldest first; what was said of it here before is forgotten.
            logits: (spatial…) of the last answer, as :meth:`logits` gave them.
            mask: (file's spatial…), boolean, as :meth:`mask` gave it.
            class_name: see :meth:`point`.

        Raises:
            DataError: when sizes differ from the image's, or there is no prompt.
        """
        index = self._index(class_name)
        if not prompts or tuple(logits.shape) != tuple(self.grids.shape) or mask.shape != self.file_shape:
            raise DataError("restore: expected prompts, and logits and a mask of the image's size.")
        said = [replace(prompt, index=index, number=self._count + k) for k, prompt in enumerate(prompts, 1)]
        steps = [_Step(prompt, None, None, None, None, held=False) for prompt in said]
        self._known[index] = _Class(logits.clone(), mask.copy(), steps)
        self._count += len(said)

    def label_map(self) -> np.ndarray:
        """All masks in one (file's spatial…), uint8: 0 background, 1 + id of a class, in the session's precedence.

        Raises:
            DataError: when no image is open, or masks of this network may overlap.
        """
        self._require_open()
        if not self.segmenter.exclusive and len(self.classes) > 1:
            raise DataError("label_map: the masks of this network may overlap; take mask(class).")
        touched = {index: state for index, state in self._known.items() if state.steps}
        out = np.zeros(self.file_shape, dtype=np.uint8)
        for index in range(len(self.classes)):
            if index not in touched:
                out[self._first[index]] = index + 1
        for index, state in sorted(touched.items(), key=lambda item: item[1].steps[-1].prompt.number):
            out[state.mask] = index + 1
        for _, index, voxels in self._foreground(touched):
            out[tuple(voxels.T)] = index + 1
        for index, state in touched.items():
            if state.accepted:
                out[out == index + 1] = 0
        for index, state in touched.items():
            if state.accepted:
                out[state.mask] = index + 1
        return out

    def apply(self, prompt: UserPrompt) -> np.ndarray:
        """Give a prompt of a log again; see the verb of its kind."""
        index = prompt.index
        if prompt.marks:
            return self._mark(prompt.kind, prompt.positions, prompt.label, index, prompt.time)
        self._index(index)
        return self._answer(
            prompt.kind, index, prompt.positions, label=prompt.label, axis=prompt.axis,
            slice_index=prompt.slice_index, mask=prompt.mask, moment=prompt.time,
        )  # fmt: skip

    def save(self, path: str | Path, class_name: str | int | None = None) -> tuple[Path, Path]:
        """Write a mask, or the label map where classes exclude each other, and the session's log beside it.

        Args:
            path: of the mask: ``.png`` for images, ``.nii.gz``, ``.nii``, ``.nrrd`` or ``.mha`` for volumes. The log
                has the same name and ``.session.json`` behind it. ``.dcm`` is a DICOM segmentation of the series that
                is open, with a segment for each class and the log in it (:mod:`medsa_nets.interaction.dicom`).
            class_name: a class; none takes the label map.

        Returns:
            Paths of mask and log.

        Raises:
            DataError: when no image is open, or the format is unknown.
            OutputError: when the files can't be written.
        """
        return save_session(self, Path(path), class_name)

    def replay(self, log: str | Path, source: Any) -> None:
        """Open an image and give all prompts of a log again: the masks are those that were saved, bit for bit.

        Args:
            log: path of the log that :meth:`save` wrote, or of a DICOM segmentation that holds one.
            source: path of the image.

        Raises:
            DataError: when the log is damaged, or belongs to another image, adapter or setting.
        """
        replay_session(self, Path(log), source)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Size of the image in voxels of its file."""
        self._require_open()
        return self.grids.file_shape

    def _require_open(self) -> None:
        _ = self.image

    def _index(self, class_name: str | int | None) -> int:
        self._require_open()
        names = [name.lower() for name in self.classes]
        if class_name is None and len(names) == 1:
            return 0
        if isinstance(class_name, str) and class_name.lower() in names:
            return names.index(class_name.lower())
        if isinstance(class_name, int) and not isinstance(class_name, bool) and 0 <= class_name < len(names):
            return class_name
        raise DataError(f"class {class_name!r} is unknown; expected one of {', '.join(self.classes)}.")

    @staticmethod
    def _check_label(label: Any) -> None:
        if label not in (0, 1):
            raise DataError(f"label: expected 1 (foreground) or 0 (background), got {label!r}.")

    def _mark(
        self, kind: str, positions: Any, label: int, class_name: str | int | None, moment: float | None = None
    ) -> np.ndarray:
        index = self._index(class_name)
        self._check_label(label)
        found = read_positions(kind, positions, self.file_shape)
        if label and self.segmenter.exclusive:
            voxels = tuple(np.rint(found).astype(int).T)
            for other, state in self._known.items():
                if other != index and state.accepted and state.mask[voxels].any():
                    raise DataError(
                        f"{kind}: it marks voxels that were accepted as {self.classes[other]}. Leave them out, or take "
                        "the acceptance back (undo)."
                    )
        return self._answer(kind, index, found, label=int(label), moment=moment)

    def _answer(
        self, kind: str, index: int, positions: np.ndarray, *, moment: float | None = None, **parts: Any
    ) -> np.ndarray:
        """Add a prompt to a class and compute its answer; what raises leaves the session as it was."""
        state = self._known.get(index)
        if state is None:
            state = _Class(self._first_logits(index), self._first[index])
        if state.accepted:
            raise DataError(
                f"{kind}: the mask of {self.classes[index]} was accepted. Take that back (undo), or reset the class."
            )
        prompt = UserPrompt(kind, index, self._count + 1, time.time() if moment is None else moment, positions, **parts)
        step, logits, mask = self._computed(state, prompt)
        state.steps.append(step)
        state.logits, state.mask = logits, mask
        self._known[index] = state
        self._count += 1
        self._bound_history([step for own in self._known.values() for step in own.steps])
        return self.mask(index)

    def _bound_history(self, steps: Sequence[_Step]) -> None:
        """Drop what the oldest of some prompts changed, but not what the newest did."""
        held = [step for step in steps if step.held]
        total = sum(step.bytes for step in held)
        for step in sorted(held, key=lambda own: own.prompt.number)[:-1]:
            if total <= self.history:
                return
            total -= step.bytes
            step.drop()

    def _again(self, index: int, prompts: Sequence[UserPrompt]) -> _Class:
        """A class after prompts that were answered before, with what they changed."""
        out = _Class(self._first_logits(index), self._first[index])
        for prompt in prompts:
            step, out.logits, out.mask = self._computed(out, prompt)
            out.steps.append(step)
            self._bound_history(out.steps)
        return out

    def _computed(self, state: _Class, prompt: UserPrompt) -> tuple[_Step, Tensor | None, np.ndarray]:
        before, logits = state.logits, state.logits
        if prompt.kind == "accept":
            mask = self.mask(prompt.index)
        elif prompt.kind == "mask":
            assert prompt.mask is not None
            logits = (2.0 * self.grids.on_tensor(prompt.mask) - 1.0) * START_LOGIT
            mask = prompt.mask.copy()
        else:
            logits = make_answer(
                self.segmenter, self.image, self.grids, prompt.index, before,
                [*self._counting(state), prompt], self.settings,
            )  # fmt: skip
            mask = self._mask_after(state, prompt, logits)
        mask_place = bounding_place(mask != state.mask)
        old_mask = None if mask_place is None else state.mask[mask_place].copy()
        if before is None:
            return _Step(prompt, None, None, mask_place, old_mask), logits, mask
        place = None if logits is None or logits is before else change(before, logits)
        place = place or tuple(slice(0, 0) for _ in self.grids.shape)
        return _Step(prompt, place, before[place].clone(), mask_place, old_mask), logits, mask

    @staticmethod
    def _counting(state: _Class) -> list[UserPrompt]:
        """Prompts of a class since the newest mask to start from."""
        prompts = state.prompts
        starts = [i for i, prompt in enumerate(prompts) if prompt.kind == "mask"]
        return prompts[starts[-1] + 1 :] if starts else prompts

    def _mask_after(self, state: _Class, prompt: UserPrompt, logits: Tensor) -> np.ndarray:
        """Mask on the file's grid: as before where no logit near it changed, then what prompts say of its voxels."""
        mask = state.mask.copy()
        changed = torch.ones(logits.shape) if state.logits is None else (state.logits != logits).float()
        place = bounding_place(changed.numpy() > 0)
        if place is not None:
            there = self.grids.file_place(place)
            values, level = (logits, 0.0) if self.segmenter.volumes else (logits.sigmoid(), 0.5)
            new = self.grids.above(values, level, there)
            if state.logits is None or bool(changed.all()):
                mask[there] = new
            else:
                near = (self.grids.on_file(changed, there) > FACE).numpy()
                mask[there] = np.where(near, new, mask[there])
        for said in [*self._counting(state), prompt]:
            said.enforce(mask)
        return mask

    def _first_logits(self, index: int) -> Tensor | None:
        """Logits that a class starts from: positive where its automatic mask is."""
        if self._automatic is None:
            return None
        own = self._automatic[index]
        if not self.segmenter.exclusive or len(self._automatic) == 1:
            return own
        others = torch.cat([self._automatic[:index], self._automatic[index + 1 :]]).amax(0)
        return own - others.clamp_min(0.0)

    def _foreground(self, touched: Mapping[int, _Class]) -> list[tuple[int, int, np.ndarray]]:
        """Voxels that classes were marked on as foreground and hold: number, class and voxels, oldest first."""
        out = []
        for index, state in touched.items():
            for prompt in self._counting(state):
                if prompt.marks and prompt.label:
                    voxels = prompt.voxels()
                    out.append((prompt.number, index, voxels[state.mask[tuple(voxels.T)]]))
        return sorted(out, key=lambda item: item[:2])
