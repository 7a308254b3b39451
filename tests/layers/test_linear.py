from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from medsa_nets.layers import Linear, attend, multiply_linear, multiply_transposed
from medsa_nets.layers import linear as module

needs_onednn = pytest.mark.skipif(not module._ONEDNN, reason="this build of PyTorch multiplies without oneDNN")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every product by oneDNN adds an entry."""
    calls: list[int] = []
    original = module._onednn
    monkeypatch.setattr(module, "_onednn", lambda *args: calls.append(1) or original(*args))
    return calls


def gradients(function, *tensors: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out, list(torch.autograd.grad((out * weights).sum(), [leaf for leaf in leaves if leaf.requires_grad]))


@needs_onednn
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("shape", [(300, 96), (2, 17, 9, 96), (96, 300)])
def test_linear_maps_and_their_gradients_equal_pytorch_s(counted, trained, shape):
    x = torch.randn(96, 300).t() if shape == (300, 96) else torch.randn(shape)  # columns first: not contiguous
    tensors = (x, torch.randn(40, x.shape[-1]), torch.randn(40))
    for tensor, trains in zip(tensors, trained, strict=True):
        tensor.requires_grad_(trains)
    found, expected = gradients(multiply_linear, *tensors), gradients(nn.functional.linear, *tensors)
    assert counted
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.fixture(params=[True, False], ids=["oneDNN", "BLAS"])
def by_onednn(request, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Batches of products by one library, whichever is faster here."""
    monkeypatch.setattr(module, "onednn_multiplies_batches", lambda threads: request.param)
    return request.param


@needs_onednn
def test_batched_products_and_their_gradients_equal_pytorch_s(counted, by_onednn):
    a, b = torch.randn(5, 70, 64).requires_grad_(), torch.randn(64, 5, 80).permute(1, 2, 0).requires_grad_()
    found = gradients(multiply_transposed, a, b)
    assert len(counted) == (15 if by_onednn else 0)
    expected = gradients(lambda a, b: a @ b.transpose(1, 2), a, b)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)
    for x, y in zip(found[1], expected[1], strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm()


@needs_onednn
def test_a_product_is_added_in_place(counted, by_onednn):
    out, a, b = torch.randn(5, 70, 80), torch.randn(5, 70, 64), torch.randn(64, 5, 80).permute(1, 2, 0)
    expected = out.double() + 0.3 * a.double() @ b.double().transpose(1, 2)
    assert module.add_product(out, a, b, 0.3) is out
    assert len(counted) == (5 if by_onednn else 0)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_the_faster_library_is_measured_once_and_leaves_random_numbers_as_they_are(counted):
    state = torch.get_rng_state()
    module.onednn_multiplies_batches.cache_clear()
    first = module.onednn_multiplies_batches(torch.get_num_threads())
    measured = len(counted)
    assert measured > 0
    assert module.onednn_multiplies_batches(torch.get_num_threads()) is first
    assert len(counted) == measured
    assert torch.equal(torch.get_rng_state(), state)


@needs_onednn
def test_an_expanded_gradient_is_no_obstacle():
    x = torch.randn(400, 64, requires_grad=True)
    weight = torch.randn(64, 64, requires_grad=True)
    multiply_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(400, -1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(64, -1), atol=1e-3, rtol=1e-4)


def test_other_types_small_products_and_switched_off_onednn_are_pytorch_s(counted):
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = torch.randn(300, 96, dtype=dtype), torch.randn(40, 96, dtype=dtype)
        assert torch.equal(multiply_linear(x, weight), nn.functional.linear(x, weight))
    multiply_linear(torch.randn(3, 8), torch.randn(4, 8))
    multiply_linear(torch.randn(0, 8), torch.randn(4, 8))
    with torch.backends.mkldnn.flags(enabled=False):
        multiply_linear(torch.randn(300, 96), torch.randn(40, 96))
    assert not counted


def test_a_frozen_layer_keeps_its_weights_in_autocast_s_type_until_they_change():
    layer = Linear(32, 32).requires_grad_(False)
    x = torch.randn(4, 32)

    def answer() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    def expected() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nn.functional.linear(x, layer.weight, layer.bias)

    assert answer().dtype == torch.bfloat16
    kept = module._remembered[layer]["weight torch.bfloat16"][1]
    assert torch.equal(answer(), expected())
    assert module._remembered[layer]["weight torch.bfloat16"][1] is kept
    layer.load_state_dict(nn.Linear(32, 32).state_dict())
    assert torch.equal(answer(), expected())
    layer.weight = nn.Parameter(torch.randn(32, 32), requires_grad=False)
    assert torch.equal(answer(), expected())
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert copy.deepcopy(layer) not in module._remembered
    assert pickle.loads(pickle.dumps(layer)) not in module._remembered


def test_what_was_remembered_in_inference_mode_serves_training():
    layer = Linear(32, 32).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.inference_mode():
            layer(torch.randn(4, 32))
        x = torch.randn(4, 32, requires_grad=True)
        layer(x).sum().backward()
    assert x.grad is not None


def test_a_trained_layer_gets_gradients_under_autocast():
    layer = Linear(32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(4, 32)).float().sum().backward()
    assert layer.weight.grad is not None
    assert layer not in module._remembered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys", "channels"),
    [(70, 2, 49, 50, 32), (2, 3, 900, 1000, 16), (2, 5, 400, 401, 16), (3, 2, 7, 9, 8)],
)
@pytest.mark.parametrize("biased", [0, 1, -1])
def test_attention_in_pieces_equals_pytorch_s(by_onednn, dtype, batch, heads, rows, keys, channels, biased):
    q = torch.randn(batch, heads, rows, channels, dtype=dtype)
    k, v = torch.randn(2, batch, heads, keys, channels, dtype=dtype).unbind(0)
    bias = torch.randn(batch if biased < 0 else 1, heads, rows, keys, dtype=dtype) if biased else None
    expected = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=None if bias is None else bias.double()
    )
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(attend(q, k, v, bias).double(), expected, atol=tolerance, rtol=tolerance)
