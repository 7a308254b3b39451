from __future__ import annotations

import dataclasses
import re
from functools import partial

import pytest
import torch

from medsa_nets.build import build_medsa
from medsa_nets.checksums import state_sha256
from medsa_nets.errors import WeightsError
from medsa_nets.networks import ImageEncoderViT
from medsa_nets.networks.identity import decode_identity
from medsa_nets.weights import BASES, load_base


def test_loading_copies_every_weight_and_names_the_base(tiny_base, tiny_file, tiny_sam):
    network = build_medsa("tiny", sam_checkpoint=str(tiny_file))
    base, expected = network.base_state_dict(), tiny_sam.state_dict()
    assert base.keys() == expected.keys()
    assert all(torch.equal(base[name], tensor) for name, tensor in expected.items())
    identity = decode_identity(network.identity)
    assert (identity["base"], identity["sha256"]) == ("tiny", state_sha256(expected))


def test_loading_lite_medsam_copies_every_weight(lite_medsam_file):
    expected = torch.load(lite_medsam_file, map_location="cpu", weights_only=True)
    base = build_medsa("lite_medsam", sam_checkpoint=str(lite_medsam_file)).base_state_dict()
    assert base.keys() == expected.keys()
    assert all(torch.equal(base[name], tensor) for name, tensor in expected.items())


def _wider(monkeypatch):
    base = dataclasses.replace(
        BASES["tiny"],
        name="wider",
        encoder=partial(ImageEncoderViT, embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(1,)),
    )
    monkeypatch.setitem(BASES, "wider", base)


@pytest.mark.parametrize("given", ["tiny", "unknown", "incomplete", "adapter", "empty"])
def test_weights_of_another_network_are_refused(tiny_base, tiny_file, tiny_sam, tmp_path, monkeypatch, given):
    _wider(monkeypatch)
    path, state = tmp_path / "given.pth", tiny_sam.state_dict()
    name, counts = "wider", r"0 parameters missing, 0 unknown, \d+ of another shape \(first: image_encoder\."
    if given == "unknown":
        name, counts = "tiny", r"0 parameters missing, 1 unknown \(first: colour\)"
        state = {**state, "colour": torch.zeros(1)}
    elif given == "incomplete":
        name, counts = "tiny", r"1 parameters missing \(first: image_encoder.neck.0.weight\)"
        state = {key: tensor for key, tensor in state.items() if key != "image_encoder.neck.0.weight"}
    elif given == "adapter":
        name, counts = "tiny", r"\d+ parameters missing .*unknown \(first: class_embeddings\)"
        state = build_medsa("tiny", pretrained=False).state_dict()
    elif given == "empty":
        name, counts, state = "tiny", r"\d+ parameters missing", {}
    torch.save(state, path)
    with pytest.raises(
        WeightsError, match=f"{re.escape(str(path))}: not the weights of the base '{name}': {counts}"
    ) as caught:
        build_medsa(name, sam_checkpoint=str(path))
    assert ("The file fits the base 'tiny'." in str(caught.value)) == (given == "tiny")


def test_refused_weights_leave_the_network_as_it_was(tiny_base, tiny_sam, tmp_path):
    network = build_medsa("tiny", pretrained=False)
    before = {name: tensor.clone() for name, tensor in network.full_state_dict().items()}
    state = tiny_sam.state_dict()
    del state["prompt_encoder.no_mask_embed.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(WeightsError):
        load_base(network, tiny_base, tmp_path / "part.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.full_state_dict().items())


@pytest.mark.parametrize("img_size", [128, 512, (192, 320)])
def test_relative_position_tables_are_interpolated_as_segment_anything_does(
    segment_anything, tiny_base, tiny_file, tiny_sam, img_size
):
    network = build_medsa("tiny", sam_checkpoint=str(tiny_file), img_size=img_size)
    get_rel_pos = segment_anything.modeling.image_encoder.get_rel_pos
    grid = [side // 16 for side in ((img_size, img_size) if isinstance(img_size, int) else img_size)]
    ours, theirs = network.image_encoder.blocks[1].attn, tiny_sam.image_encoder.blocks[1].attn
    for side, name, index in ((grid[0], "rel_pos_h", "index_h"), (grid[1], "rel_pos_w", "index_w")):
        table = getattr(ours, name)
        assert table.shape == (2 * side - 1, 16)
        expected = get_rel_pos(side, side, getattr(theirs, name))
        torch.testing.assert_close(table[getattr(ours, index)], expected, atol=1e-6, rtol=1e-6)
    windows = network.image_encoder.blocks[0].attn
    assert torch.equal(windows.rel_pos_h, tiny_sam.image_encoder.blocks[0].attn.rel_pos_h)


@pytest.mark.parametrize("img_size", [128, 512, (192, 320)])
def test_constant_tables_stay_constant_and_ramps_stay_ramps(tiny_base, tiny_sam, tmp_path, img_size):
    state = {name: tensor.clone() for name, tensor in tiny_sam.state_dict().items()}
    embed = state["image_encoder.pos_embed"]
    embed[..., :10] = 0.75
    centres = (torch.arange(16) + 0.5) / 16
    embed[..., 10] = centres[:, None]
    embed[..., 11] = centres[None, :]
    state["image_encoder.blocks.1.attn.rel_pos_h"][:] = -0.5
    torch.save(state, tmp_path / "tables.pth")
    encoder = build_medsa("tiny", sam_checkpoint=str(tmp_path / "tables.pth"), img_size=img_size).image_encoder
    height, width = encoder.pos_embed.shape[1:3]
    assert (16 * height, 16 * width) == (img_size if isinstance(img_size, tuple) else (img_size, img_size))
    torch.testing.assert_close(encoder.pos_embed[..., :10], torch.full((1, height, width, 10), 0.75))
    rows = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    columns = ((torch.arange(width) + 0.5) / width)[None, :].expand(height, width)
    inner = (slice(height // 4, -(height // 4)), slice(width // 4, -(width // 4)))  # the border is clamped
    torch.testing.assert_close(encoder.pos_embed[0, ..., 10][inner], rows[inner], atol=4e-3, rtol=0)
    torch.testing.assert_close(encoder.pos_embed[0, ..., 11][inner], columns[inner], atol=4e-3, rtol=0)
    rel_pos = encoder.blocks[1].attn.rel_pos_h
    torch.testing.assert_close(rel_pos, torch.full_like(rel_pos, -0.5))


def test_the_input_size_is_part_of_the_task_not_of_the_identity(tiny_base, tiny_file):
    networks = [build_medsa("tiny", sam_checkpoint=str(tiny_file), img_size=size) for size in (128, 256)]
    assert torch.equal(networks[0].identity, networks[1].identity)
    with pytest.raises(WeightsError, match=r"image_size \[256, 256\] \(here \[128, 128\]\)"):
        networks[0].load_state_dict(networks[1].state_dict())
