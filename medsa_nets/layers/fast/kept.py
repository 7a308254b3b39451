"""A cache of values that are computed from weights, valid until one of these changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from medsa_nets.layers.fast.dispatch import is_exporting, is_on

T = TypeVar("T")


class Kept(Generic[T]):
    """A value that was computed from tensors, until one of them is written to, moved or replaced."""

    def __init__(self) -> None:
        self._known: tuple[tuple[Any, ...], T] | None = None  # the tensors' state, what was made of them

    def get(self, sources: Iterable[Tensor], compute: Callable[[], T]) -> T:
        """The value: the known one, or what ``compute`` gives.

        Args:
            sources: the tensors that it depends on.
            compute: takes nothing.
        """
        # what writes into a tensor counts its version up, what moves it changes its address
        state = tuple((s._version, s.data_ptr(), s.dtype, s.device) for s in sources)
        known = self._known
        if known is None or known[0] != state:
            self._known = known = (state, compute())
        return known[1]


_remembered: WeakKeyDictionary[nn.Module, dict[str, Kept[Tensor]]] = WeakKeyDictionary()


def remember(module: nn.Module, name: str, sources: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` makes of frozen tensors of a module, kept until one of them changes.

    It is kept beside the module, not in it: copies, files and exports of the module know nothing of it.

    Args:
        module: what it belongs to.
        name: its name in the module.
        sources: tensors that it depends on. Where one of them trains, it is computed anew each time.
        compute: takes nothing, gives a tensor.
    """
    if not is_on() or is_exporting() or any(s.requires_grad or s.is_inference() for s in sources):
        return compute()

    def frozen() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return compute()

    kept = _remembered.setdefault(module, {})
    if name not in kept:
        kept[name] = Kept()
    return kept[name].get(sources, frozen)
