"""Matrix products where most of the time goes: by oneDNN on a CPU, with frozen weights prepared once."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# PyTorch multiplies single-precision matrices by BLAS; oneDNN, which it uses for convolutions, is faster on CPUs that
# the BLAS was not made for, and reaches its speed on weights as they are (tests/benchmarks/speed.py).
_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and platform.machine().lower() in ("x86_64", "amd64")
SMALL = 2**18  # multiplications below which the call itself costs more than it saves

_remembered: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Tensor]]] = WeakKeyDictionary()


def is_exporting() -> bool:
    """Whether a tracer, compiler or exporter looks at what is computed: it must see PyTorch's own operations."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def remember(module: nn.Module, name: str, sources: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` makes of frozen tensors, kept until one of them changes.

    It is kept beside the module, not in it: copies, files and exports of the module know nothing of it.

    Args:
        module: what it belongs to.
        name: its name in the module.
        sources: tensors that it depends on. Where one of them trains, it is computed anew each time.
        compute: takes nothing, gives a tensor.
    """
    if is_exporting() or any(s.requires_grad or s.is_inference() for s in sources):
        return compute()
    # what writes into a tensor counts its version up, what moves it changes its address
    key = tuple((s._version, s.data_ptr(), s.dtype, s.device) for s in sources)
    known = _remembered.setdefault(module, {}).get(name)
    if known is not None and known[0] == key:
        return known[1]
    with torch.inference_mode(False), torch.no_grad():
        value = compute()
    _remembered[module][name] = (key, value)
    return value


def takes_onednn(x: Tensor, size: int) -> bool:
    """Whether oneDNN multiplies: single precision on a CPU, ``size`` multiplications or more than a call costs."""
    return (
        _ONEDNN
        and bool(torch.backends.mkldnn.enabled)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and size >= SMALL
        and not torch.is_autocast_enabled("cpu")
        and not is_exporting()
    )


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


class _Product(torch.autograd.Function):
    """Batched a @ b^T, (B, N, C) and (B, M, C) to (B, N, M), by oneDNN, in both directions."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _products(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        to_a, to_b = ctx.needs_input_grad
        return (
            _products(grad, b.transpose(1, 2)) if to_a else None,
            _products(grad.transpose(1, 2), a.transpose(1, 2)) if to_b else None,
        )


def _products(a: Tensor, b: Tensor) -> Tensor:
    b = _dense(b)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[1])
    for i in range(a.shape[0]):
        out[i] = _onednn(a[i], b[i])
    return out


@functools.cache
def onednn_multiplies_batches(threads: int) -> bool:
    """Whether oneDNN multiplies matrix after matrix a quarter faster than BLAS does the whole batch, on this CPU.

    It depends on which of them was made for the CPU, so it is measured, once in a process: 460,000 scores. Below a
    quarter BLAS stays, so that chance does not choose: two processes of one machine then round alike.

    Args:
        threads: that compute; another number is measured anew.
    """
    with torch.inference_mode():
        a, b = torch.ones(12, 196, 64), torch.ones(12, 196, 64)
        best = []
        for multiply in (_products, lambda a, b: torch.bmm(a, b.transpose(1, 2))):
            multiply(a, b)
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                multiply(a, b)
                seconds.append(time.perf_counter() - start)
            best.append(min(seconds))
    return 1.25 * best[0] < best[1]


def multiply_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Batched ``a @ b.transpose(-1, -2)``: (B, N, C) and (B, M, C) to (B, N, M), by the faster library."""
    if takes_onednn(a, a.shape[1] * b.shape[1] * a.shape[2]) and onednn_multiplies_batches(torch.get_num_threads()):
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            return _Product.apply(a, b)
        return _products(a, b)
    return a @ b.transpose(1, 2)


def add_product(out: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``out`` (B, N, M) plus ``scale`` times batched ``a @ b.transpose(-1, -2)``, in place, without a backward pass."""
    if takes_onednn(a, a.shape[1] * b.shape[1] * a.shape[2]) and onednn_multiplies_batches(torch.get_num_threads()):
        return out.add_(_products(a, b), alpha=scale)
    return out.baddbmm_(a, b.transpose(1, 2), alpha=scale)


def multiply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: (..., in) to (..., out), by the faster library."""
    if not takes_onednn(x, x.numel() * weight.shape[0]):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    needs_grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        return _Linear.apply(rows, weight, bias).reshape(*x.shape[:-1], -1)
    return _onednn(rows, _dense(weight), bias).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``torch.nn.Linear``, computed by the faster library; a frozen one keeps its weights in autocast's type too."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        else:  # TorchScript compiles what follows a return
            return self._fast(input)

    @torch.jit.unused
    def _fast(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device) or is_exporting() or self.weight.requires_grad:
            return multiply_linear(x, self.weight, self.bias)
        dtype = torch.get_autocast_dtype(device)
        weight = remember(self, f"weight {dtype}", (self.weight,), lambda: self.weight.to(dtype))
        if self.bias is None:
            return F.linear(x, weight)
        return F.linear(x, weight, remember(self, f"bias {dtype}", (self.bias,), lambda: self.bias.to(dtype)))
