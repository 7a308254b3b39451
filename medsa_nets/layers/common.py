"""Small layers that several parts of the network share; parameter names equal segment-anything's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers.choices import Choice, Ways
from medsa_nets.layers.linear import Linear, is_exporting, multiply_linear, remember


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of a (B, C, H, W) tensor."""

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C, H, W) over C."""
        channels_last = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return channels_last.permute(0, 3, 1, 2)


class MLPBlock(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, *, features: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.lin1 = Linear(features, hidden)
        self.lin2 = Linear(hidden, features)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., features) to (..., features)."""
        return self.lin2(self.act(self.lin1(x)))


class ConvBN(nn.Module):
    """Bias-free convolution and a frozen batch normalisation, computed as one convolution.

    The base is frozen, its running statistics too, so batch normalisation is an affine map in training as in
    inference; it is folded into the convolution's weights, once.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.padding = kernel_size // 2
        self.groups = groups
        self.pointwise = kernel_size == 1 and stride == 1 and groups == 1

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise ``x`` (B, in_channels, H, W)."""
        if torch.jit.is_scripting():
            return F.conv2d(
                x,
                self.folded_weight(),
                self.folded_bias(),
                stride=self.stride,
                padding=self.padding,
                groups=self.groups,
            )
        else:  # TorchScript compiles what follows a return
            return self._fast(x)

    @torch.jit.unused
    def _fast(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        sources = (self.c.weight, self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var)
        assert all(isinstance(source, Tensor) for source in sources)  # BatchNorm2d types its buffers as optional
        weight = remember(self, f"weight {dtype}", sources, lambda: self.folded_weight().to(dtype))  # type: ignore[arg-type]
        bias = remember(self, f"bias {dtype}", sources, lambda: self.folded_bias().to(dtype))  # type: ignore[arg-type]
        if self.pointwise and not is_exporting():
            return multiply_linear(x.permute(0, 2, 3, 1).to(dtype), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, stride=self.stride, padding=self.padding, groups=self.groups)

    def folded_weight(self) -> Tensor:
        """The convolution's weight, scaled as batch normalisation scales its output."""
        variance = self.bn.running_var
        assert variance is not None  # BatchNorm2d types its buffers as optional
        return self.c.weight * (self.bn.weight * torch.rsqrt(variance + self.bn.eps)).reshape(-1, 1, 1, 1)

    def folded_bias(self) -> Tensor:
        """What batch normalisation adds."""
        variance, mean = self.bn.running_var, self.bn.running_mean
        assert variance is not None
        assert mean is not None
        return self.bn.bias - mean * self.bn.weight * torch.rsqrt(variance + self.bn.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor] = None, scale: Optional[float] = None) -> Tensor:
    """Scaled dot-product attention, by the fastest of equal ways (``tests/benchmarks/pairs.py``).

    One is PyTorch's fused attention. The other computes scores explicitly, in pieces that fit the processor's cache
    where nothing has to be kept for a backward pass; on a CPU in bfloat16 it is often the faster. Where the bias trains
    or values have another width than keys, PyTorch has no fused form.

    Args:
        q: queries (B, heads, N, C).
        k: keys (B, heads, M, C).
        v: values (B, heads, M, E).
        bias: added to the scores, (1 or B, heads, N, M), or none.
        scale: of the products of queries and keys; none takes 1 / sqrt(C).

    Returns:
        (B, heads, N, E).
    """
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:  # TorchScript compiles what follows a return
        return _attend(q, k, v, bias, scale)


def attend_map(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, padded: Optional[Tensor] = None, scale: float = 1.0
) -> Tensor:
    """Attention over a map whose scores have a bias for each row and one for each column of the keys.

    Either the product of queries and keys computes the bias (its parts are further columns of the queries, and the
    keys' further columns say in which row and column a key stands), or, where nothing has to be kept for a backward
    pass, the bias is laid down first, piece by piece in the processor's cache, and the product is added to it. Which is
    faster depends on type, size and processor (``tests/benchmarks/pairs.py``).

    Args:
        q: queries (B, heads, N, C).
        k: keys of a map, row by row (B, heads, H * W, C), or with one more that stands for padded ones.
        v: values, likewise (B, heads, H * W, E).
        rows: bias of the map's rows (B, heads, N, H).
        columns: bias of its columns (B, heads, N, W).
        padded: bias of the additional key (B, heads, N, 1), or none.
        scale: of the products of queries and keys.

    Returns:
        (B, heads, N, E).
    """
    if torch.jit.is_scripting():
        return _attend_by_columns(q, k, v, rows, columns, padded, scale)
    else:  # TorchScript compiles what follows a return
        return _attend_map(q, k, v, rows, columns, padded, scale)


def _attend_by_columns(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, padded: Optional[Tensor], scale: float
) -> Tensor:
    height, width = rows.shape[3], columns.shape[3]
    own_row = torch.eye(height, dtype=q.dtype, device=q.device).repeat_interleave(width, 0)
    own_column = torch.eye(width, dtype=q.dtype, device=q.device).repeat(height, 1)
    place = torch.cat([own_row, own_column], dim=1)
    queries = [q * scale, rows, columns]
    if padded is not None:
        queries.append(padded)
        place = F.pad(place, (0, 1, 0, 1))
        place[-1, -1] = 1.0
    keys = torch.cat([k, place.expand(k.shape[0], k.shape[1], -1, -1)], dim=3)
    return attend(torch.cat(queries, dim=3), keys, v, scale=1.0)


CACHED_BYTES = 2**21  # of scores, that stay in a core's cache between the two products
LARGE_MAP = 1024  # tokens from which a map is measured as a large one
SIZES = (8, 16, 24, 32, 64, 256)  # of queries and keys that attention is measured with; others go with the next larger
FUSED, EXPLICIT = "fused", "explicit"
LAID, COLUMNS = "laid down", "by columns"


@torch.jit.unused
def _attend_map(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, padded: Tensor | None, scale: float
) -> Tensor:
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, rows, columns))
    if q.device.type != "cpu" or is_exporting() or needs_grad:
        return _attend_by_columns(q, k, v, rows, columns, padded, scale)
    if map_way(f"{q.dtype}, {'large' if k.shape[2] >= LARGE_MAP else 'small'}") == COLUMNS:
        return _attend_by_columns(q, k, v, rows, columns, padded, scale)
    return _attend_laid_down(q, k, v, rows, columns, padded, scale)


def _attend_laid_down(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, padded: Tensor | None, scale: float
) -> Tensor:
    size = (rows.shape[3], columns.shape[3])

    def bias(part: tuple[slice, slice, slice]) -> Tensor:
        row, column = rows[part].unsqueeze(4), columns[part].unsqueeze(3)
        if padded is None:
            return (row + column).flatten(3)
        piece = row.new_empty(*row.shape[:3], k.shape[2])
        torch.add(row, column, out=piece[..., :-1].unflatten(3, size))
        piece[..., -1:] = padded[part]
        return piece

    return _attend_pieces(q, k, v, bias, scale)


def _map_examples(kind: str) -> Ways:
    """Four windows of ViT-B, or a third of its heads on a map of 32 x 32."""
    dtype, size = kind.removeprefix("torch.").split(", ")
    images, heads, side = (1, 4, 32) if size == "large" else (4, 12, 14)
    q, k, v = (torch.ones(images, side**2, heads, 64, dtype=getattr(torch, dtype)).transpose(1, 2) for _ in range(3))
    rows = columns = torch.ones(images, heads, side**2, side, dtype=q.dtype)

    @torch.no_grad()
    def by_columns() -> Tensor:
        with attention_way.force(EXPLICIT):
            return _attend_by_columns(q, k, v, rows, columns, None, 0.125)

    laid_down = torch.no_grad()(lambda: _attend_laid_down(q, k, v, rows, columns, None, 0.125))
    return {LAID: laid_down, COLUMNS: by_columns}


map_way = Choice("attention over a map", _map_examples)


@torch.jit.unused
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    if q.device.type != "cpu" or is_exporting():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    has_fused = q.shape[3] == v.shape[3] and (bias is None or not (needs_grad and bias.requires_grad))
    if has_fused and attention_way(_kind_of_attention(q, k, bias, needs_grad)) == FUSED:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attend_explicitly(q, k, v, bias, scale, needs_grad)


def _attend_explicitly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, needs_grad: bool) -> Tensor:
    if needs_grad:
        scores = (q * scale) @ k.transpose(2, 3)
        return torch.softmax(scores if bias is None else scores + bias, dim=-1).to(v.dtype) @ v
    if bias is None:
        return _attend_pieces(q, k, v, None, scale)
    whole = bias.expand(*q.shape[:2], -1, -1)
    return _attend_pieces(q, k, v, lambda part: whole[part].to(q.dtype, copy=True), scale)


def _kind_of_attention(q: Tensor, k: Tensor, bias: Tensor | None, needs_grad: bool) -> str:
    queries, keys = (next((size for size in SIZES if x.shape[2] <= size), SIZES[-1]) for x in (q, k))
    use, form = "training" if needs_grad else "inference", "plain" if bias is None else "biased"
    return f"{q.dtype}, {use}, {form}, {queries} x {keys}"


def _attention_examples(kind: str) -> Ways:
    """Attention with a bias as TinyViT's windows and a slab's columns have it, or without, as the decoder's tokens.

    Which way is the faster depends on the layout of what goes in and, in training, of the gradient that comes back, so
    that both are here as they are there.
    """
    dtype, use, form, size = kind.removeprefix("torch.").split(", ")
    queries, keys = (int(number) for number in size.split(" x "))
    training, biased, few = use == "training", form == "biased", min(queries, keys) <= SIZES[-3]
    heads, channels = (5, 32) if biased else (8, 16) if few else (12, 64)
    batch = max(1, min(2048 // max(queries, keys), 2**18 // (queries * keys)))
    columns = biased and few  # whose tokens, the slices, stand outermost in memory

    def values(*shape: int) -> Tensor:
        return torch.linspace(-1.0, 1.0, math.prod(shape)).to(getattr(torch, dtype)).view(shape)

    def by_head(tokens: int) -> Tensor:
        places = (tokens, batch) if columns else (batch, tokens)
        x = values(*places, 3 if biased else 1, heads, channels)[:, :, 0]  # beside others of one linear layer
        return (x.permute(1, 2, 0, 3) if columns else x.transpose(1, 2)).requires_grad_(training)

    q, k, v = (by_head(tokens) for tokens in (queries, keys, keys))
    bias = values(1, heads, queries, keys) if biased else None
    gradient = values(*((queries, batch) if columns else (batch, queries)), heads * channels)

    def by(attend: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> Tensor:
            out = attend()
            return (out.permute(2, 0, 1, 3) if columns else out.transpose(1, 2)).flatten(2)

        return (lambda: torch.autograd.grad(run(), (q, k, v), gradient)) if training else torch.no_grad()(run)

    return {
        FUSED: by(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)),
        EXPLICIT: by(lambda: _attend_explicitly(q, k, v, bias, channels**-0.5, training)),
    }


attention_way = Choice("attention", _attention_examples)


def _attend_pieces(
    q: Tensor, k: Tensor, v: Tensor, bias: Callable[[tuple[slice, slice, slice]], Tensor] | None, scale: float
) -> Tensor:
    """Attention without a backward pass, in pieces of ``CACHED_BYTES`` of scores.

    ``bias`` gives a new tensor for a piece of images, heads and queries; the piece's scores are added to it.
    """
    batch, heads, tokens = q.shape[:3]
    row = k.shape[2] * q.element_size()
    images = max(1, CACHED_BYTES // (heads * tokens * row))
    some = heads if heads * tokens * row <= CACHED_BYTES else max(1, CACHED_BYTES // (tokens * row))
    step = tokens if tokens * row <= CACHED_BYTES else max(64, CACHED_BYTES // row)
    if step < tokens:  # they are used more than once
        k, v = k.contiguous(), v.contiguous()
    out = v.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)  # as the caller wants it: by token, then head
    for i in range(0, batch, images):
        for h in range(0, heads, some):
            keys, values = (x[i : i + images, h : h + some].flatten(0, 1) for x in (k, v))
            for r in range(0, tokens, step):
                part = (slice(i, i + images), slice(h, h + some), slice(r, r + step))
                queries = q[part].flatten(0, 1)
                if bias is None:
                    scores = (queries if scale == 1.0 else queries * scale) @ keys.mT
                else:
                    scores = bias(part).flatten(0, 1).baddbmm_(queries, keys.mT, alpha=scale)
                weights = torch.softmax(scores, dim=-1).to(v.dtype)
                out[part] = (weights @ values).unflatten(0, out[part].shape[:2])
    return out


def split_windows(height: int, width: int, window_size: int) -> list[tuple[int, int, int, int]]:
    """Where a token map is cut so that all windows of a part have one size.

    Windows tile the map from its top left; those at the bottom and at the right may be smaller than the others.

    Returns:
        First and last row (exclusive), first and last column of each part; rows of parts from top to bottom.
    """
    row, column = height - height % window_size, width - width % window_size
    parts: list[tuple[int, int, int, int]] = []
    for top, bottom in [(0, row), (row, height)]:
        for left, right in [(0, column), (column, width)]:
            if bottom > top and right > left:
                parts.append((top, bottom, left, right))
    return parts


def cut_windows(x: Tensor, part: tuple[int, int, int, int], window_size: int) -> Tensor:
    """Windows (B * nH * nW, h, w, C) of a part of a token map (B, H, W, C), as :func:`split_windows` cuts it."""
    top, bottom, left, right = part
    high, wide = min(window_size, bottom - top), min(window_size, right - left)
    x = x[:, top:bottom, left:right]
    x = x.reshape(x.shape[0], (bottom - top) // high, high, (right - left) // wide, wide, x.shape[3])
    return x.transpose(2, 3).reshape(-1, high, wide, x.shape[5])


def join_windows(windows: list[Tensor], parts: list[tuple[int, int, int, int]], batch: int) -> Tensor:
    """Undo :func:`cut_windows` for all parts of a map of ``batch`` images: (B, H, W, C)."""
    rows: list[Tensor] = []
    for i, (top, bottom, left, right) in enumerate(parts):
        x = windows[i]
        high, wide = x.shape[1], x.shape[2]
        x = x.reshape(batch, (bottom - top) // high, (right - left) // wide, high, wide, x.shape[3]).transpose(2, 3)
        x = x.reshape(batch, bottom - top, right - left, x.shape[5])
        if left == 0:
            rows.append(x)
        else:
            rows[-1] = torch.cat([rows[-1], x], dim=2)
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
