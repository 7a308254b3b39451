"""Files of refinements of clicks, and where they lie."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from medsa_nets.checksums import file_sha256
from medsa_nets.interaction.refinement.base import Refinement

SUFFIX = ".clicks.pt"


def place_beside(adapter: str | Path) -> Path:
    """Where the refinement of an adapter lies: ``model.clicks.pt`` beside ``model.pt``."""
    path = Path(adapter).with_suffix("")
    return path.with_name(path.name + SUFFIX)


def beside(adapter: str | Path | None) -> str:
    """Path of the refinement that lies beside an adapter; empty where none does."""
    path = place_beside(adapter) if adapter else None
    return str(path) if path is not None and path.is_file() else ""


def is_refinement(path: str | Path) -> bool:
    """Whether a file is a refinement, by its name or, where it has another, by what it holds; damaged ones too."""
    path = Path(path)
    if path.name.endswith(SUFFIX):
        return True
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch names damaged and missing files in many ways
        return False
    return isinstance(content, dict) and content.keys() == {"form", "state"}


def describe_file(path: str | Path) -> str:
    """What a refinement's file holds: lines on its size, its use, the adapter that it goes with, its checksum.

    Raises:
        WeightsError: when the file is missing, damaged or something else.
    """
    path = Path(path)
    refinement = Refinement.load(path)
    weights = sum(parameter.numel() for parameter in refinement.parameters())
    adapter = path.with_name(path.name.removesuffix(SUFFIX) + ".pt")
    if not path.name.endswith(SUFFIX):
        goes_with = f"no adapter by its name; NAME{SUFFIX} goes with the adapter NAME.pt beside it"
    elif adapter.is_file():
        goes_with = f"the adapter {adapter.name} beside it"
    else:
        goes_with = f"the adapter {adapter.name}, which is not beside it"
    return "\n  ".join(
        [
            f"{path}: a refinement of clicks on {'volumes' if refinement.dims == 3 else 'images'}, {weights:,} weights",
            f"kind: {refinement.kind}",
            f"changes: logits up to {refinement.reach:g} {refinement.unit} from a click; "
            f"sides from a logit of {refinement.certainty:g} on",
            f"of: {'the answers of the network to each click' if refinement.asks else 'the mask before the click'}",
            f"goes with: {goes_with}",
            f"sha256: {file_sha256(path)}",
        ]
    )


@lru_cache(maxsize=8)
def kept(path: str) -> Refinement:
    """A refinement from its file, read once."""
    return Refinement.load(path)
