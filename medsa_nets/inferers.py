"""Inference of volumes: slabs along depth, each encoded once, blended; embeddings kept for the next click."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from monai.inferers import Inferer
from torch import Tensor, nn
from tqdm import tqdm

from medsa_nets.engines import plain
from medsa_nets.networks import VolumeMedSA
from medsa_nets.transforms import all_classes


def tensor_sha256(*tensors: Tensor) -> str:
    """SHA-256 of tensors' shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class EmbeddingCache:
    """Image embeddings of the volumes that were used last.

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

    @property
    def bytes(self) -> int:
        """Memory that the kept embeddings take, in bytes."""
        return sum(self._size(slabs) for slabs in self._kept.values())

    @staticmethod
    def _size(slabs: list[Tensor]) -> int:
        return sum(slab.numel() * slab.element_size() for slab in slabs)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> list[Tensor] | None:
        """Embeddings of the slabs of a volume, or none."""
        slabs = self._kept.get(key)
        if slabs is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return slabs

    def put(self, key: str, slabs: list[Tensor]) -> None:
        """Keep the embeddings of a volume's slabs."""
        if self._size(slabs) > self.max_bytes:
            return
        self._kept[key] = slabs
        self._kept.move_to_end(key)
        while self.bytes > self.max_bytes:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


class SlabInferer(Inferer):
    """Segment volumes by slabs of slices, whole in plane, that overlap along depth and are blended.

    Each slab is encoded once, whatever the number of classes and prompts. Prompts reach every slab: one that holds no
    click learns how far away it lies. With a cache, a second call on the same volume runs the decoder alone.

    Args:
        slab_depth: slices of a slab.
        overlap: share of a slab that the next one repeats, in [0, 1).
        sw_batch_size: slabs that are encoded and decoded at once.
        amp: whether to compute in bfloat16 where that is safe (autocast), on a CPU or a GPU.
        sw_device: where slabs are computed; none takes the volume's device.
        device: where the result is put together; none takes the volume's device.
        cache: keeps embeddings; none computes them anew.
        every_class: whether the result of prompts for some classes has a channel for every class of the network, with
            those that were not asked for absent.
        progress: whether a bar shows the slabs.

    Raises:
        ValueError: when a setting is out of range.
    """

    def __init__(
        self,
        slab_depth: int = 16,
        overlap: float = 0.25,
        sw_batch_size: int = 1,
        amp: bool = False,
        sw_device: str | torch.device | None = None,
        device: str | torch.device | None = None,
        cache: EmbeddingCache | None = None,
        every_class: bool = False,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if slab_depth < 1 or sw_batch_size < 1:
            raise ValueError(f"slab_depth and sw_batch_size must be 1 or more, got {slab_depth} and {sw_batch_size}.")
        if not 0.0 <= overlap < 1.0:
            raise ValueError(f"overlap must lie in [0, 1), got {overlap}.")
        self.slab_depth = slab_depth
        self.overlap = overlap
        self.sw_batch_size = sw_batch_size
        self.amp = amp
        self.sw_device = sw_device
        self.device = device
        self.cache = cache
        self.every_class = every_class
        self.progress = progress

    def starts(self, depth: int) -> list[int]:
        """First slice of each slab of a volume of ``depth`` slices; the last slab ends with the volume."""
        if depth <= self.slab_depth:
            return [0]
        step = max(1, round(self.slab_depth * (1.0 - self.overlap)))
        count = math.ceil((depth - self.slab_depth) / step)
        return [min(i * step, depth - self.slab_depth) for i in range(count + 1)]

    def __call__(
        self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, image_key: str | None = None, **kwargs: Any
    ) -> Tensor:
        """Segment volumes.

        Args:
            inputs: (B, C, H, W, D) with intensities in [0, 1].
            network: a :class:`~medsa_nets.networks.VolumeMedSA`, or a wrapper with it as ``module``.
            args: not used; MONAI's engines pass it.
            image_key: name of the volume in the cache; none takes the SHA-256 of its values.
            kwargs: prompts in voxel indices of the volume, as :meth:`~medsa_nets.networks.VolumeMedSA.decode` takes
                them; none segments automatically.

        Returns:
            Mask logits (B, K, H, W, D), single precision.

        Raises:
            ValueError: when the volume has another shape.
        """
        medsa = getattr(network, "module", network)
        if not isinstance(medsa, VolumeMedSA):
            raise ValueError(
                f"SlabInferer needs a network built with spatial_dims=3, got {type(medsa).__name__}. For another "
                "network take monai.inferers.SlidingWindowInferer."
            )
        inputs = plain(inputs)
        if inputs.dim() != 5:
            raise ValueError(f"the volume must have shape (B, C, H, W, D), got {tuple(inputs.shape)}.")
        prompts = {name: plain(value) for name, value in kwargs.items() if value is not None}
        volumes = []
        for index in range(inputs.shape[0]):
            own = {name: value if name == "classes" else value[index : index + 1] for name, value in prompts.items()}
            key = None if image_key is None else f"{image_key} {index}"
            volumes.append(self._segment(inputs[index : index + 1], medsa, own, key))
        logits = torch.cat(volumes)
        if self.every_class and "classes" in prompts:
            logits = all_classes(logits, prompts["classes"], medsa.num_classes)
        return logits

    def _segment(self, volume: Tensor, network: VolumeMedSA, prompts: dict[str, Tensor], key: str | None) -> Tensor:
        height, width, depth = volume.shape[2:]
        place = torch.device(self.sw_device) if self.sw_device is not None else volume.device
        pad = [-height % network.stride, -width % network.stride]
        masks = prompts.pop("masks", None)
        slab_depth = min(self.slab_depth, depth)
        starts = self.starts(depth)
        importance = compute_importance_map((slab_depth,), mode="gaussian", sigma_scale=0.25, device="cpu").float()
        importance = importance.clamp_min(1e-3)
        total = torch.zeros(depth)
        for start in starts:
            total[start : start + slab_depth] += importance
        result: Tensor | None = None
        place_out = torch.device(self.device) if self.device is not None else volume.device
        for group, embeddings in self._embeddings(volume, network, starts, slab_depth, pad, place, key):
            size = len(group)
            own = {name: self._for_slabs(name, value, group).to(place) for name, value in prompts.items()}
            if masks is not None:
                own["masks"] = torch.cat([masks[..., s : s + slab_depth] for s in group]).to(place)
            with torch.autocast(place.type, dtype=torch.bfloat16, enabled=self.amp):
                logits = network.decode(embeddings.to(place), **own)
            logits = logits.float()[:, :, :height, :width].to(place_out)
            if result is None:
                result = torch.zeros(1, logits.shape[1], height, width, depth, device=place_out)
            for i in range(size):
                weight = (importance / total[group[i] : group[i] + slab_depth]).to(place_out)
                result[0, ..., group[i] : group[i] + slab_depth] += logits[i] * weight
        assert result is not None
        return result

    @staticmethod
    def _for_slabs(name: str, value: Tensor, starts: list[int]) -> Tensor:
        """Prompts of the volume as each slab counts its slices."""
        if name in ("classes", "point_labels"):
            return value if name == "classes" else value.expand(len(starts), -1, -1)
        shift = torch.zeros(value.shape[-1])
        if name == "point_coords":
            shift[2] = 1.0
        else:  # boxes
            shift[2] = shift[5] = 1.0
        shift = shift.to(value.device)
        return torch.cat([value.float() - start * shift for start in starts])

    def _embeddings(
        self,
        volume: Tensor,
        network: VolumeMedSA,
        starts: list[int],
        slab_depth: int,
        pad: list[int],
        place: torch.device,
        key: str | None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Groups of slabs (first slices) with their embeddings (S, 256, h, w, slab_depth), from the cache or new."""
        groups = [starts[i : i + self.sw_batch_size] for i in range(0, len(starts), self.sw_batch_size)]
        bar = tqdm(groups, desc="slabs", disable=not self.progress or len(groups) < 2, leave=False)
        if self.cache is None:
            for group in bar:
                yield group, self._encode(volume, network, group, slab_depth, pad, place)
            return
        if key is None:
            key = tensor_sha256(volume)
        key = f"{key} {slab_depth} {starts} {self.amp} {adapter_key(network)}"
        known = self.cache.get(key)
        kept: list[Tensor] | None = []
        room = self.cache.max_bytes
        for i, group in enumerate(bar):
            if known is not None:
                yield group, torch.cat(known[i * self.sw_batch_size : i * self.sw_batch_size + len(group)])
                continue
            embeddings = self._encode(volume, network, group, slab_depth, pad, place)
            if kept is not None:
                target = self.cache.device if self.cache.device is not None else embeddings.device
                kept += [embeddings[j : j + 1].to(target) for j in range(len(group))]
                room -= embeddings.numel() * embeddings.element_size()
                if room < 0:  # too large to be kept: memory stays bounded
                    kept = None
            yield group, embeddings
        if known is None and kept is not None:
            self.cache.put(key, kept)

    def _encode(
        self,
        volume: Tensor,
        network: VolumeMedSA,
        group: list[int],
        slab_depth: int,
        pad: list[int],
        place: torch.device,
    ) -> Tensor:
        slabs = torch.cat([volume[..., start : start + slab_depth] for start in group]).to(place)
        if pad[0] > 0 or pad[1] > 0:
            slabs = F.pad(slabs, (0, 0, 0, pad[1], 0, pad[0]))
        with torch.autocast(place.type, dtype=torch.bfloat16, enabled=self.amp):
            return network.encode_image(slabs)


def adapter_key(network: nn.Module) -> str:
    """What tells an adapter from another one: the SHA-256 of its encoder's trained parameters and its identity."""
    trained = [tensor for name, tensor in network.state_dict().items() if name.startswith("image_encoder.")]
    return tensor_sha256(*trained, network.get_buffer("identity"))[:16]
