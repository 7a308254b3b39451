from __future__ import annotations

import pytest
import torch
from torch import nn

from medsa_nets.layers import Bottlenecks
from medsa_nets.networks import ImageEncoderViT

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)}
ADAPTERS = ("attn_adapter", "mlp_adapter")


def _copy_base(ours: ImageEncoderViT, reference: nn.Module) -> None:
    result = ours.load_state_dict(reference.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all(any(part in name for part in ADAPTERS) for name in result.missing_keys)


@pytest.mark.parametrize(
    ("img_size", "settings"),
    [
        (256, SMALL),
        (256, {**SMALL, "depth": 4, "global_attn_indexes": (1, 3), "num_heads": 4}),
        (1024, {**SMALL, "embed_dim": 16, "num_heads": 1}),
    ],
)
def test_encoder_equals_segment_anything(make_sam, img_size, settings):
    reference = make_sam(img_size, **settings).image_encoder
    assert all(p.abs().sum() > 0 for p in reference.parameters())
    ours = ImageEncoderViT(img_size=(img_size, img_size), **settings).eval()
    _copy_base(ours, reference)
    image = torch.randn(1, 3, img_size, img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), reference(image), atol=1e-5, rtol=1e-5)


def test_encoder_takes_images_that_are_not_square(make_sam, randomise):
    reference = make_sam(256).image_encoder
    height, width = 12, 21
    reference.pos_embed = nn.Parameter(torch.zeros(1, height, width, 32))
    reference.blocks[1].attn.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, 16))
    reference.blocks[1].attn.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, 16))
    randomise(reference)
    ours = ImageEncoderViT(img_size=(16 * height, 16 * width), **SMALL).eval()
    _copy_base(ours, reference)
    image = torch.randn(2, 3, 16 * height, 16 * width)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), reference(image), atol=1e-5, rtol=1e-5)


def test_training_and_inference_encode_alike(randomise):
    encoder = randomise(ImageEncoderViT(img_size=(64, 64), **SMALL))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(image)
    torch.testing.assert_close(encoder.train()(image), expected, atol=1e-5, rtol=1e-5)


def test_first_adapter_stands_before_the_residual_and_second_beside_the_mlp(randomise):
    encoder = randomise(ImageEncoderViT(img_size=(64, 64), **SMALL, adaptation=Bottlenecks(scale=0.25)))
    block = encoder.blocks[1]
    x = torch.randn(1, 4, 4, 32)
    with torch.no_grad():
        after_attention = x + block.attn_adapter(block.attn.proj(block.attn(block.attn.qkv(block.norm1(x)))))
        normed = block.norm2(after_attention)
        expected = after_attention + block.mlp(normed) + 0.25 * block.mlp_adapter(normed)
        torch.testing.assert_close(block(x), expected)
    assert block.attn_adapter.skip
    assert not block.mlp_adapter.skip


@pytest.mark.parametrize("name", ["up.weight", "up.bias"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("block", [0, 1], ids=["window", "global"])
def test_every_adapter_of_every_block_matters(randomise, block, adapter, name):
    encoder = randomise(ImageEncoderViT(img_size=(64, 64), **SMALL))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(image)
        parameter = encoder.get_parameter(f"blocks.{block}.{adapter}.{name}")
        parameter.add_(torch.randn_like(parameter))
        assert (encoder(image) - before).abs().max() > 1e-3


@pytest.mark.parametrize("img_size", [(250, 256), (256, 250)])
def test_sizes_that_the_patches_do_not_divide_are_refused(img_size):
    with pytest.raises(ValueError, match="multiple of 16"):
        ImageEncoderViT(img_size=img_size, **SMALL)
