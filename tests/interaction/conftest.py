"""A network for tests of sessions: cheap, deterministic, and with no regard for what it is told."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Resized, Spacingd
from scipy import ndimage
from torch import Tensor

from medsa_nets.interaction.grids import Grids
from medsa_nets.interaction.segmenters import Asked


class StandIn:
    """Answers with blobs that depend on image, class and prompts; clicks move them, seldom to where they should be.

    Args:
        volumes: whether images are volumes, on a file grid that is flipped, swapped and coarser than the network's.
        feedback: whether answers depend on the mask before them.
        name: of the adapter.
    """

    def __init__(self, volumes: bool, feedback: bool = True, name: str = "one") -> None:
        self.volumes = self.exclusive = volumes
        self.feedback = self.prompted = feedback
        self.name = name
        self.classes: Sequence[str] = ["liver", "spleen", "aorta"] if volumes else ["lesion"]
        self.decoded = 0
        self.refinement = None

    def open(self, source: Any) -> MetaTensor:
        if isinstance(source, MetaTensor):
            return source
        random = np.random.default_rng(int(str(source).rpartition("_")[2].split(".")[0]))
        if not self.volumes:
            photograph = MetaTensor(torch.from_numpy(random.random((3, 22, 17))).float())
            return Resized("image", (12, 12), anti_aliasing=True)({"image": photograph})["image"]
        affine = np.array([[0, 2.0, 0, 5], [-1.5, 0, 0, 3], [0, 0, 2.5, -4], [0, 0, 0, 1]])
        volume = MetaTensor(torch.from_numpy(random.random((1, 9, 7, 5))).float(), affine=affine)
        volume.meta["original_affine"] = affine
        transforms = Compose([Orientationd("image", "RAS", labels=None), Spacingd("image", (1.5, 1.2, 1.7))])
        return transforms({"image": volume})["image"]

    def _logits(self, image: MetaTensor, *seeds: Any) -> Tensor:
        text = " ".join([str(float(image.as_tensor().sum())), *map(str, seeds)])
        random = np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16))
        noise = ndimage.gaussian_filter(random.normal(size=tuple(image.shape[1:])), 2.0)
        return torch.from_numpy(4.0 * noise / max(float(noise.std()), 1e-6) - 2.0).float()

    def automatic(self, image: MetaTensor) -> Tensor:
        return torch.stack([self._logits(image, "automatic", index) for index in range(len(self.classes))])

    def on_file(self, logits: Tensor, image: MetaTensor) -> np.ndarray:
        grids = Grids(image)
        place = tuple(slice(0, n) for n in grids.file_shape)
        found = torch.stack([grids.on_file(one, place) for one in logits])
        best = found.argmax(0)
        return np.stack([((best == i) & (found[i] > 0)).numpy() for i in range(len(logits))])

    def decode(self, image: MetaTensor, index: int, asked: Asked, earlier: Tensor | None) -> Tensor:
        self.decoded += 1
        before = "" if earlier is None or not self.feedback else earlier.numpy().tobytes()
        box = "" if asked.box is None else asked.box.tobytes()
        return self._logits(image, index, asked.points.tobytes(), asked.labels.tobytes(), box, before)

    def identity(self) -> dict[str, str]:
        return {"base": "stand-in", "base_sha256": "0" * 64, "adapter_sha256": self.name}


@pytest.fixture(scope="session")
def stand_in() -> type[StandIn]:
    return StandIn
