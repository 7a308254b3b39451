"""Earlier masks and clicks as dense maps, an input of the decoder beside SAM's tokens."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from medsa_nets.layers.norm import LayerNorm2d

CHANNELS = 8  # earlier logits, whether there are any; foreground and background clicks, narrow, wide; the newest click


class ClickFeedback(nn.Module):
    """Earlier mask and clicks as maps, at the resolution of the image embedding and of the mask.

    SAM tells its decoder of a click by one token, and of an earlier mask at the embedding's resolution. This branch
    draws both as maps: the earlier logits, whether there are any, the positive and the negative clicks (each as a
    narrow and a wide Gaussian), and the newest click. From the maps it adds to the dense prompt embedding, and, beside
    what the decoder has upscaled, to the mask's logits. In volumes the maps have three axes: a click reaches other
    slices by its place. Both additions are zero at the start.

    Args:
        features: channels of the image embedding.
        upscaled: channels of the decoder's upscaled embedding.
        spatial_dims: 2 for images, 3 for volumes.
        hidden: channels between.
        narrow: standard deviation of a click's narrow Gaussian, in voxels of the image.
        wide: of its wide one.
    """

    __jit_unused_properties__ = ("trained",)

    def __init__(
        self,
        features: int = 256,
        *,
        upscaled: int = 32,
        spatial_dims: int = 2,
        hidden: int = 16,
        narrow: float = 2.0,
        wide: float = 10.0,
    ) -> None:
        super().__init__()
        self.narrow = narrow
        self.wide = wide
        self.to_embedding = nn.Sequential(
            nn.Conv2d(CHANNELS, 2 * hidden, kernel_size=2, stride=2),
            LayerNorm2d(2 * hidden),
            nn.GELU(),
            nn.Conv2d(2 * hidden, 4 * hidden, kernel_size=2, stride=2),
            LayerNorm2d(4 * hidden),
            nn.GELU(),
            nn.Conv2d(4 * hidden, features, kernel_size=1),
        )
        convolution = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.to_logits = nn.Sequential(
            convolution(upscaled + 1 + CHANNELS, hidden, kernel_size=3, padding=1),
            nn.GELU(),
            convolution(hidden, hidden, kernel_size=3, padding=1),
            nn.GELU(),
            convolution(hidden, 1, kernel_size=1),
        )
        for branch in (self.to_embedding, self.to_logits):
            nn.init.zeros_(branch[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(branch[-1].bias)  # type: ignore[arg-type]

    @property
    def trained(self) -> bool:
        """Whether the branch adds anything."""
        return bool(self.to_embedding[-1].weight.any()) or bool(self.to_logits[-1].weight.any())  # type: ignore

    def maps(
        self,
        coords: Optional[Tensor],
        labels: Optional[Tensor],
        earlier: Optional[Tensor],
        sets: int,
        size: list[int],
        image_size: list[int],
    ) -> Tensor:
        """Draw the maps of prompt sets.

        Args:
            coords: clicks in voxels of the image (N, P, dims), in the order of its axes, the newest last; or none.
            labels: (N, P): 1 foreground, 0 background, -1 padding.
            earlier: logits of an earlier mask (N, size…), all zero where a set has none; or none.
            sets: N.
            size: of the maps, dims numbers.
            image_size: of the image, dims numbers.

        Returns:
            (N, channels, size…).
        """
        device: torch.device = self.to_embedding[0].weight.device  # type: ignore[assignment]
        blank = torch.zeros([sets] + size, device=device)  # noqa: RUF005 (TorchScript)
        out: list[Tensor] = []
        if earlier is not None:
            known = (earlier.flatten(1) != 0).any(1).reshape([-1] + [1] * len(size))
            out = [torch.tanh(earlier.float() / 4.0), known.float().expand_as(blank)]
        else:
            out = [blank, blank]
        if coords is None or labels is None:
            out += [blank, blank, blank, blank, blank, blank]
            return torch.stack(out, dim=1)
        order = torch.arange(1, labels.shape[1] + 1, device=device) * (labels >= 0)
        newest = (order == order.amax(1, keepdim=True)) & (labels >= 0)
        narrow = [blank, blank]
        wide = [blank, blank, blank]
        for p in range(coords.shape[1]):
            kind = labels[:, p].reshape([-1] + [1] * len(size))
            spot = self._spot(coords[:, p].float(), self.narrow, size, image_size)
            narrow = [torch.maximum(narrow[0], spot * (kind == 1)), torch.maximum(narrow[1], spot * (kind == 0))]
            spot = self._spot(coords[:, p].float(), self.wide, size, image_size)
            last = spot * newest[:, p].reshape([-1] + [1] * len(size))
            wide = [
                torch.maximum(wide[0], spot * (kind == 1)),
                torch.maximum(wide[1], spot * (kind == 0)),
                torch.maximum(wide[2], last),
            ]
        wanted = (newest & (labels == 1)).any(1).reshape([-1] + [1] * len(size))
        out += [narrow[0], narrow[1], wide[0], wide[1], wide[2] * wanted, wide[2] * ~wanted]
        return torch.stack(out, dim=1)

    def _spot(self, position: Tensor, radius: float, size: list[int], image_size: list[int]) -> Tensor:
        """Gaussian around positions (N, dims): (N, size…)."""
        spot = torch.ones([position.shape[0]] + [1] * len(size), device=position.device)
        for axis in range(len(size)):
            scale = float(image_size[axis]) / float(size[axis])
            steps = (torch.arange(size[axis], device=position.device, dtype=torch.float32) + 0.5) * scale - 0.5
            line = torch.exp(-0.5 * ((steps.unsqueeze(0) - position[:, axis].unsqueeze(1)) / radius).square())
            shape = [position.shape[0]] + [1] * len(size)
            shape[axis + 1] = size[axis]
            spot = spot * line.reshape(shape)
        return spot

    def embed(self, maps: Tensor) -> Tensor:
        """What is added to dense prompt embeddings: maps of slices (N, channels, 4 h, 4 w) to (N, features, h, w)."""
        return self.to_embedding(maps)

    def refine(self, maps: Tensor, upscaled: Tensor, logits: Tensor) -> Tensor:
        """What is added to mask logits.

        Args:
            maps: (N, channels, size…).
            upscaled: the decoder's upscaled embedding (N, upscaled, size…).
            logits: the mask that the decoder gives (N, 1, size…).

        Returns:
            (N, 1, size…).
        """
        # Logits that mean the same wherever they are large must not drown the maps.
        return self.to_logits(
            torch.cat([upscaled, torch.tanh(logits / 4.0).to(upscaled.dtype), maps.to(upscaled.dtype)], dim=1)
        )
