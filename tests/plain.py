"""The encoders' blocks as papers write them: the reference of windows and attention, which the package makes faster.

Windows padded with zeros and computed whole, queries, keys and values of the space and of the depth branch computed
one after the other, the relative-position bias added to the scores, softmax and products written out. The package has
no such form. Linear maps, adapters, MLPs and convolutions it has: they compute here as ``plain_layers`` lets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from medsa_nets.layers import ConvBN, fast
from medsa_nets.networks.hiera import HieraBlock
from medsa_nets.networks.image_encoder import Block
from medsa_nets.networks.tiny_vit import TinyViTBlock


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias, dim=-1) @ v


def partition(x: Tensor, size: int) -> Tensor:
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    return rearrange(x, "b (rows h) (columns w) c -> (b rows columns) h w c", h=size, w=size)


def unpartition(windows: Tensor, height: int, width: int) -> Tensor:
    rows, columns = (-(-side // windows.shape[1]) for side in (height, width))
    joined = "(b rows columns) h w c -> b (rows h) (columns w) c"
    return rearrange(windows, joined, rows=rows, columns=columns)[:, :height, :width]


def depth_branch(block: nn.Module, qkv: Tensor, depth: int) -> Tensor:
    """Attention along depth: queries, keys and values (slices, H, W, heads, 3, c)."""
    height, width = qkv.shape[1:3]
    columns = rearrange(qkv, "(b d) h w heads qkv c -> qkv (b h w) heads d c", d=depth)
    branch = block.depth
    steps = torch.arange(depth)
    distance = (steps[:, None] - steps[None]).clamp(-branch.max_distance, branch.max_distance) + branch.max_distance
    x = softmax_attention(*columns.unbind(0), branch.bias[:, distance].to(columns.dtype))
    x = rearrange(x, "(b h w) heads d c -> (b d) h w (heads c)", h=height, w=width)
    return branch.adapter(block.attn.proj(x))


def vit_block(block: Block, x: Tensor, depth: int = 1) -> Tensor:
    attn = block.attn
    heads = attn.num_heads
    normed = block.norm1(x)
    windows = partition(normed, block.window_size) if block.window_size else normed
    count, height, width, features = windows.shape
    qkv = attn.qkv(windows).reshape(count, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q_map = q.reshape(count, heads, height, width, -1)
    rows = torch.einsum("bnhwc,hkc->bnhwk", q_map, attn.rel_pos_h[attn.index_h])
    columns = torch.einsum("bnhwc,wkc->bnhwk", q_map, attn.rel_pos_w[attn.index_w])
    bias = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).reshape(count, heads, height * width, -1)
    attended = softmax_attention(q, k, v, bias).transpose(1, 2).reshape(count, height, width, features)
    attended = attn.proj(attended)
    if block.window_size:
        attended = unpartition(attended, x.shape[1], x.shape[2])
    attended = block.attn_adapter(attended)
    if block.depth is not None:
        again = attn.qkv(normed).unflatten(-1, (3, heads, -1)).transpose(3, 4)
        attended = attended + depth_branch(block, again, depth)
    x = x + attended
    normed = block.norm2(x)
    return x + block.mlp(normed) + block.scale * block.mlp_adapter(normed)


def tiny_vit_block(block: TinyViTBlock, x: Tensor, depth: int = 1) -> Tensor:
    attn = block.attn
    heads = attn.num_heads
    tokens = x.permute(0, 2, 3, 1)
    windows = attn.norm(partition(tokens, block.window_size))
    qkv = attn.qkv(windows.flatten(1, 2)).unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
    attended = softmax_attention(*qkv.unbind(0), attn.attention_biases[:, attn.bias_index].to(qkv.dtype))
    attended = attn.proj(attended.transpose(1, 2).flatten(2)).reshape(windows.shape)
    attended = block.attn_adapter(unpartition(attended, tokens.shape[1], tokens.shape[2]))
    if block.depth is not None:
        again = attn.qkv(attn.norm(tokens)).unflatten(-1, (heads, 3, -1))
        attended = attended + depth_branch(block, again, depth)
    tokens = block.local_conv((tokens + attended).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    normed = block.mlp.norm(tokens)
    return (tokens + block.mlp(normed) + block.scale * block.mlp_adapter(normed)).permute(0, 3, 1, 2)


def largest_of_four(x: Tensor) -> Tensor:
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).amax(dim=(2, 4))


def hiera_block(block: HieraBlock, x: Tensor, depth: int = 1) -> Tensor:
    attn = block.attn
    heads = attn.num_heads
    normed = block.norm1(x)
    windows = partition(normed, block.window_size) if block.window_size else normed
    q, k, v = attn.qkv(windows).chunk(3, dim=-1)
    if attn.pool:
        q, x = largest_of_four(q), largest_of_four(block.proj(normed))
    by_head = [rearrange(part, "b h w (heads c) -> b heads (h w) c", heads=heads) for part in (q, k, v)]
    attended = softmax_attention(*by_head, torch.zeros((), dtype=q.dtype))
    attended = attn.proj(rearrange(attended, "b heads (h w) c -> b h w (heads c)", h=q.shape[1]))
    if block.window_size:
        attended = unpartition(attended, x.shape[1], x.shape[2])
    attended = block.attn_adapter(attended)
    if block.depth is not None:
        again = attn.qkv(normed).unflatten(-1, (3, heads, -1)).transpose(3, 4)
        attended = attended + depth_branch(block, again, depth)
    x = x + attended
    normed = block.norm2(x)
    return x + block.mlp(normed) + block.scale * block.mlp_adapter(normed)


_FORMS = {Block: vit_block, TinyViTBlock: tiny_vit_block, HieraBlock: hiera_block, ConvBN: ConvBN.forward}


def in_plain_layers(form: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with fast.plain_layers():
        return form(*arguments)


@contextmanager
def plain_form(network: nn.Module) -> Iterator[nn.Module]:
    """Let a network's encoder blocks compute in their plain form."""
    changed = [module for module in network.modules() if type(module) in _FORMS]
    for module in changed:
        module.forward = partial(in_plain_layers, _FORMS[type(module)], module)
    try:
        yield network
    finally:
        for module in changed:
            del module.forward
