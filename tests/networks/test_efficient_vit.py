"""EfficientViT-SAM: the numbers of its published code, where a checkout is at hand, and what holds without one."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from medsa_nets import build_medsa
from medsa_nets.weights import BASES
from medsa_nets.weights.formats import from_efficient_vit

# A checkout of github.com/mit-han-lab/efficientvit (de7d773); nothing of it is part of this repository.
VARIABLE = "MEDSA_EFFICIENTVIT"
WIDTHS = {"features": (8, 8, 16, 16, 32), "head_features": 16, "neck_features": 16}
LARGE = {"features": (32, 64, 128, 256, 512), "neck_features": 256}
DEPTHS = {"l0": ((1, 1, 1, 4, 4), 4), "l1": ((1, 1, 1, 6, 6), 8), "l2": ((1, 2, 2, 8, 8), 12)}
_MODELS = "efficientvit.models"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, segment_anything: ModuleType) -> Iterator[ModuleType]:
    """That code's module ``sam``; stand-ins take the place of what its networks do not compute with."""
    folder = os.environ.get(VARIABLE)
    if not folder or not (Path(folder) / "efficientvit" / "models").is_dir():
        pytest.skip(f"no checkout of EfficientViT's code (${VARIABLE})")
    packages = {"efficientvit": "", _MODELS: "models", f"{_MODELS}.efficientvit": "models/efficientvit"}
    for name, place in packages.items():
        package = ModuleType(name)
        package.__path__ = [str(Path(folder) / "efficientvit" / place)]
        monkeypatch.setitem(sys.modules, name, package)
    members = {
        f"{_MODELS}.nn.triton_rms_norm": ("TritonRMSNorm2dFunc",),
        "efficientvit.apps": (),
        "efficientvit.apps.trainer": (),
        "efficientvit.apps.trainer.run_config": ("Scheduler",),
        "torchvision": ("transforms",),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("resize", "to_pil_image"),
    }
    for name, names in members.items():
        module = ModuleType(name)
        for member in names:
            setattr(module, member, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    yield importlib.import_module(f"{_MODELS}.efficientvit.sam")
    for name in [name for name in sys.modules if name.split(".")[0] == "efficientvit"]:
        del sys.modules[name]


def reference(
    published: ModuleType,
    segment_anything: ModuleType,
    depths: tuple[int, ...],
    neck_depth: int,
    features: tuple[int, ...],
    neck_features: int,
    head_features: int = 32,
) -> nn.Module:
    """The published network of these widths, its norms' constant set as there."""
    backbone = published.EfficientViTLargeBackbone(list(features), list(depths), qkv_dim=head_features)
    neck = published.SamNeck(
        fid_list=["stage4", "stage3", "stage2"],
        in_channel_list=list(features[:1:-1]),
        head_width=neck_features,
        head_depth=neck_depth,
        expand_ratio=1,
        middle_op="fmb",
    )
    modeling, network = segment_anything.modeling, nn.Module()
    network.image_encoder = published.EfficientViTSamImageEncoder(backbone, neck)
    network.prompt_encoder = modeling.PromptEncoder(
        embed_dim=256, image_embedding_size=(64, 64), input_image_size=(1024, 1024), mask_in_chans=16
    )
    network.mask_decoder = modeling.MaskDecoder(
        transformer_dim=256,
        transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
    )
    importlib.import_module(f"{_MODELS}.nn.norm").set_norm_eps(network, 1e-6)
    return network.eval()


@torch.no_grad()
def test_a_network_gives_the_numbers_of_the_published_code(
    published, segment_anything, randomise, monkeypatch, tmp_path
) -> None:
    depths, neck_depth = DEPTHS["l0"]
    theirs = randomise(reference(published, segment_anything, depths, neck_depth, **WIDTHS))
    torch.save(theirs.state_dict(), tmp_path / "narrow.pt")
    base = BASES["efficientvit_sam_l0"]
    narrow = dataclasses.replace(base, name="narrow", encoder=partial(base.encoder, **WIDTHS))
    monkeypatch.setitem(BASES, "narrow", narrow)
    ours = build_medsa("narrow", sam_checkpoint=str(tmp_path / "narrow.pt")).eval()
    image = torch.rand(1, 3, 512, 512)
    expected = theirs.image_encoder((image - ours.pixel_mean) / ours.pixel_std)
    embedding = ours.encode_image(image)
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)
    # coordinates there are pixels of 1024, whose centres lie at x + 0.5
    points = (torch.tensor([[[701.0, 301.0], [41.0, 981.0]]]), torch.tensor([[1, 0]]))
    sparse, dense = theirs.prompt_encoder(points=points, boxes=None, masks=None)
    masks, _ = theirs.mask_decoder(expected, theirs.prompt_encoder.get_dense_pe(), sparse, dense, False)
    masks = nn.functional.interpolate(masks, size=(512, 512), mode="bilinear", align_corners=False)
    found = ours.decode(embedding, (points[0].flip(-1)[None] - 0.5) / 2, points[1][None])
    torch.testing.assert_close(found, masks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", list(DEPTHS))
def test_files_of_the_published_code_fit_strictly(published, segment_anything, size) -> None:
    with torch.device("meta"):
        theirs = reference(published, segment_anything, *DEPTHS[size], **LARGE).state_dict()
        expected = build_medsa(f"efficientvit_sam_{size}", pretrained=False).base_state_dict()
    found = from_efficient_vit(theirs)
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in expected.items()}


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (96, 40)])
def test_an_image_of_any_size_has_an_embedding_of_an_eighth(size) -> None:
    encoder = BASES["efficientvit_sam_l0"].encoder(img_size=size, **WIDTHS).eval()
    assert encoder(torch.rand(2, 3, *size)).shape == (2, 256, size[0] // 8, size[1] // 8)
