"""Every base, with every adaptation, through every verb: a new one of either needs no line here.

Daily a narrow base of each kind goes this way; with ``-m slow`` a narrow form of every base does, in volumes too.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from medsa_nets import build_medsa, use_backend
from medsa_nets.adaptations import ADAPTATIONS, settings_of
from medsa_nets.backends import BACKENDS
from medsa_nets.inferers import SlabInferer
from medsa_nets.interaction.segmenters import Asked, NetworkSegmenter
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.networks import MedSA
from medsa_nets.networks.identity import decode_identity
from medsa_nets.weights import BASES

from ..narrow_bases import kinds, narrow

SIZE = 32
KINDS = kinds()
ONE_OF_A_KIND = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in BASES]
USUAL = [name if name == "adapters" else pytest.param(name, marks=pytest.mark.slow) for name in ADAPTATIONS]
DIMS = [2, pytest.param(3, marks=pytest.mark.slow)]
SLOW = ("compile", "onnxruntime")  # the latter reads the file that OpenVINO does
Build = Callable[..., MedSA]


@pytest.fixture(params=ONE_OF_A_KIND)
def build(request, monkeypatch, randomise, tmp_path) -> Build:
    """Builds the base, narrow and with random weights that are the same each time, with an adaptation."""
    base = narrow(BASES[request.param])
    monkeypatch.setitem(BASES, base.name, base)
    bare = randomise(build_medsa(base.name, pretrained=False, img_size=SIZE, adaptation="none"))
    torch.save(bare.base_state_dict(), tmp_path / "base.pth")

    def make(**settings: Any) -> MedSA:
        return build_medsa(base.name, sam_checkpoint=str(tmp_path / "base.pth"), img_size=SIZE, **settings).eval()

    return make


def picture(dims: int) -> Tensor:
    shape = (1, 3, SIZE, SIZE) if dims == 2 else (1, 1, SIZE, SIZE, 2)
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def click(dims: int) -> dict[str, Tensor]:
    return {"point_coords": torch.tensor([[[[20.0, 10.0, 1.0][:dims]]]]), "point_labels": torch.ones(1, 1, 1)}


def trained(network: MedSA) -> MedSA:
    """Move all that trains away from where it began."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in sorted(network.trained_names):
            tensor = network.get_parameter(name)
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return network


def assert_close(found: Tensor, expected: Tensor) -> None:
    bound = 1e-4 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=bound, rtol=1e-4)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_fresh_it_is_the_base_and_it_trains_is_saved_loaded_and_clicked(build, adaptation, dims, tmp_path):
    settings = {"adaptation": adaptation, "spatial_dims": dims, "num_classes": 2}
    network, image, prompts = build(**settings, click_feedback=True), picture(dims), click(dims)

    frozen = build(adaptation="none", spatial_dims=dims, num_classes=2)
    with torch.no_grad():
        expected = [frozen(image), frozen(image, **prompts)]
        for found, wanted in zip([network(image), network(image, **prompts)], expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

    trained(network.train())  # fresh, one of two factors has no gradient yet
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    before = {name: tensor.clone() for name, tensor in network.full_state_dict().items()}
    loss = network(image).square().mean() + network(image, **prompts).square().mean()
    loss.backward()
    optimizer.step()
    network.eval()
    moved = {name for name, tensor in network.full_state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= network.trained_names
    assert "class_embeddings" in moved
    assert any(name.startswith("image_encoder.") for name in moved) == (adaptation != "none" or dims == 3)

    torch.save(network.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    again = build(**settings_of(decode_identity(state["identity"])["adapter"]))
    again.load_state_dict(state)
    with torch.no_grad():
        automatic, clicked = network(image), network(image, **prompts)
        assert torch.equal(again(image), automatic)
        assert torch.equal(again(image, **prompts), clicked)
        further = {**prompts, "point_coords": prompts["point_coords"].roll(1, -1)}
        assert (network(image, **further) - clicked).abs().max() > 1e-3


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("adaptation", USUAL)
def test_a_traced_network_gives_the_same_masks(build, adaptation, dims):
    network, image, exported = trained(build(adaptation=adaptation, spatial_dims=dims)), picture(dims), io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that become constants, as they should
        torch.jit.save(torch.jit.trace(network, (image,), check_trace=False), exported)
        exported.seek(0)
        assert_close(torch.jit.load(exported)(image), network(image))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_session_clicks_with_the_mask_before_and_takes_back(build, dims):
    network = trained(build(click_feedback=True, spatial_dims=dims, num_classes=2 if dims == 3 else 1))
    names = ["liver", "spleen"] if dims == 3 else ["lesion"]
    segmenter = NetworkSegmenter(network, None, names, SlabInferer(slab_depth=2) if dims == 3 else None)
    asked: list[Tensor | None] = []
    decode = segmenter.decode

    def listen(image: MetaTensor, index: int, what: Asked, earlier: Tensor | None) -> Tensor:
        asked.append(earlier)
        return decode(image, index, what, earlier)

    segmenter.decode = listen
    session = InteractiveSession(segmenter)
    image = MetaTensor(picture(dims)[0])
    if dims == 3:
        image.meta["original_affine"] = np.eye(4)
    session.open(image)
    automatic = session.mask(0)
    place = (20, 10, 1)[:dims]
    first = session.point(place, label=int(not automatic[place]), class_name=0)
    assert first[place] != automatic[place]
    logits = session.logits(0)
    other = (5, 25, 0)[:dims]
    second = session.point(other, label=int(not first[other]), class_name=0)
    assert second[other] != first[other]
    assert second[place] == first[place]
    heard = [earlier for earlier in asked if earlier is not None]
    assert heard
    assert torch.equal(heard[-1], logits)
    with torch.no_grad():  # and the network hears it
        maps = segmenter._as_earlier(logits)[None]
        prompts = click(dims)
        assert (network(picture(dims), **prompts, masks=maps) - network(picture(dims), **prompts)).abs().max() > 1e-3
    session.undo()
    assert np.array_equal(session.mask(0), first)
    session.undo()
    assert np.array_equal(session.mask(0), automatic)


def backends() -> list[Any]:
    """Each library that computes an encoder; daily those that convert a narrow one in a few seconds."""
    found = []
    for name, packages in BACKENDS.items():
        if name in ("eager", "auto"):
            continue
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        marks = [pytest.mark.skipif(bool(missing), reason=f"{name} needs {', '.join(missing)}")]
        found.append(pytest.param(name, marks=[*marks, pytest.mark.slow] if name in SLOW else marks))
    return found


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("backend", backends())
def test_every_back_end_gives_what_eager_gives(build, backend, dims, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    network = trained(build(spatial_dims=dims))
    image = picture(dims)
    with torch.no_grad():
        expected = network.encode_image(image)
        found = use_backend(network, backend).encode_image(image)
        assert_close(found, expected)
        assert_close(network.decode(found, **click(dims)), network.decode(expected, **click(dims)))
