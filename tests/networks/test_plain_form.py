"""What the encoders compute fast equals their plain form, forward and backward."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

from medsa_nets import build_medsa
from medsa_nets.layers import Adapter, DepthBranch, fast
from medsa_nets.layers.fast import groups
from medsa_nets.networks import HieraEncoder, ImageEncoderViT, TinyViTEncoder

from ..conftest import NARROW_HIERA, TINY_VIT
from ..plain import plain_form

EPSILON = torch.finfo(torch.float32).eps


def vit(height: int, width: int) -> nn.Module:
    return ImageEncoderViT(img_size=(height, width), **{**TINY_VIT, "embed_dim": 64, "depth": 3}, spatial_dims=3)


def tiny(height: int, width: int) -> nn.Module:
    return TinyViTEncoder(features=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), spatial_dims=3)


def hiera(height: int, width: int) -> nn.Module:
    return HieraEncoder(**NARROW_HIERA, spatial_dims=3)


def switch_units(encoder: nn.Module, by: float = 30.0) -> None:
    """Let half of the adapters' units be on for every token and half of them off, where a ReLU has no kink.

    At a kink, two roundings of one number may have different gradients, whatever computed them.
    """
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, Adapter):
                module.down.bias[0::2], module.down.bias[1::2] = by, -by


class Passes(NamedTuple):
    """What an encoder computed: without gradients, with them, and the gradients."""

    inferred: torch.Tensor
    trained: torch.Tensor
    gradients: dict[str, torch.Tensor]


def passes(encoder: nn.Module, image: torch.Tensor, depth: int, weights: torch.Tensor) -> Passes:
    leaves = {"image": image.clone().requires_grad_()}
    leaves |= {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    with torch.no_grad():
        inferred = encoder(image, depth)
    trained = encoder(leaves["image"], depth)
    found = torch.autograd.grad((trained * weights.to(image.dtype)).sum(), list(leaves.values()))
    return Passes(inferred, trained.detach(), dict(zip(leaves, found, strict=True)))


def compare(encoder: nn.Module, image: torch.Tensor, depth: int) -> None:
    """In double precision, fast and plain form agree: they are one function.

    In single precision, each strays from that by its own rounding, which differs between processors. The fast form may
    stray a few times as far as the plain one, or, where sums cancel, by a few roundings of the largest gradient.
    """
    weights = torch.randn(encoder(image[:depth], depth).shape[1:])
    twin = copy.deepcopy(encoder).double()
    inactive = []
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, inputs, __: inactive.append(float(inputs[0].detach().abs().min())))
    fast_in_double = passes(twin, image.double(), depth, weights)
    assert min(inactive) > 1.0, "a unit is near its kink"
    with plain_form(twin):
        exact = passes(twin, image.double(), depth, weights)
    fast = passes(encoder, image, depth, weights)
    with plain_form(encoder):
        plain = passes(encoder, image, depth, weights)

    for kind in ("inferred", "trained"):
        expected = getattr(exact, kind)
        error, rounding = (float((getattr(p, kind) - expected).norm() / expected.norm()) for p in (fast, plain))
        # the fast ViT adds up the bias of padded keys in single precision at least
        torch.testing.assert_close(getattr(fast_in_double, kind), expected, atol=1e-6 * expected.abs().max(), rtol=0)
        assert error < 4 * rounding
    largest = max(gradient.norm() for gradient in exact.gradients.values())
    for name, expected in exact.gradients.items():
        assert (fast_in_double.gradients[name] - expected).norm() < 1e-6 * expected.norm() + 1e-9 * largest, name
        error, rounding = ((p.gradients[name] - expected).norm() for p in (fast, plain))
        assert error < 4 * rounding + 8 * EPSILON * largest, name


@pytest.mark.parametrize(("make", "share"), [(vit, 1), (tiny, 2)], ids=["vit", "tiny"])
@pytest.mark.parametrize(
    ("height", "width", "slices", "depth"),
    [(224, 224, 2, 1), (256, 256, 3, 3), (64, 240, 4, 2), (480, 224, 1, 1), (128, 112, 7, 7)],
)
def test_fast_equals_plain_for_maps_that_windows_tile_and_do_not_tile(
    make, share, randomise, height, width, slices, depth
):
    height, width = height // share, width // share  # tokens of tiny are smaller: it needs no larger map
    encoder = randomise(make(height, width))
    for module in encoder.modules():
        if isinstance(module, DepthBranch):
            assert module.bias.abs().max() > 0
    switch_units(encoder)
    compare(encoder, torch.randn(slices, 3, height, width), depth)


@pytest.mark.parametrize(("height", "width", "slices", "depth"), [(256, 256, 2, 2), (64, 160, 3, 1)])
def test_fast_equals_plain_for_blocks_that_halve_the_map(randomise, height, width, slices, depth):
    encoder = randomise(hiera(height, width))
    switch_units(encoder)
    compare(encoder, torch.randn(slices, 3, height, width), depth)


def test_a_few_images_at_a_time_give_what_all_at_once_give(randomise, monkeypatch):
    encoder = randomise(tiny(64, 48))
    image = torch.randn(5, 3, 64, 48)
    with torch.no_grad():
        expected = encoder(image, 5)
        monkeypatch.setattr(groups, "HIDDEN_BYTES", 1)
        found = encoder(image, 5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_fast_equals_plain_on_real_weights(perturb_adapters, lite_medsam_file):
    network = perturb_adapters(build_medsa("lite_medsam", spatial_dims=3, img_size=256))
    image = torch.rand(1, 1, 128, 112, 3)
    with torch.no_grad():
        found = network.encode_image(image)
        with fast.plain_layers():
            plainly = network.encode_image(image)
        with plain_form(network):
            expected = network.encode_image(image)
    assert not torch.equal(found, plainly)
    assert (plainly - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_bfloat16_strays_from_single_precision_no_further_than_the_plain_form_does(randomise):
    encoder = randomise(vit(256, 256))
    image = torch.randn(2, 3, 256, 256)

    def error() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return float((encoder(image, 2).float() - exact).norm() / exact.norm())

    with torch.no_grad():
        with plain_form(encoder):
            exact = encoder(image, 2)
            plain = error()
        assert error() < 1.25 * plain + 1e-3
