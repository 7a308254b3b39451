"""Changes of low rank: what they compute, for each layout of queries, keys and values, and that they merge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medsa_nets.layers import LoRA, LowRank, LowRankLinear, merge_low_rank
from medsa_nets.layers.lora import TARGETS

FEATURES, HEADS = 12, 3


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("groups", [1, HEADS])
def test_queries_and_values_of_a_fused_layer_change_and_keys_do_not(groups, singular):
    change = randomised(LowRank(FEATURES, 3 * FEATURES, rank=2, scale=0.7, parts=(0, 2), of=3, groups=groups,
                                singular=singular))  # fmt: skip
    x = torch.randn(5, FEATURES)
    found = change(x)
    # (N, 3, C), heads within the parts, or (N, heads, 3, C / heads)
    parts = found.reshape(5, groups, 3, FEATURES // groups).transpose(1, 2).reshape(5, 3, FEATURES)
    assert torch.equal(parts[:, 1], torch.zeros(5, FEATURES))
    for i, place in enumerate((0, 2)):
        middle = x @ change.A[i].T
        expected = 0.7 * (middle * change.E[i] if singular else middle) @ change.B[i].T
        torch.testing.assert_close(parts[:, place], expected)
    torch.testing.assert_close(x @ change.change().T, found)


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_fresh_change_is_none_and_a_trained_one_merges(singular, bias):
    layer = nn.Linear(FEATURES, FEATURES, bias=bias)
    adapted = LowRankLinear(layer, rank=3, singular=singular)
    x = torch.randn(4, FEATURES)
    assert torch.equal(adapted(x), layer(x))
    assert {"weight", "bias"} & set(adapted.state_dict()) == set(layer.state_dict())
    randomised(adapted.lora)
    assert not torch.allclose(adapted(x), layer(x), atol=1e-3)
    torch.testing.assert_close(adapted.merged()(x), adapted(x))


def test_dropout_leaves_inputs_out_in_training_only():
    adapted = LowRankLinear(nn.Linear(FEATURES, FEATURES), rank=3, dropout=0.5)
    randomised(adapted.lora)
    x = torch.randn(64, FEATURES)
    assert not torch.equal(adapted.train()(x), adapted.train()(x))
    assert torch.equal(adapted.eval()(x), adapted(x))


class Block(nn.Module):
    """Layers as an encoder's and a decoder's block name them."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.cross = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self.cross, name, nn.Linear(8, 8))
        self.mlp = nn.Module()
        self.mlp.lin1, self.mlp.lin2 = nn.Linear(8, 16), nn.Linear(16, 8)


@pytest.mark.parametrize(
    ("targets", "changed"),
    [
        (("q", "v"), {"attn.qkv", "cross.q_proj", "cross.v_proj"}),
        (("k",), {"attn.qkv", "cross.k_proj"}),
        (("mlp",), {"mlp.lin1", "mlp.lin2"}),
        (TARGETS, {"attn.qkv", "cross.q_proj", "cross.k_proj", "cross.v_proj", "mlp.lin1", "mlp.lin2"}),
    ],
)
def test_what_is_targeted_changes_and_merges_back(targets, changed):
    block = Block()
    names = {name for name, _ in block.named_parameters()}
    LoRA(targets=targets).install(block)
    assert {name for name, m in block.named_modules() if isinstance(m, LowRankLinear)} == changed
    assert names < {name for name, _ in block.named_parameters()}
    assert merge_low_rank(block) == len(changed)
    assert {name for name, _ in block.named_parameters()} == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "lora_rank must be 1 or more"), ({"targets": ("q", "out")}, "lora_targets must be some of"),
     ({"targets": ()}, "lora_targets must be some of")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)
