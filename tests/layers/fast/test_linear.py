from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from medsa_nets.layers import Linear, multiply_linear
from medsa_nets.layers.fast import linear as module
from medsa_nets.layers.fast.kept import _remembered

needs_onednn = pytest.mark.skipif(not module._ONEDNN, reason="this build of PyTorch multiplies without oneDNN")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every product by oneDNN, which takes those of any size here, adds an entry."""
    calls: list[int] = []
    monkeypatch.setattr(module, "SMALL", 64)
    monkeypatch.setattr(module.linear_library, "forced", module.ONEDNN)
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


@needs_onednn
def test_an_expanded_gradient_is_no_obstacle():
    x = torch.randn(400, 64, requires_grad=True)
    weight = torch.randn(64, 64, requires_grad=True)
    multiply_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(400, -1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(64, -1), atol=1e-3, rtol=1e-4)


def test_other_types_small_products_and_switched_off_onednn_are_pytorch_s(counted):
    x, weight = torch.randn(300, 96, dtype=torch.float64), torch.randn(40, 96, dtype=torch.float64)
    assert torch.equal(multiply_linear(x, weight), nn.functional.linear(x, weight))
    multiply_linear(torch.randn(3, 2), torch.randn(4, 2))
    multiply_linear(torch.randn(0, 8), torch.randn(4, 8))
    with torch.backends.mkldnn.flags(enabled=False):
        multiply_linear(torch.randn(300, 96), torch.randn(40, 96))
    assert not counted


def test_the_library_that_is_not_the_faster_one_is_not_called(counted):
    with module.linear_library.force(module.TORCH):
        multiply_linear(torch.randn(300, 96), torch.randn(40, 96))
    assert not counted


@needs_onednn
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here")
def test_a_frozen_layer_under_autocast_and_its_gradient_equal_pytorch_s(counted):
    layer = Linear(96, 40).requires_grad_(False)

    def answer(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = torch.randn(2, 150, 96).requires_grad_()
    found = gradients(answer, x)
    assert len(counted) == 2  # forward and backward
    expected = gradients(layer, x)
    assert found[0].dtype == torch.bfloat16
    assert found[1][0].dtype == torch.float32
    for a, b in ((found[0], expected[0]), (found[1][0], expected[1][0])):
        assert (a - b).norm() <= 1e-2 * b.norm()


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
    kept = _remembered[layer]["weight torch.bfloat16"].get((layer.weight,), pytest.fail)
    assert torch.equal(answer(), expected())
    assert _remembered[layer]["weight torch.bfloat16"].get((layer.weight,), pytest.fail) is kept
    layer.load_state_dict(nn.Linear(32, 32).state_dict())
    assert torch.equal(answer(), expected())
    layer.weight = nn.Parameter(torch.randn(32, 32), requires_grad=False)
    assert torch.equal(answer(), expected())
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert copy.deepcopy(layer) not in _remembered
    assert pickle.loads(pickle.dumps(layer)) not in _remembered


def test_what_was_remembered_in_inference_mode_serves_training():
    layer = Linear(32, 32).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.inference_mode():
            layer(torch.randn(4, 32))
        x = torch.randn(4, 32, requires_grad=True)
        layer(x).sum().backward()
    assert x.grad is not None


def test_a_trained_layer_gets_gradients_under_autocast_whatever_the_type_of_its_input(counted):
    layer = Linear(32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(4, 32)).float().sum().backward()
        layer(torch.randn(4, 32).bfloat16()).float().sum().backward()
    assert layer.weight.grad is not None
    assert layer not in _remembered
