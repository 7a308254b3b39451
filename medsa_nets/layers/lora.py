"""Low-rank adaptation: linear layers whose frozen weights get a trained change of low rank (LoRA, AdaLoRA)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers.adapters import Adapter, Bottlenecks
from medsa_nets.layers.linear import Linear

TARGETS = ("q", "k", "v", "mlp")
_FUSED = ("q", "k", "v")  # the order of a fused layer's parts
_MLP = ("lin1", "lin2", "fc1", "fc2")


class LowRank(nn.Module):
    """A change of a linear layer, of low rank: ``scale * B A``, or ``scale * P diag(E) Q``; zero at the start.

    A layer that computes several things at once, as queries, keys and values, has one product for each part of it that
    changes.

    Args:
        in_features: size of the layer's input.
        out_features: size of its output.
        rank: rank of each part's product.
        scale: weight of the change.
        parts: places of the parts that change, among ``of`` equal ones.
        of: number of parts of the layer.
        groups: how often the parts follow each other in the output: 1 where all queries stand before all keys, the
            number of heads where each head's queries, keys and values stand together.
        singular: whether there are singular values (AdaLoRA): ``B`` and ``A`` are then ``P`` and ``Q``.
        dropout: probability with which an input is left out in training.

    Source: LoRA, arXiv 2106.09685; AdaLoRA, arXiv 2303.10512.
    """

    if TYPE_CHECKING:  # TorchScript cannot read a class's postponed annotations
        place: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scale: float = 1.0,
        parts: Sequence[int] = (0,),
        of: int = 1,
        groups: int = 1,
        singular: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.groups = rank, scale, groups
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(len(parts), rank, in_features))
        self.B = nn.Parameter(torch.zeros(len(parts), out_features // of, rank))
        place = F.one_hot(torch.tensor(list(parts)), of).float()
        self.register_buffer("place", place, persistent=False)  # (changed parts, parts)
        if singular:
            self.E = nn.Parameter(torch.zeros(len(parts), rank))
            nn.init.normal_(self.A, std=0.02)
            nn.init.normal_(self.B, std=0.02)
        else:
            self.register_parameter("E", None)
            nn.init.uniform_(self.A, -(in_features**-0.5), in_features**-0.5)

    def down(self) -> Tensor:
        """First factor, of all parts: (parts * rank, in_features)."""
        a = self.A if self.E is None else self.A * self.E.unsqueeze(2)
        return a.flatten(0, 1)

    def up(self) -> Tensor:
        """Second factor: (out_features, parts * rank), zero where an output and a rank belong to different parts."""
        changed, of = self.place.shape
        spread = torch.einsum("mp,mor->pomr", self.place.to(self.B.dtype), self.B)
        spread = spread.reshape(of, self.groups, -1, changed * self.rank)
        return spread.transpose(0, 1).reshape(-1, changed * self.rank)

    def change(self) -> Tensor:
        """What is added to the layer's weight: (out_features, in_features)."""
        return self.scale * (self.up() @ self.down())

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output: (..., in_features) to (..., out_features)."""
        return F.linear(F.linear(self.dropout(x), self.down()), self.scale * self.up())


class LowRankLinear(Linear):
    """A frozen linear layer, under its own names, and a change of low rank (``lora``).

    Args:
        layer: the layer; its weight and bias are shared.
        settings: see :class:`LowRank`.
    """

    def __init__(self, layer: nn.Linear, **settings: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora = LowRank(layer.in_features, layer.out_features, **settings)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias) + self.lora(input)
        else:  # TorchScript compiles what follows a return
            return self._adapted(input)

    @torch.jit.unused
    def _adapted(self, x: Tensor) -> Tensor:
        own: Tensor = Linear.forward(self, x)
        return own + self.lora(x).to(own.dtype)

    @torch.no_grad()
    def merged(self) -> Linear:
        """One linear layer that does the same: its weight is the sum."""
        layer = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = (self.weight.double() + self.lora.change().double()).to(self.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = self.bias
        return layer


class NoAdapter(nn.Module):
    """Stands where an adaptation has no adapter: what it gets where there is a skip path, else zero.

    Args:
        skip: whether there is a skip path.
    """

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., features), or zero (1,)."""
        return x if self.skip else x.new_zeros(1)


class NoPromptedAdapter(nn.Module):
    """Stands where an adaptation has no hyper-prompting adapter."""

    def forward(self, x: Tensor, prompt_embedding: Tensor) -> Tensor:
        """Tokens (B, N, features), as they are."""
        return x


@dataclass(frozen=True)
class Frozen:
    """No adaptation: blocks are the base's own. What joins slices, and the class embeddings, train all the same."""

    scale: float = 1.0

    def adapter(self, features: int, *, skip: bool = False) -> nn.Module:
        """Nothing."""
        return NoAdapter(skip)

    def prompted_adapter(self, features: int, prompt_features: int) -> nn.Module:
        """Nothing."""
        return NoPromptedAdapter()

    def depth_adapter(self, features: int) -> Adapter:
        """The paper's adapter of a depth branch, which no frozen layer could stand for."""
        return Bottlenecks().depth_adapter(features)

    def install(self, module: nn.Module) -> None:
        """Nothing."""

    def describe(self) -> dict[str, Any]:
        """Its name."""
        return {"adaptation": "none"}


@dataclass(frozen=True)
class LoRA(Frozen):
    """Low-rank changes of the attention's linear layers.

    Attributes:
        rank: of each part of a layer; with ``singular``, on average over the layers at the end of training.
        alpha: weight of a change, times ``rank``; none takes ``rank``, a weight of 1.
        targets: what changes, of :data:`TARGETS`: queries, keys, values, the linear layers of the MLPs.
        singular: whether changes have singular values, that a budget of ranks can be taken from (AdaLoRA). They begin
            with 1.5 times ``rank``, as published.
        dropout: probability with which an input of a change is left out in training.

    Raises:
        ValueError: when a value is out of range.

    Source: arXiv 2106.09685 (queries and values, rank 4 to 8), arXiv 2303.10512 (AdaLoRA).
    """

    rank: int = 4
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    singular: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora_rank must be 1 or more, got {self.rank}.")
        if not self.targets or set(self.targets) - set(TARGETS):
            raise ValueError(f"lora_targets must be some of {TARGETS}, got {tuple(self.targets)}.")

    @property
    def ranks(self) -> int:
        """Ranks of each part at the start."""
        return math.ceil(1.5 * self.rank) if self.singular else self.rank

    @property
    def weight(self) -> float:
        """Weight of a change."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def install(self, module: nn.Module) -> None:
        """Put changes into an encoder or a decoder, in place; parameters of the base keep their names."""
        for parent, name, settings in list(self._places(module)):
            layer = LowRankLinear(
                getattr(parent, name),
                rank=self.ranks,
                scale=self.weight,
                singular=self.singular,
                dropout=self.dropout,
                **settings,
            )
            setattr(parent, name, layer)

    def _places(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, dict[str, Any]]]:
        """Each layer that changes: where it hangs, its name there, and how its parts lie."""
        for path, parent in module.named_modules():
            own = [i for i, part in enumerate(_FUSED) if part in self.targets]
            if own and isinstance(getattr(parent, "qkv", None), nn.Linear):
                groups = int(getattr(parent, "num_heads", 1)) if getattr(parent, "qkv_by_head", False) else 1
                yield parent, "qkv", {"parts": own, "of": len(_FUSED), "groups": groups}
            for part in _FUSED:
                if part in self.targets and isinstance(getattr(parent, f"{part}_proj", None), nn.Linear):
                    yield parent, f"{part}_proj", {}
            if "mlp" in self.targets and path.rpartition(".")[2] == "mlp":
                yield from ((parent, name, {}) for name in _MLP if isinstance(getattr(parent, name, None), nn.Linear))

    def describe(self) -> dict[str, Any]:
        """Name, rank, weight and targets."""
        facts = {name: value for name, value in asdict(self).items() if name in ("rank", "alpha")}
        name = "adalora" if self.singular else "lora"
        return {"adaptation": name, **facts, "targets": [target for target in TARGETS if target in self.targets]}


def merge_low_rank(module: nn.Module) -> int:
    """Add every change of low rank to the weight that it changes, in place; the number of layers."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, LowRankLinear)
    ]
    for parent, name, child in found:
        setattr(parent, name, child.merged())
    return len(found)
