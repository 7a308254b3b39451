"""The trainable parts: bottleneck adapters and the hyper-prompting adapter (arXiv 2304.12620)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers import fast
from medsa_nets.layers.linear import Linear

HYPER_PROMPTING_FORMS = ("additive", "weights")


def bottleneck_features(features: int, adapter_ratio: float, adapter_dim: int | None) -> int:
    """Width of an adapter's bottleneck: ``adapter_dim`` where given, else ``adapter_ratio * features``."""
    if adapter_dim is not None:
        if adapter_dim < 1:
            raise ValueError(f"adapter_dim must be 1 or more, got {adapter_dim}.")
        return adapter_dim
    if not 0.0 < adapter_ratio <= 4.0:
        raise ValueError(f"adapter_ratio must lie in (0, 4], got {adapter_ratio}.")
    return max(1, int(features * adapter_ratio))


def zero_linear(in_features: int, out_features: int) -> Linear:
    """A linear layer that gives zero until it is trained: a fresh adapter leaves the frozen network as it was."""
    layer = Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Adapter(nn.Module):
    """Bottleneck adapter: down-projection, activation, up-projection (zero at the start).

    Args:
        features: size of the last axis of the input.
        adapter_ratio: bottleneck width as a share of ``features`` (paper: 0.25).
        adapter_dim: bottleneck width itself; takes precedence over ``adapter_ratio``.
        skip: whether the input is added to the output.
        dropout: probability with which an activation in the bottleneck is left out in training.
        activation: none takes the paper's, ReLU.

    Source: arXiv 2304.12620, section "SAM Adapter" (first adapter with, second without its own skip path).
    """

    def __init__(
        self,
        features: int,
        *,
        adapter_ratio: float = 0.25,
        adapter_dim: int | None = None,
        skip: bool = False,
        dropout: float = 0.0,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        hidden = bottleneck_features(features, adapter_ratio, adapter_dim)
        self.skip = skip
        self.down = Linear(features, hidden)
        self.activation = nn.ReLU() if activation is None else activation
        self.dropout = nn.Dropout(dropout)
        self.up = zero_linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Adapt ``x`` of shape (..., features); the shape stays."""
        y = self.widen(self.down(x))
        return x + y if self.skip else y

    def follow(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Adapt what a linear layer gives; without skip path.

        Nothing stands between that layer and the down-projection, so that one matrix can do the work of both.

        Args:
            x: input of the linear layer (..., features).
            weight: its weight (features, features).
            bias: its bias (features,).

        Returns:
            (..., features).
        """
        down = self.down
        if torch.jit.is_scripting():
            return self.widen(F.linear(x, down.weight @ weight, down.weight @ bias + down.bias))
        else:  # TorchScript compiles what follows a return
            if fast.is_on():
                return self.widen(fast.linear_twice(x, weight, bias, down))
            return self.widen(down(F.linear(x, weight, bias)))

    def widen(self, bottleneck: Tensor) -> Tensor:
        """Second half: the bottleneck (..., hidden) to (..., features)."""
        return self.up(self.dropout(self.activation(bottleneck)))


class HyperPromptingAdapter(nn.Module):
    """Adapter whose bottleneck is conditioned on the prompt embedding (HyP-Adpt).

    Args:
        features: size of the last axis of the tokens.
        prompt_features: size of the last axis of the prompt embedding.
        form: ``additive`` adds the down-projected prompt embedding to the bottleneck, token by token (first version
            of the paper); ``weights`` turns the mean prompt embedding, by an MLP, into a matrix that multiplies the
            bottleneck (seventh version). The matrix starts near the identity.
        adapter_ratio: bottleneck width as a share of ``features``.
        adapter_dim: bottleneck width itself; takes precedence over ``adapter_ratio``.
        dropout: probability with which an activation in the bottleneck is left out in training.

    Raises:
        ValueError: when ``form`` is neither of the two.

    Source: arXiv 2304.12620, section "Hyper-Prompting Adapter".
    """

    def __init__(
        self,
        features: int,
        prompt_features: int,
        *,
        form: str = "additive",
        adapter_ratio: float = 0.25,
        adapter_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if form not in HYPER_PROMPTING_FORMS:
            raise ValueError(f"hyper_prompting must be one of {HYPER_PROMPTING_FORMS}, got {form!r}.")
        hidden = bottleneck_features(features, adapter_ratio, adapter_dim)
        self.hidden = hidden
        self.multiply = form == "weights"
        self.down = Linear(features, hidden)
        self.prompt: nn.Module
        if self.multiply:
            to_weights = nn.Linear(hidden, hidden * hidden)
            nn.init.normal_(to_weights.weight, std=0.01)
            with torch.no_grad():
                to_weights.bias.copy_(torch.eye(hidden).flatten())
            self.prompt = nn.Sequential(nn.Linear(prompt_features, hidden), nn.ReLU(), to_weights)
        else:
            self.prompt = Linear(prompt_features, hidden)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.up = zero_linear(hidden, features)

    def forward(self, x: Tensor, prompt_embedding: Tensor) -> Tensor:
        """Adapt tokens, keeping their skip path.

        Args:
            x: tokens (B, N, features).
            prompt_embedding: embedding of the same tokens before the decoder (B, N, prompt_features).

        Returns:
            Adapted tokens (B, N, features).
        """
        bottleneck = self.down(x)
        if self.multiply:
            weights = self.prompt(prompt_embedding.mean(dim=1)).reshape(-1, self.hidden, self.hidden)
            bottleneck = torch.bmm(bottleneck, weights)
        else:
            bottleneck = bottleneck + self.prompt(prompt_embedding)
        return x + self.up(self.dropout(self.activation(bottleneck)))


class Adaptation(Protocol):
    """Makes what adapts a frozen network: encoders and decoder ask it for the adapters of their blocks.

    Attributes:
        scale: weight of the adapters beside the MLPs.
    """

    @property
    def scale(self) -> float: ...

    def adapter(self, features: int, *, skip: bool = False) -> nn.Module:
        """An adapter of tokens (..., features), zero at the start beside its skip path, where it has one."""
        ...

    def prompted_adapter(self, features: int, prompt_features: int) -> nn.Module:
        """An adapter of a decoder's tokens that sees the prompt embedding (:class:`HyperPromptingAdapter`)."""
        ...

    def depth_adapter(self, features: int) -> nn.Module:
        """The adapter of a depth branch, without skip path; it has :meth:`Adapter.follow`."""
        ...

    def install(self, module: nn.Module) -> None:
        """Change the layers of an encoder or a decoder, in place, where the adaptation is of that kind."""
        ...

    def describe(self) -> dict[str, Any]:
        """What an adapter file depends on, in numbers and texts; it stands in the file's identity."""
        ...


@dataclass(frozen=True)
class Bottlenecks:
    """The paper's adaptation: bottleneck adapters, and hyper-prompting ones in the decoder.

    Attributes:
        adapter_ratio: bottleneck width as a share of a block's width (paper: 0.25).
        adapter_dim: bottleneck width itself; takes precedence over ``adapter_ratio``.
        scale: weight of the adapters beside the MLPs (paper: 0.5).
        hyper_prompting: form of the hyper-prompting adapters, ``additive`` or ``weights``.
        dropout: probability with which an activation in a bottleneck is left out in training; no part of what a file
            depends on.

    Source: arXiv 2304.12620.
    """

    adapter_ratio: float = 0.25
    adapter_dim: int | None = None
    scale: float = 0.5
    hyper_prompting: str = "additive"
    dropout: float = 0.0

    def adapter(self, features: int, *, skip: bool = False) -> Adapter:
        """A bottleneck adapter."""
        return Adapter(
            features,
            adapter_ratio=self.adapter_ratio,
            adapter_dim=self.adapter_dim,
            skip=skip,
            dropout=self.dropout,
        )

    def prompted_adapter(self, features: int, prompt_features: int) -> HyperPromptingAdapter:
        """A hyper-prompting adapter."""
        return HyperPromptingAdapter(
            features,
            prompt_features,
            form=self.hyper_prompting,
            adapter_ratio=self.adapter_ratio,
            adapter_dim=self.adapter_dim,
            dropout=self.dropout,
        )

    def depth_adapter(self, features: int) -> Adapter:
        """A bottleneck adapter without skip path."""
        return self.adapter(features)

    def install(self, module: nn.Module) -> None:
        """Nothing: adapters stand beside the layers."""

    def describe(self) -> dict[str, Any]:
        """Width, weight and form."""
        return {name: value for name, value in asdict(self).items() if name != "dropout"}
