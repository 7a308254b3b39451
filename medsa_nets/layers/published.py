"""How the published code of Medical SAM Adapter adapts SAM, where that differs from the paper and from this package.

These adaptations exist so that checkpoints of that code give the masks that they gave there. What they change in a
frozen network stands at its layers, as attributes: ``relative``, ``norm_padding``, ``embed_values``,
``norm_mlp_adapter``, ``own_statistics``.

Source: github.com/SuperMedIntel/Medical-SAM-Adapter, commit 0add836.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from medsa_nets.layers.adapters import Adapter, Bottlenecks
from medsa_nets.layers.lora import Frozen, LoRA


def _set(module: nn.Module, **attributes: bool) -> None:
    """Change attributes of all layers that have them."""
    for layer in module.modules():
        for name, value in attributes.items():
            if hasattr(layer, name):
                setattr(layer, name, value)


@dataclass(frozen=True)
class PublishedDecoder(Frozen):
    """The mask decoder of the published code's ``-net sam``, all of which trains.

    In each block's self-attention the tokens' prompt embeddings are part of the values and of the residual, and the
    first block has a residual too.
    """

    def install(self, module: nn.Module) -> None:
        """Change the self-attention of a decoder's blocks, in place."""
        _set(module, embed_values=True)


@dataclass(frozen=True)
class PublishedAdapters(Bottlenecks):
    """Adapters of the published code: GELU, ratio 0.25, in the encoder alone.

    In a ViT, SAM's relative-position tables are zero, and tokens that pad a window are normalised with the others; in a
    TinyViT, the adapter beside the MLP sees tokens before the norm, and batch normalisation has statistics of the
    training data.

    Attributes:
        mobile: whether the base is a TinyViT (``-net mobile_sam``).
    """

    mobile: bool = False

    def adapter(self, features: int, *, skip: bool = False) -> Adapter:
        """A bottleneck adapter with GELU."""
        return Adapter(features, adapter_ratio=0.25, skip=skip, dropout=self.dropout, activation=nn.GELU())

    def install(self, module: nn.Module) -> None:
        """Change an encoder's layers, in place."""
        _set(module, relative=False, norm_padding=True, norm_mlp_adapter=False, own_statistics=True)

    def describe(self) -> dict[str, Any]:
        """Its name."""
        return {"adaptation": "published_mobile_adapters" if self.mobile else "published_adapters"}


@dataclass(frozen=True)
class PublishedLoRA(LoRA):
    """LoRA of the published code, in an encoder: a weight of 1 / rank, in both layers of an MLP and in the attention.

    What changes in the attention is the first and the last third of the fused layer's output: queries and values of a
    ViT, a mixture of all three of a TinyViT, whose heads have them side by side. Of a ViT, SAM's relative-position
    tables are zero; a TinyViT's batch normalisation has statistics of the training data.

    Attributes:
        mobile: whether the base is a TinyViT (``-net mobile_sam``).
    """

    mobile: bool = False

    def install(self, module: nn.Module) -> None:
        """Put changes into an encoder, and change its layers, in place."""
        super().install(module)
        _set(module, relative=False, own_statistics=True)

    def _places(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, dict[str, Any]]]:
        for parent, name, settings in super()._places(module):
            yield parent, name, {**settings, "groups": 1}

    def describe(self) -> dict[str, Any]:
        """Name and rank."""
        return {"adaptation": "published_mobile_lora" if self.mobile else "published_lora", "rank": self.rank}
