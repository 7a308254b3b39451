"""Matrix products where most of the time goes: by oneDNN on a CPU, with frozen weights prepared once."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from medsa_nets.layers.fast.choices import Choice, Ways
from medsa_nets.layers.fast.dispatch import is_exporting
from medsa_nets.layers.fast.kept import remember

# PyTorch multiplies single-precision matrices by BLAS. oneDNN, which it uses for convolutions, is faster on many CPUs,
# adds the bias as it multiplies, and reaches its speed on weights as they are (tests/benchmarks/pairs.py).
_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and platform.machine().lower() in ("x86_64", "amd64")
SMALL = 2**25  # multiplications below which it saves nothing, or less than its call costs
ONEDNN, TORCH = "onednn", "torch"


def takes_onednn(x: Tensor, size: int) -> bool:
    """Whether oneDNN multiplies: on a CPU where it is faster, ``size`` multiplications or more than a call costs."""
    return (
        _ONEDNN
        and size >= SMALL
        and x.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and not is_exporting()
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
        # autocast has yet to change the type of the others
        and (not torch.is_autocast_enabled("cpu") or x.dtype == torch.get_autocast_dtype("cpu"))
        and linear_library(str(x.dtype)) == ONEDNN
    )


def _linear_examples(kind: str) -> Ways:
    """Maps as TinyViT's first and last stage and ViT-B's MLP have them, 1.2 G multiplications."""
    dtype = getattr(torch, kind.removeprefix("torch."))
    shapes = ((8192, 64, 256), (8192, 256, 64), (1024, 320, 1280), (64, 768, 3072), (64, 3072, 768))
    sides = [tuple(torch.ones(n, dtype=dtype) for n in ((m, i), (o, i), (o,))) for m, i, o in shapes]

    def by(multiply: Callable[..., Tensor]) -> Callable[[], object]:
        return torch.no_grad()(lambda: [multiply(*side) for side in sides])

    return {ONEDNN: by(_onednn), TORCH: by(F.linear)}


linear_library = Choice("linear", _linear_examples)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(weight: Tensor) -> Tensor:
    """A matrix (…, M, K) by rows or by columns without gaps; oneDNN takes a slow path for others."""
    rows, columns = weight.shape[-2:]
    if weight.stride(-2) == 1:
        return weight if weight.stride(-1) == rows else weight.mT.contiguous().mT
    return weight if weight.stride()[-2:] == (columns, 1) else weight.contiguous()


class _Linear(torch.autograd.Function):
    """Linear map of rows (N, in) by oneDNN, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _onednn(x, _dense(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        transposed = grad.t().contiguous() if to_weight else None
        return (
            _onednn(grad, _dense(weight.t())) if to_x else None,
            _onednn(transposed, _dense(x.t())) if transposed is not None else None,
            grad.sum(0) if to_bias else None,
        )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: (..., in) to (..., out), by the faster library."""
    # autocast has yet to change the type of a weight that trains
    if x.dtype != weight.dtype or not takes_onednn(x, x.numel() * weight.shape[0]):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    needs_grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        return _Linear.apply(rows, weight, bias).reshape(*x.shape[:-1], -1)
    return _onednn(rows, _dense(weight), bias).reshape(*x.shape[:-1], -1)


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer, by the faster library; a frozen one keeps its weights in autocast's type too."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or is_exporting() or layer.weight.requires_grad:
        return multiply(x, layer.weight, layer.bias)
    dtype = torch.get_autocast_dtype(device)
    weight = remember(layer, f"weight {dtype}", (layer.weight,), lambda: layer.weight.to(dtype))
    if layer.bias is None:
        return multiply(x.to(dtype), weight)
    bias = remember(layer, f"bias {dtype}", (layer.bias,), lambda: layer.bias.to(dtype))
    return multiply(x.to(dtype), weight, bias)


def linear_twice(x: Tensor, weight: Tensor, bias: Tensor, narrow: nn.Linear) -> Tensor:
    """A linear map, then a layer that is narrower: their product, one small matrix, does the work of both."""
    with torch.autocast(x.device.type, enabled=False):
        narrowed = multiply(narrow.weight, weight.t())
        shift = multiply(narrow.weight, bias.unsqueeze(0)).flatten() + narrow.bias
    return multiply(x, narrowed, shift)
