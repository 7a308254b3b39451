"""EfficientSAM: the numbers of its published code, where a checkout of it is at hand, and what holds without one."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from medsa_nets import WeightsError, build_medsa
from medsa_nets.errors import SettingError
from medsa_nets.networks import PlainViTEncoder
from medsa_nets.weights import BASES
from medsa_nets.weights.formats import from_efficient_sam

# A checkout of github.com/yformer/EfficientSAM (d525f62); nothing of it is part of this repository.
VARIABLE = "MEDSA_EFFICIENT_SAM"
NARROW = {"embed_dim": 32, "num_heads": 2, "depth": 2}
# Names and shapes of efficient_sam_vitt.pt beside those of segment-anything, by the published code.
OWN = {
    "image_encoder.pos_embed": (1, 197, 192),
    "image_encoder.blocks.11.mlp.fc1.weight": (768, 192),
    "image_encoder.blocks.11.attn.qkv.bias": (576,),
    "prompt_encoder.invalid_points.weight": (1, 256),
    "prompt_encoder.point_embeddings.weight": (1, 256),
    "prompt_encoder.bbox_top_left_embeddings.weight": (1, 256),
    "prompt_encoder.bbox_bottom_right_embeddings.weight": (1, 256),
    "mask_decoder.transformer.layers.1.mlp.layers.0.0.weight": (2048, 256),
    "mask_decoder.transformer.layers.1.mlp.fc.bias": (256,),
    "mask_decoder.final_output_upscaling_layers.0.0.weight": (256, 64, 2, 2),
    "mask_decoder.final_output_upscaling_layers.0.1.weight": (64,),
    "mask_decoder.final_output_upscaling_layers.1.0.weight": (64, 32, 2, 2),
    "mask_decoder.output_hypernetworks_mlps.3.layers.1.0.weight": (256, 256),
    "mask_decoder.output_hypernetworks_mlps.3.fc.weight": (32, 256),
    "mask_decoder.iou_prediction_head.layers.1.0.weight": (256, 256),
    "mask_decoder.iou_prediction_head.fc.bias": (4,),
}
TO_FILE = (
    ("image_encoder.blocks.", ".mlp.lin", ".mlp.fc"),
    ("mask_decoder.transformer.", ".mlp.lin1.", ".mlp.layers.0.0."),
    ("mask_decoder.transformer.", ".mlp.lin2.", ".mlp.fc."),
    ("mask_decoder.output_hyper", ".layers.2.", ".fc."),
    ("mask_decoder.iou_pred", ".layers.2.", ".fc."),
    ("mask_decoder.output_hyper", ".layers.0.", ".layers.0.0."),
    ("mask_decoder.output_hyper", ".layers.1.", ".layers.1.0."),
    ("mask_decoder.iou_pred", ".layers.0.", ".layers.0.0."),
    ("mask_decoder.iou_pred", ".layers.1.", ".layers.1.0."),
    ("mask_decoder.output_up", "output_upscaling.3.", "final_output_upscaling_layers.1.0."),
    ("mask_decoder.output_up", "output_upscaling.", "final_output_upscaling_layers.0."),
)


def as_published(network: nn.Module, class_tokens: int = 1) -> dict[str, Tensor]:
    """A base's weights under the names of EfficientSAM's file, its position table of 14 x 14 tokens."""
    out = {}
    for name, tensor in network.base_state_dict().items():
        for start, ours, theirs in TO_FILE:
            if name.startswith(start) and ours in name:
                name = name.replace(ours, theirs)
                break
        if name == "image_encoder.pos_embed":
            tensor = torch.randn(1, 196 + class_tokens, tensor.shape[3], generator=torch.Generator().manual_seed(7))
        out[name] = tensor
    return out


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, randomise, tmp_path: Path) -> tuple[str, Path]:
    """A narrow EfficientSAM, ``narrow``, and a file of random weights for it as the published ones are."""
    base = dataclasses.replace(
        BASES["efficient_sam_vitt"], name="narrow", encoder=partial(PlainViTEncoder, **NARROW), filename="narrow.pt"
    )
    monkeypatch.setitem(BASES, "narrow", base)
    network = randomise(build_medsa("narrow", pretrained=False, img_size=224))
    torch.save({"model": as_published(network)}, tmp_path / "narrow.pt")
    return "narrow", tmp_path / "narrow.pt"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder = os.environ.get(VARIABLE)
    if not folder or not (Path(folder) / "efficient_sam").is_dir():
        pytest.skip(f"no checkout of EfficientSAM's code (${VARIABLE})")
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("efficient_sam.efficient_sam")
    for name in [name for name in sys.modules if name.split(".")[0] == "efficient_sam"]:
        del sys.modules[name]


def reference(published: ModuleType, size: int = 1024, depth: int | None = None, **widths: int) -> nn.Module:
    """The published network; of another size and depth than it has there, if wanted."""
    network = published.build_efficient_sam(**widths).eval()
    network.image_encoder.blocks = network.image_encoder.blocks[:depth]
    network.image_encoder.img_size = size
    network.prompt_encoder.input_image_size = (size, size)
    network.prompt_encoder.image_embedding_size = (size // 16, size // 16)
    return network


# (x, y) and labels as the published code takes them; the same as clicks, labels and boxes of ours
SIZE = 128
PROMPTS = {
    "a click": ([[70.0, 30.0]], [1], {"point_coords": [[30.0, 70.0]], "point_labels": [1]}),
    "clicks": (
        [[70.0, 30.0], [2.0, 99.0], [5.0, 7.0]],
        [1, 0, 1],
        {"point_coords": [[30.0, 70.0], [99.0, 2.0], [7.0, 5.0]], "point_labels": [1, 0, 1]},
    ),
    "a box": ([[10.0, 20.0], [90.0, 80.0]], [2, 3], {"boxes": [20.0, 10.0, 80.0, 90.0]}),
    "a click and a box": (
        [[70.0, 30.0], [10.0, 20.0], [90.0, 80.0]],
        [1, 2, 3],
        {"point_coords": [[30.0, 70.0]], "point_labels": [1], "boxes": [20.0, 10.0, 80.0, 90.0]},
    ),
    "padding": (
        [[70.0, 30.0], [-1.0, -1.0]],
        [1, -1],
        {"point_coords": [[30.0, 70.0], [-1.0, -1.0]], "point_labels": [1, -1]},
    ),
    "six clicks": (
        [[3.0 * i, 90.0 - 5 * i] for i in range(6)],
        [1, 1, 0, 1, 0, 1],
        {"point_coords": [[90.0 - 5 * i, 3.0 * i] for i in range(6)], "point_labels": [1, 1, 0, 1, 0, 1]},
    ),
}
# Mean and standard deviation of each mask, and its first and last value, by the published code.
FIGURES = {
    "a click": (-0.274024, 0.467391, -0.865706, 0.175685),
    "clicks": (-0.209374, 0.450363, -0.752674, 0.203693),
    "a box": (-0.224768, 0.472501, -0.367884, 0.200749),
    "a click and a box": (-0.278878, 0.432318, -0.394846, -0.150557),
    "padding": (-0.274024, 0.467391, -0.865706, 0.175685),
    "six clicks": (-0.105939, 0.400769, -0.892614, 0.059584),
}


def figures(mask: Tensor) -> tuple[float, ...]:
    return (*(float(x) for x in (mask.mean(), mask.std())), float(mask.flatten()[0]), float(mask.flatten()[-1]))


def ours_of(narrow: tuple[str, Path]) -> nn.Module:
    network = build_medsa(narrow[0], sam_checkpoint=str(narrow[1]), img_size=SIZE).eval()
    network.prompt_encoder.nowhere = -0.5 / SIZE
    return network


def photograph() -> Tensor:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def as_sets(prompts: dict[str, list]) -> dict[str, Tensor]:
    return {kind: torch.tensor(value)[None, None] for kind, value in prompts.items()}


@torch.no_grad()
def test_a_network_gives_the_numbers_of_the_published_code(published, narrow) -> None:
    theirs = reference(published, SIZE, 2, encoder_patch_embed_dim=32, encoder_num_heads=2)
    theirs.load_state_dict(torch.load(narrow[1], weights_only=True)["model"])
    ours, image = ours_of(narrow), photograph()
    embedding, expected = ours.encode_image(image), theirs.get_image_embeddings(image)
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)
    for kind, (coords, labels, prompts) in PROMPTS.items():
        points = torch.tensor(coords)[None, None], torch.tensor(labels)[None, None]
        masks, iou = theirs.predict_masks(expected, *points, False, SIZE, SIZE)
        large = nn.functional.interpolate(masks[:, 0], size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        sets = as_sets(prompts)
        torch.testing.assert_close(ours.decode(embedding, **sets), large, atol=1e-5, rtol=1e-5)
        sparse = ours.embed_prompts(
            sets.get("point_coords"), sets.get("point_labels"), sets.get("boxes"), 1, (SIZE, SIZE), 1
        )
        side = SIZE // 16
        dense, places = ours.prompt_encoder.embed_masks(None, 1, (side, side)), ours.prompt_encoder.dense_pe(side, side)
        found = ours.mask_decoder(embedding, places, sparse, dense)
        torch.testing.assert_close(found[0], masks[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], iou[0], atol=1e-5, rtol=1e-5)
        assert figures(large) == pytest.approx(FIGURES[kind], abs=1e-5)


@torch.no_grad()
def test_a_network_gives_the_figures_of_the_published_code(narrow) -> None:
    ours = ours_of(narrow)
    embedding = ours.encode_image(photograph())
    for kind, (_, _, prompts) in PROMPTS.items():
        assert figures(ours.decode(embedding, **as_sets(prompts))) == pytest.approx(FIGURES[kind], abs=1e-5)


@pytest.mark.parametrize(("name", "width", "heads"), [("efficient_sam_vitt", 192, 3), ("efficient_sam_vits", 384, 6)])
def test_files_of_the_published_code_fit_strictly(published, name, width, heads) -> None:
    with torch.device("meta"):
        theirs = reference(published, encoder_patch_embed_dim=width, encoder_num_heads=heads)
        expected = build_medsa(name, pretrained=False, img_size=224).base_state_dict()
    found = from_efficient_sam(theirs.state_dict())
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in expected.items()}
    assert {k: t.shape for k, t in as_published(theirs_as_ours(expected)).items()} == {
        k: t.shape for k, t in theirs.state_dict().items()
    }


def theirs_as_ours(state: dict[str, Tensor]) -> nn.Module:
    network = nn.Module()
    network.base_state_dict = lambda: state
    return network


def test_the_public_file_has_the_names_and_shapes_known_of_it() -> None:
    with torch.device("meta"):
        state = as_published(build_medsa("efficient_sam_vitt", pretrained=False))
    assert len(state) == 278
    assert {name: tuple(state[name].shape) for name in OWN if name in state} == OWN


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (64, 96)])
def test_a_file_is_loaded_at_any_size_and_checked(narrow, size, tmp_path) -> None:
    network = build_medsa(narrow[0], sam_checkpoint=str(narrow[1]), img_size=size).eval()
    table = torch.load(narrow[1], weights_only=True)["model"]["image_encoder.pos_embed"][:, 1:]
    grid = table.reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(size[0] // 16, size[1] // 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(network.image_encoder.pos_embed, grid.permute(0, 2, 3, 1), atol=1e-6, rtol=1e-6)
    assert network(torch.rand(1, 3, *size)).shape == (1, 1, *size)
    state = torch.load(narrow[1], weights_only=True)["model"]
    del state["prompt_encoder.invalid_points.weight"]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"not the weights of the base 'narrow'.*missing"):
        build_medsa(narrow[0], sam_checkpoint=str(tmp_path / "other.pt"), img_size=size)


@torch.no_grad()
def test_prompts_beyond_six_places_count_and_earlier_masks_do_not(narrow) -> None:
    ours = ours_of(narrow)
    embedding = ours.encode_image(photograph())
    coords, labels = torch.rand(1, 1, 8, 2) * SIZE, torch.ones(1, 1, 8, dtype=torch.long)
    six, eight = (ours.decode(embedding, coords[:, :, :n], labels[:, :, :n]) for n in (6, 8))
    assert (six - eight).abs().max() > 1e-3
    masks = torch.randn(1, 1, SIZE // 4, SIZE // 4)
    assert torch.equal(ours.decode(embedding, coords[:, :, :6], labels[:, :, :6], masks=masks), six)


def test_adaptations_of_the_published_code_are_refused() -> None:
    with pytest.raises(SettingError, match="goes with a ViT base"):
        build_medsa("efficient_sam_vitt", pretrained=False, adaptation="published_adapters")
