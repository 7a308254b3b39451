"""The network behind a session: one image, encoded once, automatic masks and answers to prompts on its own grid."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Compose
from torch import Tensor

from medsa_nets.bundles import Bundle, read
from medsa_nets.checksums import tensor_sha256
from medsa_nets.errors import DataError, WeightsError
from medsa_nets.inferers import (
    AllClassesInferer,
    ClassesInferer,
    EmbeddingCache,
    PromptInferer,
    SlabInferer,
    SpreadInferer,
    VolumeInferer,
    adapter_key,
    network_name,
    rebuilt,
    slab_inferer,
)
from medsa_nets.inferers.slabs import Around
from medsa_nets.interaction.grids import Grids
from medsa_nets.interaction.refinement import Refinement, beside, kept
from medsa_nets.networks import MedSA, VolumeMedSA
from medsa_nets.networks.identity import decode_identity
from medsa_nets.prompts import Prompts
from medsa_nets.prompts.earlier import LIMIT, as_earlier
from medsa_nets.transforms import SeparateClassesd
from medsa_nets.transforms.volumes import ABSENT, MasksToSourceLabeld
from medsa_nets.weights import check_adapter

EMBEDDING_BYTES = 4 * 1024**3


def load_adapter(network: MedSA, path: str | Path) -> None:
    """Load an adapter's file into its network.

    Raises:
        WeightsError: when the file is missing, damaged or another network's.
    """
    state = torch.load(check_adapter(path), map_location="cpu", weights_only=True)
    network.load_state_dict(state.get("model", state))


@dataclass(frozen=True)
class Asked:
    """What a class is asked for, in the network's grid: positions in voxels, oldest first.

    Attributes:
        points: (P, dims).
        labels: (P,): 1 foreground, 0 background.
        box: first and last corner (2 * dims), or none.
    """

    points: np.ndarray
    labels: np.ndarray
    box: np.ndarray | None = None


class Segmenter(Protocol):
    """What a session needs of a network. All logits are float32 on the grid of ``image``."""

    classes: Sequence[str]
    volumes: bool
    exclusive: bool
    refinement: Refinement | None  # what clicks on masks of this adapter mean, where that was learnt

    @property
    def feedback(self) -> bool:
        """Whether the network was trained with earlier masks."""
        ...

    @property
    def prompted(self) -> bool:
        """Whether the network was trained with clicks or boxes."""
        ...

    def open(self, source: Any) -> MetaTensor:
        """Read and preprocess an image: (C, spatial…) in [0, 1], a tensor with affine and history."""
        ...

    def automatic(self, image: MetaTensor) -> Tensor:
        """Logits of every class (K, spatial…) without prompts."""
        ...

    def on_file(self, logits: Tensor, image: MetaTensor) -> np.ndarray:
        """Masks (K, file's spatial…), boolean, of automatic logits, as the bundle would save them."""
        ...

    def decode(self, image: MetaTensor, index: int, asked: Asked, earlier: Tensor | None) -> Tensor:
        """Logits (spatial…) of the network's answer to prompts of a class.

        Args:
            image: from :meth:`open`.
            index: id of the class; below 0, what the prompts show, whatever its class.
            asked: prompts.
            earlier: logits (spatial…) of the answer before this one, or none.
        """
        ...

    def identity(self) -> dict[str, str]:
        """What the answers depend on beside the image: base, its sha256, and the adapter's key."""
        ...


def of_one_class(inferer: VolumeInferer) -> VolumeInferer:
    """A bundle's inferer as sessions ask it: for one class at a time, by prompts that spread from their own slabs."""

    def change(own: VolumeInferer) -> VolumeInferer:
        if isinstance(own, AllClassesInferer):
            return own.inferer
        if isinstance(own, SpreadInferer) and own.automatic_masks == "whole":
            own.automatic_masks = "near"
        if isinstance(own, SlabInferer):
            own.progress = False
            return own if spreads else SpreadInferer(own)  # a click costs as many slabs as the organ has
        return own

    spreads, inner = False, inferer
    while isinstance(inner, Around):
        spreads, inner = spreads or isinstance(inner, SpreadInferer), inner.inferer
    return rebuilt(inferer, change)


class NetworkSegmenter:
    """An adapted network with a bundle's preprocessing and inferer.

    Args:
        network: a :class:`~medsa_nets.networks.MedSA` for images, or a :class:`~medsa_nets.networks.VolumeMedSA`.
        preprocessing: the bundle's transforms, from a path under ``image`` to the network's input; none where images
            are opened that went through them already.
        classes: names of the classes, in the order of their ids.
        inferer: the bundle's; none takes one with usual settings.
        refinement: file of what clicks on masks of this adapter mean; empty: it was not learnt.

    Raises:
        WeightsError: when the refinement is missing or damaged, or for images where the network takes volumes.
        DataError: when the classes are not as many as the network has.
    """

    def __init__(
        self,
        network: MedSA,
        preprocessing: Compose | None,
        classes: Sequence[str],
        inferer: PromptInferer | VolumeInferer | None = None,
        refinement: str = "",
    ) -> None:
        if len(classes) != network.num_classes:
            raise DataError(
                f"{len(classes)} classes are named ({', '.join(classes)}), but the adapter has {network.num_classes}. "
                "Name one for each, in the order of their ids."
            )
        self.network = network.eval()
        self.preprocessing = preprocessing
        self.classes: Sequence[str] = list(classes)
        self.codes: dict[str, Any] = {}  # of the classes, by name, as DICOM writes them: code and meaning of SNOMED CT
        self.volumes = isinstance(network, VolumeMedSA)
        # a label map has one class at each voxel
        overlap = inferer.overlap if isinstance(inferer, ClassesInferer) else True
        self.exclusive = self.volumes or (len(classes) > 1 and not overlap)
        self.refinement = kept(refinement) if refinement else None
        if self.refinement is not None and (self.refinement.dims == 3) != self.volumes:
            raise WeightsError(
                f"{refinement}: it refines clicks in {self.refinement.dims} dimensions; the network does not."
            )
        if inferer is None:
            inferer = SlabInferer() if self.volumes else PromptInferer()
        self.inferer = of_one_class(inferer) if isinstance(inferer, VolumeInferer) else copy.copy(inferer)
        base = slab_inferer(self.inferer) if isinstance(self.inferer, VolumeInferer) else self.inferer
        if base.cache is None:  # one that is empty is one all the same
            base.cache = EmbeddingCache(EMBEDDING_BYTES)

    @property
    def feedback(self) -> bool:
        """Whether the adapter was trained with earlier masks; one that was made without them knows nothing of them."""
        branch = self.network.click_feedback
        return branch is not None and branch.trained

    @property
    def prompted(self) -> bool:
        """Whether the adapter was trained with prompts; of volumes, its ``distant_prompt`` shows it."""
        return self.feedback or not isinstance(self.network, VolumeMedSA) or self.network.distant_prompt.trained

    @classmethod
    def from_bundle(
        cls, bundle: str | Path, overlays: Sequence[str] = (), settings: Mapping[str, Any] | None = None
    ) -> NetworkSegmenter:
        """A bundle's network with its adapter, preprocessing and inferer.

        Args:
            bundle: folder of the bundle.
            overlays: files of its ``configs``, as ``hippocampus.yaml``, laid over ``inference.yaml``.
            settings: keys of the configuration to set, as ``device``, ``amp`` or ``checkpoint``.

        Raises:
            DataError: when there is no such bundle or overlay.
            WeightsError: when the adapter is missing, damaged or another one's.
        """
        opened = Bundle.open(bundle, overlays, {"use_click": True, **(settings or {})}, server=True)
        parser = opened.parser()
        network, checkpoint = read(parser, "network"), read(parser, "checkpoint")
        load_adapter(network, checkpoint)
        inferer, preprocessing = read(parser, "inferer"), read(parser, "preprocessing")
        found = cls(network, preprocessing, opened.classes, getattr(inferer, "inferer", inferer), beside(checkpoint))
        found.codes = dict((opened.value("deploy") or {}).get("codes") or {})
        return found

    def open(self, source: Any) -> MetaTensor:
        """Read and preprocess an image from its path; an image that the network can see stays as it is."""
        if isinstance(source, MetaTensor):
            return source
        if self.preprocessing is None:
            raise DataError(f"{source}: this session takes images that went through the bundle's transforms, no paths.")
        return self.preprocessing({"image": source})["image"]

    @torch.no_grad()
    def automatic(self, image: MetaTensor) -> Tensor:
        """Logits of every class (K, spatial…) without prompts."""
        inputs, cache = self._input(image), self.inferer.cache
        version = adapter_key(self.network)
        turns = self.inferer.turns if isinstance(self.inferer, PromptInferer) else ()
        key = f"session {self.inferer.amp} {turns} {tensor_sha256(inputs)} {version}"
        known = cache.get(key) if cache is not None else None
        if known is not None:
            return known[0]
        logits = self._cut(self.inferer(inputs, self.network)[0], image)
        if cache is not None:
            cache.put(key, [logits], network=network_name(self.network), version=version)
        return logits

    def on_file(self, logits: Tensor, image: MetaTensor) -> np.ndarray:
        """Masks (K, file's spatial…) of automatic logits, as the bundle would save them."""
        if self.volumes:
            pred = MetaTensor(logits, affine=image.affine)
            label = MasksToSourceLabeld("pred")({"image": image, "pred": pred})["pred"][0].numpy()
            return np.stack([label == 1 + index for index in range(len(self.classes))])
        grids = Grids(image)
        place = tuple(slice(0, n) for n in grids.file_shape)
        if self.exclusive:
            pred = torch.stack([grids.on_file(one, place) for one in logits])
            return np.asarray(SeparateClassesd("pred")({"pred": pred})["pred"].numpy() > 0.5)
        return np.stack([(grids.on_file(one.sigmoid(), place) > 0.5).numpy() for one in logits])

    @torch.no_grad()
    def decode(self, image: MetaTensor, index: int, asked: Asked, earlier: Tensor | None) -> Tensor:
        """Logits (spatial…) of the network's answer to prompts of a class, or of none (see :class:`Segmenter`)."""
        if index < 0 and not len(asked.points) and asked.box is None:
            return torch.full(tuple(image.shape[1:]), ABSENT)  # nothing shows what is meant
        points = labels = boxes = masks = None
        if len(asked.points):
            points, labels = (torch.from_numpy(own).float()[None] for own in (asked.points, asked.labels))
        if asked.box is not None:
            boxes = torch.from_numpy(asked.box).float()[None]
        if earlier is not None and self.feedback:
            masks = self._as_earlier(earlier)
        classes = torch.tensor([index]) if index >= 0 else None
        prompts = Prompts(points=points, labels=labels, boxes=boxes, masks=masks, classes=classes)
        inputs = self._input(image)
        if isinstance(self.inferer, PromptInferer):
            return self._cut(self.inferer.decode(inputs, self.network, [prompts])[0], image)[0]
        logits = self._cut(self.inferer(inputs, self.network, prompts=prompts)[0], image)[0]
        if masks is None or earlier is None:
            return logits
        return torch.where(logits == ABSENT, earlier, logits)  # slabs that the answer did not reach hold what they held

    def _as_earlier(self, logits: Tensor) -> Tensor:
        """Logits (H, W[, D]) as the network takes those of an earlier mask, of whole strides: (1, 4 h, 4 w[, D])."""
        stride = self.network.stride
        pad = [0, 0] * (logits.dim() - 2) + [0, -logits.shape[1] % stride, 0, -logits.shape[0] % stride]
        logits = F.pad(logits.float()[None, None], pad, value=-LIMIT)
        return as_earlier(logits, [n // stride for n in logits.shape[2:4]])[0]

    def _input(self, image: MetaTensor) -> Tensor:
        device = next(self.network.parameters()).device
        tensor = image.as_tensor()[None].to(device)
        if self.volumes and self.feedback:  # earlier masks, which may be mirrored, cover whole strides
            stride = self.network.stride
            tensor = F.pad(tensor, (0, 0, 0, -tensor.shape[3] % stride, 0, -tensor.shape[2] % stride))
        return tensor

    @staticmethod
    def _cut(logits: Tensor, image: MetaTensor) -> Tensor:
        """Logits (K, …) without padding, on the CPU."""
        place = (slice(None), *(slice(0, n) for n in image.shape[1:]))
        return logits[place].float().cpu().contiguous()

    def identity(self) -> dict[str, str]:
        """Base, its sha256, and the SHA-256 (16 digits) of the adapter's weights and settings."""
        known = decode_identity(self.network.get_buffer("identity"))
        return {"base": known["base"], "base_sha256": known["sha256"], "adapter_sha256": adapter_key(self.network)}
