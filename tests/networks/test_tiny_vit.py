"""TinyViT against a plain reading of the paper (arXiv 2207.10666, section 3.2) on `torch.nn.functional`."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medsa_nets.layers import Bottlenecks
from medsa_nets.networks import TinyViTEncoder

SMALL = {"features": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 3), "window_sizes": (7, 7, 4, 7)}


class Reference:
    """TinyViT computed step by step from an encoder's weights, without adapters."""

    def __init__(self, encoder, *, patch_stride, depths, num_heads, window_sizes, **_):
        self.state = encoder.state_dict()
        self.patch_stride, self.depths, self.num_heads, self.windows = patch_stride, depths, num_heads, window_sizes

    def conv_bn(self, x, name, *, stride=1, depthwise=False):
        weight = self.state[f"{name}.c.weight"]
        x = F.conv2d(
            x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2, groups=weight.shape[0] if depthwise else 1
        )
        norm = {key: self.state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        return F.batch_norm(x, **norm, training=False, eps=1e-5)

    def conv_bottleneck(self, x, name, *, stride=1):
        x = F.gelu(self.conv_bn(x, f"{name}.conv1"))
        x = F.gelu(self.conv_bn(x, f"{name}.conv2", stride=stride, depthwise=True))
        return self.conv_bn(x, f"{name}.conv3")

    def linear(self, x, name):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, window, name, heads):
        """Attention among the tokens (S, S, C) of one window."""
        size, channels = window.shape[0], window.shape[2]
        tokens = window.reshape(size * size, channels)
        rows, columns = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
        # One bias for each |row offset| and |column offset|.
        table = self.state[f"{name}.attention_biases"].reshape(heads, size, size)
        bias = table[:, (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()]
        packed = self.linear(self.norm(tokens, f"{name}.norm"), f"{name}.qkv").reshape(size * size, heads, -1)
        width = channels // heads
        out = []
        for head in range(heads):
            q, k, v = packed[:, head].split(width, dim=1)
            scores = (q @ k.T / math.sqrt(width) + bias[head]).exp()
            out.append(scores / scores.sum(1, keepdim=True) @ v)
        return self.linear(torch.cat(out, dim=1), f"{name}.proj").reshape(window.shape)

    def block(self, x, name, heads, size):
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % size, 0, -height % size)).permute(0, 2, 3, 1)
        attended = torch.zeros_like(padded)
        for b in range(x.shape[0]):
            for i in range(0, padded.shape[1], size):
                for j in range(0, padded.shape[2], size):
                    attended[b, i : i + size, j : j + size] = self.attention(
                        padded[b, i : i + size, j : j + size], f"{name}.attn", heads
                    )
        x = x + attended[:, :height, :width].permute(0, 3, 1, 2)
        x = self.conv_bn(x, f"{name}.local_conv", depthwise=True)
        tokens = self.norm(x.permute(0, 2, 3, 1), f"{name}.mlp.norm")
        return x + self.linear(F.gelu(self.linear(tokens, f"{name}.mlp.fc1")), f"{name}.mlp.fc2").permute(0, 3, 1, 2)

    def channel_norm(self, x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * self.state[f"{name}.weight"].reshape(-1, 1, 1) + self.state[f"{name}.bias"].reshape(-1, 1, 1)

    def __call__(self, x):
        stride = {1: 1, 4: 2}[self.patch_stride]
        x = F.gelu(self.conv_bn(x, "patch_embed.seq.0", stride=stride))
        x = self.conv_bn(x, "patch_embed.seq.2", stride=stride)
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                name = f"layers.{stage}.blocks.{i}"
                if stage == 0:
                    x = F.gelu(x + self.conv_bottleneck(x, name))
                else:
                    x = self.block(x, name, self.num_heads[stage], self.windows[stage])
            if stage < 3:  # MobileSAM keeps the last stage at the third one's resolution
                x = self.conv_bottleneck(x, f"layers.{stage}.downsample", stride=(2, 2, 1)[stage])
        x = self.channel_norm(F.conv2d(x, self.state["neck.0.weight"]), "neck.1")
        return self.channel_norm(F.conv2d(x, self.state["neck.2.weight"], padding=1), "neck.3")


def at_identity(encoder):
    """Put the adapters back where a fresh network has them."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "adapter.up" in name:
                parameter.zero_()
    return encoder


@pytest.mark.parametrize(
    ("patch_stride", "size"),
    [
        (1, (28, 28)),  # stages of 14 and 7 tokens: windows fit
        (1, (36, 52)),  # 18 x 26 and 9 x 13 tokens: every window is padded
        (4, (112, 80)),
    ],
)
def test_encoder_equals_the_plain_reading(patch_stride, size, randomise):
    encoder = at_identity(randomise(TinyViTEncoder(patch_stride=patch_stride, **SMALL)))
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        actual = encoder(image)
        expected = Reference(encoder, patch_stride=patch_stride, **SMALL)(image)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (7, 7), (9, 20)])
def test_windows_of_a_block_equal_the_plain_reading(size, randomise):
    encoder = at_identity(randomise(TinyViTEncoder(**SMALL)))
    x = torch.randn(2, 16, *size)
    with torch.no_grad():
        expected = Reference(encoder, patch_stride=1, **SMALL).block(x, "layers.1.blocks.0", 2, 7)
        torch.testing.assert_close(encoder.layers[1].blocks[0](x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("patch_stride", "stride"), [(1, 4), (4, 16)])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_output_has_the_size_that_the_stride_says(patch_stride, stride, size):
    encoder = TinyViTEncoder(patch_stride=patch_stride, **SMALL)
    assert encoder.stride == stride
    with torch.no_grad():
        embedding = encoder(torch.randn(1, 3, *size))
    assert embedding.shape == (1, encoder.out_channels, size[0] // stride, size[1] // stride)


@pytest.mark.parametrize("patch_stride", [0, 2, 8])
def test_other_patch_strides_are_refused(patch_stride):
    with pytest.raises(ValueError, match=f"patch_stride must be 1 .* or 4 .*, got {patch_stride}"):
        TinyViTEncoder(patch_stride=patch_stride)


def test_training_and_inference_encode_alike_and_leave_statistics_alone(randomise):
    encoder = randomise(TinyViTEncoder(**SMALL))
    image = torch.randn(2, 3, 36, 36)
    before = {name: tensor.clone() for name, tensor in encoder.named_buffers()}
    with torch.no_grad():
        expected = encoder(image)
    torch.testing.assert_close(encoder.train()(image), expected, atol=1e-5, rtol=1e-4)
    assert before
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.named_buffers())


@pytest.mark.parametrize("adapter", ["attn_adapter", "mlp_adapter"])
@pytest.mark.parametrize("block", ["layers.1.blocks.0", "layers.1.blocks.1", "layers.2.blocks.0", "layers.3.blocks.0"])
def test_every_adapter_of_every_attention_block_matters(block, adapter, randomise):
    encoder = at_identity(randomise(TinyViTEncoder(**SMALL)))
    image = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        before = encoder(image)
        weight = encoder.get_parameter(f"{block}.{adapter}.up.weight")
        weight.copy_(torch.randn(weight.shape))
        assert (encoder(image) - before).abs().max() > 1e-3


def test_the_adapter_beside_the_mlp_is_scaled_and_shares_its_norm(randomise):
    encoder = randomise(TinyViTEncoder(adaptation=Bottlenecks(scale=0.25), **SMALL))
    block = encoder.layers[3].blocks[0]
    x = torch.randn(1, 24, 7, 7)
    with torch.no_grad():
        tokens = x.permute(0, 2, 3, 1)
        attended = block.attn.proj(block.attn(block.attn.qkv(block.attn.norm(tokens))))
        tokens = tokens + attended + block.attn_adapter.up(block.attn_adapter.down(attended).relu())
        tokens = block.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        normed = block.mlp.norm(tokens)
        expected = tokens + block.mlp(normed) + 0.25 * block.mlp_adapter.up(block.mlp_adapter.down(normed).relu())
        torch.testing.assert_close(block(x), expected.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-4)
