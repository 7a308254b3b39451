"""Load a base's weights into a network, and tell from weights which base they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from medsa_nets.checksums import state_sha256
from medsa_nets.errors import WeightsError
from medsa_nets.networks import MedSA
from medsa_nets.weights.bases import BASES, Base
from medsa_nets.weights.files import find_base_file
from medsa_nets.weights.formats import read_base_file
from medsa_nets.weights.hub import find_file


def load_base(network: MedSA, base: Base, path: str | Path | None = None) -> str:
    """Load a base's weights into a network, strictly; position tables are interpolated to the network's size.

    Args:
        network: the network, built on the same kind of base.
        base: the base.
        path: its file, a folder of it, or its id on a hub (:func:`~medsa_nets.weights.hub.find_file`); none finds it
            (:func:`~medsa_nets.weights.files.find_base_file`).

    Returns:
        Fingerprint of the weights (:func:`~medsa_nets.checksums.state_sha256`, before interpolation).

    Raises:
        WeightsError: when parameters are missing, left over, or of another shape.
    """
    file = find_file(path) if path else find_base_file(base)
    state = read_base_file(file)
    expected = network.base_state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    resized = {name: _interpolate(name, tensor, expected[name]) for name, tensor in state.items() if name in expected}
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in resized
        if resized[name].shape != expected[name].shape
    ]
    if missing or unexpected or wrong:
        found = guess_base(state)
        raise WeightsError(
            f"{file}: not the weights of the base {base.name!r}: {len(missing)} parameters missing"
            f"{_first(missing)}, {len(unexpected)} unknown{_first(unexpected)}, {len(wrong)} of another shape"
            f"{_first(wrong)}." + (f" The file fits the base {found!r}." if found else "")
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(resized[name])
    return state_sha256(state)


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""


def _interpolate(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Fit a position table to another grid: absolute embedding bicubic, relative tables linear (as SAM does)."""
    if tensor.shape == like.shape:
        return tensor
    if name.endswith("pos_embed") and tensor.dim() == 4 and tensor.shape[3] == like.shape[3]:
        grid = rearrange(tensor.float(), "1 height width channels -> 1 channels height width")
        grid = F.interpolate(grid, size=like.shape[1:3], mode="bicubic", align_corners=False)
        return rearrange(grid, "1 channels height width -> 1 height width channels").to(tensor.dtype)
    if re.search(r"\.rel_pos_[hw]$", name) and tensor.dim() == 2 and tensor.shape[1] == like.shape[1]:
        table = rearrange(tensor.float(), "distances channels -> 1 channels distances")
        table = F.interpolate(table, size=like.shape[0], mode="linear")
        return rearrange(table, "1 channels distances -> distances channels").to(tensor.dtype)
    return tensor


def guess_base(state: Mapping[str, Tensor]) -> str | None:
    """Name of the base whose parameters have these names and widths, or none."""
    shapes = _shapes(state)
    return next((name for name, base in BASES.items() if _shapes(_bare(base).base_state_dict()) == shapes), None)


def _bare(base: Base) -> MedSA:
    """A network on a base, without memory for its weights."""
    with torch.device("meta"):
        encoder = base.encoder(img_size=(base.img_size, base.img_size))
        return MedSA(image_encoder=encoder, prompt_encoder=base.prompt_encoder(), mask_decoder=base.mask_decoder())


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes that do not depend on the input's size."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not re.search("pos_embed|rel_pos", name)}
