"""PEFT's files: PEFT itself gives the same output from what is written, and what it saves is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medsa_nets import WeightsError, build_medsa
from medsa_nets.exchange import read_peft, write_peft
from medsa_nets.exchange.peft import CONFIG, WEIGHTS, changes_of

SIZE = 32


@pytest.fixture(params=["small", "tiny"])
def base(request, small_base, tiny_base, tiny_file):
    return request.param, {"img_size": SIZE, **({} if request.param == "small" else {"sam_checkpoint": str(tiny_file)})}


def trained(base, **settings):
    network = build_medsa(base[0], **base[1], **settings).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in changes_of(network).values():
            for parameter in layer.lora.parameters():
                parameter.normal_(std=0.2, generator=generator)
    return network


class Parts(nn.Module):
    """Parts of a network, as segment-anything's ``Sam`` holds them: PEFT takes no network with rules for its files."""

    def __init__(self, network):
        super().__init__()
        self.image_encoder, self.mask_decoder = network.image_encoder, network.mask_decoder


def picture():
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def same(a, b):
    with torch.no_grad():
        expected = b(picture())
        torch.testing.assert_close(a(picture()), expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"adaptation": "lora"},
        {"adaptation": "lora", "lora_alpha": 16, "train_decoder": "adapted", "lora_targets": ["q", "k", "mlp"]},
        {"adaptation": "adalora", "lora_rank": 2},
    ],
)
def test_what_is_written_is_read_back(base, settings, tmp_path):
    network = trained(base, **settings)
    assert write_peft(network, tmp_path) == ["class_embeddings"]
    again = read_peft(tmp_path, base[0], **base[1]).eval()
    same(again, network)
    assert write_peft(again, tmp_path / "again") == ["class_embeddings"]
    first, second = (load_file(folder / WEIGHTS) for folder in (tmp_path, tmp_path / "again"))
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}


def test_peft_itself_gives_the_same_from_what_is_written(base, tmp_path):
    peft = pytest.importorskip("peft")
    network = trained(base, adaptation="lora", lora_alpha=6, train_decoder="adapted", lora_targets=["q", "v", "mlp"])
    write_peft(network, tmp_path)
    bare = build_medsa(base[0], **base[1], adaptation="none").eval()
    before = bare(picture())
    peft.PeftModel.from_pretrained(Parts(bare), str(tmp_path))  # puts the changes into its layers
    assert not torch.allclose(bare(picture()), before, atol=1e-2)
    same(bare.eval(), network)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"mlp.fc1|mlp.lin1": 3}}])
def test_what_peft_saves_is_read(base, settings, tmp_path):
    peft = pytest.importorskip("peft")
    bare = build_medsa(base[0], **base[1], adaptation="none").eval()
    targets = ["qkv", "q_proj", "lin1", "fc1"]
    theirs = peft.get_peft_model(Parts(bare), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(str(tmp_path))
    same(read_peft(tmp_path, base[0], **base[1]).eval(), bare.eval())


def test_a_file_without_patterns_of_a_fused_layer_is_computed_by_hand(tiny_base, tiny_file, tmp_path):
    settings = {"img_size": SIZE, "sam_checkpoint": str(tiny_file)}
    name, a, b = "image_encoder.blocks.0.attn.qkv", torch.randn(2, 32), torch.randn(96, 2)
    save_file({f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b},
              str(tmp_path / WEIGHTS))  # fmt: skip
    (tmp_path / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["qkv"]})
    )
    change = changes_of(read_peft(tmp_path, "tiny", **settings))[name].lora.change()
    torch.testing.assert_close(change, 2.0 * b @ a)
    hugging_face = {
        f"base_model.model.vision_encoder.layers.0.attn.qkv.lora_{x}.weight": t for x, t in (("A", a), ("B", b))
    }
    save_file(hugging_face, str(tmp_path / WEIGHTS))
    assert torch.equal(changes_of(read_peft(tmp_path, "tiny", **settings))[name].lora.change(), change)


@pytest.mark.parametrize(
    ("config", "tensor", "message"),
    [
        ({"peft_type": "LOHA"}, None, "peft_type is 'LOHA'; LORA and ADALORA can be read"),
        ({"use_dora": True}, None, "use_dora is True, which can't be read"),
        ({}, None, "changes no layer"),
        ({}, "image_encoder.neck.0.lora_A.weight", "neck.0 lacks lora_A or lora_B"),
        ({}, "image_encoder.blocks.0.attn.qkv.weight", "expected changes of low rank"),
        ({}, "image_encoder.blocks.0.attn.proj", "Changes of q, k, v .fused or not."),
        ({}, "image_encoder.blocks.7.attn.qkv", "which the base 'tiny' does not have"),
        ({}, "image_encoder.blocks.1.attn.qkv", "It belongs to another base"),
    ],
)
def test_what_can_not_be_read_is_named(tiny_base, config, tensor, message, tmp_path):
    names = (
        [] if tensor is None else [tensor] if tensor.endswith("weight") else [f"{tensor}.lora_{x}.weight" for x in "AB"]
    )
    save_file({f"base_model.model.{name}": torch.ones(2, 2) for name in names}, str(tmp_path / WEIGHTS))
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}))
    with pytest.raises(WeightsError, match=message):
        read_peft(tmp_path, "tiny", pretrained=False)


def test_adapters_are_no_change_of_low_rank(small_base, tmp_path):
    with pytest.raises(WeightsError, match="hold changes of low rank only"):
        write_peft(build_medsa(small_base), tmp_path)
    assert not list(tmp_path.iterdir())
