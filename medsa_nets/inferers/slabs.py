"""Volumes in slabs of slices: their geometry, their embeddings, and how their answers are blended."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from monai.inferers import Inferer
from torch import Tensor
from tqdm import tqdm

from medsa_nets.backends import expect_encodings
from medsa_nets.checksums import tensor_sha256
from medsa_nets.inferers.cache import EmbeddingCache, adapter_key, network_name, take_precomputed
from medsa_nets.networks import VolumeMedSA
from medsa_nets.precision import Amp, autocast, choose_amp, read_amp
from medsa_nets.prompts import Prompts, prompts_of_batch
from medsa_nets.runtime import plain, release_freed_memory, unwrap
from medsa_nets.transforms import ABSENT

logger = logging.getLogger("medsa_nets.inferers")
AROUND = frozenset({"spread", "mirror_axes", "component_share", "every_class", "others"})  # settings of those around
makers: list[Callable[..., Any]] = []  # volume_inferer, from the module that knows those around it


class VolumeInferer(Inferer):
    """Base class of inferers of volumes, which can be nested (:class:`Around`).

    A volume is opened once, as one or more images of it (itself and what mirrors it), each in slabs whose embeddings
    every answer shares.
    """

    def open(self, volume: Tensor, network: VolumeMedSA, key: str | None, axes: tuple[int, ...] = ()) -> list[Slabs]:
        """The images of a volume that are answered.

        Args:
            volume: (1, C, H, W, D) with intensities in [0, 1].
            network: the network.
            key: name of the volume in the cache; none takes the SHA-256 of its values.
            axes: along which the volume is mirrored.
        """
        raise NotImplementedError

    def answer(self, images: list[Slabs], prompts: Prompts) -> Tensor:
        """Logits (1, K, H, W, D) of the prompts, or of every class where there are none."""
        raise NotImplementedError

    def automatic(self, images: list[Slabs]) -> Tensor:
        """Logits of every class without prompts, kept beside the embeddings."""
        raise NotImplementedError

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
                f"{type(self).__name__} needs a network built with spatial_dims=3, got {type(medsa).__name__}. For "
                "another network take monai.inferers.SlidingWindowInferer."
            )
        if inputs.dim() != 5:
            raise ValueError(f"the volume must have shape (B, C, H, W, D), got {tuple(inputs.shape)}.")
        asked = prompts_of_batch(inputs, prompts)
        if isinstance(medsa, VolumeMedSA) and not medsa.training:
            take_precomputed(medsa, slab_inferer(self).precomputed)
        release_freed_memory()  # reading and resampling a large volume takes more than its slabs do
        inputs = plain(inputs)
        volumes = []
        for index, own in enumerate(asked):
            key = None if image_key is None else f"{image_key} {index}"
            images = self.open(inputs[index : index + 1], medsa, key)
            expect_encodings(medsa, sum(len(image.groups) for image in images))
            volumes.append(self.answer(images, own))
            if any(image.encoded for image in images):
                release_freed_memory()
        return torch.cat(volumes)


class Around(VolumeInferer):
    """An inferer around another one, whose settings it shares.

    Args:
        inferer: the other one.
    """

    def __init__(self, inferer: VolumeInferer) -> None:
        super().__init__()
        self.inferer = inferer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inferer":
            raise AttributeError(name)
        return getattr(self.inferer, name)

    def open(self, volume: Tensor, network: VolumeMedSA, key: str | None, axes: tuple[int, ...] = ()) -> list[Slabs]:
        """The images of a volume that are answered."""
        return self.inferer.open(volume, network, key, axes)

    def answer(self, images: list[Slabs], prompts: Prompts) -> Tensor:
        """Logits (1, K, H, W, D) of the prompts, or of every class where there are none."""
        return self.inferer.answer(images, prompts)

    def automatic(self, images: list[Slabs]) -> Tensor:
        """Logits of every class without prompts, kept beside the embeddings."""
        return self.inferer.automatic(images)


def slab_inferer(inferer: VolumeInferer) -> SlabInferer:
    """The innermost one."""
    while isinstance(inferer, Around):
        inferer = inferer.inferer
    assert isinstance(inferer, SlabInferer)
    return inferer


def rebuilt(inferer: VolumeInferer, change: Callable[[VolumeInferer], VolumeInferer]) -> VolumeInferer:
    """Copies of an inferer and of those inside it, each as ``change`` makes it, from the innermost outwards."""
    own = copy.copy(inferer)
    if isinstance(own, Around):
        own.inferer = rebuilt(own.inferer, change)
    return change(own)


class SlabInferer(VolumeInferer):
    """Segment volumes by slabs of slices, whole in plane, that overlap along depth and are blended.

    Each slab is encoded once, whatever the number of classes and prompts. Prompts reach every slab: one that holds no
    click learns how far away it lies. With a cache, a second call on the same volume runs the decoder alone.

    The settings of those around it (``spread``, ``mirror_axes``, ``component_share``, ``every_class``, ``others``) may
    be given too: what comes back is then as :func:`~medsa_nets.inferers.classes.volume_inferer` makes it.

    Args:
        slab_depth: slices of a slab.
        overlap: share of a slab that the next one repeats, in [0, 1).
        sw_batch_size: slabs that are encoded and decoded at once.
        amp: precision, ``auto``, true or false (:func:`~medsa_nets.precision.choose_amp`).
        cache: keeps embeddings; none computes them anew.
        progress: whether a bar shows the slabs.
        precomputed: folder of embeddings that ``python -m medsa_nets precompute`` computed ahead of time, or none.

    Raises:
        ValueError: when a setting is out of range.
    """

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        """The inferer, or one around it where settings of such are given."""
        if cls is SlabInferer and not AROUND.isdisjoint(settings):
            return makers[0](*args, **settings)
        return super().__new__(cls)

    def __init__(
        self,
        slab_depth: int = 16,
        overlap: float = 0.25,
        sw_batch_size: int = 1,
        amp: Amp = False,
        cache: EmbeddingCache | None = None,
        progress: bool = False,
        precomputed: str | Path | None = None,
    ) -> None:
        super().__init__()
        if slab_depth < 1 or sw_batch_size < 1:
            raise ValueError(f"slab_depth and sw_batch_size must be 1 or more, got {slab_depth} and {sw_batch_size}.")
        if not 0.0 <= overlap < 1.0:
            raise ValueError(f"overlap must lie in [0, 1), got {overlap}.")
        self.slab_depth = slab_depth
        self.overlap = overlap
        self.sw_batch_size = sw_batch_size
        self.amp = read_amp(amp)
        self.cache = cache
        self.progress = progress
        self.precomputed = precomputed

    def starts(self, depth: int) -> list[int]:
        """First slice of each slab of a volume of ``depth`` slices; the last slab ends with the volume."""
        if depth <= self.slab_depth:
            return [0]
        step = max(1, round(self.slab_depth * (1.0 - self.overlap)))
        count = math.ceil((depth - self.slab_depth) / step)
        return [min(i * step, depth - self.slab_depth) for i in range(count + 1)]

    def open(self, volume: Tensor, network: VolumeMedSA, key: str | None, axes: tuple[int, ...] = ()) -> list[Slabs]:
        """The slabs of a volume, or of its mirror image along ``axes``."""
        return [Slabs(self, volume, network, key, axes)]

    def answer(self, images: list[Slabs], prompts: Prompts) -> Tensor:
        """Logits of the prompts, or of every class, from every slab."""
        (slabs,) = images
        groups = range(len(slabs.groups))
        bar = tqdm(groups, desc="slabs", disable=not self.progress or len(groups) < 2, leave=False)
        return self.blend(slabs, ((g, self.decode(slabs, g, prompts)) for g in bar))

    def automatic(self, images: list[Slabs]) -> Tensor:
        """Logits of every class without prompts, kept beside the embeddings."""
        (slabs,) = images
        cache = slabs.cache
        if cache is None:
            return self.answer(images, Prompts())
        key = f"automatic {self.overlap} {slabs.key}"
        known = cache.get(key)
        if known is not None:
            return known[0].to(slabs.place)
        logits = self.answer(images, Prompts())
        kept = logits if cache.device is None else logits.to(cache.device)
        cache.put(key, [kept], network=slabs.name, version=slabs.version)
        return logits

    def automatic_slabs(self, slabs: Slabs, g: int, index: int) -> Tensor:
        """Logits (S, 1, H, W, slab depth) of a class without prompts, kept beside the embeddings."""
        key = f"automatic {index} of slabs {g} of {slabs.key}"
        found = slabs.cache.get(key) if slabs.cache is not None else None
        if found is not None:
            return found[0].to(slabs.place)
        logits = self.decode(slabs, g, Prompts(classes=torch.tensor([index])))
        if slabs.cache is not None:
            kept = logits if slabs.cache.device is None else logits.to(slabs.cache.device)
            slabs.cache.put(key, [kept], network=slabs.name, version=slabs.version)
        return logits

    def decode(self, slabs: Slabs, g: int, prompts: Prompts) -> Tensor:
        """Logits (S, K, H, W, slab depth) of the slabs of a group, where they are put together."""
        embeddings = slabs.embeddings(g)
        prompts = prompts.to(slabs.place)
        own = Prompts.batched([prompts.shift(start, slabs.depth) for start in slabs.groups[g]])
        with autocast(self.amp, slabs.place):
            logits = slabs.network.decode(embeddings.to(slabs.place), **own)
        height, width = slabs.volume.shape[2:4]
        return logits.float()[:, :, :height, :width].to(slabs.place)

    @staticmethod
    def blend(slabs: Slabs, answers: Iterable[tuple[int, Tensor]], absent: float = ABSENT) -> Tensor:
        """Weighted mean of overlapping slabs, ``absent`` where there is none."""
        importance = compute_importance_map((slabs.depth,), mode="gaussian", sigma_scale=0.25, device="cpu").float()
        importance = importance.clamp_min(1e-3)
        result: Tensor | None = None
        total = torch.zeros(slabs.volume.shape[4])
        for g, logits in answers:
            if result is None:
                shape = (1, logits.shape[1], *logits.shape[2:4], len(total))
                result = torch.zeros(shape, device=slabs.place)
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
        self.place = volume.device
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
