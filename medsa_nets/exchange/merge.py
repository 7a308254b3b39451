"""An adapter of low rank added to its base: a base of its own, for code that knows no adapters."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from medsa_nets.adaptations import merge_adapter
from medsa_nets.data.atomic import make_folder, temporary_name
from medsa_nets.exchange.folders import from_pretrained, write_folder
from medsa_nets.networks import MedSA

BASE = "base.safetensors"


def write_merged(network: MedSA, folder: str | Path) -> Path:
    """Merge a network's changes of low rank into its base, and write both what came of it and what else trained.

    Args:
        network: with ``adaptation`` ``lora`` or ``adalora``; it is changed in place.
        folder: gets ``base.safetensors``, the merged base under segment-anything's names, and ``adapter/``, the folder
            of what trained beside it, for ``sam_checkpoint=FOLDER/base.safetensors``.

    Returns:
        The folder.

    Raises:
        SettingError: when it has no changes of low rank.
    """
    merged = merge_adapter(network)
    folder = make_folder(folder)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in merged.base_state_dict().items()}
    with temporary_name(folder / BASE) as part:
        save_file(tensors, str(part), metadata={"format": "pt"})
    write_folder(merged.state_dict(), folder / "adapter", name=folder.resolve().name)
    return folder


def merge_folder(source: str | Path, folder: str | Path, sam_checkpoint: str | None = None) -> Path:
    """:func:`write_merged` for an adapter's folder."""
    return write_merged(from_pretrained(source, sam_checkpoint=sam_checkpoint), folder)
