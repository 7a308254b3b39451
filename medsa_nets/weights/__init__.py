"""Weights: bases and their files, and files of adapters.

``python -m medsa_nets.weights`` lists the bases; ``… fetch NAME`` gets one; ``… check FILE`` says what a file is.
"""

from __future__ import annotations

from pathlib import Path

from medsa_nets.checksums import file_sha256
from medsa_nets.errors import WeightsError
from medsa_nets.weights.adapters import check_adapter, describe_adapter, is_adapter
from medsa_nets.weights.bases import BASES, Base, get_base
from medsa_nets.weights.files import WEIGHTS_DIR_VARIABLE, check_sha256, fetch, find_base_file, weights_dir
from medsa_nets.weights.formats import from_hugging_face, read_base_file, read_state
from medsa_nets.weights.hub import find_file
from medsa_nets.weights.loading import guess_base, load_base

__all__ = [
    "BASES",
    "WEIGHTS_DIR_VARIABLE",
    "Base",
    "check_adapter",
    "check_sha256",
    "describe_adapter",
    "describe_file",
    "fetch",
    "find_base_file",
    "find_file",
    "from_hugging_face",
    "get_base",
    "guess_base",
    "load_base",
    "read_base_file",
    "weights_dir",
]


def describe_file(path: str | Path) -> str:
    """What a file is: an adapter, the published file of a base, or one that fits a base.

    Args:
        path: as :func:`~medsa_nets.weights.hub.find_file` takes it.

    Raises:
        WeightsError: when it is none of these.
    """
    path = find_file(path)
    state = read_state(path, "an adapter or the weights of a base model")
    digest = file_sha256(path)
    if is_adapter(state):
        return "\n  ".join([f"{path}: {describe_adapter(state)[0]}", *describe_adapter(state)[1:], f"sha256: {digest}"])
    for base in BASES.values():
        if digest == base.sha256:
            return f"{path}: the published file of {base.name} (sha256 {digest})"
    fits = guess_base(read_base_file(path))
    if fits is None:
        raise WeightsError(
            f"{path}: no adapter of MedSA, and fits no base; known are {', '.join(BASES)} (sha256 {digest})."
        )
    same_shape = [name for name, base in BASES.items() if base.encoder == BASES[fits].encoder]
    return f"{path}: not a published file known here, but it fits {' or '.join(same_shape)} (sha256 {digest})"
