from __future__ import annotations

import pytest
import torch

from medsa_nets.build import build_medsa, parameter_table
from medsa_nets.weights import BASES, get_base

VITS = ["vit_b", "vit_l", "vit_h", "medsam"]


def _count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def table():
    return {row["base"]: row for row in parameter_table(adapter_dim=80)}


@pytest.fixture(scope="module")
def published(segment_anything):
    """segment-anything's own networks, without memory for their weights."""
    with torch.device("meta"):
        networks = {name: segment_anything.sam_model_registry[name]() for name in ("vit_b", "vit_l", "vit_h")}
    return {**networks, "medsam": networks["vit_b"]}


def _on_meta(name, **settings):
    with torch.device("meta"):
        return build_medsa(name, pretrained=False, **settings)


# ---------------------------------------------------------------- names and parameters


@pytest.mark.parametrize("name", VITS)
def test_base_parameters_are_segment_anything_s(published, name):
    ours = {key: tuple(tensor.shape) for key, tensor in _on_meta(name).base_state_dict().items()}
    assert ours == {key: tuple(tensor.shape) for key, tensor in published[name].state_dict().items()}


def test_base_parameters_are_lite_medsam_s(lite_medsam_file):
    theirs = torch.load(lite_medsam_file, map_location="cpu", weights_only=True)
    ours = _on_meta("lite_medsam").base_state_dict()
    assert {k: tuple(t.shape) for k, t in ours.items()} == {k: tuple(t.shape) for k, t in theirs.items()}


@pytest.mark.parametrize("name", VITS)
def test_table_counts_the_base_as_segment_anything_does(table, published, name):
    assert table[name]["total"] - table[name]["trainable"] == _count(published[name])


def test_vit_h_with_bottlenecks_of_80_has_the_paper_s_number_of_parameters(table):
    row = table["vit_h"]
    assert row["encoder_adapters"] == 32 * 2 * (2 * 1280 * 80 + 80 + 1280) == 13_194_240
    assert 636e6 < row["total"] - row["trainable"] < 641.1e6
    assert row["percent"] == pytest.approx(2.06, abs=0.01)


@pytest.mark.parametrize(
    ("name", "width", "blocks"), [("vit_b", 768, 12), ("vit_l", 1024, 24), ("vit_h", 1280, 32), ("medsam", 768, 12)]
)
def test_table_counts_what_trains(table, name, width, blocks):
    row = table[name]
    encoder = blocks * 2 * (2 * width * 80 + 80 + width)
    plain = 2 * 256 * 80 + 80 + 256
    decoder = 2 * (3 * plain + 256 * 80 + 80)  # the hyper-prompting adapter has a projection of the prompt more
    assert row["encoder_adapters"] == encoder
    assert row["trainable"] == encoder + decoder + 256  # one class embedding
    assert row["percent"] == pytest.approx(100 * row["trainable"] / row["total"])


@pytest.mark.parametrize("name", ["lite_medsam", "mobile_sam"])
def test_table_counts_tiny_vit_s_adapters(table, name):
    blocks = [(128, 2), (160, 6), (320, 2)]  # arXiv 2207.10666, table of the 5M variant
    assert table[name]["encoder_adapters"] == sum(n * 2 * (2 * w * 80 + 80 + w) for w, n in blocks)
    assert (table[name]["total"] - table[name]["trainable"]) / 1e6 == pytest.approx(9.8, abs=0.05)


def test_table_has_a_row_for_every_base_and_grows_with_the_ratio():
    small, large = parameter_table(adapter_ratio=0.125), parameter_table(adapter_ratio=0.25)
    assert [row["base"] for row in small] == list(BASES)
    for a, b in zip(small, large, strict=True):
        assert a["trainable"] < b["trainable"]
        assert a["total"] - a["trainable"] == b["total"] - b["trainable"]


@pytest.mark.parametrize("name", list(BASES))
def test_published_files_are_named_with_their_source_and_licence(name):
    base = BASES[name]
    assert base.name == name
    assert base.url
    assert base.licence
    assert base.sha256 is None or len(base.sha256) == 64
    assert base.filename.endswith((".pth", ".pt"))


# ---------------------------------------------------------------- building


@pytest.mark.parametrize("find", [get_base, lambda name: build_medsa(name, pretrained=False)])
def test_unknown_base_is_refused_with_the_names_there_are(find):
    with pytest.raises(ValueError, match=r"no base 'vit_g'.*lite_medsam.*vit_h"):
        find("vit_g")


@pytest.mark.parametrize(("img_size", "grid"), [(None, (64, 64)), (512, (32, 32)), ((320, 480), (20, 30))])
def test_position_tables_of_a_vit_follow_img_size(img_size, grid):
    encoder = _on_meta("vit_b", img_size=img_size).image_encoder
    assert encoder.pos_embed.shape == (1, *grid, 768)
    assert encoder.blocks[2].attn.rel_pos_h.shape[0] == 2 * grid[0] - 1  # global
    assert encoder.blocks[2].attn.rel_pos_w.shape[0] == 2 * grid[1] - 1
    assert encoder.blocks[0].attn.rel_pos_w.shape[0] == 2 * 14 - 1  # windows stay as they are


@pytest.mark.parametrize(("name", "stride"), [("lite_medsam", 4), ("mobile_sam", 16), ("vit_b", 16)])
def test_stride_of_each_kind_of_encoder(name, stride):
    base = BASES[name]
    assert _on_meta(name).stride == stride
    assert base.img_size // stride == 64  # every published base has an embedding of 64 x 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be 1 or more"),
        ({"hyper_prompting": "none"}, "hyper_prompting must be one of"),
        ({"adapter_dim": -1}, "adapter_dim must be 1 or more"),
        ({"adapter_ratio": 0}, "adapter_ratio must lie in"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _on_meta("lite_medsam", **settings)


# ---------------------------------------------------------------- the published weights at work


@pytest.fixture(scope="module")
def abdomen(shared_data):
    """A real CT and its organ labels, both (H, W, D), window 400 at 40 HU scaled to [0, 1]."""
    nibabel = pytest.importorskip("nibabel")
    folder = shared_data / "ct"
    if not (folder / "ct_a.nii.gz").is_file():
        pytest.skip(f"real images are absent: no {folder / 'ct_a.nii.gz'}")
    volume = torch.from_numpy(nibabel.load(folder / "ct_a.nii.gz").get_fdata()).float()
    labels = torch.from_numpy(nibabel.load(folder / "ct_a_totalsegmentator.nii.gz").get_fdata()).round().long()
    return ((volume + 160) / 400).clamp(0, 1), labels


@pytest.mark.parametrize(("organ", "least"), [(5, 0.85), (1, 0.85)], ids=["liver", "spleen"])
def test_frozen_lite_medsam_finds_an_organ_in_its_box(lite_medsam_file, abdomen, organ, least):
    """Agreement with another model's labels; a wrong axis order, normalisation or weight would break it."""
    volume, labels = abdomen
    masks = labels == organ
    z = int(masks.sum(dim=(0, 1)).argmax())
    scale = 256 // max(volume.shape[:2])
    image = torch.zeros(1, 3, 256, 256)
    mask = torch.zeros(256, 256, dtype=torch.bool)
    height, width = scale * volume.shape[0], scale * volume.shape[1]
    image[..., :height, :width] = torch.nn.functional.interpolate(
        volume[None, None, :, :, z], size=(height, width), mode="bilinear"
    )
    mask[:height, :width] = masks[:, :, z].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    rows, columns = mask.nonzero().unbind(1)
    box = torch.stack([rows.min(), columns.min(), rows.max(), columns.max()]).float()
    network = build_medsa("lite_medsam", sam_checkpoint=str(lite_medsam_file)).eval()
    with torch.no_grad():
        found = network(image, boxes=box.reshape(1, 1, 4))[0, 0] > 0
    dice = 2 * (found & mask).sum() / (found.sum() + mask.sum())
    assert dice > least


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_dropout_varies_what_the_adapters_do_in_training_alone(perturb_adapters, spatial_dims):
    image = torch.rand(1, 3, 32, 32) if spatial_dims == 2 else torch.rand(1, 1, 32, 32, 2)
    settings = {"pretrained": False, "spatial_dims": spatial_dims, "adapter_dim": 8}
    torch.manual_seed(0)
    network = perturb_adapters(build_medsa("lite_medsam", dropout=0.5, **settings), std=0.05)
    torch.manual_seed(0)
    plain = perturb_adapters(build_medsa("lite_medsam", **settings), std=0.05)
    plain.load_state_dict(network.state_dict())  # an adapter fits with and without
    full = {**network.full_state_dict()}
    assert set(full) == set(plain.full_state_dict())
    with torch.no_grad():
        assert torch.equal(network.train()(image), network(image)) is False
        assert torch.equal(plain.train()(image), plain(image))
        assert torch.equal(network.eval()(image), network(image))


def test_dropout_is_a_probability():
    with pytest.raises(ValueError, match="dropout must lie in"):
        build_medsa("lite_medsam", pretrained=False, dropout=1.0)
