"""Sessions behind a bundle's evaluator: what MONAI Label's requests and files of prompts are answered by."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch
from monai.inferers import Inferer
from torch import Tensor

from medsa_nets.backends import backend_of
from medsa_nets.checksums import tensor_sha256
from medsa_nets.inferers import PromptInferer, VolumeInferer, adapter_key
from medsa_nets.inferers.queues import shared_queue
from medsa_nets.interaction.ahead import VolumeAhead, own_adapter
from medsa_nets.interaction.answers import AnswerSettings
from medsa_nets.interaction.grids import Grids
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.networks import MedSA, VolumeMedSA
from medsa_nets.prompts import Prompts, UserPrompt, user_prompts_of_batch
from medsa_nets.runtime import unwrap
from medsa_nets.transforms.volumes import ABSENT

logger = logging.getLogger(__name__)
SESSIONS = 8  # that a process keeps
VOLUMES = 2  # that are encoded ahead of their answers at a time


class SessionInferer(Inferer):
    """Answers what a user says of images as sessions do, and leaves images without such prompts to another inferer.

    What travels with an image (:func:`~medsa_nets.prompts.with_user_prompts`) is given to a session of that image, one
    prompt after the other: each answer is made from the one before it, clicks are obeyed, and a class that is known
    starts from its automatic mask. The answer depends on the prompts and their order alone. Sessions are kept: a
    request that goes on from an earlier one costs one answer, and one that takes its newest prompts back costs none.

    A request lists the clicks of each kind in their order, but not in which order kinds followed each other. They are
    taken in the order in which requests brought them; in the listed order where no kept session holds the beginning.
    Scribbles may come as one drawing that grows: what it has beyond the scribbles of a kept session is a new scribble.

    With ``patience``, the first answers on a volume that was not encoded yet show what the slab around the newest click
    shows, and nothing of other classes, while the rest is encoded in the background; the next request afterwards gets
    the answer to all that was said, the same as if all had been encoded from the start.

    Args:
        inferer: the bundle's, for images without prompts, and behind the sessions.
        classes: names of the classes, in the order of their ids.
        others: what the classes hold that were not asked for: ``absent`` (nothing), or ``automatic``.
        settings: how answers are made; none takes the usual ones.
        patience: seconds that an answer may wait until all slabs of its volume are encoded; none lets it wait. Heeded
            where the inner inferer has a cache that the volume's embeddings fit in, and the encoder no other back end.

    Raises:
        ValueError: when ``others`` has another value, or ``patience`` is negative.
    """

    def __init__(
        self,
        inferer: PromptInferer | VolumeInferer,
        classes: Sequence[str],
        others: str = "absent",
        settings: AnswerSettings | None = None,
        patience: float | None = None,
    ) -> None:
        super().__init__()
        if patience is not None and not patience >= 0:
            raise ValueError(f"patience must be a number of seconds, 0 or more, or none, got {patience!r}.")
        if others not in ("absent", "automatic"):
            raise ValueError(f"others must be absent or automatic, got {others!r}.")
        self.inferer = inferer
        self.classes = list(classes)
        self.others = others
        self.settings = settings
        self.patience = patience
        self._sessions: list[tuple[str, InteractiveSession]] = []  # the newest last
        self._volumes: dict[str, VolumeAhead] = {}  # the newest last
        self._near: list[tuple[str, InteractiveSession]] = []  # sessions on these
        self._brought: deque[tuple[str, list[UserPrompt]]] = deque(maxlen=SESSIONS)  # what was said on earlier ones
        self._own: tuple[str, VolumeMedSA] | None = None  # key of an adapter, and a network that keeps it
        self._lock = threading.Lock()

    @property
    def cache(self) -> Any:
        """The inner inferer's cache of embeddings."""
        return self.inferer.cache

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        prompts: Prompts | Sequence[Prompts] | None = None,
    ) -> Tensor:
        """Segment images.

        Args:
            inputs: (B, C, spatial…) with intensities in [0, 1].
            network: a :class:`~medsa_nets.networks.MedSA`, or a wrapper of it. Exports of it have no sessions: the
                inner inferer answers them, at once and by points and boxes alone.
            args: not used; MONAI's engines pass it.
            prompts: given to the inner inferer in place of what travels with the images.

        Returns:
            Mask logits (B, K, spatial…), single precision, of every class.
        """
        said = user_prompts_of_batch(inputs)
        medsa = unwrap(network)
        if prompts is not None or not any(said) or not isinstance(medsa, MedSA) or medsa.training:
            return self.inferer(inputs, network, *args, prompts=prompts)
        answers = []
        for index, (image, own) in enumerate(zip(_images(inputs), said)):
            if own:
                with self._lock:
                    answers.append(self._answer(medsa, image, own)[None].to(inputs.device))
            else:
                answers.append(self.inferer(inputs[index : index + 1], network, *args))
        return torch.cat(answers)

    def _answer(self, network: MedSA, image: MetaTensor, prompts: Sequence[UserPrompt]) -> Tensor:
        session = self._session(network, image, prompts)
        if not session.segmenter.exclusive:
            asked = {prompt.index for prompt in session.prompts()}
            masks = [session.logits(index) for index in range(len(self.classes))]
            if self.others == "absent":
                masks = [mask if index in asked or len(masks) == 1 else None for index, mask in enumerate(masks)]
            elif session.automatic is not None:
                masks = [session.automatic[index] if mask is None else mask for index, mask in enumerate(masks)]
            return torch.stack([torch.full(image.shape[1:], ABSENT) if mask is None else mask for mask in masks])
        automatic = session.automatic if self.others == "automatic" else None
        shape = (len(self.classes), *image.shape[1:])
        out = torch.full(shape, ABSENT) if automatic is None else automatic.clone()
        newest = {prompt.index: prompt.number for prompt in session.prompts()}
        for index in newest:
            out[index] = ABSENT
        for index in sorted(newest, key=lambda k: newest[k]):
            own = session.logits(index)
            if own is not None:  # of classes that overlap, the one that was asked for last
                out[index] = torch.where(own > 0, own + out.amax(0).clamp_min(0.0), own)
        return out

    def _session(self, network: MedSA, image: MetaTensor, prompts: Sequence[UserPrompt]) -> InteractiveSession:
        """A session of the image in which exactly these prompts hold; kept for the next request."""
        place = " ".join(str(float(value)) for value in image.affine.flatten())
        key = f"{tensor_sha256(image.as_tensor())} {place} {adapter_key(network)}"
        volume = self._unseen(key, network, image)
        if volume is not None:
            start = time.monotonic()
            near, self._near = _going_on(self._near, key, prompts, volume.near_session)
            newest = near.prompts()[-1]
            volume.say(near.prompts(), float(Grids(image).positions(newest.positions).mean(0)[2]))
            whole = volume.whole(self.patience - (time.monotonic() - start)) if self.patience is not None else None
            if whole is None and volume.failure is None:
                logger.info("the answer shows the slab around the newest click: %s", volume.progress())
                return near
            self._close(key)
            if whole is not None:
                self._sessions.append((key, whole))
        earlier = [(said, _divided(said, prompts)) for kept, said in self._brought if kept == key]
        brought, wanted = max(earlier, key=lambda pair: _shared(*pair), default=([], list(prompts)))
        known = brought[: _shared(brought, wanted)]
        session, self._sessions = _going_on(self._sessions, key, [*known, *_missing(known, wanted)],
                                            lambda: self._fresh(network, image))  # fmt: skip
        return session

    def _fresh(self, network: MedSA, image: MetaTensor) -> InteractiveSession:
        session = InteractiveSession(NetworkSegmenter(network, None, self.classes, self.inferer), self.settings)
        session.open(image)
        return session

    def _unseen(self, key: str, network: MedSA, image: MetaTensor) -> VolumeAhead | None:
        """The volume of an image that has not been encoded as a whole; none where all slabs are waited for."""
        if key in self._volumes:
            self._volumes[key] = self._volumes.pop(key)
            return self._volumes[key]
        if (
            self.patience is None
            or any(kept == key for kept, _ in self._sessions)
            or not isinstance(self.inferer, VolumeInferer)
            or not isinstance(network, VolumeMedSA)
            or self.inferer.cache is None
            or backend_of(network) != "eager"
        ):
            return None
        version = f"{id(network)} {adapter_key(network)}"
        if self._own is None or self._own[0] != version:
            self._own = version, own_adapter(network)
            shared_queue().watch(self._own[1].image_encoder)
        settings = self.settings or AnswerSettings()
        volume = VolumeAhead(self._own[1], self.inferer, self.classes, settings, image, shared_queue(), _bring)
        if not volume.pays:
            return None
        room = self.inferer.cache.max_bytes - volume.bytes
        while self._volumes and (
            len(self._volumes) >= VOLUMES or sum(other.bytes for other in self._volumes.values()) > room
        ):
            self._close(next(iter(self._volumes)))
        self._volumes[key] = volume
        volume.start()
        return volume

    def _close(self, key: str) -> None:
        """Forget a volume, but for the order in which requests brought what was said on it."""
        self._volumes.pop(key).stop()
        self._brought.extend((key, one.prompts()) for kept, one in self._near if kept == key)
        self._near = [(kept, one) for kept, one in self._near if kept != key]


def _going_on(
    sessions: Sequence[tuple[str, InteractiveSession]],
    key: str,
    prompts: Sequence[UserPrompt],
    fresh: Callable[[], InteractiveSession],
) -> tuple[InteractiveSession, list[tuple[str, InteractiveSession]]]:
    """A session in which exactly these prompts hold, and the sessions to keep, this one among them.

    Args:
        sessions: that are kept, with the keys of their images.
        key: of the image.
        prompts: as a request lists them.
        fresh: makes a session of the image.
    """
    shared, found, wanted = -1, None, list(prompts)
    for kept, known in sessions:
        if kept == key:
            divided = _divided(known.prompts(), prompts)
            if (own := _shared(known.prompts(), divided)) > shared:
                shared, found, wanted = own, known, divided
    session = fresh() if found is None else found
    if found is not None and not shared == len(found.prompts()) == len(wanted):
        session = found.fork()  # others may go on with what was there
    _bring(session, prompts)
    others = [(kept, one) for kept, one in sessions if one is not session][1 - SESSIONS :]
    return session, [*others, (key, session)]


def _bring(session: InteractiveSession, prompts: Sequence[UserPrompt]) -> None:
    """Let exactly these prompts hold in a session; a scribble may go on from those that it holds."""
    wanted = _divided(session.prompts(), prompts)
    shared = _shared(session.prompts(), wanted)
    while len(session.prompts()) > shared:
        session.undo()
    for prompt in _missing(session.prompts(), wanted):
        session.apply(prompt)


def _images(inputs: Tensor) -> list[MetaTensor]:
    """Images of a batch, as a data loader collated them, or as a single one with an axis in front."""
    return decollate_batch(inputs) if getattr(inputs, "is_batch", False) else list(inputs)


def _kind(prompt: UserPrompt) -> tuple[Any, ...]:
    """What a request lists together."""
    return prompt.index, prompt.kind, prompt.label


def _same(one: UserPrompt, other: UserPrompt) -> bool:
    if _kind(one) != _kind(other) or not np.array_equal(one.positions, other.positions):
        return False
    return one.mask is None or other.mask is None or np.array_equal(one.mask, other.mask)


def _divided(held: Sequence[UserPrompt], wanted: Sequence[UserPrompt]) -> list[UserPrompt]:
    """A request's prompts, each scribble as those that a session holds of it, and what it has beyond them."""
    left: dict[tuple[Any, ...], list[UserPrompt]] = {}
    for prompt in held:
        if prompt.kind == "scribble":
            left.setdefault(_kind(prompt), []).append(prompt)
    out = []
    for prompt in wanted:
        rest, own = prompt, left.get(_kind(prompt), [])
        while own and prompt.kind == "scribble" and len(rest.positions):
            beyond = _beyond(rest.positions, own[0].positions)
            if len(beyond) != len(rest.positions) - len(own[0].positions):
                break  # a part of what was drawn is gone
            out.append(own.pop(0))
            rest = replace(rest, positions=beyond)
        if len(rest.positions) or rest is prompt:
            out.append(rest)
    return out


def _beyond(positions: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Those of some positions (N, dims) that are none of others (M, dims), in their order."""
    places = {row.tobytes() for row in np.ascontiguousarray(known)}
    kept = [row.tobytes() not in places for row in np.ascontiguousarray(positions)]
    return positions[np.array(kept, dtype=bool)]


def _shared(held: Sequence[UserPrompt], wanted: Sequence[UserPrompt]) -> int:
    """How many of a session's prompts, from its beginning on, a request lists in the same order, kind by kind."""
    lists: dict[tuple[Any, ...], list[UserPrompt]] = {}
    for prompt in wanted:
        lists.setdefault(_kind(prompt), []).append(prompt)
    seen: Counter[tuple[Any, ...]] = Counter()
    for number, prompt in enumerate(held):
        own, kind = lists.get(_kind(prompt), []), _kind(prompt)
        if seen[kind] >= len(own) or not _same(own[seen[kind]], prompt):
            return number
        seen[kind] += 1
    return len(held)


def _missing(held: Sequence[UserPrompt], wanted: Sequence[UserPrompt]) -> list[UserPrompt]:
    """Of a request's prompts those that a session, which shares all of its own with it, has not been given."""
    left = Counter(_kind(prompt) for prompt in held)
    out = []
    for prompt in wanted:
        if left[_kind(prompt)]:
            left[_kind(prompt)] -= 1
        else:
            out.append(prompt)
    return out
