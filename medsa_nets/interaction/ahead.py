"""Volumes that nobody has seen yet: answers from the clicked slab, while the rest is encoded behind them."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from monai.data import MetaTensor
from torch import Tensor

from medsa_nets.inferers import Slabs, VolumeInferer
from medsa_nets.inferers.cache import take_precomputed
from medsa_nets.inferers.near import QueuedSlabInferer, bytes_when_encoded, encode
from medsa_nets.inferers.queues import AHEAD, DeviceQueue
from medsa_nets.interaction.answers import AnswerSettings
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.networks import MedSA, VolumeMedSA
from medsa_nets.prompts import UserPrompt

logger = logging.getLogger(__name__)
Network = TypeVar("Network", bound=MedSA)
Bring = Callable[[InteractiveSession, Sequence[UserPrompt]], None]  # lets exactly these prompts hold in a session


def own_adapter(network: Network) -> Network:
    """A copy of a network with an adapter of its own, which stays as it is when another one is loaded; the rest, which
    does not train, is held once."""
    own = set(network.state_dict())
    tensors = [*network.named_parameters(), *network.named_buffers()]
    shared = {id(tensor): tensor for name, tensor in tensors if name not in own}
    return copy.deepcopy(network, {**shared, id(network.kept_embeddings): None})


class VolumeAhead:
    """A volume whose slabs are encoded in the background, first those near the newest click.

    As long as they are, sessions from :meth:`near_session` answer from the newest click's slab. Behind them a session
    is made that sees all slabs and is told the same: bit for bit the one that there would be if all had been encoded
    from the start.

    Args:
        network: whose weights do not change any more (:func:`own_adapter`).
        inferer: the bundle's, with a cache.
        classes: names of the classes.
        settings: how answers are made.
        image: (C, H, W, D), as the network sees it.
        queue: of the device.
        bring: gives prompts to the session behind.
    """

    def __init__(
        self,
        network: VolumeMedSA,
        inferer: VolumeInferer,
        classes: Sequence[str],
        settings: AnswerSettings,
        image: MetaTensor,
        queue: DeviceQueue,
        bring: Bring,
    ) -> None:
        self.image, self.settings, self.queue, self.bring = image, settings, queue, bring
        self.failure: Exception | None = None
        self.stopped = False
        self._said: list[UserPrompt] = []
        self._focus: float | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._whole: InteractiveSession | None = None
        opened: dict[tuple[int, ...], Slabs] = {}
        self._urgent = NetworkSegmenter(network, None, classes, inferer)
        bundled = self._urgent.inferer
        assert isinstance(bundled, VolumeInferer)
        self._urgent.inferer = QueuedSlabInferer.of(bundled, queue)
        self._near, self._behind = copy.copy(self._urgent), copy.copy(self._urgent)
        self._near.inferer = QueuedSlabInferer.of(bundled, queue, near=True, opened=opened)
        self._behind.inferer = QueuedSlabInferer.of(bundled, queue, ahead=True, opened=opened)
        take_precomputed(network, bundled.precomputed)
        self.images = self._behind.inferer.open(self._inputs(), network, None)

    def _inputs(self) -> Tensor:
        return self._urgent._input(self.image)

    @property
    def pays(self) -> bool:
        """Whether there is something left to encode, and room to keep it."""
        cache, new = self.images[0].cache, [slabs for slabs in self.images if slabs.known is None]
        return cache is not None and bool(new) and len(self.images[0].groups) > 1 and self.bytes <= cache.max_bytes

    @property
    def bytes(self) -> int:
        """Most memory that its embeddings take."""
        return sum(map(bytes_when_encoded, self.images))

    def start(self) -> None:
        """Begin to encode."""
        threading.Thread(target=self._work, name="encode ahead", daemon=True).start()

    def stop(self) -> None:
        """Encode nothing more."""
        self.stopped = True

    def near_session(self) -> InteractiveSession:
        """A session that answers from the newest click's slab, and begins with nothing."""
        out = InteractiveSession(self._near, replace(self.settings, network="first"), "nothing")
        out.open(self.image)
        return out

    def say(self, prompts: Sequence[UserPrompt], focus: float | None) -> None:
        """Tell the session behind what it has to hold, and encode first what lies near a slice of the network's grid.

        Args:
            prompts: in the order in which they were brought.
            focus: index of the slice.
        """
        with self._lock:
            self._said, self._focus = list(prompts), focus

    def whole(self, patience: float) -> InteractiveSession | None:
        """The session that sees all slabs, as soon as it holds what was said; none where that takes longer.

        Args:
            patience: seconds to wait.
        """
        self._done.wait(max(0.0, patience))
        return self._whole

    def progress(self) -> str:
        """How much is encoded."""
        counts = [len(slabs.groups) if slabs.known is not None else len(slabs.new) for slabs in self.images]
        return f"{sum(counts)} of {sum(len(slabs.groups) for slabs in self.images)} slabs are encoded"

    def _work(self) -> None:
        try:
            while not self.stopped and self._encode_next():
                logger.info("%s", self.progress())
            if self.stopped:
                return
            session = InteractiveSession(self._behind, self.settings)
            session.open(self.image)
            while not self.stopped:
                with self._lock:
                    said = self._said
                self.bring(session, said)
                with self._lock:
                    if said is self._said:
                        session.segmenter = self._urgent
                        self._whole = session
                        return
        except Exception as error:  # the request that goes the other way meets the same, and says so
            logger.exception("encoding ahead stopped")
            self.failure = error
        finally:
            self._done.set()

    def _encode_next(self) -> bool:
        """Encode the group of slabs that lies nearest to where the newest click was; false where all are encoded."""
        left = [
            (abs(slabs.groups[g][0] + (slabs.depth - 1) / 2.0 - self._middle(slabs)), number, g)
            for number, slabs in enumerate(self.images)
            if slabs.known is None
            for g in range(len(slabs.groups))
            if g not in slabs.new
        ]
        if left:
            _, number, g = min(left)
            encode(self.queue, self.images[number], g, AHEAD).result()
        return bool(left)

    def _middle(self, slabs: Slabs) -> float:
        depth = slabs.volume.shape[4]
        focus = (depth - 1) / 2.0 if self._focus is None else self._focus
        return depth - 1 - focus if 2 in slabs.mirrored else focus
