"""SAM 2's bases: the numbers and names of its own code, other sizes, adapters, volumes, exports.

Two references: that code itself, where ``$MEDSA_SAM2_CODE`` names a checkout, and figures that it gave with the seeded
weights of a narrow trunk, which are always compared.
"""

from __future__ import annotations

import io
import re

import pytest
import torch
import torch.nn.functional as F

from medsa_nets import WeightsError, build_medsa
from medsa_nets.embeddings import train_decoder_alone
from medsa_nets.errors import SettingError
from medsa_nets.layers import Bottlenecks, DepthBranch
from medsa_nets.networks import HieraEncoder
from medsa_nets.networks.skips import pack_skips, unpack_skips
from medsa_nets.weights import BASES, describe_file, guess_base
from medsa_nets.weights.formats import from_sam2

from .. import sam2_code
from ..conftest import NARROW_HIERA

# number of entries of that code's files that images need, and SHA-256 of their names and shapes
PUBLIC = {
    "sam2_hiera_t": (311, "d4c2f294669ace9866ae8bb96249f7047290a152a4d5d759489dbb3873ef2616"),
    "sam2_hiera_s": (359, "f45239d3c342cb76ac0240ad86129b5d7a4643a4c9bff6838e71482af4ec5517"),
}
# of that code with the weights of ``hiera_file``, for ``picture()``: mean and standard deviation
FIGURES = {
    "embedding": (0.034739, 2.494805),
    "middle": (0.194688, 2.484645),
    "wide": (0.241428, 1.730867),
    "click": (-0.313647, 2.834281),
    "box": (-0.087166, 2.588458),
}
SIDE = 256
CLICK = (torch.tensor([[[200.0, 30.0], [90.0, 170.0]]]), torch.tensor([[1, 0]]))  # (x, y)
BOX = torch.tensor([[[20.0, 30.0], [200.0, 120.0]]])  # (x, y) of two corners


@pytest.fixture(scope="module")
def code():
    found = sam2_code.folder()
    if found is None:
        pytest.skip(f"SAM 2's code is absent: ${sam2_code.VARIABLE} names no checkout of facebookresearch/sam2")
    return found


@pytest.fixture
def build(hiera_base, hiera_file):
    def make(**settings):
        return build_medsa("hiera", sam_checkpoint=str(hiera_file), **{"adapter_dim": 4, **settings}).eval()

    return make


def picture(height=SIDE, width=SIDE):
    """Waves of several lengths and directions, (1, 3, height, width) in [0, 1]."""
    rows, columns = torch.arange(height)[:, None] / 256, torch.arange(width)[None] / 256
    waves = [torch.sin(40 * rows + 9 * columns), torch.cos(25 * rows * columns), torch.sin(70 * columns - 20 * rows)]
    return 0.5 + 0.5 * torch.stack(waves)[None]


@torch.no_grad()
def computed(network):
    """The three maps of an embedding, and the logits of a click and of a box, by this package."""
    embedding = network.encode_image(picture())
    middle, wide = unpack_skips(embedding)
    click = network.decode(embedding, CLICK[0].flip(-1)[None], CLICK[1][None])
    box = network.decode(embedding, boxes=BOX.flip(-1).reshape(1, 1, 4))
    return {"embedding": embedding[:, :256], "middle": middle, "wide": wide, "click": click, "box": box}


def expected(reference, network):
    """The same, by that code."""
    encoded = sam2_code.encode(reference, (picture() - network.pixel_mean) / network.pixel_std)
    masks = {}
    for name, points in {"click": CLICK, "box": (BOX, torch.tensor([[2, 3]]))}.items():
        logits, _ = sam2_code.decode(reference, encoded, points)
        masks[name] = F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return {"embedding": encoded[0], "middle": encoded[1][1], "wide": encoded[1][0], **masks}


@pytest.fixture(scope="module")
def reference(code, hiera_file):
    trunk = {"embed_dim": 8, "stages": list(NARROW_HIERA["stages"]), "global_att_blocks": [4]}
    network = sam2_code.build(code, "sam2_hiera_t", SIDE, **trunk)
    state = torch.load(hiera_file, weights_only=True)["model"]
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(sam2_code.VIDEOS) for name in missing)
    return network


def test_embedding_and_masks_equal_those_of_sam_2_s_code(reference, build):
    network = build()
    theirs, ours = expected(reference, network), computed(network)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() < 1e-5 * value.abs().max(), name


def test_figures_are_those_that_sam_2_s_code_gave(build):
    for name, value in computed(build()).items():
        assert (float(value.mean()), float(value.std())) == pytest.approx(FIGURES[name], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("name", list(PUBLIC))
def test_names_and_shapes_are_those_of_the_public_file(name):
    with torch.device("meta"):
        base = build_medsa(name, pretrained=False).base_state_dict()
    assert sam2_code.digest(sam2_code.as_file(base)) == PUBLIC[name]


@pytest.mark.parametrize("name", list(PUBLIC))
def test_the_public_names_are_those_of_sam_2_s_code(code, name):
    state = sam2_code.build(code, name).state_dict()
    of_images = {key: tensor for key, tensor in state.items() if not key.startswith(sam2_code.VIDEOS)}
    assert sam2_code.digest(of_images) == PUBLIC[name]
    assert guess_base(from_sam2(state)) == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 parameters missing \(first: image_encoder.no_mem_embed\), 0 unknown"),
        ("unknown", r"0 parameters missing, 1 unknown \(first: image_encoder.trunk.colour\)"),
        ("other", r"2 of another shape \(first: image_encoder.trunk.pos_embed"),
    ],
)
def test_a_file_that_lacks_a_name_or_has_another_is_refused_in_one_line(
    hiera_base, hiera_file, tmp_path, change, message
):
    state = torch.load(hiera_file, weights_only=True)["model"]
    if change == "missing":
        del state["no_mem_embed"]
    elif change == "unknown":
        state["image_encoder.trunk.colour"] = torch.zeros(1)
    else:
        state["image_encoder.trunk.pos_embed"] = torch.zeros(1, 8, 14, 14)
        state["image_encoder.trunk.pos_embed_window"] = torch.zeros(1, 8, 7, 7)
    torch.save({"model": state}, tmp_path / "given.pt")
    with pytest.raises(WeightsError, match=f"{re.escape(str(tmp_path / 'given.pt'))}: not the weights .*{message}"):
        build_medsa("hiera", sam_checkpoint=str(tmp_path / "given.pt"))


def test_check_names_the_base_that_a_file_fits(hiera_base, hiera_file):
    assert "it fits hiera" in describe_file(hiera_file)


def test_finer_maps_travel_with_the_embedding_unchanged():
    maps = torch.randn(2, 16, 3, 5), torch.randn(2, 64, 6, 10), torch.randn(2, 32, 12, 20)
    packed = pack_skips(*maps)
    assert packed.shape == (2, 16 + 768, 3, 5)
    assert torch.equal(packed[:, :16], maps[0])
    assert all(torch.equal(a, b) for a, b in zip(unpack_skips(packed), maps[1:], strict=True))


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (48, 80)])
def test_every_multiple_of_the_stride_is_taken(build, size):
    """A side that is no multiple of 32 goes in padded by the base's mean, which normalises to zero."""
    network = build()
    image = picture(*size)
    whole = network.pixel_mean.expand(1, 3, 32 * -(-size[0] // 32), 32 * -(-size[1] // 32)).clone()
    whole[..., : size[0], : size[1]] = image
    with torch.no_grad():
        embedding, padded = network.encode_image(image), network.encode_image(whole)
        assert network(image).shape == (1, 1, *size)
    assert embedding.shape == (1, HieraEncoder.out_channels, size[0] // 16, size[1] // 16)
    torch.testing.assert_close(embedding, padded[..., : size[0] // 16, : size[1] // 16], atol=1e-5, rtol=1e-5)


def test_each_adapter_matters_and_blocks_that_halve_the_map_have_no_depth_branch(randomise):
    torch.manual_seed(0)  # with few hidden units, all of them can be silent by chance
    encoder = randomise(HieraEncoder(**NARROW_HIERA, adaptation=Bottlenecks(adapter_dim=16), spatial_dims=3))
    blocks = list(encoder.trunk.blocks)
    assert [block.depth is None for block in blocks] == [block.attn.pool for block in blocks]
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = encoder(image, 2)
        for name, module in encoder.named_modules():
            if not name.endswith((".up", ".depth")):
                continue
            weight = module.bias if isinstance(module, DepthBranch) else module.weight
            kept = weight.clone()
            weight.copy_(torch.randn(weight.shape))
            assert (encoder(image, 2) - before).abs().max() > 1e-4, name
            weight.copy_(kept)


def test_a_fresh_network_of_volumes_gives_each_slice_what_that_of_images_gives(build):
    flat, volume = build(), build(spatial_dims=3)
    image = torch.stack([picture(64, 96), picture(64, 96).flip(2)], dim=-1)
    coords = torch.tensor([[[[20.0, 70.0, 1.0]]]])
    with torch.no_grad():
        embedding = volume.encode_image(image)
        automatic = volume.decode(embedding)
        clicked = volume.decode(embedding, coords, torch.ones(1, 1, 1))
        for z in range(2):
            own = flat.encode_image(image[..., z])
            torch.testing.assert_close(embedding[..., z], own, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(automatic[..., z], flat.decode(own), atol=1e-4, rtol=1e-4)
        clicked_there = flat.decode(own, coords[..., :2], torch.ones(1, 1, 1))
        torch.testing.assert_close(clicked[..., 1], clicked_there, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_equals_eager(build, perturb_adapters, spatial_dims):
    network = perturb_adapters(build(spatial_dims=spatial_dims, num_classes=2, click_feedback=True))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(network), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    image = picture(64, 96) if spatial_dims == 2 else torch.stack([picture(64, 96)] * 2, dim=-1)
    click = torch.tensor([[[[20.0, 70.0, 1.0][:spatial_dims]]]])
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), network(image), atol=1e-4, rtol=1e-4)
        found, wanted = (n(image, click, torch.ones(1, 1, 1)) for n in (scripted, network))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_blocks_that_are_computed_twice_give_the_same_gradients(build, perturb_adapters):
    network = perturb_adapters(build()).train()
    gradients = []
    for network.image_encoder.trunk.checkpointing in (False, True):
        network.zero_grad()
        network(picture(64, 64)).square().mean().backward()
        gradients.append([p.grad for p in network.image_encoder.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_embedding_with_its_finer_maps_is_kept_on_disk_and_read_back(build, tmp_path):
    network = train_decoder_alone(build(), tmp_path)
    with torch.no_grad():
        fresh, again = network(picture(64, 64)), network(picture(64, 64))
    assert (network.kept_embeddings.computed, network.kept_embeddings.read) == (1, 1)
    assert torch.equal(fresh, again)


def test_adaptations_of_the_published_code_are_refused():
    with pytest.raises(SettingError, match=r"published_adapters goes with a ViT base .* not with 'sam2_hiera_t'"):
        build_medsa("sam2_hiera_t", pretrained=False, adaptation="published_adapters")


def test_a_fresh_encoder_has_adapters_in_every_block_and_lora_in_every_attention():
    with torch.device("meta"):
        lora = build_medsa("sam2_hiera_t", pretrained=False, adaptation="lora", lora_targets=("q", "v", "mlp"))
        adapters = build_medsa("sam2_hiera_t", pretrained=False)
    assert BASES["sam2_hiera_t"].img_size // adapters.stride == 64
    for i in range(12):
        names = {name.split(f"blocks.{i}.")[1] for name in lora.trained_names if f"trunk.blocks.{i}." in name}
        assert {"attn.qkv.lora.A", "mlp.lin1.lora.B", "mlp.lin2.lora.B"} <= names
        names = {name.split(f"blocks.{i}.")[1] for name in adapters.trained_names if f"trunk.blocks.{i}." in name}
        assert {"attn_adapter.up.weight", "mlp_adapter.up.weight"} <= names
