"""All classes in one pass of the decoder: a token for each, which see each other."""

from __future__ import annotations

import pytest
import torch

from medsa_nets import build_medsa
from medsa_nets.errors import WeightsError
from medsa_nets.layers import Bottlenecks, DepthBranch
from medsa_nets.networks import MaskDecoder, TwoWayTransformer
from medsa_nets.training import train_slices


@pytest.fixture
def build(tiny_base, tiny_file, perturb_adapters):
    def make(**settings):
        torch.manual_seed(0)  # the same adapters each time
        settings = {"num_classes": 5, "classes_per_pass": 3, "adapter_dim": 8, **settings}
        return perturb_adapters(build_medsa("tiny", sam_checkpoint=str(tiny_file), **settings)).eval()

    return make


def test_the_decoder_gives_what_segment_anything_s_parts_give_for_more_tokens(segment_anything, randomise):
    modeling = segment_anything.modeling
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    reference = randomise(modeling.MaskDecoder(transformer_dim=256, transformer=transformer))
    ours = MaskDecoder(transformer=TwoWayTransformer(adaptation=Bottlenecks(adapter_dim=16))).eval()
    ours.load_state_dict(reference.state_dict(), strict=False)
    image, pe, dense = torch.randn(2, 256, 6, 9), torch.randn(1, 256, 6, 9), torch.randn(2, 256, 6, 9)
    classes = torch.randn(2, 4, 256)
    own = reference.mask_tokens.weight[:1] + classes
    others = torch.cat([reference.iou_token.weight, reference.mask_tokens.weight[1:]]).expand(2, -1, -1)
    tokens = torch.cat([others, own], dim=1)  # attention does not depend on the order
    with torch.no_grad():
        found, _ = ours(image, pe, torch.zeros(2, 0, 256), dense, classes)
        answered, keys = transformer(image + dense, pe.expand(2, -1, -1, -1), tokens)
        upscaled = reference.output_upscaling(keys.transpose(1, 2).reshape(2, 256, 6, 9))
        weights = reference.output_hypernetworks_mlps[0](answered[:, 4:])
        expected = torch.einsum("bgc,bchw->bghw", weights, upscaled)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_one_class_in_a_pass_is_the_decoder_of_before_bit_for_bit(build, spatial_dims):
    network = build(classes_per_pass=1, num_classes=1, spatial_dims=spatial_dims)
    embedding = network.encode_image(torch.rand(1, 3, 256, 256, *[2] * (spatial_dims - 2)))
    with torch.no_grad():
        assert torch.equal(network.decode_classes(embedding), network.decode(embedding))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_what_a_class_gets_does_not_depend_on_which_are_asked_for(build, spatial_dims):
    network = build(spatial_dims=spatial_dims)
    embedding = network.encode_image(torch.rand(1, 3, 256, 256, *[2] * (spatial_dims - 2)))
    with torch.no_grad():
        every = network.decode(embedding)
        assert every.shape[1] == 5
        for asked in ([0], [4], [4, 1, 3], [2, 0], [3, 3]):
            some = network.decode(embedding, classes=torch.tensor(asked))
            torch.testing.assert_close(some, every[:, asked], atol=1e-5, rtol=1e-5)


def test_classes_of_one_pass_see_each_other_and_no_others(build):
    network = build()
    embedding = network.encode_image(torch.rand(1, 3, 256, 256))
    with torch.no_grad():
        before = network.decode(embedding)
        network.class_embeddings[1] += 1.0
        after = network.decode(embedding)
    changed = (after - before).abs().flatten(2).amax(-1)[0] > 1e-4
    assert changed.tolist() == [True, True, True, False, False]


def test_a_prompt_for_a_class_is_answered_by_that_class_s_token_alone(build):
    together, alone = build(), build(classes_per_pass=1)
    embedding = together.encode_image(torch.rand(1, 3, 256, 256))
    prompts = {"point_coords": torch.full((1, 2, 1, 2), 50.0), "point_labels": torch.ones(1, 2, 1)}
    with torch.no_grad():
        found, expected = (n.decode(embedding, **prompts, classes=torch.tensor([1, 4])) for n in (together, alone))
    assert torch.equal(found, expected)


def test_how_many_classes_share_a_pass_is_part_of_the_identity(build):
    with pytest.raises(WeightsError, match=r"classes_per_pass=3 \(here None\)"):
        build(classes_per_pass=1).load_state_dict(build().state_dict())
    with pytest.raises(ValueError, match="classes_per_pass must be 1 or more, got 0"):
        build(classes_per_pass=0)


def test_torchscript_equals_eager(build):
    network = build(spatial_dims=3)
    scripted = torch.jit.script(network)
    image = torch.rand(1, 1, 256, 256, 2)
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), network(image), atol=1e-4, rtol=1e-4)
        classes = torch.tensor([3, 1])
        found, expected = scripted(image, classes=classes), network(image, classes=classes)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_checkpointing_changes_no_gradient(build):
    gradients = []
    for checkpointing in (False, True):
        network = build(spatial_dims=3, checkpointing=checkpointing).train()
        torch.manual_seed(1)
        network.decode(network.encode_image(torch.rand(1, 1, 256, 256, 2))).square().mean().backward()
        gradients.append(network.class_embeddings.grad)
    assert (gradients[0] != 0).any(1).all()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_slices_train_one_by_one_into_an_adapter_of_volumes(build):
    network = train_slices(build(spatial_dims=3)).train()
    image = torch.rand(1, 1, 256, 256, 2)
    network(image).square().mean().backward()
    for name, module in network.named_modules():
        if isinstance(module, DepthBranch):
            assert all(parameter.grad is None for parameter in module.parameters()), name
    assert network.class_embeddings.grad is not None
    with torch.no_grad():
        together = network(image)
        for z in range(2):
            torch.testing.assert_close(network(image[..., z : z + 1])[..., 0], together[..., z], atol=1e-4, rtol=1e-4)
    build(spatial_dims=3).load_state_dict(network.state_dict())
