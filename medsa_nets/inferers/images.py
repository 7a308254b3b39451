"""Inference of images, with prompts that are answered in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SimpleInferer
from torch import Tensor

from medsa_nets.checksums import tensor_sha256
from medsa_nets.inferers.cache import EmbeddingCache, adapter_key, network_name, take_precomputed
from medsa_nets.networks import MedSA
from medsa_nets.precision import Amp, autocast, choose_amp, read_amp
from medsa_nets.prompts import Prompts, prompts_of_batch
from medsa_nets.prompts.earlier import as_earlier
from medsa_nets.prompts.observations import Kernel, observe
from medsa_nets.runtime import plain, unwrap
from medsa_nets.transforms.volumes import all_classes

CLICK_KERNEL = Kernel(length=3.0, contrast=0.15)  # pixels of the network's grid, share of the intensity range


class PromptInferer(SimpleInferer):
    """MONAI's simple inferer with prompts, mixed precision and a cache; logits come in single precision.

    Args:
        amp: precision, ``auto``, true or false (:func:`~medsa_nets.precision.choose_amp`).
        cache: keeps embeddings of images that are asked for again; none computes them anew.
        precomputed: folder of embeddings from ``python -m medsa_nets precompute``; none computes them.
        turns: in which positions images are seen, in quarter turns: the logits are the mean over them, turned back.
            Each costs what the image costs. For tasks that train on turned images.

    Raises:
        ValueError: when a turn is none of 0, 1, 2, 3, or comes twice, or there is none.
    """

    def __init__(
        self,
        amp: Amp = False,
        cache: EmbeddingCache | None = None,
        precomputed: str | Path | None = None,
        turns: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        self.amp = read_amp(amp)
        self.cache = cache
        self.precomputed = precomputed
        if not turns or len(set(turns)) < len(turns) or not set(turns) <= {0, 1, 2, 3}:
            raise ValueError(f"turns must be quarter turns, some of 0, 1, 2, 3, each once at most, got {list(turns)}.")
        self.turns = tuple(turns)

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        prompts: Prompts | Sequence[Prompts] | None = None,
    ) -> Tensor:
        """Segment images.

        Args:
            inputs: (B, 3, H, W) with intensities in [0, 1].
            network: a :class:`~medsa_nets.networks.MedSA`, or a wrapper of it.
            args: not used; MONAI's engines pass it.
            prompts: of each image, or of the only one; none takes those that travel with the images
                (:func:`~medsa_nets.prompts.with_prompts`), and segments automatically where there are none.

        Returns:
            Mask logits (B, K, H, W).

        Raises:
            ValueError: when there are prompts for another number of images, or images differ in the kinds of theirs.
        """
        medsa = unwrap(network)

        def answer(view: Tensor, asked: Sequence[Prompts], turn: int) -> Tensor:
            if not isinstance(medsa, MedSA) or medsa.training:  # dropout answers anew each time
                return network(view, *args, **Prompts.batched(asked)).float()
            take_precomputed(medsa, self.precomputed)
            in_order = medsa.click_feedback is not None and medsa.click_feedback.trained
            if self.cache is None and not in_order:
                return network(view, *args, **Prompts.batched(asked)).float()
            embedding = self._embed(view, medsa, turn)
            if in_order:
                return answer_in_order(medsa, embedding, view, asked)
            return medsa.decode(embedding, **Prompts.batched(asked)).float()

        asked = prompts_of_batch(inputs, prompts)
        return self._mean_over_turns(plain(inputs), asked, answer)

    def decode(self, inputs: Tensor, network: MedSA, prompts: Sequence[Prompts]) -> Tensor:
        """Answer all prompts of each image at once, in one pass through the decoder: logits (B, K, H, W)."""

        def answer(view: Tensor, asked: Sequence[Prompts], turn: int) -> Tensor:
            return network.decode(self._embed(view, network, turn), **Prompts.batched(asked)).float()

        return self._mean_over_turns(plain(inputs), prompts, answer)

    def views(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Images (B, C, H, W) in each position that they are seen in, with its number of quarter turns."""
        for turn in self.turns:
            yield turn, inputs if turn == 0 else torch.rot90(inputs, turn, (2, 3)).contiguous()

    def _mean_over_turns(
        self,
        inputs: Tensor,
        prompts: Sequence[Prompts],
        answer: Callable[[Tensor, Sequence[Prompts], int], Tensor],
    ) -> Tensor:
        """Mean of the answers (B, K, H, W) to the images in all positions."""
        size, total = inputs.shape[2:], None
        with autocast(self.amp, inputs.device):
            for turn, view in self.views(inputs):
                logits = answer(view, [one.turn(turn, size) for one in prompts], turn)
                logits = logits if turn == 0 else torch.rot90(logits, -turn, (2, 3))
                total = logits if total is None else total + logits
        assert total is not None
        return total / len(self.turns) if len(self.turns) > 1 else total

    def _embed(self, inputs: Tensor, medsa: MedSA, turn: int) -> Tensor:
        """Embedding of images in one of their positions, from the cache where it is there."""
        if self.cache is None:
            return medsa.encode_image(inputs)
        name, version = network_name(medsa), adapter_key(medsa)
        key = f"{tensor_sha256(inputs)} {choose_amp(self.amp, inputs.device).name} {name} {version}"
        known = self.cache.get(key)
        if known is not None:
            return known[0].to(inputs.device)
        embedding = medsa.encode_image(inputs)
        kept = embedding if self.cache.device is None else embedding.to(self.cache.device)
        self.cache.put(key, [kept], network=name, version=version)
        return embedding


class ClassesInferer(PromptInferer):
    """Inference of images with one or several classes: a channel for every class, whichever of them prompts ask for.

    Args:
        overlap: whether a pixel may hold several classes; where not, sessions of clicks see to it.
        others: what classes hold that were not asked for: ``absent`` (nothing), or ``automatic``.
        settings: of :class:`PromptInferer`.

    Raises:
        ValueError: when ``others`` has another value.
    """

    def __init__(self, overlap: bool = False, others: str = "absent", **settings: Any) -> None:
        super().__init__(**settings)
        if others not in ("absent", "automatic"):
            raise ValueError(f"others must be absent or automatic, got {others!r}.")
        self.overlap = overlap
        self.others = others

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        prompts: Prompts | Sequence[Prompts] | None = None,
    ) -> Tensor:
        """Segment images: mask logits (B, classes, H, W); arguments as of :class:`PromptInferer`."""
        asked = prompts_of_batch(inputs, prompts)
        inputs = plain(inputs)
        count = getattr(unwrap(network), "num_classes", 1)
        if count == 1 or not any(one and one.classes is not None for one in asked):
            return super().__call__(inputs, network, *args, prompts=asked)
        answers = [
            self._of_image(image[None], network, *args, own=own, count=count) for image, own in zip(inputs, asked)
        ]
        return torch.cat(answers)

    def _of_image(self, image: Tensor, network: Callable[..., Tensor], *args: Any, own: Prompts, count: int) -> Tensor:
        logits = super().__call__(image, network, *args, prompts=[own])
        if not own or own.classes is None:
            return logits
        others = super().__call__(image, network, *args, prompts=[Prompts()]) if self.others == "automatic" else None
        out = all_classes(logits, own.classes, count, others=None if self.overlap else others)
        if others is not None and self.overlap:
            rest = [k for k in range(count) if k not in own.classes.tolist()]
            out[:, rest] = others[:, rest]
        return out


def answer_in_order(network: MedSA, embedding: Tensor, image: Tensor, prompts: Sequence[Prompts]) -> Tensor:
    """Answer click after click, each from the mask before it, as a network with click feedback has learned to.

    A session begins with the box, where there is one, else with the automatic mask, where the class is named, else with
    the first click. A click on foreground takes nothing from a mask, one on background adds nothing, so that no later
    click undoes what was right elsewhere. In each answer every clicked pixel carries its label
    (:func:`~medsa_nets.prompts.observations.observe`).

    Args:
        network: the network.
        embedding: of the images (B, 256, h, w).
        image: (B, 3, H, W) with intensities in [0, 1].
        prompts: of each image.

    Returns:
        Mask logits (B, K, H, W), single precision.
    """
    if any(one.points is None or one.masks is not None for one in prompts):
        return network.decode(embedding, **Prompts.batched(prompts)).float()
    start = [one.until(0) for one in prompts]
    earlier = network.decode(embedding, **Prompts.batched(start)).float() if any(start) else None
    for number in range(1, max(one.labels.shape[1] for one in prompts if one.labels is not None) + 1):
        clicked = [one.until(number) for one in prompts]
        now = clicked
        if earlier is not None:
            now = [replace(one, masks=own) for one, own in zip(clicked, as_earlier(earlier, embedding.shape[2:4]))]
        arguments = Prompts.batched(now)
        logits = network.decode(embedding, **arguments).float()
        newest = arguments["point_labels"][:, :, number - 1][..., None, None]
        if earlier is not None:
            logits = torch.where(newest == 1, torch.maximum(logits, earlier), torch.minimum(logits, earlier))
        logits = obey(logits, image, clicked)
        earlier = logits if earlier is None else torch.where(newest < 0, earlier, logits)  # padding clicks nothing
    assert earlier is not None
    return earlier


def obey(logits: Tensor, image: Tensor, prompts: Sequence[Prompts]) -> Tensor:
    """Logits (B, K, H, W) that agree with the points of the prompts of each image."""
    out = logits.cpu().numpy().copy()
    last = np.array(logits.shape[2:]) - 1
    for b, one in enumerate(prompts):
        if one.points is None or one.labels is None:
            continue
        places, labels = one.points.cpu().float().round().numpy().astype(np.int64), one.labels.cpu().numpy()
        for k, real in enumerate(labels >= 0):
            voxels = places[k][real].clip(0, last)
            out[b, k] = observe(out[b, k], image[b].cpu().numpy(), voxels, labels[k][real], (1.0, 1.0), CLICK_KERNEL)
    return torch.from_numpy(out).to(logits.device)
