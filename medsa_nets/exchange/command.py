"""Commands on adapters: ``python -m medsa_nets weights convert | merge | to_peft | …``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medsa_nets.commands import command
from medsa_nets.exchange import folders, merge, peft, published
from medsa_nets.networks import MedSA
from medsa_nets.training import save_atomically


def convert(source: str, target: str, licence: str = "apache-2.0", data: str = "") -> None:
    """Turn models/model.pt into a folder with a model card, or a folder into a file.

    Args:
        source: the file or the folder.
        target: the other one.
        licence: of the adapter, for the card, by Hugging Face's identifier.
        data: one sentence for the card on what it was trained on.
    """
    print(folders.convert(source, target, licence=licence, data=data))


def merge_into_base(source: str, folder: str, sam_checkpoint: str | None = None) -> None:
    """Add an adapter of LoRA or AdaLoRA to its base: a base that any code for it reads.

    Args:
        source: the adapter's file or folder.
        folder: gets base.safetensors, and adapter/ with what trained beside it.
        sam_checkpoint: file of the base's weights; without it, they are looked for.
    """
    print(merge.merge_folder(source, folder, sam_checkpoint))


def to_peft(source: str, folder: str, sam_checkpoint: str | None = None) -> None:
    """Write an adapter of LoRA or AdaLoRA as PEFT's files.

    Args:
        source: the adapter's file or folder.
        folder: gets adapter_model.safetensors and adapter_config.json.
        sam_checkpoint: file of the base's weights; without it, they are looked for.
    """
    left = peft.write_peft(folders.from_pretrained(source, sam_checkpoint=sam_checkpoint), folder)
    print(f"{folder}\nnot in PEFT's files: {', '.join(left) or 'nothing'}")


def from_peft(folder: str, target: str, base: str, sam_checkpoint: str | None = None) -> None:
    """Read PEFT's files of LoRA or AdaLoRA into an adapter.

    Args:
        folder: with adapter_model.safetensors and adapter_config.json.
        target: the adapter's file (.pt) or folder.
        base: name of the base that they were trained on.
        sam_checkpoint: file of the base's weights; without it, they are looked for.
    """
    _write(peft.read_peft(folder, base, sam_checkpoint=sam_checkpoint), target)


def import_published(
    source: str,
    target: str,
    base: str | None = None,
    sam_checkpoint: str | None = None,
    image_size: int | None = None,
    intensity_maximum: float = 255.0,
) -> None:
    """Read a checkpoint of the published Medical SAM Adapter code into an adapter.

    Args:
        source: the checkpoint, best_dice_checkpoint.pth.
        target: the adapter's file (.pt) or folder.
        base: name of the base that it was trained on; without it, by the checkpoint's widths.
        sam_checkpoint: file of the base's weights (-sam_ckpt there); without it, they are looked for.
        image_size: side of its images in pixels (-image_size there), where the checkpoint does not say it.
        intensity_maximum: white in training: 255, or 1 before that code's commit ddecab9 of April 2025.
    """
    network, notes = published.read_published(
        source, base, sam_checkpoint=sam_checkpoint, image_size=image_size, intensity_maximum=intensity_maximum
    )
    _write(network, target)
    print("\n".join(f"  {note}" for note in notes))


def _write(network: MedSA, target: str) -> None:
    if Path(target).suffix == ".pt":
        print(save_atomically(network.state_dict(), target))
    else:
        print(folders.save_pretrained(network, target))


def push(folder: str, repository: str, revision: str | None = None, private: bool = True) -> None:
    """Send an adapter's folder to a hub of Hugging Face ($HF_ENDPOINT, $HF_TOKEN).

    Args:
        folder: as convert writes it.
        repository: its id, OWNER/NAME.
        revision: branch.
        private: whether a new repository is private.
    """
    print(folders.push(folder, repository, revision, private))


def pull(repository: str, folder: str | None = None, revision: str | None = None) -> None:
    """Fetch an adapter's folder from a hub of Hugging Face, and check it.

    Args:
        repository: its id, OWNER/NAME.
        folder: where it goes; without it, into the hub's cache.
        revision: branch, tag or commit.
    """
    print(folders.pull(repository, folder, revision))


COMMANDS: dict[str, Callable[..., Any]] = {
    "convert": convert,
    "merge": merge_into_base,
    "to_peft": to_peft,
    "from_peft": from_peft,
    "import": import_published,
    "push": push,
    "pull": pull,
}


def main(arguments: Sequence[str]) -> int:
    """Run a command on an adapter, named first; its exit status."""
    name = arguments[0]
    return command(COMMANDS[name], arguments[1:], name=f"python -m medsa_nets weights {name}")
