"""Every adaptation on every kind of base: fresh it is the base, and it trains, is saved, loaded, exported, clicked."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch

from medsa_nets import WeightsError, build_medsa
from medsa_nets.adaptations import ADAPTATIONS, merge_adapter, settings_of
from medsa_nets.checksums import state_sha256
from medsa_nets.errors import SettingError
from medsa_nets.layers import LowRank
from medsa_nets.networks.identity import decode_identity

SIZE = 32
# each adaptation with each decoder, the usual one named by none
FORMS = [(name, decoder) for name in ADAPTATIONS for decoder in (None, "frozen", "adapted", "whole")
         if (name, decoder) not in {("none", "adapted"), ("adapters", "adapted")}
         and (name == "adapters" or decoder != "frozen")]  # fmt: skip
WITH_VOLUMES = [(*form, 2) for form in FORMS] + [(*form, 3) for form in FORMS if form[1] is None]
CLICK = {"point_coords": torch.tensor([[[[20.0, 10.0]]]]), "point_labels": torch.ones(1, 1, 1)}


@pytest.fixture(params=["small", "tiny", "hiera"])
def base(request, small_base, tiny_base, tiny_file, hiera_base, hiera_file):
    """A TinyViT, a ViT and SAM 2's Hiera: name and settings."""
    files = {"tiny": tiny_file, "hiera": hiera_file}
    settings = {"sam_checkpoint": str(files[request.param])} if request.param in files else {}
    return request.param, {**settings, "img_size": SIZE}


def build(base, **settings):
    name, own = base
    return build_medsa(name, **{**own, "adapter_dim": 4, **settings}).eval()


def picture(dims):
    return torch.rand(
        (1, 3, SIZE, SIZE) if dims == 2 else (1, 1, SIZE, SIZE, 2), generator=torch.Generator().manual_seed(3)
    )


def train_a_step(network, dims=2):
    """One step away from the base: everything that trains gets a gradient, or moves by chance."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def click_of(dims):
    return CLICK if dims == 2 else {**CLICK, "point_coords": torch.tensor([[[[20.0, 10.0, 1.0]]]])}


@pytest.mark.parametrize(("adaptation", "decoder", "dims"), WITH_VOLUMES)
def test_a_fresh_adaptation_is_the_frozen_base(base, adaptation, decoder, dims):
    bare = build(base, adaptation="none", spatial_dims=dims)
    network = build(base, adaptation=adaptation, train_decoder=decoder, spatial_dims=dims)
    assert network.base_state_dict().keys() == bare.base_state_dict().keys()
    with torch.no_grad():
        for prompts in ({}, click_of(dims)):
            expected, found = bare(picture(dims), **prompts), network(picture(dims), **prompts)
            # a decoder that trains is multiplied by another library
            tolerance = {"atol": 1e-5, "rtol": 1e-5} if decoder == "whole" else {"atol": 0, "rtol": 0}
            torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize(("adaptation", "decoder", "dims"), WITH_VOLUMES)
def test_what_trains_gets_a_gradient_and_is_all_that_the_file_holds(base, adaptation, decoder, dims):
    network = build(base, adaptation=adaptation, train_decoder=decoder, spatial_dims=dims, click_feedback=True).train()
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert set(network.state_dict()) == trained | {"identity", "task"} == network.trained_names | {"identity", "task"}
    frozen = {name: p.clone() for name, p in network.named_parameters() if name not in trained}
    train_a_step(network, dims)  # fresh, one of two factors has no gradient yet
    embedding = network.encode_image(picture(dims))
    (network.decode(embedding).square().sum() + network.decode(embedding, **click_of(dims)).square().sum()).backward()
    named = dict(network.named_parameters())
    assert {name for name, p in named.items() if p.grad is not None} <= trained
    low_rank = {name for name in trained if ".lora." in name}
    assert bool(low_rank) == (adaptation in ("lora", "adalora"))
    assert all(bool(named[name].grad.any()) for name in low_rank)
    whole = {name for name in trained if name.startswith("mask_decoder.") and name in network.base_state_dict()}
    assert bool(whole) == (decoder == "whole")
    assert all(torch.equal(p, named[name]) for name, p in frozen.items())


@pytest.mark.parametrize(("adaptation", "decoder"), FORMS)
def test_a_saved_adaptation_is_read_back_by_what_its_identity_says(base, adaptation, decoder, tmp_path):
    network = train_a_step(build(base, adaptation=adaptation, train_decoder=decoder, num_classes=2))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    again = build(base, **settings_of(decode_identity(state["identity"])["adapter"]))
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(picture(2)), network(picture(2)))


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"adaptation": "lora"}, {}, r"adaptation='lora' \(here 'adapters'\)"),
        ({}, {"adaptation": "adalora"}, r"adaptation='adapters' \(here 'adalora'\)"),
        ({"adaptation": "lora"}, {"adaptation": "lora", "lora_rank": 8}, r"rank=4 \(here 8\)"),
        ({"adaptation": "lora"}, {"adaptation": "lora", "lora_alpha": 8}, r"alpha=None \(here 8\)"),
        (
            {"adaptation": "lora"},
            {"adaptation": "lora", "lora_targets": ["q"]},
            r"targets=\['q', 'v'\] \(here \['q'\]\)",
        ),
        ({"train_decoder": "whole"}, {}, r"train_decoder='whole' \(here None\)"),
    ],
)
def test_an_adapter_of_another_adaptation_is_refused(base, there, here, message):
    with pytest.raises(WeightsError, match=message):
        build(base, **here).load_state_dict(build(base, **there).state_dict())


@pytest.mark.parametrize("adaptation", ["lora", "adalora"])
@pytest.mark.parametrize("decoder", ["frozen", "adapted", "whole"])
def test_a_merged_network_gives_the_same_masks_and_is_a_base(base, adaptation, decoder, tmp_path):
    network = train_a_step(
        build(base, adaptation=adaptation, train_decoder=decoder, num_classes=2, lora_targets=("q", "v", "mlp"))
    )
    merged = merge_adapter(copy.deepcopy(network))
    assert not any(isinstance(m, LowRank) for m in merged.modules())
    torch.save(merged.base_state_dict(), tmp_path / "merged.pth")
    kept = {"num_classes": 2, **({"train_decoder": "whole"} if decoder == "whole" else {})}
    again = build(base, adaptation="none", sam_checkpoint=str(tmp_path / "merged.pth"), **kept)
    again.load_state_dict(merged.state_dict())
    assert decode_identity(again.identity)["sha256"] == state_sha256(merged.base_state_dict())
    with torch.no_grad():
        for prompts in ({}, CLICK):
            expected = network(picture(2), **prompts)
            scale = expected.abs().max().item()
            assert scale > 0.1
            for one in (merged, again):
                torch.testing.assert_close(one(picture(2), **prompts), expected, atol=1e-5 * max(1.0, scale), rtol=0)


def test_only_changes_of_low_rank_can_be_merged(base):
    with pytest.raises(SettingError, match=r"Only changes of low rank.*this is 'adapters'"):
        merge_adapter(build(base))


@pytest.mark.parametrize(("adaptation", "decoder", "dims"), [("lora", "adapted", 2), ("adalora", None, 3)])
def test_a_scripted_network_gives_the_same_masks(base, adaptation, decoder, dims):
    network = train_a_step(build(base, adaptation=adaptation, train_decoder=decoder, spatial_dims=dims))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(network), buffer)
        buffer.seek(0)
        scripted = torch.jit.load(buffer)
    with torch.no_grad():
        for prompts in ({}, click_of(dims)):
            torch.testing.assert_close(
                scripted(picture(dims), **prompts), network(picture(dims), **prompts), atol=1e-4, rtol=1e-4
            )


def test_an_encoder_in_onnx_gives_the_same_embedding(tiny_base, tiny_file):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = train_a_step(build(("tiny", {"sam_checkpoint": str(tiny_file), "img_size": SIZE}), adaptation="adalora"))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network.image_encoder, (picture(2),), buffer, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: picture(2).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network.image_encoder(picture(2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptation": "loha"}, "adaptation must be one of adapters, lora, adalora, none, got 'loha'"),
        ({"train_decoder": "all"}, "train_decoder must be one of adapted, frozen, whole, or null, got 'all'"),
        ({"adaptation": "none", "train_decoder": "adapted"}, "nothing to adapt the decoder with"),
    ],
)
def test_unknown_names_are_refused(small_base, settings, message):
    with pytest.raises(SettingError, match=message):
        build_medsa(small_base, pretrained=False, **settings)
