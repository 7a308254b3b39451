from __future__ import annotations

import pytest
import torch

from medsa_nets.layers import HYPER_PROMPTING_FORMS, Adapter, HyperPromptingAdapter


@pytest.mark.parametrize("skip", [False, True])
def test_fresh_adapter_is_the_identity_with_and_zero_without_skip_path(skip):
    x = torch.randn(2, 5, 16)
    assert torch.equal(Adapter(16, skip=skip)(x), x if skip else torch.zeros_like(x))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("shape", [(16,), (2, 5, 16), (2, 4, 3, 16)])
def test_adapter_computes_down_relu_up(skip, shape, perturb_adapters):
    adapter = perturb_adapters(Adapter(16, skip=skip))
    x = torch.randn(shape)
    hidden = (x @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    expected = hidden @ adapter.up.weight.T + adapter.up.bias + (x if skip else 0)
    torch.testing.assert_close(adapter(x), expected)


@pytest.mark.parametrize(
    ("features", "settings", "width"),
    [
        (1280, {}, 320),
        (1280, {"adapter_dim": 80}, 80),
        (1280, {"adapter_ratio": 0.5, "adapter_dim": 80}, 80),
        (160, {"adapter_ratio": 0.1}, 16),
        (4, {"adapter_ratio": 0.01}, 1),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "hyper"])
def test_bottleneck_width_follows_ratio_or_dimension(features, settings, width, kind):
    adapter = Adapter(features, **settings) if kind == "plain" else HyperPromptingAdapter(features, 8, **settings)
    assert adapter.down.weight.shape == (width, features)
    assert adapter.up.weight.shape == (features, width)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter_dim": 0}, "adapter_dim must be 1 or more, got 0"),
        ({"adapter_ratio": 0.0}, r"adapter_ratio must lie in \(0, 4\], got 0.0"),
        ({"adapter_ratio": 4.5}, "got 4.5"),
        ({"adapter_ratio": -1.0}, "got -1.0"),
    ],
)
def test_impossible_bottlenecks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Adapter(16, **settings)


def test_unknown_hyper_prompting_form_is_refused():
    with pytest.raises(ValueError, match=r"additive.*weights.*'multiplied'"):
        HyperPromptingAdapter(16, 16, form="multiplied")


@pytest.mark.parametrize("form", HYPER_PROMPTING_FORMS)
def test_fresh_hyper_prompting_adapter_is_the_identity(form):
    x = torch.randn(3, 7, 16)
    assert torch.equal(HyperPromptingAdapter(16, 8, form=form)(x, torch.randn(3, 7, 8)), x)


def test_additive_form_adds_the_prompt_token_by_token(perturb_adapters):
    adapter = perturb_adapters(HyperPromptingAdapter(16, 8, form="additive"))
    x, prompt = torch.randn(3, 7, 16), torch.randn(3, 7, 8)
    actual = adapter(x, prompt)
    for sample in range(3):
        for token in range(7):
            hidden = adapter.down.weight @ x[sample, token] + adapter.down.bias
            hidden = hidden + adapter.prompt.weight @ prompt[sample, token] + adapter.prompt.bias
            expected = x[sample, token] + adapter.up.weight @ hidden.clamp(min=0) + adapter.up.bias
            torch.testing.assert_close(actual[sample, token], expected)


def test_weights_form_multiplies_by_a_matrix_made_of_the_prompt(perturb_adapters):
    adapter = perturb_adapters(HyperPromptingAdapter(16, 8, form="weights"))
    first, last = adapter.prompt[0], adapter.prompt[2]
    x, prompt = torch.randn(3, 7, 16), torch.randn(3, 7, 8)
    actual = adapter(x, prompt)
    for sample in range(3):
        mean = sum(prompt[sample]) / 7
        matrix = (last.weight @ (first.weight @ mean + first.bias).clamp(min=0) + last.bias).reshape(4, 4)
        hidden = (x[sample] @ adapter.down.weight.T + adapter.down.bias) @ matrix
        expected = x[sample] + hidden.clamp(min=0) @ adapter.up.weight.T + adapter.up.bias
        torch.testing.assert_close(actual[sample], expected)


def test_weights_form_starts_near_the_plain_bottleneck():
    adapter = HyperPromptingAdapter(256, 256, form="weights")
    matrix = adapter.prompt(torch.randn(5, 256)).reshape(5, 64, 64)
    deviation = matrix - torch.eye(64)
    assert 0 < deviation.abs().mean() < 0.1


@pytest.mark.parametrize("form", HYPER_PROMPTING_FORMS)
def test_the_prompt_conditions_a_trained_adapter(form, perturb_adapters):
    adapter = perturb_adapters(HyperPromptingAdapter(16, 16, form=form))
    x, prompt = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    assert not torch.allclose(adapter(x, prompt), adapter(x, 2 * prompt), atol=1e-4)


@pytest.mark.parametrize("form", HYPER_PROMPTING_FORMS)
def test_gradient_reaches_every_parameter_of_a_trained_adapter(form, perturb_adapters):
    adapter = perturb_adapters(HyperPromptingAdapter(16, 8, form=form))
    adapter(torch.randn(3, 7, 16), torch.randn(3, 7, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
