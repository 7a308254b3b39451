"""Networks whose decoder sees clicks and the mask before them as maps."""

from __future__ import annotations

import pytest
import torch

from medsa_nets import build_medsa
from medsa_nets.errors import WeightsError


@pytest.fixture
def build(tiny_base, tiny_file, perturb_adapters):
    def make(perturbed=False, **settings):
        torch.manual_seed(0)  # the same adapters each time
        settings = {"click_feedback": True, "adapter_dim": 8, **settings}
        network = build_medsa("tiny", sam_checkpoint=str(tiny_file), **settings).eval()
        return perturb_adapters(network) if perturbed else network

    return make


def _prompts(spatial_dims, masks=True, sets=2):
    tail = [3] * (spatial_dims - 2)
    prompts = {
        "point_coords": torch.rand(1, sets, 2, spatial_dims) * torch.tensor([256.0, 256.0, 2.0][:spatial_dims]),
        "point_labels": torch.tensor([[[1, 0]] * sets]),
    }
    return {**prompts, "masks": torch.randn(1, sets, 64, 64, *tail)} if masks else prompts


def _embed(network, spatial_dims):
    with torch.no_grad():
        return network.encode_image(torch.rand(1, 3, 256, 256, *[3] * (spatial_dims - 2)))


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_fresh_network_gives_what_it_gives_without_the_branch(build, spatial_dims, masks):
    network, plain = build(spatial_dims=spatial_dims), build(spatial_dims=spatial_dims, click_feedback=False)
    embedding, prompts = _embed(network, spatial_dims), _prompts(spatial_dims, masks)
    with torch.no_grad():
        assert torch.equal(network.decode(embedding, **prompts), plain.decode(embedding, **prompts))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_trained_branch_changes_answers_to_clicks_and_no_automatic_mask(build, spatial_dims):
    network, trained = build(spatial_dims=spatial_dims), build(spatial_dims=spatial_dims)
    for parameter in trained.click_feedback.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    embedding, prompts = _embed(network, spatial_dims), _prompts(spatial_dims)
    with torch.no_grad():
        assert torch.equal(network.decode(embedding), trained.decode(embedding))
        assert (network.decode(embedding, **prompts) - trained.decode(embedding, **prompts)).abs().max() > 1e-2


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_an_earlier_mask_of_zeros_is_none(build, spatial_dims):
    network = build(perturbed=True, spatial_dims=spatial_dims)
    embedding, prompts = _embed(network, spatial_dims), _prompts(spatial_dims)
    first, second = prompts["masks"].clone(), prompts.pop("masks")
    first[:, 0] = 0
    with torch.no_grad():
        mixed = network.decode(embedding, **prompts, masks=first)
        none, both = network.decode(embedding, **prompts), network.decode(embedding, **prompts, masks=second)
    torch.testing.assert_close(mixed[:, 0], none[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[:, 1], both[:, 1], atol=1e-4, rtol=1e-4)
    assert (none[:, 0] - both[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_prompt_sets_do_not_see_each_other(build, spatial_dims):
    network = build(perturbed=True, spatial_dims=spatial_dims)
    embedding, prompts = _embed(network, spatial_dims), _prompts(spatial_dims, sets=3)
    with torch.no_grad():
        together = network.decode(embedding, **prompts)
        for k in range(3):
            alone = network.decode(embedding, **{name: value[:, k : k + 1] for name, value in prompts.items()})
            torch.testing.assert_close(together[:, k : k + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_click_reaches_other_slices_of_a_volume_by_its_place(build):
    network = build(spatial_dims=3)
    for parameter in network.click_feedback.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    embedding = _embed(network, 3)
    labels = torch.ones(1, 1, 1)
    with torch.no_grad():
        near, far = (
            network.decode(embedding, torch.tensor([[[[128.0, 128.0, z]]]]), labels)[..., 0] for z in (1.0, 2.0)
        )
        network.click_feedback.to_logits[-1].weight.zero_()
        network.click_feedback.to_embedding[-1].weight.zero_()
        without = [network.decode(embedding, torch.tensor([[[[128.0, 128.0, z]]]]), labels)[..., 0] for z in (1.0, 2.0)]
    assert (near - far).abs().max() > 1e-3
    torch.testing.assert_close(*without)  # fresh adapters of distance: tokens do not reach that slice


def test_an_adapter_without_the_branch_is_taken_and_gives_the_masks_that_it_gave(build):
    plain = build(perturbed=True, click_feedback=False)
    network = build()
    network.load_state_dict(plain.state_dict())
    embedding, prompts = _embed(plain, 2), _prompts(2)
    with torch.no_grad():
        assert torch.equal(network.decode(embedding, **prompts), plain.decode(embedding, **prompts))
    assert torch.equal(network.identity, build().identity)


def test_an_adapter_with_the_branch_is_refused_by_a_network_without(build):
    with pytest.raises(WeightsError, match="click_feedback=True"):
        build(click_feedback=False).load_state_dict(build().state_dict())


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_adapter_files_hold_the_branch_and_bring_it_back(build, spatial_dims):
    network, other = build(perturbed=True, spatial_dims=spatial_dims), build(spatial_dims=spatial_dims)
    assert any(name.startswith("click_feedback.") for name in network.state_dict())
    assert not any(name.startswith("click_feedback.") for name in network.base_state_dict())
    other.load_state_dict(network.state_dict())
    embedding, prompts = _embed(network, spatial_dims), _prompts(spatial_dims)
    with torch.no_grad():
        assert torch.equal(network.decode(embedding, **prompts), other.decode(embedding, **prompts))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_torchscript_gives_the_same_answers(build, spatial_dims):
    network = build(perturbed=True, spatial_dims=spatial_dims)
    scripted = torch.jit.script(network)
    image, prompts = torch.rand(1, 3, 256, 256, *[3] * (spatial_dims - 2)), _prompts(spatial_dims)
    with torch.no_grad():
        for asked in ({}, prompts, {"masks": prompts["masks"]}):
            torch.testing.assert_close(scripted(image, **asked), network(image, **asked), atol=1e-4, rtol=1e-4)
