from __future__ import annotations

import pytest
import torch
from torch import nn

from medsa_nets.layers import attend, attend_map, fast
from medsa_nets.layers.fast import attention


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


@pytest.fixture(params=[attention.FUSED, attention.EXPLICIT, "plain"])
def way(request):
    """Attention by one of its ways, whichever is faster here, or plainly."""
    with fast.plain_layers() if request.param == "plain" else attention.attention_way.force(request.param):
        yield request.param


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias_shape", [None, (2, 3, 5, 6), (1, 3, 5, 6), (1, 1, 5, 6)])
def test_every_way_to_attend_follows_the_formula(way, training, bias_shape):
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


@pytest.fixture(params=[attention.LAID, attention.COLUMNS, "plain"])
def map_way(request):
    """Attention over a map by one of its ways, whichever is faster here, or plainly."""
    with fast.plain_layers() if request.param == "plain" else attention.map_way.force(request.param):
        yield request.param


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("one_more", [False, True], ids=["map", "map and padded key"])
@pytest.mark.parametrize("cached", [2**21, 500, 100], ids=["whole", "by head", "by row"])
def test_attention_over_a_map_follows_the_formula(map_way, training, one_more, cached, monkeypatch):
    monkeypatch.setattr(attention, "CACHED_BYTES", cached)
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
