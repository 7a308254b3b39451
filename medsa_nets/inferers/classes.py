"""Classes without prompts, and small parts of automatic masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from medsa_nets.inferers.mirror import MirrorInferer
from medsa_nets.inferers.slabs import Around, SlabInferer, Slabs, VolumeInferer, makers
from medsa_nets.inferers.spread import SpreadInferer
from medsa_nets.prompts import Prompts
from medsa_nets.transforms import all_classes, keep_main_components


class MainComponentsInferer(Around):
    """Drops small parts of automatic masks (:func:`~medsa_nets.transforms.keep_main_components`).

    What prompts ask for is not touched.

    Args:
        inferer: gives the masks.
        share: connected components smaller than this share of their class's largest one are dropped; 0 keeps all.

    Raises:
        ValueError: when the share is out of range.
    """

    def __init__(self, inferer: VolumeInferer, share: float = 0.0) -> None:
        super().__init__(inferer)
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"component_share must lie between 0 and 1, got {share}.")
        self.share = share

    def answer(self, images: list[Slabs], prompts: Prompts) -> Tensor:
        """Logits of the prompts, or of every class, less its small parts."""
        logits = self.inferer.answer(images, prompts)
        return logits if prompts else keep_main_components(logits, self.share)

    def automatic(self, images: list[Slabs]) -> Tensor:
        """Logits of every class without prompts, less their small parts."""
        return keep_main_components(self.inferer.automatic(images), self.share)


class AllClassesInferer(Around):
    """Answers prompts for some classes by a channel for every class of the network.

    Args:
        inferer: answers for the classes that are asked for.
        others: what the classes hold that were not asked for: ``absent`` (nothing), or ``automatic``: what they hold
            without prompts, less the voxels of the classes that were asked for.

    Raises:
        ValueError: when ``others`` has another value.
    """

    def __init__(self, inferer: VolumeInferer, others: str = "absent") -> None:
        super().__init__(inferer)
        if others not in ("absent", "automatic"):
            raise ValueError(f"others must be absent or automatic, got {others!r}.")
        self.others = others

    def answer(self, images: list[Slabs], prompts: Prompts) -> Tensor:
        """Logits of every class."""
        automatic = self.others == "automatic"
        if not prompts and automatic:
            return self.inferer.automatic(images)
        logits = self.inferer.answer(images, prompts)
        if not prompts or prompts.classes is None:
            return logits
        others = self.inferer.automatic(images) if automatic else None
        return all_classes(logits, prompts.classes, images[0].network.num_classes, others=others)


def volume_inferer(
    *args: Any,
    spread: bool = False,
    mirror_axes: Sequence[int] = (),
    component_share: float = 0.0,
    every_class: bool = False,
    others: str = "absent",
    **settings: Any,
) -> VolumeInferer:
    """Put the inferers of volumes around each other, from the innermost outwards.

    Args:
        args: of :class:`SlabInferer`.
        spread: whether prompts are answered from their slabs outwards (:class:`SpreadInferer`).
        mirror_axes: of :class:`MirrorInferer`.
        component_share: of :class:`MainComponentsInferer`.
        every_class: whether there is a channel for every class (:class:`AllClassesInferer`).
        others: what classes hold that were not asked for.
        settings: of :class:`SlabInferer`.
    """
    out: VolumeInferer = SlabInferer(*args, **settings)
    if spread:
        masks = ("whole" if every_class else "near") if others == "automatic" else "never"
        out = SpreadInferer(out, masks)
    out = MainComponentsInferer(MirrorInferer(out, mirror_axes), component_share)
    whole = AllClassesInferer(out, others)  # also says where others has another value
    return whole if every_class else out


makers.append(volume_inferer)
