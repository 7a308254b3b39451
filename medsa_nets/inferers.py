"""Inference of images and volumes (slabs along depth, blended); embeddings are kept for the next click."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from monai.inferers import Inferer, SimpleInferer
from monai.metrics import compute_dice
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

from medsa_nets.backends import backend_of, expect_encodings
from medsa_nets.checksums import tensor_sha256
from medsa_nets.embeddings import read_embeddings
from medsa_nets.machine import limit_threads
from medsa_nets.networks import MedSA, VolumeMedSA
from medsa_nets.precision import Amp, autocast, choose_amp, read_amp
from medsa_nets.prompts import Prompts, prompts_of_batch
from medsa_nets.prompts.earlier import as_earlier
from medsa_nets.prompts.observations import Kernel, observe
from medsa_nets.runtime import keep_freed_memory, plain, release_freed_memory, unwrap
from medsa_nets.transforms import ABSENT, all_classes, keep_main_components

logger = logging.getLogger(__name__)
CLICK_KERNEL = Kernel(length=3.0, contrast=0.15)  # pixels of the network's grid, share of the intensity range
AGREEMENT = 0.5  # Dice from which an automatic mask and that of clicks show the same
Answer: TypeAlias = "Callable[[Slabs, Prompts], Tensor]"
Look: TypeAlias = Callable[[range], Tensor]  # a mask (H, W, slices) on some slices


class EmbeddingCache:
    """Image embeddings of the volumes that were used last. Several threads may share one.

    A volume is known by what the network sees: the values of the preprocessed tensor. Another file, window or spacing
    is another volume, and so is another adapter.

    Args:
        max_bytes: most memory for embeddings; the least recently used volumes leave first. A volume that needs more
            is not kept.
        device: where embeddings are kept; none keeps them where they were computed.

    Raises:
        ValueError: when ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int = 2 * 1024**3, device: str | torch.device | None = None) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 or more, got {max_bytes}.")
        self.max_bytes = max_bytes
        self.device = device
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._versions: dict[str, tuple[str, str]] = {}
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """Memory that the kept embeddings take, in bytes."""
        with self._lock:
            return sum(self._size(slabs) for slabs in self._kept.values())

    @staticmethod
    def _size(slabs: list[Tensor]) -> int:
        return sum(slab.numel() * slab.element_size() for slab in slabs)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> list[Tensor] | None:
        """Embeddings of the slabs of a volume, or none."""
        with self._lock:
            slabs = self._kept.get(key)
            if slabs is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return slabs

    def put(self, key: str, slabs: list[Tensor], *, network: str = "", version: str = "") -> None:
        """Keep the embeddings of a volume's slabs.

        Args:
            key: name of the volume, as seen by this network.
            slabs: embeddings.
            network: name of the network; what other versions of it computed is forgotten.
            version: of its weights.
        """
        if self._size(slabs) > self.max_bytes:
            return
        with self._lock:
            for other in [k for k, (n, v) in self._versions.items() if n == network and v != version]:
                self._forget(other)
            self._kept[key] = slabs
            self._kept.move_to_end(key)
            if network:
                self._versions[key] = (network, version)
            while self.bytes > self.max_bytes:
                self._forget(next(iter(self._kept)))

    def _forget(self, key: str) -> None:
        self._kept.pop(key, None)
        self._versions.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._versions.clear()


_shared: dict[int, EmbeddingCache] = {}
_shared_lock = threading.Lock()


def shared_cache(max_bytes: int) -> EmbeddingCache | None:
    """The cache of this size that all inferers of the process share; none for 0 bytes.

    A server holds an automatic and a clicking task for one bundle: what one of them has encoded, the other one needs.
    Its process also keeps the memory that it frees for the next request (:func:`medsa_nets.runtime.keep_freed_memory`),
    and computes with as many threads as it has processors (:func:`medsa_nets.machine.limit_threads`): a server does not
    run what a bundle lists under ``initialize``.
    """
    if not max_bytes:
        return None
    limit_threads()
    keep_freed_memory()
    with _shared_lock:
        if max_bytes not in _shared:
            _shared[max_bytes] = EmbeddingCache(max_bytes)
        return _shared[max_bytes]


class PromptInferer(SimpleInferer):
    """MONAI's simple inferer with prompts, mixed precision and a cache; logits come in single precision.

    Args:
        amp: precision, ``auto``, true or false (:func:`~medsa_nets.precision.choose_amp`).
        cache: keeps embeddings of images that are asked for again; none computes them anew.
        precomputed: folder of embeddings from ``python -m medsa_nets precompute``; none computes them.
    """

    def __init__(
        self, amp: Amp = False, cache: EmbeddingCache | None = None, precomputed: str | Path | None = None
    ) -> None:
        super().__init__()
        self.amp = read_amp(amp)
        self.cache = cache
        self.precomputed = precomputed

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
        asked = prompts_of_batch(inputs, prompts)
        inputs = plain(inputs)
        with autocast(self.amp, inputs.device):
            medsa = unwrap(network)
            if not isinstance(medsa, MedSA) or medsa.training:  # dropout answers anew each time
                return network(inputs, *args, **Prompts.batched(asked)).float()
            _read_precomputed(medsa, self.precomputed)
            in_order = medsa.click_feedback is not None and medsa.click_feedback.trained
            if self.cache is None and not in_order:
                return network(inputs, *args, **Prompts.batched(asked)).float()
            if in_order:
                return answer_in_order(medsa, self._embed(inputs, medsa), inputs, asked)
        return self.decode(inputs, medsa, asked)

    def decode(self, inputs: Tensor, network: MedSA, prompts: Sequence[Prompts]) -> Tensor:
        """Answer all prompts of each image at once, in one pass through the decoder: logits (B, K, H, W)."""
        inputs = plain(inputs)
        with autocast(self.amp, inputs.device):
            return network.decode(self._embed(inputs, network), **Prompts.batched(prompts)).float()

    def _embed(self, inputs: Tensor, medsa: MedSA) -> Tensor:
        """Embedding of images, from the cache where it is there."""
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


class SlabInferer(Inferer):
    """Segment volumes by slabs of slices, whole in plane, that overlap along depth and are blended.

    Each slab is encoded once, whatever the number of classes and prompts. Prompts reach every slab: one that holds no
    click learns how far away it lies. With a cache, a second call on the same volume runs the decoder alone.

    Args:
        slab_depth: slices of a slab.
        overlap: share of a slab that the next one repeats, in [0, 1).
        sw_batch_size: slabs that are encoded and decoded at once.
        amp: precision, ``auto``, true or false (:func:`~medsa_nets.precision.choose_amp`).
        sw_device: where slabs are computed; none takes the volume's device.
        device: where the result is put together; none takes the volume's device.
        cache: keeps embeddings; none computes them anew.
        every_class: whether the result of prompts for some classes has a channel for every class of the network.
        others: with ``every_class``, what the classes hold that were not asked for: ``absent`` (nothing), or
            ``automatic``: what they hold without prompts, less the voxels of the classes that were asked for.
        spread: whether prompts are answered from the slabs that hold them outwards, each class as long as its mask
            reaches the last slice of a slab, and not beyond. A click then costs as many slabs as the organ has. The
            next slab gets a click of its own, in the middle of what the one before it found where the two meet. With
            ``others="automatic"``, a mask of clicks on a class goes on only where the automatic mask of that class
            shows it too (Dice of 0.5 or more where two slabs meet), unless that shows nothing of it at the clicks.
        mirror_axes: axes (0 rows, 1 columns, 2 slices) along which the volume and its prompts are mirrored too; the
            logits are the mean over the volume and its mirror images, one for each combination of axes, and each costs
            what the volume costs. For tasks that train on mirror images.
        progress: whether a bar shows the slabs.
        precomputed: folder of embeddings from ``python -m medsa_nets precompute``; none computes them.
        component_share: of automatic masks, connected components smaller than this share of their class's largest one
            are dropped (:func:`~medsa_nets.transforms.keep_main_components`); 0 keeps all. What prompts ask for is not
            touched.

    Raises:
        ValueError: when a setting is out of range.
    """

    def __init__(
        self,
        slab_depth: int = 16,
        overlap: float = 0.25,
        sw_batch_size: int = 1,
        amp: Amp = False,
        sw_device: str | torch.device | None = None,
        device: str | torch.device | None = None,
        cache: EmbeddingCache | None = None,
        every_class: bool = False,
        others: str = "absent",
        spread: bool = False,
        mirror_axes: Sequence[int] = (),
        progress: bool = False,
        component_share: float = 0.0,
        precomputed: str | Path | None = None,
    ) -> None:
        super().__init__()
        if slab_depth < 1 or sw_batch_size < 1:
            raise ValueError(f"slab_depth and sw_batch_size must be 1 or more, got {slab_depth} and {sw_batch_size}.")
        if not 0.0 <= overlap < 1.0:
            raise ValueError(f"overlap must lie in [0, 1), got {overlap}.")
        if others not in ("absent", "automatic"):
            raise ValueError(f"others must be absent or automatic, got {others!r}.")
        if len(set(mirror_axes)) < len(mirror_axes) or not set(mirror_axes) <= {0, 1, 2}:
            raise ValueError(f"mirror_axes must hold 0, 1 or 2, each once at most, got {list(mirror_axes)}.")
        if not 0.0 <= component_share <= 1.0:
            raise ValueError(f"component_share must lie between 0 and 1, got {component_share}.")
        self.slab_depth = slab_depth
        self.overlap = overlap
        self.sw_batch_size = sw_batch_size
        self.amp = read_amp(amp)
        self.sw_device = sw_device
        self.device = device
        self.cache = cache
        self.every_class = every_class
        self.others = others
        self.spread = spread
        self.component_share = component_share
        self.mirror_axes = tuple(mirror_axes)
        self.progress = progress
        self.precomputed = precomputed

    def starts(self, depth: int) -> list[int]:
        """First slice of each slab of a volume of ``depth`` slices; the last slab ends with the volume."""
        if depth <= self.slab_depth:
            return [0]
        step = max(1, round(self.slab_depth * (1.0 - self.overlap)))
        count = math.ceil((depth - self.slab_depth) / step)
        return [min(i * step, depth - self.slab_depth) for i in range(count + 1)]

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        image_key: str | None = None,
        prompts: Prompts | Sequence[Prompts] | None = None,
    ) -> Tensor:
        """Segment volumes.

        Args:
            inputs: (B, C, H, W, D) with intensities in [0, 1].
            network: a :class:`~medsa_nets.networks.VolumeMedSA`, a wrapper with it as ``module``, or a TorchScript
                export of it.
            args: not used; MONAI's engines pass it.
            image_key: name of the volume in the cache; none takes the SHA-256 of its values.
            prompts: of each volume, or of the only one, in its voxel indices; none takes those that travel with the
                volumes (:func:`~medsa_nets.prompts.with_prompts`), and segments automatically where there are none.

        Returns:
            Mask logits (B, K, H, W, D), single precision.

        Raises:
            ValueError: when the volume has another shape, or one that earlier masks can't be mirrored in, or there are
                prompts for another number of volumes.
        """
        medsa: Any = unwrap(network)
        if not isinstance(medsa, VolumeMedSA) and getattr(medsa, "original_name", "") != VolumeMedSA.__name__:
            raise ValueError(
                f"SlabInferer needs a network built with spatial_dims=3, got {type(medsa).__name__}. For another "
                "network take monai.inferers.SlidingWindowInferer."
            )
        if inputs.dim() != 5:
            raise ValueError(f"the volume must have shape (B, C, H, W, D), got {tuple(inputs.shape)}.")
        asked = prompts_of_batch(inputs, prompts)
        if isinstance(medsa, VolumeMedSA) and not medsa.training:
            _read_precomputed(medsa, self.precomputed)
        release_freed_memory()  # reading and resampling a large volume takes more than its slabs do
        inputs = plain(inputs)
        volumes = []
        for index, own in enumerate(asked):
            key = None if image_key is None else f"{image_key} {index}"
            images = [self._slabs(inputs[index : index + 1], medsa, key, axes) for axes in self._mirrorings()]
            expect_encodings(medsa, sum(len(image.groups) for image in images))
            volumes.append(self._answer(images, own))
            if any(image.encoded for image in images):
                release_freed_memory()
        return torch.cat(volumes)

    def _slabs(self, volume: Tensor, network: VolumeMedSA, key: str | None, axes: tuple[int, ...]) -> Slabs:
        """Slabs of a volume, or of its mirror image along ``axes``; one that keeps volumes open has its own."""
        return Slabs(self, volume, network, key, axes)

    def _mirrorings(self) -> list[tuple[int, ...]]:
        """Axes along which each image of a volume is mirrored; first none."""
        return [a for count in range(len(self.mirror_axes) + 1) for a in combinations(self.mirror_axes, count)]

    @staticmethod
    def _mean(images: list[Slabs], prompts: Prompts, answer: Answer) -> Tensor:
        """Mean over the volume and its mirror images of what ``answer`` makes of each."""
        answers = (image.mirror_back(answer(image, image.mirror_prompts(prompts))) for image in images)
        logits = next(answers)
        for other in answers:
            logits = logits + other
        return logits / len(images) if len(images) > 1 else logits

    def _answer(self, images: list[Slabs], prompts: Prompts) -> Tensor:
        automatic = self.every_class and self.others == "automatic"
        if not prompts:
            logits = self._mean(images, prompts, self._automatic if automatic else self._segment)
            return keep_main_components(logits, self.component_share)
        outwards = self.spread and not prompts.automatic
        logits = self._mean(images, prompts, self._spread_sets if outwards else self._segment)
        if not self.every_class or prompts.classes is None:
            return logits
        others = self._mean(images, Prompts(), self._automatic) if automatic else None
        if others is not None:
            others = keep_main_components(others, self.component_share)
        return all_classes(logits, prompts.classes, images[0].network.num_classes, others=others)

    def _automatic(self, slabs: Slabs, prompts: Prompts) -> Tensor:
        """Logits of every class without prompts (``prompts`` is empty), kept beside the embeddings."""
        cache = slabs.cache
        if cache is None:
            return self._segment(slabs, prompts)
        key = f"automatic {self.overlap} {slabs.key}"
        known = cache.get(key)
        if known is not None:
            return known[0].to(slabs.place_out)
        logits = self._segment(slabs, prompts)
        kept = logits if cache.device is None else logits.to(cache.device)
        cache.put(key, [kept], network=slabs.name, version=slabs.version)
        return logits

    def _segment(self, slabs: Slabs, prompts: Prompts) -> Tensor:
        """Decode every slab."""
        groups = range(len(slabs.groups))
        bar = tqdm(groups, desc="slabs", disable=not self.progress or len(groups) < 2, leave=False)
        return self._blend(slabs, ((g, self._decode(slabs, g, prompts)) for g in bar))

    def _spread_sets(self, slabs: Slabs, prompts: Prompts) -> Tensor:
        """Answer each prompt set from its own slabs outwards."""
        logits = torch.cat([self._spread(slabs, prompts.select([k])) for k in range(prompts.sets)], dim=1)
        slabs.finish()
        return logits

    def _spread(self, slabs: Slabs, prompts: Prompts) -> Tensor:
        """Decode the slabs that hold prompts, then their neighbours as long as the mask goes on there."""
        waiting = [(g, prompts) for g in slabs.holding(prompts)]
        answers: dict[int, Tensor] = {}
        automatic: Look | None = None
        while waiting:
            g, own = waiting.pop()
            if g in answers:
                continue
            logits = self._decode(slabs, g, own)
            if not answers:
                automatic = self._witness(slabs, prompts, logits, g)
            answers[g] = logits
            for n, edge in ((g - 1, logits[0, ..., 0]), (g + 1, logits[-1, ..., -1])):
                if not 0 <= n < len(slabs.groups) or not bool((edge > 0).any()):
                    continue
                if automatic is None or self._goes_on(slabs, logits, automatic, g, n):
                    waiting.append((n, self._hand_on(slabs, prompts, logits, g, n)))
        return self._blend(slabs, sorted(answers.items()))

    def _witness(self, slabs: Slabs, prompts: Prompts, logits: Tensor, g: int) -> Look | None:
        """Automatic mask of the class that was clicked; none where it knows nothing of what the clicks show.

        A click that is handed on from slab to slab says that the organ is there; without another opinion, a mask that
        leaves the organ once would follow whatever it has got into through the whole volume.
        """
        if self.others != "automatic" or prompts.boxes is not None or prompts.points is None or prompts.classes is None:
            return None
        index = int(prompts.classes[0])
        if index < 0:
            return None
        mask = self._automatic_mask(slabs, index)
        own = torch.stack([mask(range(start, start + slabs.depth)) for start in slabs.groups[g]])
        return mask if bool((own & (logits[:, 0] > 0)).any()) else None

    def _automatic_mask(self, slabs: Slabs, index: int) -> Look:
        """Automatic mask (H, W, slices) of a class on some slices; where it is all that is asked for, no more of it is
        computed than the slabs that hold these slices."""
        if self.every_class and self.others == "automatic":  # all of it is part of the answer
            whole = self._automatic(slabs, Prompts())[0, index] > 0
            return lambda slices: whole[..., slices.start : slices.stop]
        known: dict[int, Tensor] = {}

        def look(slices: range) -> Tensor:
            groups = [g for g in range(len(slabs.groups)) if slabs.holds(g, slices)]
            for g in groups:
                if g not in known:
                    known[g] = self._automatic_slabs(slabs, g, index)
            logits = self._blend(slabs, [(g, known[g]) for g in groups])
            return logits[0, 0, ..., slices.start : slices.stop] > 0

        return look

    def _automatic_slabs(self, slabs: Slabs, g: int, index: int) -> Tensor:
        """Logits (S, 1, H, W, slab depth) of a class without prompts, kept beside the embeddings."""
        key = f"automatic {index} of slabs {g} of {slabs.key}"
        found = slabs.cache.get(key) if slabs.cache is not None else None
        if found is not None:
            return found[0].to(slabs.place_out)
        logits = self._decode(slabs, g, Prompts(classes=torch.tensor([index])))
        if slabs.cache is not None:
            kept = logits if slabs.cache.device is None else logits.to(slabs.cache.device)
            slabs.cache.put(key, [kept], network=slabs.name, version=slabs.version)
        return logits

    def _goes_on(self, slabs: Slabs, logits: Tensor, automatic: Look, g: int, n: int) -> bool:
        """Whether the automatic mask shows what slabs ``g`` found where they meet slabs ``n``."""
        s, here, shared = self._meeting(slabs, g, n)
        found = logits[s, 0, :, :, shared.start - here : shared.stop - here] > 0
        there = automatic(shared)
        return float(compute_dice(found[None, None], there[None, None], ignore_empty=False)) >= AGREEMENT

    @staticmethod
    def _meeting(slabs: Slabs, g: int, n: int) -> tuple[int, int, range]:
        """Slab of ``g`` beside ``n``: its place, its first slice, and its slices where the two overlap, or touch."""
        s, here = (0, slabs.groups[g][0]) if n < g else (-1, slabs.groups[g][-1])
        shared = range(max(here, slabs.groups[n][0]), min(here, slabs.groups[n][-1]) + slabs.depth)
        if not shared:
            edge = here if n < g else here + slabs.depth - 1
            shared = range(edge, edge + 1)
        return s, here, shared

    @staticmethod
    def _hand_on(slabs: Slabs, prompts: Prompts, logits: Tensor, g: int, n: int) -> Prompts:
        """Prompts of the neighbouring slabs ``n``: clicks, and one more in the middle of what slabs ``g`` found there.

        A slab far from the user's clicks would have to trace an organ from a click that lies many slices away.
        """
        if prompts.boxes is not None or prompts.points is None or prompts.labels is None:
            return prompts
        s, here, shared = SlabInferer._meeting(slabs, g, n)
        z = shared[len(shared) // 2]
        plane = (logits[s, 0, :, :, z - here] > 0).cpu().numpy()
        if not plane.any():
            return prompts
        depth = ndimage.distance_transform_edt(np.pad(plane, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        return prompts.with_points(prompts.points.new_tensor([[[row, column, z]]]), prompts.labels.new_ones(1, 1))

    def _decode(self, slabs: Slabs, g: int, prompts: Prompts) -> Tensor:
        """Logits (S, K, H, W, slab depth) of the slabs of a group, where they are put together."""
        embeddings = slabs.embeddings(g)
        prompts = prompts.to(slabs.place)
        own = Prompts.batched([prompts.shift(start, slabs.depth) for start in slabs.groups[g]])
        with autocast(self.amp, slabs.place):
            logits = slabs.network.decode(embeddings.to(slabs.place), **own)
        height, width = slabs.volume.shape[2:4]
        return logits.float()[:, :, :height, :width].to(slabs.place_out)

    @staticmethod
    def _blend(slabs: Slabs, answers: Iterable[tuple[int, Tensor]], absent: float = ABSENT) -> Tensor:
        """Weighted mean of overlapping slabs, ``absent`` where there is none."""
        importance = compute_importance_map((slabs.depth,), mode="gaussian", sigma_scale=0.25, device="cpu").float()
        importance = importance.clamp_min(1e-3)
        result: Tensor | None = None
        total = torch.zeros(slabs.volume.shape[4])
        for g, logits in answers:
            if result is None:
                shape = (1, logits.shape[1], *logits.shape[2:4], len(total))
                result = torch.zeros(shape, device=slabs.place_out)
            for start, own in zip(slabs.groups[g], logits):
                result[0, ..., start : start + slabs.depth] += own * importance.to(own.device)
                total[start : start + slabs.depth] += importance
        assert result is not None
        seen = (total > 0).to(result.device)
        result /= torch.where(total > 0, total, torch.ones_like(total)).to(result.device)
        return result if bool(seen.all()) else torch.where(seen, result, torch.full_like(result, absent))


class Slabs:
    """The slabs of a volume or a mirror image of it, in groups that are encoded together when they are asked for."""

    def __init__(
        self,
        settings: SlabInferer,
        volume: Tensor,
        network: VolumeMedSA,
        image_key: str | None,
        mirrored: tuple[int, ...] = (),
    ) -> None:
        self.settings = settings
        self.mirrored = mirrored
        self.volume = self.mirror_back(volume)
        self.network = network
        self.depth = min(settings.slab_depth, volume.shape[4])
        self.place = torch.device(settings.sw_device) if settings.sw_device is not None else volume.device
        self.place_out = torch.device(settings.device) if settings.device is not None else volume.device
        starts, size = settings.starts(volume.shape[4]), settings.sw_batch_size
        self.groups = [starts[i : i + size] for i in range(0, len(starts), size)]
        self.known: list[Tensor] | None = None
        self.new: dict[int, Tensor] = {}
        self.room = 0
        self.encoded = False
        self.key = self.name = self.version = ""
        self.cache = None if network.training else settings.cache  # dropout answers anew each time
        if self.cache is not None:
            self.name, self.version = network_name(network), adapter_key(network)
            name = tensor_sha256(self.volume) if image_key is None else f"{image_key} {mirrored}"
            precision = choose_amp(settings.amp, self.place).name
            self.key = f"{name} {self.depth} {starts} {precision} {self.name} {self.version}"
            self.known = self.cache.get(self.key)
            self.room = self.cache.max_bytes

    def mirror_back(self, volume: Tensor) -> Tensor:
        """The mirror image of a volume, or the volume of a mirror image."""
        return volume.flip([axis + 2 for axis in self.mirrored]) if self.mirrored else volume

    def mirror_prompts(self, prompts: Prompts) -> Prompts:
        """Prompts of the volume as this image of it has them."""
        size = self.volume.shape[2:]
        uneven = size[0] % self.network.stride or size[1] % self.network.stride
        if self.mirrored and prompts.masks is not None and uneven:
            raise ValueError(  # they cover the padding too, which lies at the end of a mirror image as well
                f"mirror_axes with masks needs rows and columns in multiples of {self.network.stride}, got "
                f"{tuple(size)}. Pad the volume and its masks, or leave mirror_axes empty."
            )
        return prompts.mirror(self.mirrored, size)

    def holding(self, prompts: Prompts) -> list[int]:
        """Groups that hold a click or a part of a box; the first one where none does."""
        slices: set[int] = set()
        if prompts.points is not None and prompts.labels is not None:
            slices.update(int(z) for z in prompts.points[..., 2][prompts.labels >= 0].round().tolist())
        if prompts.boxes is not None:
            for box in prompts.boxes.round().long().tolist():
                slices.update(range(box[2], box[5] + 1))
        last = self.volume.shape[4] - 1
        slices = {min(max(z, 0), last) for z in slices} or {0}
        return [g for g in range(len(self.groups)) if self.holds(g, slices)]

    def holds(self, g: int, slices: Iterable[int]) -> bool:
        """Whether a group holds one of some slices."""
        return any(start <= z < start + self.depth for start in self.groups[g] for z in slices)

    def embeddings(self, g: int) -> Tensor:
        """Embeddings (S, 256, h, w, slab depth) of a group, from the cache or new."""
        cache = self.cache
        first = sum(len(group) for group in self.groups[:g])
        if self.known is not None:
            return torch.cat(self.known[first : first + len(self.groups[g])])
        if g in self.new:
            return self.new[g]
        embeddings = self._encode(self.groups[g])
        if cache is not None:
            self.room -= embeddings.numel() * embeddings.element_size()
            if self.room < 0:  # too large to be kept: memory stays bounded
                self.new.clear()
            else:
                self.new[g] = embeddings.to(cache.device) if cache.device is not None else embeddings
                if len(self.new) == len(self.groups):
                    self.known = [slab[None] for i in range(len(self.groups)) for slab in self.new[i]]
                    cache.put(self.key, self.known, network=self.name, version=self.version)
        return embeddings

    def finish(self) -> None:
        """Encode what no prompt needed, for the next one."""
        if self.cache is not None and self.known is None:
            for g in range(len(self.groups)):
                if self.room >= 0 and self.known is None:
                    self.embeddings(g)

    def _encode(self, group: list[int]) -> Tensor:
        stride = self.network.stride
        if not self.encoded:
            logger.info("encode %s in slabs of %d slices", "x".join(map(str, self.volume.shape[2:])), self.depth)
        self.encoded = True
        slabs = torch.cat([self.volume[..., start : start + self.depth] for start in group]).to(self.place)
        pad = (0, 0, 0, -slabs.shape[3] % stride, 0, -slabs.shape[2] % stride)
        if any(pad):
            slabs = F.pad(slabs, pad)
        with autocast(self.settings.amp, self.place):
            return self.network.encode_image(slabs)


def _read_precomputed(network: MedSA, folder: str | Path | None) -> None:
    """Let a network take embeddings from a folder, unless it takes them from somewhere already."""
    if folder and "encode_image" not in network.__dict__:
        read_embeddings(network, folder)


def network_name(network: nn.Module) -> str:
    """What tells a network from another one, whatever its adapter has learned: its identity and its back end."""
    return f"{tensor_sha256(network.get_buffer('identity'))[:16]} {backend_of(network)}"


def adapter_key(network: nn.Module) -> str:
    """What tells an adapter from another one: the SHA-256 of its trained parameters and its identity."""
    return tensor_sha256(*network.state_dict().values())[:16]
