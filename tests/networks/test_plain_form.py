"""What the encoders compute fast equals their plain form, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from medsa_nets import build_medsa
from medsa_nets.layers import DepthBranch
from medsa_nets.networks import ImageEncoderViT, TinyViTEncoder, tiny_vit

from ..conftest import TINY_VIT
from ..plain import plain_form

Encode = Callable[[], torch.Tensor]


def vit(height: int, width: int) -> nn.Module:
    return ImageEncoderViT(img_size=(height, width), **{**TINY_VIT, "embed_dim": 64, "depth": 3}, spatial_dims=3)


def tiny(height: int, width: int) -> nn.Module:
    return TinyViTEncoder(features=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), patch_stride=1, spatial_dims=3)


def compare(encoder: nn.Module, image: torch.Tensor, depth: int) -> None:
    trained = [p for p in encoder.parameters() if p.requires_grad]
    x, y = image.clone().requires_grad_(), image.clone().requires_grad_()
    with torch.no_grad():
        inferred = encoder(image, depth)
    found = encoder(x, depth)
    with plain_form(encoder):
        expected = encoder(y, depth)
    scale = expected.detach().abs().max()
    assert (inferred - expected).abs().max() < 1e-5 * scale
    assert (found - expected).abs().max() < 1e-5 * scale
    weights = torch.randn(found.shape)
    ours = torch.autograd.grad((found * weights).sum(), [x, *trained])
    theirs = torch.autograd.grad((expected * weights).sum(), [y, *trained])
    norm = torch.stack([b.norm() for b in theirs]).max()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm() + 1e-7 * norm


@pytest.mark.parametrize("make", [vit, tiny])
@pytest.mark.parametrize(
    ("height", "width", "slices", "depth"),
    [(224, 224, 2, 1), (256, 256, 3, 3), (64, 240, 4, 2), (480, 224, 1, 1), (128, 112, 7, 7)],
)
def test_fast_equals_plain_for_maps_that_windows_tile_and_do_not_tile(make, randomise, height, width, slices, depth):
    encoder = randomise(make(height, width))
    for module in encoder.modules():
        if isinstance(module, DepthBranch):
            assert module.bias.abs().max() > 0
    compare(encoder, torch.randn(slices, 3, height, width), depth)


def test_a_few_images_at_a_time_give_what_all_at_once_give(randomise, monkeypatch):
    encoder = randomise(tiny(64, 48))
    image = torch.randn(5, 3, 64, 48)
    with torch.no_grad():
        expected = encoder(image, 5)
        monkeypatch.setattr(tiny_vit, "HIDDEN_BYTES", 1)
        found = encoder(image, 5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_fast_equals_plain_on_real_weights(perturb_adapters, lite_medsam_file):
    network = perturb_adapters(build_medsa("lite_medsam", spatial_dims=3, img_size=256))
    image = torch.rand(1, 1, 128, 112, 3)
    with torch.no_grad():
        found = network.encode_image(image)
        with plain_form(network):
            expected = network.encode_image(image)
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
