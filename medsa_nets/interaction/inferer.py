"""Sessions behind a bundle's evaluator: what MONAI Label's requests and files of prompts are answered by."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch
from monai.inferers import Inferer
from torch import Tensor

from medsa_nets.checksums import tensor_sha256
from medsa_nets.inferers import PromptInferer, VolumeInferer, adapter_key
from medsa_nets.interaction.answers import AnswerSettings
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.networks import MedSA
from medsa_nets.prompts import Prompts, UserPrompt, user_prompts_of_batch
from medsa_nets.runtime import unwrap
from medsa_nets.transforms.volumes import ABSENT

SESSIONS = 8  # that a process keeps


class SessionInferer(Inferer):
    """Answers what a user says of images as sessions do, and leaves images without such prompts to another inferer.

    What travels with an image (:func:`~medsa_nets.prompts.with_user_prompts`) is given to a session of that image, one
    prompt after the other: each answer is made from the one before it, clicks are obeyed, and a class that is known
    starts from its automatic mask. The answer depends on the prompts and their order alone. Sessions are kept: a
    request that goes on from an earlier one costs one answer, and one that takes its newest prompts back costs none.

    A request lists the clicks of each kind in their order, but not in which order kinds followed each other. They are
    taken in the order in which requests brought them; in the listed order where no kept session holds the beginning.
    Scribbles may come as one drawing that grows: what it has beyond the scribbles of a kept session is a new scribble.

    Args:
        inferer: the bundle's, for images without prompts, and behind the sessions.
        classes: names of the classes, in the order of their ids.
        others: what the classes hold that were not asked for: ``absent`` (nothing), or ``automatic``.
        settings: how answers are made; none takes the usual ones.

    Raises:
        ValueError: when ``others`` has another value.
    """

    def __init__(
        self,
        inferer: PromptInferer | VolumeInferer,
        classes: Sequence[str],
        others: str = "absent",
        settings: AnswerSettings | None = None,
    ) -> None:
        super().__init__()
        if others not in ("absent", "automatic"):
            raise ValueError(f"others must be absent or automatic, got {others!r}.")
        self.inferer = inferer
        self.classes = list(classes)
        self.others = others
        self.settings = settings
        self._sessions: list[tuple[str, InteractiveSession]] = []  # the newest last
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
        shared, found, wanted = -1, None, list(prompts)
        for kept, known in self._sessions:
            if kept == key:
                divided = _divided(known.prompts(), prompts)
                if (own := _shared(known.prompts(), divided)) > shared:
                    shared, found, wanted = own, known, divided
        if found is None:
            session = InteractiveSession(NetworkSegmenter(network, None, self.classes, self.inferer), self.settings)
            session.open(image)
        else:
            session = found if shared == len(found.prompts()) == len(wanted) else found.fork()
            while len(session.prompts()) > shared:  # of a copy: others may go on with what was there
                session.undo()
        for prompt in _missing(session.prompts(), wanted):
            session.apply(prompt)
        self._sessions = [(kept, one) for kept, one in self._sessions if one is not session][1 - SESSIONS :]
        self._sessions.append((key, session))
        return session


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
