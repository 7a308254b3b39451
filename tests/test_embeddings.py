from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from medsa_nets import build_medsa
from medsa_nets.embeddings import StoredEmbeddings, train_decoder_alone
from medsa_nets.inferers import PromptInferer, SlabInferer
from medsa_nets.training import trainable_parameters

pytestmark = pytest.mark.usefixtures("small_base")


@pytest.fixture
def network(perturb_adapters) -> nn.Module:
    return perturb_adapters(build_medsa("lite_medsam", pretrained=False))  # narrow layers tell a decoder too little


def stored(network: nn.Module) -> StoredEmbeddings:
    return network.kept_embeddings


@pytest.mark.parametrize("amp", [False, True])
def test_kept_embeddings_equal_computed_ones_bit_for_bit(network, tmp_path, amp):
    images = torch.rand(3, 3, 64, 48)
    inferer = PromptInferer(amp=amp)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        alone = torch.cat([network.encode_image(image[None]) for image in images])
        expected = inferer(images, network)
    train_decoder_alone(network, tmp_path / "kept")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(inferer(images, network), expected, atol=0.05 if amp else 1e-5, rtol=1e-4)
    assert (stored(network).computed, stored(network).read) == (3, 3)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        first = network.encode_image(images)
        assert first.dtype == alone.dtype
        assert torch.equal(network.encode_image(images[[2, 0]]), first[[2, 0]])
        torch.testing.assert_close(first, alone, atol=0.05 if amp else 1e-5, rtol=1e-4)  # batches round otherwise
    assert stored(network).computed == 3


def test_another_image_encoder_or_precision_is_computed_anew(network, tmp_path):
    train_decoder_alone(network, tmp_path)
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        first = network.encode_image(image)
        network.encode_image(image + 0.01)
        with torch.autocast("cpu", torch.bfloat16):
            network.encode_image(image)
        assert stored(network).computed == 3
        network.image_encoder.layers[1].blocks[0].attn_adapter.up.bias.add_(0.5)
        assert not torch.equal(network.encode_image(image), first)
    assert stored(network).computed == 4


def test_a_damaged_file_is_computed_anew(network, tmp_path):
    train_decoder_alone(network, tmp_path)
    image = torch.rand(1, 3, 32, 32)
    first = network.encode_image(image)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(network.encode_image(image), first)
    assert torch.equal(torch.load(file, weights_only=True)[None], first)


def test_the_decoder_trains_and_the_encoder_does_not(network, tmp_path):
    train_decoder_alone(network, tmp_path)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW(trainable_parameters(network), lr=0.01)
    image, label = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    label[..., 20:40, 10:50] = 1
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(network.train()(image), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]  # below what the share of the foreground alone gives
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not any(name.startswith("image_encoder.") for name in changed)
    assert set(network.state_dict()) == set(before)
    assert stored(network).computed == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_keeps_embeddings_of_its_own_weights(network, tmp_path, duplicate):
    train_decoder_alone(network, tmp_path)
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        first = network.encode_image(image)
        other = duplicate(network)
        assert stored(other) is not stored(network)
        assert stored(other).network is other
        other.image_encoder.layers[1].blocks[0].attn_adapter.up.bias.add_(0.5)
        assert not torch.equal(other.encode_image(image), first)
        assert torch.equal(network.encode_image(image), first)
    assert (stored(network).computed, stored(other).computed) == (1, 2)
    assert list(network.full_state_dict()) == list(build_medsa("lite_medsam", pretrained=False).full_state_dict())


def test_torchscript_of_a_network_that_keeps_embeddings_computes_them(network, tmp_path):
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = network.eval()(image)
        train_decoder_alone(network, tmp_path)
        scripted, traced = torch.jit.script(network), torch.jit.trace(network, (image,), check_trace=False)
        for exported in (scripted, traced):
            torch.testing.assert_close(exported(image), expected, atol=1e-4, rtol=1e-4)
    assert not list(tmp_path.iterdir())


def test_volumes_keep_each_slab(tmp_path):
    network = train_decoder_alone(build_medsa("small", pretrained=False, spatial_dims=3, num_classes=2), tmp_path)
    volume = torch.rand(1, 1, 32, 32, 10)
    with torch.no_grad():
        first = SlabInferer(slab_depth=4, overlap=0.0)(volume, network.eval())
        assert torch.equal(SlabInferer(slab_depth=4, overlap=0.0)(volume, network), first)
    assert (stored(network).computed, stored(network).read) == (3, 3)


def test_an_encoder_that_trains_is_refused(network, tmp_path: Path):
    with pytest.raises(ValueError, match=r"frozen encoders only, but .*adapter.* trains"):
        StoredEmbeddings(network, tmp_path)
