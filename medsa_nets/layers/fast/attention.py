"""Attention by the fastest of equal ways: fused, or in pieces that fit the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from medsa_nets.layers.fast.choices import Choice, Ways
from medsa_nets.layers.fast.dispatch import is_exporting


def attend_by_columns(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, padded: Optional[Tensor], scale: float
) -> Tensor:
    """Attention over a map, its bias computed by the product of queries and keys; also for TorchScript."""
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
    joined = torch.cat(queries, dim=3)
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(joined, keys, v, scale=1.0)
    else:  # TorchScript compiles what follows a return
        return attend(joined, keys, v, None, 1.0)


CACHED_BYTES = 2**21  # of scores, that stay in a core's cache between the two products
LARGE_MAP = 1024  # tokens from which a map is measured as a large one
SIZES = (8, 16, 24, 32, 64, 256)  # of queries and keys that attention is measured with; others go with the next larger
FUSED, EXPLICIT = "fused", "explicit"
LAID, COLUMNS = "laid down", "by columns"


def attend_map(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, padded: Tensor | None, scale: float
) -> Tensor:
    """:func:`medsa_nets.layers.attend_map`, by the faster of two ways (``tests/benchmarks/pairs.py``).

    Either the product of queries and keys computes the bias (its parts are further columns of the queries, and the
    keys' further columns say in which row and column a key stands), or, where nothing has to be kept for a backward
    pass, the bias is laid down first, piece by piece in the processor's cache, and the product is added to it.
    """
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, rows, columns))
    if q.device.type != "cpu" or is_exporting() or needs_grad:
        return attend_by_columns(q, k, v, rows, columns, padded, scale)
    if map_way(f"{q.dtype}, {'large' if k.shape[2] >= LARGE_MAP else 'small'}") == COLUMNS:
        return attend_by_columns(q, k, v, rows, columns, padded, scale)
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
            return attend_by_columns(q, k, v, rows, columns, None, 0.125)

    laid_down = torch.no_grad()(lambda: _attend_laid_down(q, k, v, rows, columns, None, 0.125))
    return {LAID: laid_down, COLUMNS: by_columns}


map_way = Choice("attention over a map", _map_examples)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """:func:`medsa_nets.layers.attend`, by the faster of two ways (``tests/benchmarks/pairs.py``).

    One is PyTorch's fused attention. The other computes scores explicitly, in pieces that fit the processor's cache
    where nothing has to be kept for a backward pass; on a CPU in bfloat16 it is often the faster. Where the bias trains
    or values have another width than keys, PyTorch has no fused form.
    """
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
