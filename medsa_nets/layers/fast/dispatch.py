"""The switch between the plain and the fast forms of layers, and the test for exports, which must see PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_on = True


def is_on() -> bool:
    """Whether layers compute by their fast forms."""
    return _on


@contextmanager
def plain_layers() -> Iterator[None]:
    """Let every layer of the process compute in its plain form as long as the block runs."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def is_exporting() -> bool:
    """Whether a tracer, compiler or exporter looks at what is computed: it must see PyTorch's own operations."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()
