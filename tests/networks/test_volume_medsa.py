from __future__ import annotations

import io

import pytest
import torch

from medsa_nets.build import build_medsa
from medsa_nets.errors import WeightsError
from medsa_nets.layers import DepthBranch, DistantPrompt
from medsa_nets.networks import MedSA, VolumeMedSA
from medsa_nets.weights import BASES

SIZES = {"tiny": 256, "lite_medsam": 64}


@pytest.fixture(params=list(SIZES))
def base(request, tiny_base, tiny_file, lite_medsam_file):
    """A ViT with windows and global attention, and TinyViT, with their weights."""
    file = {"tiny": tiny_file, "lite_medsam": lite_medsam_file}[request.param]
    return request.param, {"sam_checkpoint": str(file), "num_classes": 2, "adapter_dim": 8}, SIZES[request.param]


@pytest.fixture
def lite(lite_medsam_file):
    def build(**settings):
        return build_medsa(
            "lite_medsam", sam_checkpoint=str(lite_medsam_file), spatial_dims=3, **{"adapter_dim": 8, **settings}
        ).eval()

    return build


def train_a_little(network, perturb_adapters):
    """Depth adapters, biases and distant prompts away from zero, as training leaves them."""
    perturb_adapters(network, std=0.1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, DepthBranch):
                module.bias.normal_(std=0.5)
            if isinstance(module, DistantPrompt):
                module.up.weight.normal_(std=0.2)
    return network


@pytest.mark.parametrize("depth", [1, 2, 7, 16])
def test_a_fresh_network_gives_each_slice_what_the_2d_network_gives(base, depth):
    name, settings, size = base
    flat, volume = build_medsa(name, **settings).eval(), build_medsa(name, spatial_dims=3, **settings).eval()
    assert isinstance(volume, VolumeMedSA)
    image = torch.rand(1, 1, size, size, depth)
    with torch.no_grad():
        found = volume(image)
        assert found.shape == (1, 2, size, size, depth)
        for z in range(depth):
            expected = flat(image[..., z].expand(-1, 3, -1, -1))
            torch.testing.assert_close(found[..., z], expected, atol=1e-5, rtol=1e-5)


def test_fresh_prompts_are_those_of_their_slices(base):
    name, settings, size = base
    flat, volume = build_medsa(name, **settings).eval(), build_medsa(name, spatial_dims=3, **settings).eval()
    depth = 5
    image = torch.rand(2, 3, size, size, depth)
    coords = torch.rand(2, 3, 4, 3) * size
    coords[..., 2] = torch.randint(0, depth, (2, 3, 4))
    labels = torch.randint(-1, 2, (2, 3, 4))
    corner = torch.rand(2, 3, 2) * size / 2
    low, high = torch.full((2, 3, 1), 1.0), torch.full((2, 3, 1), 3.0)
    boxes = torch.cat([corner, low, corner + size / 4, high], dim=-1)
    with torch.no_grad():
        embedding = volume.encode_image(image)
        points = volume.decode(embedding, coords, labels)
        boxed = volume.decode(embedding, boxes=boxes)
        both = volume.decode(embedding, coords, labels, boxes)
        for z in range(depth):
            here = torch.where(coords[..., 2] == z, labels, -1)
            flat_embedding = flat.encode_image(image[..., z])
            expected = flat.decode(flat_embedding, coords[..., :2], here)
            torch.testing.assert_close(points[..., z], expected, atol=1e-4, rtol=1e-4)
            if 1 <= z <= 3:
                plane = boxes[..., [0, 1, 3, 4]]
                expected = flat.decode(flat_embedding, boxes=plane)
                torch.testing.assert_close(boxed[..., z], expected, atol=1e-4, rtol=1e-4)
                expected = flat.decode(flat_embedding, coords[..., :2], here, plane)
                torch.testing.assert_close(both[..., z], expected, atol=1e-4, rtol=1e-4)
            else:  # a slice without prompt: two tokens that say so
                nothing = torch.zeros(2, 3, 1, 2), -torch.ones(2, 3, 1)
                expected = flat.decode(flat_embedding, *nothing)
                torch.testing.assert_close(boxed[..., z], expected, atol=1e-4, rtol=1e-4)


def test_a_changed_slice_changes_every_other_one_of_its_volume_alone(base, perturb_adapters):
    name, settings, size = base
    network = train_a_little(build_medsa(name, spatial_dims=3, **settings).eval(), perturb_adapters)
    image = torch.rand(2, 1, size, size, 5)
    changed = image.clone()
    changed[0, ..., 2] = torch.rand(1, size, size)
    with torch.no_grad():
        before, after = network(image), network(changed)
    difference = (before - after).abs().amax(dim=(1, 2, 3))
    assert (difference[0] > 1e-3).all()
    assert (difference[1] == 0).all()


def test_depth_is_not_mixed_with_windows(base, perturb_adapters):
    """What the depth branch sees at one position is that position on other slices, through every block."""
    name, settings, size = base
    network = build_medsa(name, spatial_dims=3, **settings).eval()
    encoder = network.image_encoder
    blocks = [m for m in encoder.modules() if isinstance(getattr(m, "depth", None), DepthBranch)]
    assert len(blocks) == (2 if name == "tiny" else 10)
    for block in blocks:
        seen = []
        original = block.depth.attend
        block.depth.attend = lambda q, k, v, depth, o=original, s=seen: s.append(q.shape) or o(q, k, v, depth)
        with torch.no_grad():
            network.encode_image(torch.rand(1, 1, size, size, 3))
        block.depth.attend = original
        assert seen[0][0] == 3, "whole slices, not windows"
        assert seen[0][1] * network.stride * (1 if name == "tiny" else 2) >= size // 2


def test_a_click_reaches_the_other_slices_and_tells_how_far_it_is(lite, perturb_adapters):
    network = train_a_little(lite(), perturb_adapters)
    with torch.no_grad():
        embedding = network.encode_image(torch.rand(1, 1, 64, 64, 4))
        answers = []
        for z in (0.0, 1.0, -9.0, 12.0):  # also from beyond the slab
            answers.append(network.decode(embedding, torch.tensor([[[[20.0, 30.0, z]]]]), torch.ones(1, 1, 1)))
    for i, a in enumerate(answers):
        for b in answers[:i]:
            assert ((a - b).abs().amax(dim=(0, 1, 2, 3)) > 1e-4).all()


def test_a_slice_sees_its_own_clicks_and_the_nearest_of_the_others(lite, perturb_adapters):
    network = train_a_little(lite(num_classes=1), perturb_adapters)
    embedding = torch.randn(1, 256, 4, 4, 9)
    heights = [0, 0, 0, 0, 0, 3, 5, 6, 8]  # slices of the clicks: five on the first one
    coords = torch.stack([torch.rand(9) * 15, torch.rand(9) * 15, torch.tensor(heights).float()], dim=1)[None, None]
    labels = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1, 1])[None, None]
    with torch.no_grad():
        whole = network.decode(embedding, coords, labels)
        nearest = [0, 1, 2, 3, 4, 5, 6, 7]  # of slice 0: its own five, and three more
        own = network.decode(embedding, coords[:, :, nearest], labels[:, :, nearest])
        torch.testing.assert_close(whole[..., 0], own[..., 0], atol=1e-4, rtol=1e-4)
        moved = coords.clone()
        moved[0, 0, 0, :2] = 15 - moved[0, 0, 0, :2]  # a click on slice 0
        changed = (network.decode(embedding, moved, labels) - whole).abs().amax(dim=(0, 1, 2, 3)) > 1e-4
        assert changed[0]
        assert not changed[5:].any()  # three clicks are nearer
        last = coords.clone()
        last[0, 0, 8, :2] = 15 - last[0, 0, 8, :2]
        assert (network.decode(embedding, last, labels) - whole).abs().amax() > 1e-4


def test_the_decoder_in_chunks_gives_the_same(lite, perturb_adapters):
    network = train_a_little(lite(num_classes=5), perturb_adapters)
    embedding = network.encode_image(torch.rand(2, 1, 64, 64, 3)).detach()
    with torch.no_grad():
        whole = network.decode(embedding)
        for network.class_chunk in (1, 2, 5, 9):
            torch.testing.assert_close(network.decode(embedding), whole, atol=1e-4, rtol=1e-4)
        one = network.decode(embedding, classes=torch.tensor([3]))
        torch.testing.assert_close(one, whole[:, 3:4], atol=1e-4, rtol=1e-4)


def test_gradients_reach_everything_that_trains_and_checkpointing_changes_none(lite, perturb_adapters):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = train_a_little(lite(num_classes=2, checkpointing=checkpointing), perturb_adapters).train()
        torch.manual_seed(1)
        embedding = network.encode_image(torch.rand(1, 1, 64, 64, 3))
        prompted = network.decode(embedding, torch.tensor([[[[20.0, 30.0, 1]]]]), torch.ones(1, 1, 1))
        (network.decode(embedding).square().mean() + prompted.square().mean()).backward()
        trained = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
        assert all(grad is not None and (grad != 0).any() for grad in trained.values()), [
            name for name, grad in trained.items() if grad is None or not (grad != 0).any()
        ]
        assert all(p.grad is None for p in network.parameters() if not p.requires_grad)
        gradients.append(trained)
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_adapters_of_images_and_volumes_are_told_apart(lite, lite_medsam_file):
    volume = lite()
    flat = build_medsa("lite_medsam", sam_checkpoint=str(lite_medsam_file), adapter_dim=8)
    state = volume.state_dict()
    assert any(".depth." in name for name in state)
    assert {name for name in state if not name.startswith(("image_encoder", "mask_decoder"))} >= {
        "class_embeddings",
        "identity",
        "task",
        "distant_prompt.up.weight",
    }
    with pytest.raises(WeightsError, match=r"spatial_dims=None \(here 3\)"):
        volume.load_state_dict(flat.state_dict())
    with pytest.raises(WeightsError, match=r"spatial_dims=3 \(here None\)"):
        flat.load_state_dict(state)
    other = lite()
    other.load_state_dict(torch.load(io.BytesIO(_saved(state)), weights_only=True))


def _saved(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_torchscript_equals_eager(lite, perturb_adapters):
    network = train_a_little(lite(num_classes=3, class_chunk=2), perturb_adapters)
    scripted = torch.jit.script(network)
    image = torch.rand(1, 1, 64, 64, 3)
    prompts = {
        "point_coords": torch.tensor([[[[20.0, 30.0, 1]], [[5.0, 6.0, 9]]]]),
        "point_labels": torch.tensor([[[1.0], [0.0]]]),
        "boxes": torch.tensor([[[5.0, 6, 0, 40, 50, 1], [5.0, 6, 2, 40, 50, 2]]]),
    }
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), network(image), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scripted(image, **prompts), network(image, **prompts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("image", "prompts", "message"),
    [
        ((1, 1, 64, 64), {}, "B, 1 or 3, H, W, D"),
        ((1, 2, 64, 64, 3), {}, "B, 1 or 3, H, W, D"),
        ((1, 1, 64, 62, 3), {}, "multiples of 4"),
        ((1, 1, 64, 64, 3), {"point_coords": torch.zeros(1, 1, 1, 2), "point_labels": torch.ones(1, 1, 1)}, "K, P, 3"),
        ((1, 1, 64, 64, 3), {"point_coords": torch.zeros(1, 1, 1, 3)}, "without point_labels"),
        ((1, 1, 64, 64, 3), {"boxes": torch.zeros(1, 1, 4)}, "B, K, 6"),
        ((1, 1, 64, 64, 3), {"boxes": torch.zeros(1, 2, 6), "classes": torch.tensor([0])}, "one class for each of 2"),
    ],
)
def test_wrong_shapes_are_named(lite, image, prompts, message):
    with pytest.raises(ValueError, match=message):
        lite()(torch.rand(image), **prompts)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="spatial_dims must be 2"):
        build_medsa(pretrained=False, spatial_dims=4)
    with pytest.raises(ValueError, match="class_chunk must be 0"):
        build_medsa(pretrained=False, spatial_dims=3, class_chunk=-1)
    assert type(build_medsa(pretrained=False)) is MedSA
    assert "vit_b" in BASES
