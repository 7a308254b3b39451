"""Images of any number of channels: what the base sees of them, and what an adapter for them belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medsa_nets import WeightsError, build_medsa
from medsa_nets.embeddings import StoredEmbeddings, train_decoder_alone
from medsa_nets.layers import ChannelProjection
from medsa_nets.networks import MedSA
from medsa_nets.networks.identity import decode_identity

SHAPES = {2: (1, 64, 64), 3: (1, 64, 64, 3)}


def build(base: str, channels: int | None, dims: int = 3) -> MedSA:
    torch.manual_seed(0)
    return build_medsa(base, pretrained=False, spatial_dims=dims, img_size=64, in_channels=channels).eval()


@pytest.mark.usefixtures("tiny_base")
@pytest.mark.parametrize(("dims", "channels"), [(2, None), (2, 3), (3, None), (3, 1), (3, 3)])
def test_what_a_base_takes_as_it_is_has_no_projection(dims: int, channels: int | None) -> None:
    network, before = build("tiny", channels, dims), build("tiny", None, dims)
    assert network.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(network.identity, before.identity)
    assert "in_channels" not in decode_identity(network.identity)["adapter"]
    assert not [name for name in network.full_state_dict() if "projection" in name.split(".")[0]]


@pytest.mark.usefixtures("tiny_base")
def test_one_channel_is_given_thrice() -> None:
    image = torch.rand(2, 1, 64, 64)
    ours, plain = build("tiny", 1, 2), build("tiny", None, 2)
    ours.load_state_dict({**plain.state_dict(), **{k: v for k, v in ours.state_dict().items() if "projection" in k},
                          "identity": ours.identity})  # fmt: skip
    assert ours.channel_projection is not None
    with torch.no_grad():
        assert torch.equal(ours(image), plain(image.repeat(1, 3, 1, 1)))


@pytest.mark.usefixtures("tiny_base")
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [2, 4])
def test_several_channels_begin_as_their_mean(dims: int, channels: int) -> None:
    batch, *space = SHAPES[dims]
    image = torch.rand(batch, channels, *space)
    mean = image.mean(dim=1, keepdim=True).expand(-1, 3, *space)
    with torch.no_grad():
        ours, plain = build("tiny", channels, dims)(image), build("tiny", None, dims)(mean)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_intensities_keep_their_precision_under_autocast() -> None:
    projection = ChannelProjection(4)
    image = torch.rand(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = projection(image)
    assert found.dtype == torch.float32
    assert torch.equal(found, projection(image))
    weight, bias = torch.randn(3, 4, 1, 1), torch.randn(3)
    projection.load_state_dict({"weight": weight, "bias": bias})
    torch.testing.assert_close(projection(image), torch.nn.functional.conv2d(image, weight, bias))


@pytest.mark.usefixtures("tiny_base")
def test_a_projection_trains_with_the_adapter_and_lies_in_its_file() -> None:
    network = build("tiny", 4)
    names = {"channel_projection.weight", "channel_projection.bias"}
    assert names <= network.trained_names
    assert names <= network.state_dict().keys()
    assert not names & network.base_state_dict().keys()
    network(torch.rand(1, 4, 64, 64, 2)).sum().backward()
    assert network.channel_projection is not None
    gradient = network.channel_projection.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
    other = build("tiny", 4)
    with torch.no_grad():
        network.channel_projection.weight.normal_()
    other.load_state_dict(network.state_dict())
    assert other.channel_projection is not None
    assert torch.equal(other.channel_projection.weight, network.channel_projection.weight)


@pytest.mark.usefixtures("tiny_base")
@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (4, 1, r"in_channels=4 \(here 1\)"),
        (4, None, r"in_channels=4 \(here '1 or 3'\)"),
        (None, 4, r"in_channels='1 or 3' \(here 4\)"),
        (4, 2, r"in_channels=4 \(here 2\)"),
    ],
)
def test_an_adapter_for_other_channels_is_refused_with_both_values(theirs: int, ours: int, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        build("tiny", ours).load_state_dict(build("tiny", theirs).state_dict())


@pytest.mark.usefixtures("tiny_base")
def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image must have shape \(B, 4, H, W, D\)"):
        build("tiny", 4)(torch.rand(1, 1, 64, 64, 2))
    with pytest.raises(ValueError, match=r"image must have shape \(B, 2, H, W\)"):
        build("tiny", 2, 2)(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="in_channels must be 1 or more, got 0"):
        build("tiny", 0)


@pytest.mark.usefixtures("tiny_base")
def test_kept_embeddings_are_those_of_the_projection_that_made_them(tmp_path: Path) -> None:
    network = build("tiny", 4)
    with pytest.raises(ValueError, match="frozen encoders only"):
        StoredEmbeddings(network, tmp_path)
    train_decoder_alone(network, tmp_path)
    kept, image = network.kept_embeddings, torch.rand(1, 4, 64, 64, 2)
    assert isinstance(kept, StoredEmbeddings)
    assert network.channel_projection is not None
    assert not network.channel_projection.weight.requires_grad
    first = network.encode_image(image)
    assert torch.equal(network.encode_image(image), first)
    assert (kept.computed, kept.read) == (1, 1)
    with torch.no_grad():
        network.channel_projection.weight.mul_(2.0)
    assert not torch.equal(network.encode_image(image), first)
    assert kept.computed == 2


@pytest.mark.usefixtures("tiny_base")
@pytest.mark.parametrize("dims", [2, 3])
def test_torchscript_takes_the_channels_too(dims: int) -> None:
    batch, *space = SHAPES[dims]
    network = build("tiny", 4, dims)
    image = torch.rand(batch, 4, *space)
    scripted = torch.jit.script(network)
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), network(image), atol=1e-5, rtol=1e-5)
