"""The mean over a volume and its mirror images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from torch import Tensor

from medsa_nets.inferers.slabs import Around, Slabs, VolumeInferer
from medsa_nets.networks import VolumeMedSA
from medsa_nets.prompts import Prompts


class MirrorInferer(Around):
    """Mirrors volumes and their prompts along some axes too: the logits are the mean over the volume and its images.

    There is one image for each combination of axes, and each costs what the volume costs. For tasks that train on
    mirror images.

    Args:
        inferer: answers each image.
        axes: 0 rows, 1 columns, 2 slices.

    Raises:
        ValueError: when an axis is another one, or comes twice.
    """

    def __init__(self, inferer: VolumeInferer, axes: Sequence[int] = ()) -> None:
        super().__init__(inferer)
        if len(set(axes)) < len(axes) or not set(axes) <= {0, 1, 2}:
            raise ValueError(f"mirror_axes must hold 0, 1 or 2, each once at most, got {list(axes)}.")
        self.axes = tuple(axes)

    def open(self, volume: Tensor, network: VolumeMedSA, key: str | None, axes: tuple[int, ...] = ()) -> list[Slabs]:
        """The volume, and its mirror images."""
        chosen = [own for count in range(len(self.axes) + 1) for own in combinations(self.axes, count)]
        return [slabs for own in chosen for slabs in self.inferer.open(volume, network, key, own)]

    def answer(self, images: list[Slabs], prompts: Prompts) -> Tensor:
        """Mean of the answers of the images."""
        return self._mean(images, lambda image: self.inferer.answer([image], image.mirror_prompts(prompts)))

    def automatic(self, images: list[Slabs]) -> Tensor:
        """Mean of the automatic masks of the images."""
        return self._mean(images, lambda image: self.inferer.automatic([image]))

    @staticmethod
    def _mean(images: list[Slabs], answer: Callable[[Slabs], Tensor]) -> Tensor:
        answers = (image.mirror_back(answer(image)) for image in images)
        logits = next(answers)
        for other in answers:
            logits = logits + other
        return logits / len(images) if len(images) > 1 else logits
