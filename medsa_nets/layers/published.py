"""How the published code of Medical SAM Adapter adapts SAM, where that differs from the paper and from this package.

These adaptations exist so that checkpoints of that code give the masks that they gave there. What they change in a
frozen network stands at its layers, as attributes: ``relative``, ``norm_padding``, ``embed_values``,
``norm_mlp_adapter``, ``own_statistics``, ``own_weights``.

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


def _install_plain(encoder: nn.Module) -> None:
    """Change EfficientSAM's encoder, in place: another constant in its norms, MLPs that are not the base's."""
    for layer in encoder.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = 1e-5
    _set(encoder, own_weights=True)


def _name(net: str, mod: str) -> str:
    return "_".join(filter(None, ("published", net, mod)))


@dataclass(frozen=True)
class PublishedDecoder(Frozen):
    """The mask decoder of the published code's ``-net sam`` and ``efficient_sam``, all of which trains.

    In each block's self-attention the tokens' prompt embeddings are part of the values and of the residual, and the
    first block has a residual too; EfficientSAM's is so by itself.
    """

    def install(self, module: nn.Module) -> None:
        """Change the self-attention of a decoder's blocks, in place."""
        _set(module, embed_values=True)


@dataclass(frozen=True)
class PublishedAdapters(Bottlenecks):
    """Adapters of the published code: GELU, ratio 0.25, in the encoder alone.

    In a ViT, SAM's relative-position tables are zero, and tokens that pad a window are normalised with the others; in a
    TinyViT, the adapter beside the MLP sees tokens before the norm, and batch normalisation has statistics of the
    training data; in EfficientSAM's ViT, the MLPs have weights of their own, and norms another constant.

    Attributes:
        net: the base: empty for a ViT (``-net sam``), ``mobile`` for a TinyViT (``-net mobile_sam``), ``efficient`` for
            EfficientSAM's ViT.
    """

    net: str = ""

    def adapter(self, features: int, *, skip: bool = False) -> Adapter:
        """A bottleneck adapter with GELU."""
        return Adapter(features, adapter_ratio=0.25, skip=skip, dropout=self.dropout, activation=nn.GELU())

    def install(self, module: nn.Module) -> None:
        """Change an encoder's layers, in place."""
        _set(module, relative=False, norm_padding=True, norm_mlp_adapter=False, own_statistics=True)
        if self.net == "efficient":
            _install_plain(module)

    def describe(self) -> dict[str, Any]:
        """Its name."""
        return {"adaptation": _name(self.net, "adapters")}


@dataclass(frozen=True)
class PublishedLoRA(LoRA):
    """LoRA and AdaLoRA of the published code, in an encoder: in both layers of an MLP and in the attention.

    What LoRA changes in the attention, with a weight of 1 / rank, is the first and the last third of the fused layer's
    output: queries and values of a ViT, a mixture of all three of a TinyViT, whose heads have them side by side.
    AdaLoRA changes the whole fused layer by one product, and a TinyViT's projection after the attention too. The rest
    is as with adapters (:class:`PublishedAdapters`); tokens that pad a window are not normalised.

    Attributes:
        net: see :class:`PublishedAdapters`.
    """

    net: str = ""

    @property
    def ranks(self) -> int:
        """Ranks of each product, those of AdaLoRA too."""
        return self.rank

    def install(self, module: nn.Module) -> None:
        """Put changes into an encoder, and change its layers, in place."""
        super().install(module)
        _set(module, relative=False, own_statistics=True)
        if self.net == "efficient":
            _install_plain(module)

    def _places(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, dict[str, Any]]]:
        for parent, name, settings in super()._places(module):
            if not self.singular:
                yield parent, name, {**settings, "groups": 1}
                continue
            yield parent, name, {}  # one product
            if name == "qkv" and self.net == "mobile":
                yield parent, "proj", {}

    def describe(self) -> dict[str, Any]:
        """Name and rank."""
        return {"adaptation": _name(self.net, "adalora" if self.singular else "lora"), "rank": self.rank}
