from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medsa_nets.layers import (
    ConvBN,
    LayerNorm2d,
    MLPBlock,
    attend,
    attend_map,
    common,
    cut_windows,
    join_windows,
    split_windows,
)


def test_layer_norm_2d_equals_segment_anything(segment_anything, randomise):
    reference = randomise(segment_anything.modeling.common.LayerNorm2d(12))
    ours = LayerNorm2d(12)
    ours.load_state_dict(reference.state_dict())
    x = 3.0 + 2.0 * torch.randn(2, 12, 5, 7)
    torch.testing.assert_close(ours(x), reference(x), atol=1e-5, rtol=1e-5)


def test_mlp_block_equals_segment_anything(segment_anything, randomise):
    reference = randomise(segment_anything.modeling.common.MLPBlock(12, 48, nn.GELU))
    ours = MLPBlock(features=12, hidden=48, activation=nn.GELU())
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), reference(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "shape", [{"kernel_size": 1}, {"kernel_size": 3}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 3, "groups": 8}]
)
def test_conv_bn_equals_convolution_then_frozen_batch_norm(shape, training, randomise):
    ours = randomise(ConvBN(8, 16, **shape)).train(training)
    statistics = copy.deepcopy(ours.bn.state_dict())
    convolution = nn.Conv2d(8, 16, padding=shape["kernel_size"] // 2, bias=False, **shape)
    convolution.load_state_dict(ours.c.state_dict())
    norm = nn.BatchNorm2d(16).eval()
    norm.load_state_dict(statistics)
    x = torch.randn(2, 8, 9, 11)
    torch.testing.assert_close(ours(x), norm(convolution(x)), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, statistics[name]) for name, value in ours.bn.state_dict().items())


def _attention_by_the_formula(q, k, v, bias):
    out = torch.zeros(*q.shape[:3], v.shape[3])
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = torch.stack([q[b, head, i] @ key for key in k[b, head]]) / q.shape[3] ** 0.5
                if bias is not None:
                    scores = scores + bias.expand(q.shape[0], q.shape[1], -1, -1)[b, head, i]
                weights = scores.exp() / scores.exp().sum()
                out[b, head, i] = weights @ v[b, head]
    return out


@pytest.fixture(params=[common.FUSED, common.EXPLICIT])
def way(request):
    """Attention by one of its ways, whichever is faster here."""
    with common.attention_way.force(request.param):
        yield request.param


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias_shape", [None, (2, 3, 5, 6), (1, 3, 5, 6), (1, 1, 5, 6)])
def test_both_ways_to_attend_follow_the_formula(way, training, bias_shape):
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    bias = None if bias_shape is None else torch.randn(bias_shape)
    actual = attend(q.clone().requires_grad_(training), k, v, bias)
    torch.testing.assert_close(actual, _attention_by_the_formula(q, k, v, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias_trains", [False, True])
def test_gradients_of_each_way_equal_those_of_pytorch_s(way, bias_trains):
    tensors = [torch.randn(2, 3, 5, 4) for _ in range(3)] + [torch.randn(1, 3, 5, 5)]
    ours = [t.clone().requires_grad_(i < 3 or bias_trains) for i, t in enumerate(tensors)]
    theirs = [t.clone().requires_grad_(i < 3 or bias_trains) for i, t in enumerate(tensors)]
    attend(*ours).square().sum().backward()
    nn.functional.scaled_dot_product_attention(*theirs[:3], attn_mask=theirs[3]).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_a_bias_that_trains_alone_has_its_gradient(way):
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    ours, theirs = (torch.zeros(1, 3, 5, 5, requires_grad=True) for _ in range(2))
    attend(q, k, v, ours).square().sum().backward()
    nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys", "channels"),
    [(70, 2, 49, 50, 32), (2, 3, 900, 1000, 16), (2, 5, 400, 401, 16), (3, 2, 7, 9, 8)],
)
@pytest.mark.parametrize("biased", [0, 1, -1])
def test_attention_equals_pytorch_s_in_double_precision(way, dtype, batch, heads, rows, keys, channels, biased):
    q = torch.randn(batch, heads, rows, channels, dtype=dtype)
    k, v = torch.randn(2, batch, heads, keys, channels, dtype=dtype).unbind(0)
    bias = torch.randn(batch if biased < 0 else 1, heads, rows, keys, dtype=dtype) if biased else None
    expected = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=None if bias is None else bias.double()
    )
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(attend(q, k, v, bias).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=[common.LAID, common.COLUMNS])
def map_way(request):
    """Attention over a map by one of its ways, whichever is faster here."""
    with common.map_way.force(request.param):
        yield request.param


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("one_more", [False, True], ids=["map", "map and padded key"])
@pytest.mark.parametrize("cached", [2**21, 500, 100], ids=["whole", "by head", "by row"])
def test_attention_over_a_map_follows_the_formula(map_way, training, one_more, cached, monkeypatch):
    monkeypatch.setattr(common, "CACHED_BYTES", cached)
    height, width, queries = 2, 3, 70  # more queries than a piece has at least
    keys = height * width + one_more
    q, k, v = torch.randn(2, 3, queries, 4), torch.randn(2, 3, keys, 4), torch.randn(2, 3, keys, 5)
    rows, columns, padded = (torch.randn(2, 3, queries, n) for n in (height, width, 1))
    bias = rows.repeat_interleave(width, 3) + columns.repeat(1, 1, 1, height)
    if one_more:
        bias = torch.cat([bias, padded], dim=3)
    found = attend_map(q.requires_grad_(training), k, v, rows, columns, padded if one_more else None, 0.5)
    torch.testing.assert_close(found, _attention_by_the_formula(q, k, v, bias), atol=1e-5, rtol=1e-5)


def test_attention_over_a_map_in_bfloat16(map_way):
    tensors = [torch.randn(1, 2, n, c).bfloat16() for n, c in ((6, 4), (6, 4), (6, 4), (6, 2), (6, 3))]
    q, k, v, rows, columns = (t.float() for t in tensors)
    bias = rows.repeat_interleave(3, 3) + columns.repeat(1, 1, 1, 2)
    found = attend_map(*tensors, None, 0.5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), _attention_by_the_formula(q, k, v, bias), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("size", [(14, 14), (28, 14), (16, 16), (9, 30), (3, 5)])
@pytest.mark.parametrize("window", [7, 14])
def test_windows_hold_the_tokens_of_segment_anything_s(segment_anything, size, window):
    module = segment_anything.modeling.image_encoder
    x = torch.randn(2, *size, 3)
    padded, _ = module.window_partition(x, window)
    parts = split_windows(*size, window)
    windows = [cut_windows(x, part, window) for part in parts]
    assert sum(w.shape[0] for w in windows) == padded.shape[0]  # as many windows, and none of their padding
    assert sum(w.shape[:3].numel() for w in windows) == 2 * size[0] * size[1]
    expected = {tuple(w[w.abs().sum(-1) > 0].flatten().tolist()) for w in padded}
    assert {tuple(w.flatten().tolist()) for part in windows for w in part} == expected
    assert torch.equal(join_windows(windows, parts, 2), x)
