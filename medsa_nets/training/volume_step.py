"""One training step on labelled volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from torch import Tensor

from medsa_nets.layers import DepthBranch, DistantPrompt
from medsa_nets.networks import MedSA
from medsa_nets.prompts import Prompts, class_masks
from medsa_nets.runtime import plain
from medsa_nets.training.step import PromptedIteration, call_through, correct


def train_slices(network: MedSA) -> MedSA:
    """Let slices train one by one: what joins them (the depth branches, prompts of other slices) rests.

    The adapter of such a training has the form of any other; what rested in it is as it was at the start, so that a
    training on slabs may go on from it.

    Args:
        network: the network; it is changed in place.

    Returns:
        ``network``.
    """
    for module in network.modules():
        if isinstance(module, (DepthBranch, DistantPrompt)):
            module.requires_grad_(False)
        if isinstance(module, DepthBranch):
            module.idle = True
    return network


class VolumeIteration(PromptedIteration):
    """A training step on labelled volumes, for ``monai.engines.SupervisedTrainer`` (``iteration_update``).

    Without prompt, every class is asked for; with prompts, some classes, those in the volumes first. The loss function
    is called with logits, masks and which classes are annotated, see :class:`~medsa_nets.losses.AnnotatedDiceCELoss`.

    Args:
        num_classes: number of classes; labels hold 0 (background) and 1 + class id.
        max_classes: most classes that are prompted for at once.
        unnamed: share of prompted draws that do not say which class is meant, so that a click alone works too.
        annotated_key: key of the batch with the annotated classes of each volume, (B, num_classes); where a batch has
            none, all classes are annotated.
        slab_depth: slices that are encoded in a step, around the middle of what is given; 0 takes all. With fewer,
            prompts lie on slices that are not encoded too, as in the inference of a volume in slabs.
        fixed_slabs: whether these slices are one of the slabs that tile the volume, so that embeddings can be kept
            (:class:`~medsa_nets.embeddings.StoredEmbeddings`).
        settings: see :class:`PromptedIteration`.

    Raises:
        ValueError: when ``max_classes`` is below 1 or ``slab_depth`` below 0.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        max_classes: int = 3,
        unnamed: float = 0.25,
        annotated_key: str = "annotated",
        slab_depth: int = 0,
        fixed_slabs: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(max_classes=max_classes, **settings)
        if slab_depth < 0:
            raise ValueError(f"slab_depth must be 0 (all slices) or more, got {slab_depth}.")
        self.slab_depth = slab_depth
        self.fixed_slabs = fixed_slabs
        self.num_classes = num_classes
        self.unnamed = unnamed
        self.annotated_key = annotated_key

    def answer(
        self,
        engine: SupervisedTrainer,
        batchdata: Mapping[str, Any],
        kinds: torch.Generator,
        places: Sequence[torch.Generator],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Answer the batch's prompts: the image, and for each draw logits, masks and annotated classes (B, K)."""
        image, label = self.prepare(engine, batchdata)
        annotated = torch.ones(len(image), self.num_classes, dtype=torch.bool, device=image.device)
        if self.annotated_key in batchdata:
            annotated = plain(batchdata[self.annotated_key]).to(image.device).bool()
        with self.precision(image.device).autocast(image.device):
            answers = call_through(engine.network, self.answer_slab, image, label, annotated, kinds, places)
        return image, answers

    def choose_classes(self, label: Tensor, annotated: Tensor, places: torch.Generator) -> Tensor:
        """Up to ``max_classes`` class ids to prompt for: first those in the volumes, then other annotated ones."""
        present = torch.zeros(self.num_classes, dtype=torch.bool)
        values = torch.unique(label).long().cpu() - 1
        present[values[(values >= 0) & (values < self.num_classes)]] = True
        usable = annotated.any(0).cpu()
        order = torch.rand(self.num_classes, generator=places) + (~present).float() + 2.0 * (~usable).float()
        count = max(1, min(self.max_classes, int((present & usable).sum())))
        return order.argsort()[:count].sort().values

    def choose_slab(self, depth: int, kinds: torch.Generator) -> slice:
        """Slices to encode: some that hold the middle one, around which crops are cut, or one of fixed slabs."""
        if not 0 < self.slab_depth < depth:
            return slice(0, depth)
        if self.fixed_slabs:  # the last one ends with the volume
            count = -(-depth // self.slab_depth)
            start = min(int(torch.randint(count, (1,), generator=kinds)) * self.slab_depth, depth - self.slab_depth)
            return slice(start, start + self.slab_depth)
        middle = depth // 2
        first, last = max(0, middle - self.slab_depth + 1), min(middle, depth - self.slab_depth)
        start = int(torch.randint(first, last + 1, (1,), generator=kinds))
        return slice(start, start + self.slab_depth)

    def answer_slab(
        self,
        network: MedSA,
        image: Tensor,
        label: Tensor,
        annotated: Tensor,
        kinds: torch.Generator,
        places: torch.Generator | Sequence[torch.Generator],
    ) -> list[tuple[Tensor, ...]]:
        """Answers of a network, before anything is learned from them.

        Args:
            network: the network, not wrapped.
            image: slabs (B, C, H, W, D).
            label: their labels (B, 1, H, W, D).
            annotated: which classes are annotated (B, classes).
            kinds: draws which prompts there are, and the slices that are encoded.
            places: draws where prompts lie, one for all slabs or one for each.

        Returns:
            For each answer logits (B, K, H, W, D), masks of that shape, and which of them are annotated (B, K).
        """
        slab = self.choose_slab(image.shape[-1], kinds)
        embedding = network.encode_image(image[..., slab])
        answers: list[tuple[Tensor, ...]] = []
        for mode in self.sampler.modes(self.draws, kinds):
            if mode == "none":
                classes = torch.arange(self.num_classes)
            else:
                classes = self.choose_classes(label, annotated, _first(places))
            masks, known = class_masks(label, classes), annotated[:, classes.to(annotated.device)]
            prompts = [one.shift(slab.start) for one in self.sampler.draw(masks.float(), mode, places)]
            masks = masks[..., slab]
            if not any(prompts) or float(torch.rand(1, generator=kinds)) >= self.unnamed:
                asked = classes.to(image.device)
                prompts = [replace(one, classes=asked) for one in prompts]
            logits = network.decode(embedding, **Prompts.batched(prompts))
            answers.append((logits, masks, known))
            clicks = self.sampler.corrections(kinds)
            if clicks:
                feedback = network.click_feedback is not None
                logits = correct(network, embedding, prompts, logits, masks.float(), clicks, places, feedback)
                answers.append((logits, masks, known))
        return answers


def _first(places: torch.Generator | Sequence[torch.Generator]) -> torch.Generator:
    return places if isinstance(places, torch.Generator) else places[0]
