"""Volumes whose slabs are encoded and decoded through a device's queue, and answers from the clicked slab alone."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from medsa_nets.inferers.mirror import MirrorInferer
from medsa_nets.inferers.queues import AHEAD, DECODE, ENCODE, NEAREST, DeviceQueue
from medsa_nets.inferers.slabs import Around, SlabInferer, Slabs, VolumeInferer, rebuilt, slab_inferer
from medsa_nets.inferers.spread import SpreadInferer
from medsa_nets.networks import VolumeMedSA
from medsa_nets.prompts import Prompts


class QueuedSlabInferer(SlabInferer):
    """An inferer in slabs, each of which is a piece of work of its own in a device's queue."""

    queue: DeviceQueue
    priority: int  # with which slabs are encoded; ahead of need, with which they are decoded too
    opened: dict[tuple[int, ...], Slabs] | None  # of the only volume that it answers

    @classmethod
    def of(
        cls,
        inferer: VolumeInferer,
        queue: DeviceQueue,
        *,
        near: bool = False,
        ahead: bool = False,
        opened: dict[tuple[int, ...], Slabs] | None = None,
    ) -> VolumeInferer:
        """An inferer of volumes with the same settings, whose slabs go through a queue.

        Args:
            inferer: of volumes, with others around it or not.
            queue: of the device.
            near: whether the slab that lies best around the newest click is all that is decoded, in no mirror image.
            ahead: whether others' work goes before what is decoded.
            opened: slabs of a volume and of its mirror images, which are opened once; none opens volumes at each call.
        """

        def change(own: VolumeInferer) -> VolumeInferer:
            if isinstance(own, SpreadInferer) and near:
                return NearestInferer(own.inferer)
            if isinstance(own, MirrorInferer) and near:
                return own.inferer
            if not isinstance(own, SlabInferer):
                return own
            out = cls.__new__(cls)
            out.__dict__.update(own.__dict__)
            out.queue, out.opened, out.progress = queue, opened, False
            out.priority = AHEAD if ahead else NEAREST if near else ENCODE
            return out

        return rebuilt(inferer, change)

    def open(self, volume: Tensor, network: VolumeMedSA, key: str | None, axes: tuple[int, ...] = ()) -> list[Slabs]:
        """The slabs of a volume, or of its mirror image along ``axes``."""
        if self.opened is None:
            return super().open(volume, network, key, axes)
        if axes not in self.opened:
            self.opened[axes] = super().open(volume, network, key, axes)[0]
        return [self.opened[axes]]

    def prepare(self, slabs: Slabs, g: int) -> None:
        """Wait until a group of slabs is encoded."""
        if slabs.known is None:
            encode(self.queue, slabs, g, self.priority).result()

    def decode(self, slabs: Slabs, g: int, prompts: Prompts) -> Tensor:
        """Logits of the slabs of a group, as a piece of work."""
        self.prepare(slabs, g)
        own = super().decode
        return self.queue.run(lambda: own(slabs, g, prompts), self.urgency)

    @property
    def urgency(self) -> int:
        """Priority with which slabs are decoded."""
        return AHEAD if self.priority == AHEAD else DECODE


class NearestInferer(Around):
    """Answers prompts from the slab that lies best around the newest click, and from no other."""

    def answer(self, images: list[Slabs], prompts: Prompts) -> Tensor:
        """Logits of the prompts; absent outside of that slab."""
        if not prompts or prompts.automatic:
            return self.inferer.answer(images, prompts)
        (slabs,), base = images, slab_inferer(self)
        groups = [nearest_group(slabs, prompts.select([k])) for k in range(prompts.sets)]
        return torch.cat(
            [base.blend(slabs, [(g, base.decode(slabs, g, prompts.select([k])))]) for k, g in enumerate(groups)], dim=1
        )


def encode(queue: DeviceQueue, slabs: Slabs, g: int, priority: int) -> Future[None]:
    """Have a group of slabs encoded, and kept by them; what is being encoded already goes on, as urgently."""

    def work() -> None:
        slabs.embeddings(g)

    return queue.share((slabs, g), work, priority)


def nearest_group(slabs: Slabs, prompts: Prompts) -> int:
    """The group of slabs in whose middle the newest click, or the box, lies best."""
    depth = slabs.volume.shape[4]
    place = 0.0
    if prompts.points is not None and prompts.labels is not None:
        place = float(prompts.points[0, prompts.labels[0] >= 0][-1, 2])
    elif prompts.boxes is not None:
        place = float(prompts.boxes[0, 2] + prompts.boxes[0, 5]) / 2.0
    place = min(max(place, 0.0), depth - 1.0)
    away = [min(abs(start + (slabs.depth - 1) / 2.0 - place) for start in group) for group in slabs.groups]
    return int(np.argmin(away))


def bytes_when_encoded(slabs: Slabs) -> int:
    """Most memory that the embeddings of a volume's slabs take."""
    count = sum(len(group) for group in slabs.groups) * slabs.depth
    height, width = (-(-n // slabs.network.stride) for n in slabs.volume.shape[2:4])
    return count * height * width * slabs.network.embedding_channels * 4
