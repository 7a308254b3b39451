"""Files of adapters: whether one is whole, and what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsa_nets.errors import WeightsError, describe
from medsa_nets.networks.identity import decode_identity, decode_task


def _adapters_beside(path: Path) -> str:
    """A sentence on the adapters where one was looked for, and on the bundle's overlays that belong to them."""
    names = sorted(
        file.name
        for file in path.parent.glob("*.pt")
        if file.name != "training_state.pt" and not file.name.endswith(".clicks.pt")
    )
    if not names:
        return ""
    overlays: dict[str, str] = {}
    configs = path.parent.parent / "configs"
    for overlay in sorted(configs.glob("*.yaml")):
        text = overlay.read_text(encoding="utf-8")
        task = re.search(r"^task: *(\w+)", text, re.MULTILINE)
        if task and (facts := configs / "tasks" / f"{task.group(1)}.yaml").is_file():
            text += facts.read_text(encoding="utf-8")
        found = re.search(r"^checkpoint_filename: *(\S+)", text, re.MULTILINE)
        if found and overlay.name not in ("train.yaml", "inference.yaml"):
            overlays.setdefault(found.group(1), overlay.name)
    listed = [f"{name} (lay configs/{overlays[name]} over)" if name in overlays else name for name in names]
    return f"Beside it: {', '.join(listed)}. "


def check_adapter(path: str | Path) -> str:
    """Path of an adapter's file, after a look whether it is there and whole.

    Raises:
        WeightsError: when it is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: there is no such adapter. {_adapters_beside(path)}Train one (python -m monai.bundle run training "
            "…), or pass its folder and name (--ckpt_dir, --checkpoint_filename)."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise errors of their own
        raise WeightsError(
            f"{path}: not readable as an adapter ({describe(error)}). Restore the file, or train it again."
        ) from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, expected an adapter's state dictionary.")
    return str(path)


def is_adapter(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dictionary is that of an adapter of this package."""
    return "identity" in state


def describe_adapter(state: Mapping[str, Tensor]) -> list[str]:
    """Lines on an adapter: its base, what it was made with, what its masks mean, its size.

    Raises:
        WeightsError: when its entries ``identity`` or ``task`` are damaged.
    """
    identity = decode_identity(state["identity"])
    task = decode_task(state["task"]) if "task" in state else {}
    parameters = sum(tensor.numel() for name, tensor in state.items() if name not in ("identity", "task"))
    settings = {"spatial_dims": 2, **identity["adapter"]}
    lines = [
        f"an adapter of the base {identity['base']}, {parameters / 1e6:.2f} M parameters",
        f"base sha256: {identity['sha256']}",
        f"made with: {_listed(settings)}",
    ]
    return lines + [f"{name}: {_text(fact)}" for name, fact in task.items()]


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(fact)}" for name, fact in facts.items() if fact is not None)


def _text(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return _listed(fact)
    if isinstance(fact, (list, tuple)):
        return ", ".join(_text(one) for one in fact) if all(isinstance(one, str) for one in fact) else str(list(fact))
    return str(fact)
