"""A client's work: an image, the object that is being segmented, those that are finished, and what the client shows."""

from __future__ import annotations

import base64
import logging
import math
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from medsa_nets.errors import MedSAError
from medsa_nets.interaction.answers import AGREEMENT, AnswerSettings
from medsa_nets.interaction.grids import Place, bounding_place
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.prompts.user import UserPrompt, make_lasso, prompt_from_json, prompt_to_json
from medsa_nets.server.errors import RequestError
from medsa_nets.server.logs import SessionLog, hash_said
from medsa_nets.server.outlines import areas_of, corners_of
from medsa_nets.server.studies import FOREGROUND, ObjectSegmenter, StoppedError, Study

logger = logging.getLogger(__name__)
MAX_INTERACTIONS = 10_000  # with one object
MAX_MARKED = 250_000  # voxels of a scribble
MAX_CORNERS = 2_000  # of a drawn line
MAX_AREAS = 8  # drawn at once, and slices of a box that excludes: each is a prompt, and every answer minds all of them
PATIENT = 5.0  # seconds from which on a wait is one for the whole answer
LONGEST = 45.0  # seconds that a client is let wait; usual ones give up after 60


@dataclass(frozen=True)
class Answer:
    """What changed for a client.

    Attributes:
        ran: whether there is an answer, or something was taken back.
        place: box of the client's (X, Y, Z) in which its mask changed, or none.
        values: new mask (box), uint8.
        complete: whether nothing more follows from what the user said; else the next answer, or one without a new
            prompt, brings the rest.
        class_name: class of the object, or empty.
    """

    ran: bool = False
    place: Place | None = None
    values: np.ndarray | None = None
    complete: bool = True
    class_name: str = ""


class Part:
    """A mask, packed: a finished object."""

    def __init__(self, mask: np.ndarray) -> None:
        self.place = bounding_place(mask)
        self.shape = () if self.place is None else mask[self.place].shape
        bits = np.empty(0, np.uint8) if self.place is None else np.packbits(mask[self.place])
        self.packed = zlib.compress(bits.tobytes(), 1)

    def to_json(self) -> dict[str, Any]:
        """The object as it stands in a log."""
        place = None if self.place is None else [[own.start, own.stop] for own in self.place]
        return {"place": place, "bits": base64.b64encode(self.packed).decode("ascii")}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], shape: Sequence[int]) -> Part:
        """Read an object of an image of a shape back.

        Raises:
            ValueError: when it has another form.
        """
        out = cls(np.zeros((0,) * len(shape), dtype=bool))
        if entry["place"] is None:
            return out
        ends = [(int(a), int(b)) for a, b in entry["place"]]
        if len(ends) != len(shape) or not all(0 <= a < b <= n for (a, b), n in zip(ends, shape)):
            raise ValueError("an object lies outside the image")
        out.place, out.shape = tuple(slice(a, b) for a, b in ends), tuple(b - a for a, b in ends)
        count = -(-math.prod(out.shape) // 8)
        out.packed = base64.b64decode(entry["bits"])
        if len(zlib.decompressobj().decompress(out.packed, count + 1)) != count:
            raise ValueError("an object has another size")
        return out

    def add_to(self, mask: np.ndarray) -> None:
        """Set its voxels."""
        if self.place is not None:
            mask[self.place] |= self._own()

    def agrees(self, mask: np.ndarray) -> bool:
        """Whether it is more or less the same as another mask."""
        if self.place is None:
            return False
        own = self._own()
        return 2.0 * int((own & mask[self.place]).sum()) >= AGREEMENT * (int(own.sum()) + int(mask.sum()))

    def _own(self) -> np.ndarray:
        bits = np.frombuffer(zlib.decompress(self.packed), np.uint8)
        return np.unpackbits(bits, count=int(np.prod(self.shape))).reshape(self.shape).astype(bool)


class SegmentedObject:
    """One object of an image: a session of its own, whose answers are computed in the background.

    Args:
        study: the image.
        index: id of the class; none for a foreground without one.
        settings: how answers are made.
        executor: runs what is computed.
        history: bytes that are kept to take back at once what was said.
        log: keeps an answer now and then, or none.
    """

    def __init__(
        self,
        study: Study,
        index: int | None,
        settings: AnswerSettings | None,
        executor: Executor,
        history: int,
        log: SessionLog | None = None,
    ) -> None:
        self.study = study
        self.index = index
        self.decided = True  # whether what was said showed the class
        self.settings = settings or AnswerSettings()
        self.executor = executor
        self.log = log
        self.session = InteractiveSession(ObjectSegmenter(study, index), self.settings, "nothing", history)
        self.session.open(None)
        self.interactions: list[int] = []  # prompts of each
        self._todo: deque[UserPrompt] = deque()  # not in the session yet; the first one is being answered
        self._lock = threading.Lock()
        self._running: Future[None] | None = None
        self._stopped = False
        self._failure: Exception | None = None
        self._preview = self._look_ahead()  # goes ahead of the session, by what the nearest slab shows
        self._ahead: list[UserPrompt] = []  # prompts that the session may lack
        self._shown = 0  # of these, in the preview

    @property
    def class_name(self) -> str:
        """Name of the class."""
        return self.session.classes[0]

    def add(self, prompts: Sequence[UserPrompt]) -> None:
        """Say something; :meth:`mask` answers."""
        self._follow()
        self.interactions.append(len(prompts))
        with self._lock:
            self._todo.extend(prompts)
        self._ahead.extend(prompts)

    def restore(self, groups: Sequence[Sequence[UserPrompt]], known: tuple[int, Tensor, np.ndarray]) -> None:
        """Go on where an earlier session was.

        Args:
            groups: all that was said, oldest first.
            known: how many of these prompts have an answer, its logits and its mask.
        """
        said = [prompt for own in groups for prompt in own]
        count, logits, mask = known
        self.session.restore(said[:count], logits, mask)
        self.interactions = [len(own) for own in groups]
        self._preview, self._ahead, self._shown = self._look_ahead(), said[count:], 0
        self._todo.extend(said[count:])

    def said(self) -> list[UserPrompt]:
        """All prompts, oldest first."""
        with self._lock:
            return [*self.session.prompts(), *self._todo]

    def undo(self) -> bool:
        """Take back what was said last; false where there is nothing."""
        if not self.interactions:
            return False
        self._follow()
        for _ in range(self.interactions.pop()):
            if self._ahead:
                prompt = self._ahead.pop()
                if self._shown > len(self._ahead):
                    self._preview.undo()
                    self._shown -= 1
                with self._lock:
                    waits = bool(self._todo) and self._todo[-1] is prompt
                    if waits:
                        self._todo.pop()
                if waits:
                    continue
            self._wait(LONGEST)
            self.session.undo()
        self.decided = any(prompt.label for prompt in self.said())
        return True

    def mask(self, patience: float) -> tuple[np.ndarray, bool]:
        """The mask (file's spatial…) as it is now, and whether it is complete.

        Args:
            patience: seconds to wait for a complete one. After that, and at once where slabs are not encoded yet, what
                the nearest slab shows.
        """
        if self.study.encoded or patience >= PATIENT or not self._todo:
            self._run()
            if self._follow(patience):
                return self.session.mask(0), True
        for prompt in self._ahead[self._shown :]:
            self._preview.apply(prompt)
            self._shown += 1
        self._run()
        return self._preview.mask(0), not self._ahead

    def stop(self) -> None:
        """Stop computing; to be called once, at the end. What is being computed ends by itself, and is not kept."""
        self._stopped = True

    def wait(self) -> None:
        """Wait until nothing is being computed any more."""
        self._wait(LONGEST)

    def _follow(self, patience: float = 0.0) -> bool:
        """Whether the session holds all that was said; the preview then begins with what it shows.

        Raises:
            RequestError: when what was said could not be answered; it is forgotten then.
        """
        idle = self._wait(patience)
        failure, self._failure = self._failure, None
        if failure is not None:
            held = len(self.session.prompts())
            self._todo.clear()
            while sum(self.interactions) > held:
                self.interactions.pop()
            for _ in range(held - sum(self.interactions)):
                self.session.undo()
        if not idle or self._todo:
            return False
        if self._ahead or failure is not None:
            self._preview = self._look_ahead()
            self._ahead, self._shown = [], 0
        if failure is not None:
            raise RequestError(str(failure)) if isinstance(failure, MedSAError) else failure
        return True

    def _look_ahead(self) -> InteractiveSession:
        out = self.session.fork()
        out.segmenter = ObjectSegmenter(self.study, self.index, near=True)
        out.settings = replace(self.settings, network="first")
        return out

    def _run(self) -> None:
        with self._lock:
            if self._todo and self._running is None and self._failure is None:
                self._running = self.executor.submit(self._work)

    def _wait(self, patience: float) -> bool:
        """Whether nothing is being computed any more."""
        running = self._running
        if running is not None:
            try:
                running.result(timeout=patience)
            except futures.TimeoutError:
                return False
        return True

    def _work(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._todo or self._stopped:
                        self._running = None
                        return
                    prompt = self._todo[0]
                self._answer(prompt)
        except Exception as error:
            with self._lock:
                self._failure = None if isinstance(error, StoppedError) else error
                self._running = None

    def _answer(self, prompt: UserPrompt) -> None:
        def wanted() -> bool:
            return not self._stopped and bool(self._todo) and self._todo[0] is prompt

        self.study.stopping.wanted = wanted
        try:
            self.session.apply(prompt)
        except StoppedError:
            if self.study.closed:
                raise
            return
        finally:
            del self.study.stopping.wanted
        with self._lock:
            if wanted():
                self._todo.popleft()
            else:  # taken back in the meantime
                self.session.undo()
            answered = not self._todo
        if answered and self.log is not None and self.log.wants_answer:
            self._keep_answer(self.log)

    def _keep_answer(self, log: SessionLog) -> None:
        prompts, logits = self.session.prompts(), self.session.logits()
        if prompts and logits is not None:
            about = hash_said(self.index, [_entry(prompt) for prompt in prompts])
            log.write_answer(about, len(prompts), logits, self.session.mask())


class Work:
    """What a client does, one request after the other.

    Args:
        open_study: makes a study of an array and its properties.
        executor: computes answers.
        settings: how they are made.
        patience: seconds after which a first answer comes from the clicked slab alone.
        memory: most bytes of what was said of an object, and as many to take it back at once.
    """

    def __init__(
        self,
        open_study: Callable[..., Study],
        executor: Executor,
        settings: AnswerSettings | None = None,
        patience: float = 1.0,
        memory: int = 2**28,
    ) -> None:
        self.open_study = open_study
        self.executor = executor
        self.settings = settings
        self.patience = patience
        self.memory = memory
        self._log: SessionLog | None = None
        self._opening: Future[Study] | None = None
        self._shape: tuple[int, ...] = ()
        self._class_name = ""
        self._forget()

    def _forget(self) -> None:
        self._object: SegmentedObject | None = None
        self._left: SegmentedObject | None = None  # the object before, which may still be computing
        self._finished: list[Part] = []
        self._given_up: Part | None = None
        self._taken: np.ndarray | None = None  # voxels of finished objects
        self._shown: np.ndarray | None = None  # what the client shows, on the file's grid
        self._queued: list[tuple[str, list[UserPrompt], np.ndarray | None]] = []
        self._saved: Mapping[str, Any] | None = None  # of an earlier client on this image; not gone on with yet

    def finish(self) -> None:
        """The client has ended its work by itself: nothing of it is kept."""
        log, self._log = self._log, None
        if log is not None:
            log.close(done=True)

    def close(self) -> None:
        """Stop everything; may be called while a request is answered."""
        log, self._log = self._log, None
        if log is not None:
            log.close()
        opening, self._opening = self._opening, None
        if opening is not None and not opening.cancel():
            opening.add_done_callback(_close_study)

    def set_image(
        self, array: np.ndarray, properties: Any, class_name: str, log: SessionLog | None = None
    ) -> tuple[int, ...]:
        """Open an image; it is read and encoded in the background.

        Args:
            array: (C, X, Y, Z).
            properties: of it.
            class_name: that the client named, or empty.
            log: where the session is kept, and gone on with where it holds one already.

        Returns:
            Its shape (C, X, Y, Z).
        """
        shape = tuple(int(n) for n in array.shape)
        self.close()
        self._forget()
        self._shape, self._class_name = shape[1:], class_name
        self._log = log
        self._saved = None if log is None else log.saved
        self._opening = self.executor.submit(self.open_study, array, properties)
        return shape

    def set_target_buffer(self, shape: Sequence[int], class_name: str | None = None) -> None:
        """The client has a new, empty mask: the object that it showed, if any, is finished, and another one begins.

        Args:
            shape: of the mask.
            class_name: of this and later objects, or empty to choose by the first click; none leaves it as it was.

        Raises:
            RequestError: when no image is open, or it has another size.
        """
        self._require_image()
        if tuple(shape) != self._shape:
            raise RequestError(
                f"target buffer: its shape is {list(shape)}, that of the image {list(self._shape)}. Make one like it."
            )
        if class_name is not None:
            self._class_name = class_name
        if self._saved is not None:
            return  # what an earlier client left comes with the next answer
        part = self._given_up
        if self._object is not None and self._shown is not None:
            part = Part(self._shown)
        self._begin()
        if part is not None and part.place is not None:
            self._finished.append(part)
            self._taken = None
        self._given_up = None
        self._keep()

    def reset(self) -> None:
        """Give the object up, and begin another one.

        Raises:
            RequestError: when no image is open.
        """
        self._require_image()
        self._resume()
        if self._object is not None and self._shown is not None:
            self._given_up = Part(self._shown)  # or finished, where a new target buffer follows at once
        self._begin()
        self._keep()

    def _begin(self) -> None:
        if self._object is not None:
            if self._left is not None:
                self._left.wait()  # one that still computes, and no more of them
            self._object.stop()
            self._left = self._object
        self._object, self._shown, self._queued = None, None, []

    def add(self, kind: str, runs: bool, **given: Any) -> Answer:
        """Something that the user says of the object.

        Args:
            kind: ``point``, ``box``, ``scribble``, ``lasso`` or ``mask``.
            runs: whether it is answered; else it waits for the next one that is, or for :meth:`predict`.
            given: of that kind, see the methods that read it.

        Raises:
            RequestError: when no image is open, or what was said can't be used; nothing changes then.
        """
        study = self._study()
        self._resume()
        mask: np.ndarray | None = None
        if kind == "mask":
            mask = self._read_mask(study, given["mask"], None)
            prompts = [_prompt("mask", np.empty((0, study.grids.dims)), mask=mask)]
        else:
            prompts = getattr(self, f"_read_{kind}")(study, **given)
        count = len(self._queued) + (0 if self._object is None else len(self._object.interactions))
        if count >= MAX_INTERACTIONS:
            raise RequestError(f"There are {MAX_INTERACTIONS} interactions already. Begin another object.", 409)
        said = [] if self._object is None else self._object.said()
        if sum(map(_bytes, [*said, *(prompt for _, own, _ in self._queued for prompt in own), *prompts])) > self.memory:
            raise RequestError(
                f"What was said of this object takes more than the {self.memory >> 20} MiB that the server has for a "
                "client. Begin another object.",
                413,
            )
        self._check_taken(study, prompts)
        if mask is not None:  # clients show it at once
            self._reopen(mask)
            self._shown = mask.copy()
        self._given_up = None
        self._queued.append((kind, prompts, mask))
        self._keep()
        if not runs and mask is None:
            return Answer()
        return self._answer(study)

    def predict(self) -> Answer:
        """Answer what waits, or bring what an answer left out."""
        study = self._study()
        self._resume()
        if self._object is None and not self._queued:
            return Answer()
        return self._answer(study, patience=self.patience if self._queued else LONGEST)

    def undo(self) -> Answer:
        """Take back what was said last."""
        study = self._study()
        self._resume()
        if self._queued:
            self._queued.pop()
            self._keep()
            return self._difference(study, self._current(), True) if self._object is not None else Answer(ran=True)
        if self._object is None or not self._object.undo():
            return Answer()
        self._keep()
        mask, complete = self._object.mask(0.0 if self.patience < PATIENT else self.patience)
        return self._difference(study, mask, complete)

    def _keep(self) -> None:
        """Write the log, before what it says is answered."""
        if self._log is None:
            return
        known = self._object
        counts = ([] if known is None else list(known.interactions)) + [len(said) for _, said, _ in self._queued]
        prompts = ([] if known is None else known.said()) + [prompt for _, said, _ in self._queued for prompt in said]
        entries = [_entry(prompt) for prompt in prompts]
        self._log.write(
            {
                "class": None if known is None else known.index,
                "decided": known is not None and known.decided,
                "answered": None if known is None else len(known.interactions),
                "interactions": counts,
                "prompts": entries,
                "finished": [part.to_json() for part in self._finished],
                "given_up": None if self._given_up is None else self._given_up.to_json(),
            }
        )

    def _resume(self) -> None:
        """Go on with what an earlier client said of this image, where there is a log of it."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        study = self._study()
        shape = study.grids.file_shape
        try:
            finished = [Part.from_json(entry, shape) for entry in saved["finished"]]
            given_up = None if saved["given_up"] is None else Part.from_json(saved["given_up"], shape)
            said = deque(prompt_from_json(entry, [FOREGROUND], shape) for entry in saved["prompts"])
            counts, index, decided = [int(n) for n in saved["interactions"]], saved["class"], bool(saved["decided"])
            if sum(counts) != len(said) or min(counts, default=1) < 1 or len(counts) > MAX_INTERACTIONS:
                raise ValueError("interactions and prompts do not agree")
            answered = len(counts) if decided else saved.get("answered")
            if answered is not None and answered not in range(len(counts) + 1):
                raise ValueError("more is answered than was said")
            if index is not None and index not in range(len(study.segmenter.classes)):
                raise ValueError("its class is unknown")
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            logger.warning("a session's log can't be gone on with: %s: %s", type(error).__name__, error)
            return
        self._finished, self._given_up, self._taken = finished, given_up, None
        if not counts:
            return
        groups = [[said.popleft() for _ in range(count)] for count in counts]
        # the first thing said that shows the class chooses it, as it would have
        self._queued = [(own[0].kind, own, own[0].mask) for own in groups[answered or 0 :]]
        if answered is None:
            return
        self._object = SegmentedObject(study, index, self.settings, self.executor, self.memory, self._log)
        self._object.decided = decided
        entries = saved["prompts"][: sum(counts[:answered])]
        known = None if self._log is None else self._log.read_answer(index, entries, shape)
        if known is not None and tuple(known[1].shape) == tuple(study.grids.shape):
            self._object.restore(groups[:answered], known)
            return
        for own in groups[:answered]:
            self._object.add(own)

    def _current(self) -> np.ndarray:
        assert self._object is not None
        return self._object.mask(self.patience)[0]

    def _answer(self, study: Study, patience: float | None = None) -> Answer:
        queued, self._queued = self._queued, []
        if queued:
            first = next((prompts for _, prompts, _ in queued if prompts[0].label), None)
            self._object = self._choose_object(study, first)
            for _, prompts, _ in queued:
                self._object.add(prompts)
            position = _middle(queued[-1][1][-1])
            if position is not None:
                study.look_at(position)
        assert self._object is not None
        mask, complete = self._object.mask(self.patience if patience is None else patience)
        return self._difference(study, mask, complete)

    def _choose_object(self, study: Study, first: Sequence[UserPrompt] | None) -> SegmentedObject:
        """The object, of the class that the first thing said of it shows."""
        known = self._object
        if known is not None and (known.decided or first is None):
            return known
        names = [name.lower() for name in study.segmenter.classes]
        index: int | None = None
        if self._class_name:
            index = names.index(self._class_name) if self._class_name != FOREGROUND else None
        elif first is not None:
            position = _middle(first[0])
            index = None if position is None else self._class_at(study, position)
        decided = bool(self._class_name) or first is not None
        if known is not None and known.index == index:
            known.decided = decided
            return known
        out = SegmentedObject(study, index, self.settings, self.executor, self.memory, self._log)
        out.decided = decided
        if known is not None:  # what was said before what showed the class
            known.stop()
            known.wait()
            said = deque(known.said())
            for count in known.interactions:
                out.add([said.popleft() for _ in range(count)])
        return out

    @staticmethod
    def _class_at(study: Study, position: np.ndarray) -> int | None:
        study.look_at(position)
        logits = study.automatic_logits(position)
        best = int(logits.argmax())
        return best if logits[best] > 0 else None

    def _difference(self, study: Study, mask: np.ndarray, complete: bool) -> Answer:
        """What a client has to change to show a mask, less what is finished."""
        assert self._object is not None
        if self._finished:
            mask = mask & ~self._taken_voxels(study)
        if self._shown is None:
            self._shown = np.zeros(mask.shape, dtype=bool)
        place = bounding_place(mask != self._shown)
        name = self._object.class_name
        if place is None:
            return Answer(ran=True, complete=complete, class_name=name)
        values = mask[place]
        self._shown[place] = values
        out = study.mask_to_client(values).astype(np.uint8)
        box = list(place)
        if study.slice_axis is not None:
            box = box[::-1] if study.slice_axis == 0 else box
            box.insert(study.slice_axis, slice(0, 1))
        return Answer(True, tuple(box), out, complete, name)

    def _taken_voxels(self, study: Study) -> np.ndarray:
        if self._taken is None:
            self._taken = np.zeros(study.grids.file_shape, dtype=bool)
            for part in self._finished:
                part.add_to(self._taken)
        return self._taken

    def _check_taken(self, study: Study, prompts: Sequence[UserPrompt]) -> None:
        if not self._finished:
            return
        taken = self._taken_voxels(study)
        for prompt in prompts:
            if prompt.marks and prompt.label and taken[tuple(prompt.voxels().T)].any():
                raise RequestError(
                    "It marks voxels of a finished object, which stays as it is. Leave them out, or go on with that "
                    "object from its mask (initial segmentation).",
                    409,
                )

    def _reopen(self, mask: np.ndarray) -> None:
        """Go on with the finished object that a mask shows, where there is one."""
        kept = [part for part in self._finished if not part.agrees(mask)]
        if len(kept) < len(self._finished):
            self._finished, self._taken = kept, None

    def _require_image(self) -> None:
        if self._opening is None:
            raise RequestError("No image is open. Set one first.", 409)

    def _study(self) -> Study:
        self._require_image()
        assert self._opening is not None
        return self._opening.result()

    def _read_point(self, study: Study, position: Any, label: int) -> list[UserPrompt]:
        place = self._positions([position], "coordinates")
        return [_prompt("point", study.to_file(place), label)]

    def _read_scribble(self, study: Study, mask: np.ndarray, box: Any, label: int) -> list[UserPrompt]:
        drawn = self._read_mask(study, mask, box)
        if int(np.count_nonzero(drawn)) > MAX_MARKED:
            raise RequestError(
                f"scribble: it marks more than {MAX_MARKED} voxels. Draw less at once, or give a mask to start from "
                "(initial segmentation).",
                413,
            )
        voxels = np.argwhere(drawn)
        if not len(voxels):
            raise RequestError("scribble: nothing is drawn.")
        return [_prompt("scribble", voxels.astype(np.float64), label)]

    def _read_lasso(self, study: Study, mask: np.ndarray, box: Any, label: int) -> list[UserPrompt]:
        drawn = self._read_mask(study, mask, box)
        place = bounding_place(drawn)
        if place is None:
            raise RequestError("lasso: nothing is drawn.")
        if drawn.ndim == 2:
            planes: list[tuple[int | None, int]] = [(None, 0)]
        else:
            extents = [s.stop - s.start for s in place]
            axis = int(np.argmin(extents))
            planes = [(axis, z) for z in range(place[axis].start, place[axis].stop)]
        if len(planes) > 1:
            raise RequestError("lasso: expected a closed line in one slice.")
        ((plane_axis, z),) = planes
        areas = areas_of(drawn if plane_axis is None else drawn.take(z, plane_axis))
        if len(areas) > (1 if label else MAX_AREAS):
            raise RequestError("lasso: expected one closed line; something else is drawn beside it.")
        lines = [corners_of(area) for area in areas]
        if sum(map(len, lines)) > MAX_CORNERS:
            raise RequestError(f"lasso: the line turns more than {MAX_CORNERS} times.", 413)
        return [self._lasso(corners, plane_axis, z, label, study.grids.file_shape) for corners in lines]

    @staticmethod
    def _lasso(corners: np.ndarray, axis: int | None, z: int, label: int, shape: tuple[int, ...]) -> UserPrompt:
        line = corners if axis is None else np.insert(corners, axis, z, axis=1)
        out = make_lasso(line, label, 0, shape)
        # a line that is flat along two axes would be taken as one of another slice
        return out if axis is None else replace(out, axis=axis, slice_index=z)

    def _read_box(self, study: Study, box: Any, label: int) -> list[UserPrompt]:
        low, high = self._box(box).T
        corners = study.to_file(np.stack([low, high - 1]).astype(np.float64))
        first, last = corners.min(0), corners.max(0)
        flat = [axis for axis in range(len(first)) if first[axis] == last[axis]]
        if label and not (flat and len(first) == 3):
            return [_prompt("box", np.stack([first, last]))]
        if len(first) == 2:
            return [make_lasso(_rectangle(first, last), label, 0, study.grids.file_shape)]
        axis = flat[-1] if flat else int(np.argmin(last - first))
        plane = [a for a in range(3) if a != axis]
        corners = _rectangle(first[plane], last[plane])
        slices = range(int(first[axis]), int(last[axis]) + 1)
        if len(slices) > MAX_AREAS:
            raise RequestError(f"bbox: one that excludes may have {MAX_AREAS} slices at most.", 413)
        return [self._lasso(corners, axis, z, label, study.grids.file_shape) for z in slices]

    def _read_mask(self, study: Study, mask: np.ndarray, box: Any) -> np.ndarray:
        """A drawn mask on the image's grid, boolean; ``box`` says where a crop lies."""
        if mask.ndim == 4 and mask.shape[0] == 1:
            mask = mask[0]
        drawn = np.not_equal(mask, 0)
        if box is not None:
            ends = self._box(box)
            if tuple(ends[:, 1] - ends[:, 0]) != drawn.shape:
                raise RequestError(f"interaction_bbox: it does not have the drawing's size, {list(drawn.shape)}.")
            whole = np.zeros(self._shape, dtype=bool)
            whole[tuple(slice(a, b) for a, b in ends)] = drawn
            drawn = whole
        if drawn.shape != self._shape:
            raise RequestError(
                f"mask: its shape is {list(drawn.shape)}, that of the image {list(self._shape)}; send it whole, or "
                "where it lies (interaction_bbox)."
            )
        return np.ascontiguousarray(study.mask_to_file(drawn))

    def _positions(self, positions: Any, what: str) -> np.ndarray:
        """Positions (N, 3) within the image.

        Raises:
            RequestError: when they are something else.
        """
        try:
            found = np.asarray(positions, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            found = np.empty(0)
        if found.ndim != 2 or found.shape[1] != 3 or not np.isfinite(found).all():
            raise RequestError(f"{what}: expected three voxel indices.")
        if ((found < 0) | (np.rint(found) > np.array(self._shape) - 1)).any():
            raise RequestError(f"{what}: they lie outside the image, which is {list(self._shape)}.")
        return found

    def _box(self, box: Any) -> np.ndarray:
        """First and last + 1 voxel (3, 2), int, cut to the image.

        Raises:
            RequestError: when it is something else, or lies outside.
        """
        try:
            found = np.asarray(box, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            found = np.empty(0)
        if found.shape != (3, 2) or not np.isfinite(found).all() or np.abs(found).max() > 1e9:
            raise RequestError("bbox: expected [first, last + 1] along each of three axes.")
        ends = np.clip(np.rint(found).astype(np.int64), 0, np.array(self._shape)[:, None])
        if (ends[:, 1] <= ends[:, 0]).any():
            raise RequestError(f"bbox: it is empty, or lies outside the image, which is {list(self._shape)}.")
        return ends


def _rectangle(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    return np.array([first, [first[0], last[1]], last, [last[0], first[1]]], dtype=np.float64)


def _prompt(kind: str, positions: np.ndarray, label: int = 1, mask: np.ndarray | None = None) -> UserPrompt:
    return UserPrompt(kind, 0, 0, time.time(), np.asarray(positions, dtype=np.float64), label=label, mask=mask)


def _entry(prompt: UserPrompt) -> dict[str, Any]:
    """A prompt as it stands in a log."""
    out = prompt_to_json(prompt, [FOREGROUND], prompt.positions)
    out.pop("world", None)
    return out


def _bytes(prompt: UserPrompt) -> int:
    """Memory that a prompt takes."""
    return prompt.positions.nbytes + (0 if prompt.mask is None else prompt.mask.nbytes)


def _middle(prompt: UserPrompt) -> np.ndarray | None:
    """A position that a prompt speaks of: the middle one of a scribble, of a mask the voxel nearest to its centre."""
    if prompt.kind == "mask":
        assert prompt.mask is not None
        voxels = np.argwhere(prompt.mask).astype(np.float64)
        return voxels[((voxels - voxels.mean(0)) ** 2).sum(1).argmin()] if len(voxels) else None
    if prompt.kind in ("box", "lasso"):
        middle: np.ndarray = (prompt.positions.min(0) + prompt.positions.max(0)) / 2.0
        return middle
    found: np.ndarray = prompt.positions[len(prompt.positions) // 2]
    return found


def _close_study(opening: Future[Study]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
