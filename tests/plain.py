"""The encoders' blocks in their plain form: the reference of what the package computes faster.

Windows padded with zeros and computed whole, queries, keys and values of the space and of the depth branch computed
one after the other, the relative-position bias added to the scores, softmax and products written out, every linear map
by ``torch.nn.functional.linear``, batch norms apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers import Adapter, ConvBN
from medsa_nets.networks.image_encoder import Block
from medsa_nets.networks.tiny_vit import TinyViTBlock


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def adapt(adapter: Adapter, x: Tensor) -> Tensor:
    y = linear(adapter.up, F.relu(linear(adapter.down, x)))
    return x + y if adapter.skip else y


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias, dim=-1) @ v


def partition(x: Tensor, size: int) -> Tensor:
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    x = x.reshape(batch, x.shape[1] // size, size, x.shape[2] // size, size, channels)
    return x.transpose(2, 3).reshape(-1, size, size, channels)


def unpartition(windows: Tensor, height: int, width: int) -> Tensor:
    size, channels = windows.shape[1], windows.shape[3]
    rows, columns = -(-height // size), -(-width // size)
    x = windows.reshape(-1, rows, columns, size, size, channels).transpose(2, 3)
    return x.reshape(-1, rows * size, columns * size, channels)[:, :height, :width]


def depth_branch(block: nn.Module, qkv: Tensor, depth: int) -> Tensor:
    """Attention along depth: queries, keys and values (slices, H, W, heads, 3, c)."""
    slices, height, width, heads, _, channels = qkv.shape
    columns = qkv.reshape(-1, depth, height * width, heads, 3, channels).permute(4, 0, 2, 3, 1, 5).flatten(1, 2)
    branch = block.depth
    steps = torch.arange(depth)
    distance = (steps[:, None] - steps[None]).clamp(-branch.max_distance, branch.max_distance) + branch.max_distance
    x = softmax_attention(*columns.unbind(0), branch.bias[:, distance].to(columns.dtype))
    x = x.reshape(-1, height * width, heads, depth, channels).permute(0, 3, 1, 2, 4)
    x = linear(block.attn.proj, x.reshape(slices, height, width, heads * channels))
    return adapt(branch.adapter, x)


def vit_block(block: Block, x: Tensor, depth: int = 1) -> Tensor:
    attn = block.attn
    heads = attn.num_heads
    normed = block.norm1(x)
    windows = partition(normed, block.window_size) if block.window_size else normed
    count, height, width, features = windows.shape
    qkv = linear(attn.qkv, windows).reshape(count, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q_map = q.reshape(count, heads, height, width, -1)
    rows = torch.einsum("bnhwc,hkc->bnhwk", q_map, attn.rel_pos_h[attn.index_h])
    columns = torch.einsum("bnhwc,wkc->bnhwk", q_map, attn.rel_pos_w[attn.index_w])
    bias = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).reshape(count, heads, height * width, -1)
    attended = softmax_attention(q, k, v, bias).transpose(1, 2).reshape(count, height, width, features)
    attended = linear(attn.proj, attended)
    if block.window_size:
        attended = unpartition(attended, x.shape[1], x.shape[2])
    attended = adapt(block.attn_adapter, attended)
    if block.depth is not None:
        again = linear(attn.qkv, normed).unflatten(-1, (3, heads, -1)).transpose(3, 4)
        attended = attended + depth_branch(block, again, depth)
    x = x + attended
    normed = block.norm2(x)
    mlp = linear(block.mlp.lin2, F.gelu(linear(block.mlp.lin1, normed)))
    return x + mlp + block.scale * adapt(block.mlp_adapter, normed)


def tiny_vit_block(block: TinyViTBlock, x: Tensor, depth: int = 1) -> Tensor:
    attn = block.attn
    heads = attn.num_heads
    tokens = x.permute(0, 2, 3, 1)
    windows = attn.norm(partition(tokens, block.window_size))
    qkv = linear(attn.qkv, windows.flatten(1, 2)).unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
    attended = softmax_attention(*qkv.unbind(0), attn.attention_biases[:, attn.bias_index].to(qkv.dtype))
    attended = linear(attn.proj, attended.transpose(1, 2).flatten(2)).reshape(windows.shape)
    attended = adapt(block.attn_adapter, unpartition(attended, tokens.shape[1], tokens.shape[2]))
    if block.depth is not None:
        again = linear(attn.qkv, attn.norm(tokens)).unflatten(-1, (heads, 3, -1))
        attended = attended + depth_branch(block, again, depth)
    tokens = block.local_conv((tokens + attended).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    normed = block.mlp.norm(tokens)
    mlp = linear(block.mlp.fc2, F.gelu(linear(block.mlp.fc1, normed)))
    return (tokens + mlp + block.scale * adapt(block.mlp_adapter, normed)).permute(0, 3, 1, 2)


def conv_bn(module: ConvBN, x: Tensor) -> Tensor:
    bn = module.bn
    return F.batch_norm(module.c(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


_FORMS = {Block: vit_block, TinyViTBlock: tiny_vit_block, ConvBN: conv_bn}


@contextmanager
def plain_form(network: nn.Module) -> Iterator[nn.Module]:
    """Let a network's encoder blocks compute in their plain form."""
    changed = [module for module in network.modules() if type(module) in _FORMS]
    for module in changed:
        module.forward = partial(_FORMS[type(module)], module)
    try:
        yield network
    finally:
        for module in changed:
            del module.forward
