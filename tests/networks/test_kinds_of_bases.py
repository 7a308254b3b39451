"""Volumes, export, fast layers and less memory, for kinds of bases beside ViT and TinyViT.

These two have tests of their own (``test_medsa.py``, ``test_volume_medsa.py``, ``test_plain_form.py``).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from medsa_nets import build_medsa
from medsa_nets.layers import fast
from medsa_nets.weights import BASES

from ..conftest import randomise_weights
from ..narrow_bases import narrow

KINDS = ("efficientvit_sam_l0", "efficient_sam_vitt")
SIZE = 64
POINTS = {"point_coords": torch.tensor([[[[30.0, 20.0], [4.0, 60.0]]]]), "point_labels": torch.tensor([[[1, 0]]])}


@pytest.fixture(params=KINDS)
def build(request, monkeypatch):
    base = dataclasses.replace(narrow(BASES[request.param]), name="narrow")
    monkeypatch.setitem(BASES, "narrow", base)

    def make(**settings):
        torch.manual_seed(0)
        network = build_medsa("narrow", pretrained=False, img_size=SIZE, **settings)
        torch.manual_seed(1)
        frozen = randomise_weights(build_medsa("narrow", pretrained=False, img_size=SIZE, adaptation="none"))
        with torch.no_grad():
            for name, tensor in network.base_state_dict().items():
                tensor.copy_(frozen.base_state_dict()[name])
        return network.eval()

    return make


def _trained(network, seed=2):
    """Move all that trains away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(network.trained_names):
            tensor = network.get_parameter(name)
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return network


@torch.no_grad()
def test_a_fresh_network_for_volumes_gives_what_slices_give_and_slices_can_see_each_other(build):
    flat, volume = build(), build(spatial_dims=3)
    image = torch.rand(1, 1, SIZE, SIZE, 3)
    found = volume(image)
    for z in range(3):
        torch.testing.assert_close(found[..., z], flat(image[..., z].expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)
    _trained(volume)
    other = image.clone()
    other[..., 2] = torch.rand(SIZE, SIZE)
    assert (volume.encode_image(image) - volume.encode_image(other))[..., 0].abs().max() > 1e-4
    clicks = {"point_coords": torch.tensor([[[[30.0, 20.0, 1.0]]]]), "point_labels": torch.ones(1, 1, 1)}
    boxes = {"boxes": torch.tensor([[[5.0, 5.0, 0.0, 50.0, 40.0, 1.0]]])}
    for prompts in (clicks, boxes, {**clicks, **boxes}):
        assert volume(image, **prompts).shape == (1, 1, SIZE, SIZE, 3)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"spatial_dims": 3, "click_feedback": True}], ids=["image", "volume"])
def test_a_scripted_network_and_plain_layers_give_the_same(build, settings):
    network = _trained(build(**settings))
    axes = settings.get("spatial_dims", 2)
    image = torch.rand(1, 3, SIZE, SIZE, *[2] * (axes - 2))
    prompts = {
        "point_coords": 8.0 * torch.rand(1, 2, 3, axes).round(),
        "point_labels": torch.tensor([[[1, 0, 1], [1, -1, -1]]]),
        "masks": torch.randn(1, 2, *(4 * n // network.stride for n in (SIZE, SIZE)), *[2] * (axes - 2)),
    }
    scripted = torch.jit.script(network)
    for given in ({}, prompts):
        expected = network(image, **given)
        bound = 1e-4 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(scripted(image, **given), expected, atol=bound, rtol=1e-4)
        with fast.plain_layers():
            torch.testing.assert_close(network(image, **given), expected, atol=bound, rtol=1e-4)


def test_computing_activations_twice_changes_no_gradient(build):
    gradients = []
    for checkpointing in (False, True):
        network = _trained(build(checkpointing=checkpointing)).train()
        torch.manual_seed(3)
        network(torch.rand(1, 3, SIZE, SIZE), **POINTS).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    encoder = [name for name in gradients[0] if name.startswith("image_encoder.")]
    assert encoder
    for name in encoder:
        assert gradients[0][name].any(), name
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-6, rtol=1e-5)
