"""Checkpoints of the published code of Medical SAM Adapter: read into adapters that give the same masks here.

The file is that code's whole network, ``state_dict`` among what its training keeps. What it froze is compared with the
base, value by value; what it trained becomes the adapter. How that code differs from the paper is kept
(:mod:`medsa_nets.layers.published`), so that the logits are the same.

Source: github.com/SuperMedIntel/Medical-SAM-Adapter, commit 0add836.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsa_nets.build import build_medsa
from medsa_nets.errors import WeightsError, describe
from medsa_nets.networks import MedSA
from medsa_nets.weights import BASES
from medsa_nets.weights.formats import from_efficient_sam

WINDOW = 14  # tokens along a window's side in a ViT
_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_EFFICIENT_WIDTHS = {192: "efficient_sam_vitt", 384: "efficient_sam_vits"}
ROUNDING = 1e-5  # what that code adds to AdaLoRA's rank
_ADAPTER = re.compile(r"\.(Space|MLP|Depth)_Adapter\.")
_NAMES = (
    (".Space_Adapter.D_fc1.", ".attn_adapter.down."),
    (".Space_Adapter.D_fc2.", ".attn_adapter.up."),
    (".MLP_Adapter.D_fc1.", ".mlp_adapter.down."),
    (".MLP_Adapter.D_fc2.", ".mlp_adapter.up."),
    (".mlp.layers.0.0.", ".mlp.lin1."),
    (".mlp.fc.", ".mlp.lin2."),
    (".lora_A", ".lora.A"),
    (".lora_B", ".lora.B"),
    (".lora_E", ".lora.E"),
)
# never used there (a classifier's head), or without meaning in inference
_UNUSED = ("image_encoder.head.", "image_encoder.norm_head.", "pixel_mean", "pixel_std")


@dataclass(frozen=True)
class Published:
    """A checkpoint of the published code.

    Attributes:
        path: its file.
        state: parameters under that code's names.
        adaptation: which of :data:`medsa_nets.adaptations.PUBLISHED` it is.
        rank: of its changes of low rank; 0 of adapters.
        image_size: side of its images in pixels, where the file says it.
        volumes: whether its depth adapters trained (``-thd True``); none where the file does not say it.
    """

    path: Path
    state: Mapping[str, Tensor]
    adaptation: str
    rank: int
    image_size: int | None
    volumes: bool | None

    @property
    def mobile(self) -> bool:
        """Whether its encoder is a TinyViT."""
        return "mobile" in self.adaptation

    @property
    def efficient(self) -> bool:
        """Whether its base is EfficientSAM."""
        return "efficient" in self.adaptation


def read_checkpoint(path: str | Path) -> Published:
    """Read a checkpoint. Nothing in it is executed.

    Args:
        path: as that code saves it (``best_dice_checkpoint.pth``), or its ``state_dict`` alone.

    Raises:
        WeightsError: when the file is missing, damaged or another one, or of a training that can't be read.
    """
    path = Path(path)
    content = _load(path)
    found = content.get("state_dict", content)
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items())
    ):
        raise WeightsError(
            f"{path}: holds no state_dict of tensors. Expected a checkpoint of the published Medical SAM Adapter code "
            "(best_dice_checkpoint.pth)."
        )
    state = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    adaptation = _adaptation(path, state)
    rank = next((tensor.shape[1] for name, tensor in state.items() if name.endswith(".lora_B")), 0)
    return Published(path, state, adaptation, rank, _image_size(state), _trained_on_volumes(state, content))


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise WeightsError(
            f"{path}: there is no such file. Expected a checkpoint of the published Medical SAM Adapter code "
            "(best_dice_checkpoint.pth)."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise errors of their own
        if kind := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise WeightsError(
                f"{path}: holds an object beside its tensors ({kind[1]}), and reading it could run code. Where you "
                "trust the file, keep its tensors alone: python -c \"import torch; torch.save(torch.load('FILE', "
                "map_location='cpu', weights_only=False)['state_dict'], 'NEW.pth')\", then import NEW.pth."
            ) from error
        raise WeightsError(
            f"{path}: not readable as a checkpoint ({describe(error)}). The file is damaged or no file of PyTorch; "
            "copy it again from where it was trained."
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected a checkpoint with a state_dict.")
    return content


def _adaptation(path: Path, state: Mapping[str, Tensor]) -> str:
    """Which of the published adaptations a state dictionary is of."""

    def has(part: str) -> bool:
        return any(part in name for name in state)

    efficient = "prompt_encoder.invalid_points.weight" in state
    vit, tiny_vit = "image_encoder.pos_embed" in state, has("image_encoder.layers.")
    of_sam, of_mobile_sam = (
        has("mask_decoder.transformer.layers.0.mlp.fc."),
        has("mask_decoder.transformer.layers.0.mlp.lin1."),
    )
    adapters, lora = has(".Space_Adapter."), has(".lora_A")
    if "identity" in state:
        raise WeightsError(f"{path}: is an adapter of MedSA already; there is nothing to import.")
    if (adapters or lora) and not has("mask_decoder."):
        raise WeightsError(
            f"{path}: holds what trained in the encoder alone. The mask decoder of that code trains too; expected its "
            "whole checkpoint (best_dice_checkpoint.pth)."
        )
    if has("image_encoder.backbone."):
        raise WeightsError(
            f"{path}: is of -encoder efficientvit_l2, which can't be imported: that code puts no adapters into this "
            "encoder, sees every image at 512 x 512, and shrinks the embedding to a sixteenth of the image's size, "
            "which is not computed here. Train on the base efficientvit_sam_l2 anew."
        )
    if vit == tiny_vit or of_sam == of_mobile_sam or not (adapters or lora):
        raise WeightsError(
            f"{path}: no checkpoint with adapters or LoRA of the published Medical SAM Adapter code (first name: "
            f"{next(iter(state))}). Expected one of -net sam, -net efficient_sam, or -net mobile_sam -encoder "
            "tiny_vit, with -mod sam_adpt, sam_lora or sam_adalora."
        )
    if vit != of_sam:
        raise WeightsError(
            f"{path}: joins {'a ViT' if vit else 'a TinyViT'} with the decoder of -net "
            f"{'sam' if of_sam else 'mobile_sam'}, which can't be imported. Expected -net sam, or -net mobile_sam "
            "-encoder tiny_vit."
        )
    net = "efficient_" if efficient else "" if vit else "mobile_"
    return f"published_{net}{'adapters' if adapters else 'adalora' if has('.lora_E') else 'lora'}"


def _image_size(state: Mapping[str, Tensor]) -> int | None:
    """Side of the images, by the tables of global attention that ``sam_adpt`` makes for their size."""
    if not any(_ADAPTER.search(name) for name in state):
        return None  # sam_lora makes them for 1024, whatever the size
    rows = {tensor.shape[0] for name, tensor in state.items() if name.endswith(".attn.rel_h")}
    if not rows:
        return None
    return 16 * ((max(rows - {2 * WINDOW - 1}, default=2 * WINDOW - 1) + 1) // 2)


def _trained_on_volumes(state: Mapping[str, Tensor], content: Mapping[str, Any]) -> bool | None:
    """Whether the optimizer moved a depth adapter: images leave them as they began."""
    optimizer = content.get("optimizer")
    if not isinstance(optimizer, Mapping) or not any(".Depth_Adapter." in name for name in state):
        return None
    buffers = ("running_mean", "running_var", "num_batches_tracked", "positional_encoding_gaussian_matrix")
    names = [name for name in state if not name.endswith(buffers)]
    groups, moved = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or not isinstance(moved, Mapping) or not moved:
        return None
    numbers = [number for group in groups for number in group["params"]]
    if len(numbers) != len(names):
        return None
    return any(".Depth_Adapter." in name for number, name in zip(numbers, names) if number in moved)


def read_published(
    path: str | Path,
    base: str | None = None,
    *,
    sam_checkpoint: str | None = None,
    image_size: int | None = None,
    intensity_maximum: float = 255.0,
) -> tuple[MedSA, list[str]]:
    """Build the network of a checkpoint of the published code: with the same logits, for images.

    Args:
        path: the checkpoint.
        base: name of the base that it was trained on; none takes what its widths say.
        sam_checkpoint: file of the base's weights; none looks for it.
        image_size: side of its images in pixels (``-image_size``); none takes what the file says, which is nothing for
            LoRA and TinyViT.
        intensity_maximum: what white was in training: 255, or 1 before that code's commit ddecab9 (April 2025).

    Returns:
        The network, and lines on what was read and what is to be known about it.

    Raises:
        WeightsError: when the file can't be read, belongs to another base, or says too little.
    """
    read = read_checkpoint(path)
    if read.volumes:
        raise WeightsError(
            f"{path}: was trained on volumes (-thd True): its depth adapters moved. In blocks with windows, that code "
            "attends along the list of all windows of all slices, -chunk at a time, so that tokens of different places "
            "of one slice count as depth; what is computed here is depth at one place. Checkpoints of images can be "
            "imported."
        )
    size = _choose_size(read, image_size)
    name = base or _guess_base(read)
    if name not in BASES:
        raise WeightsError(f"There is no base {name!r}; choose one of {', '.join(BASES)}.")
    network = build_medsa(
        name,
        sam_checkpoint=sam_checkpoint,
        img_size=size,
        adaptation=read.adaptation,
        lora_rank=max(1, read.rank),
        task={"intensity": _intensity(intensity_maximum, read.efficient)},
    )
    state = _translate(read, network, size)
    _check_names(read, state, network, name)
    own = network.full_state_dict()
    changed = [key for key in state if key not in network.trained_names and not _same(key, state[key], own[key])]
    if changed:
        raise WeightsError(
            f"{path}: belongs to another base than these weights of {name!r}: {len(changed)} of its frozen tensors "
            f"differ (first: {changed[0]}). Pass the file that it was trained on (-sam_ckpt there) as --sam_checkpoint."
        )
    with torch.no_grad():
        for key in network.trained_names & state.keys():
            own[key].copy_(state[key])
    return network, _notes(read, name, size, intensity_maximum)


def _choose_size(read: Published, asked: int | None) -> int:
    if asked is None and read.image_size is None:
        raise WeightsError(
            f"{read.path}: does not say the size of its images. Pass what it was trained with (-image_size there, 256 "
            "unless given) as --image_size."
        )
    if asked is not None and read.image_size not in (None, asked):
        raise WeightsError(f"{read.path}: was trained at --image_size {read.image_size}, got {asked}.")
    size = asked or read.image_size or 0
    if size < 16 or size % 16:
        raise WeightsError(f"--image_size must be a multiple of 16, got {size}.")
    return size


def _guess_base(read: Published) -> str:
    if read.mobile:
        return "mobile_sam"
    width, known = read.state["image_encoder.pos_embed"].shape[-1], _EFFICIENT_WIDTHS if read.efficient else _WIDTHS
    if width not in known:
        raise WeightsError(f"{read.path}: its encoder has tokens of width {width}, that of no base; pass --base.")
    return known[width]


def _intensity(maximum: float, efficient: bool) -> dict[str, Any]:
    """What photographs become before the network, as a task names it (MONAI's ``ScaleIntensityRange``).

    EfficientSAM's statistics are those of intensities in [0, 1], which that code applies to those in [0, maximum].
    """
    if maximum not in (1.0, 255.0):
        raise WeightsError(f"--intensity_maximum must be 255, or 1 for older checkpoints, got {maximum}.")
    return {
        "transform": "ScaleIntensityRange", "a_min": 0.0, "a_max": 255.0, "b_min": 0.0,
        "b_max": maximum if efficient else maximum / 255.0,
        "clip": True,
    }  # fmt: skip


def _translate(read: Published, network: MedSA, size: int) -> dict[str, Tensor]:
    """The state under our names and in our shapes, without what has no counterpart."""
    state: dict[str, Tensor] = {}
    own = network.full_state_dict()
    unused_adapters = tuple(f"image_encoder.{name}.attn_adapter.up." for name in _whole_maps(read, size))
    for name, tensor in (from_efficient_sam(read.state) if read.efficient else read.state).items():
        if name.startswith(_UNUSED) or name.endswith((".num_batches_tracked", ".ranknum")) or ".Depth_Adapter." in name:
            continue
        if name.endswith(".lora_E"):
            tensor = tensor / (read.state[name.replace(".lora_E", ".ranknum")] + ROUNDING)
        if name.endswith((".attn.rel_h", ".attn.rel_w")):
            if tensor.any():
                raise WeightsError(
                    f"{read.path}: {name} is not zero, as it is where adapters or LoRA train alone. Checkpoints of "
                    "other trainings (-mod sam) can't be imported."
                )
            continue
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        if name.endswith((".lora.A", ".lora.B", ".lora.E")) and name in own and tensor.numel() == own[name].numel():
            tensor = tensor.reshape(own[name].shape)  # parts lie one after the other
        state[name] = torch.zeros_like(tensor) if name.startswith(unused_adapters) else tensor
    return state


def _whole_maps(read: Published, size: int) -> Iterable[str]:
    """Blocks of a TinyViT whose map is one window: that code leaves out their first adapter."""
    if read.mobile and not read.rank:
        for stage, side, window in ((1, size // 8, 7), (2, size // 16, 14), (3, size // 16, 7)):
            if side == window:
                yield from (f"layers.{stage}.blocks.{block}" for block in range(len(read.state)))


def _check_names(read: Published, state: Mapping[str, Tensor], network: MedSA, base: str) -> None:
    own = network.full_state_dict()
    absent = ("class_embeddings", "identity", "task")
    needed = {
        name
        for name in own
        if name not in absent and not name.endswith((".rel_pos_h", ".rel_pos_w", ".num_batches_tracked"))
    }
    missing, unknown = sorted(needed - state.keys()), sorted(state.keys() - needed)
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(needed & state.keys())
        if state[name].shape != own[name].shape and not name.endswith("pos_embed")
    ]
    if missing or unknown or wrong:
        listed = [
            f"{len(names)} {kind} (first: {names[0]})"
            for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
            if names
        ]
        raise WeightsError(
            f"{read.path}: its parameters are not those of that code on the base {base!r}: {', '.join(listed)}. Pass "
            "the base that it was trained on as --base."
        )


def _same(name: str, theirs: Tensor, ours: Tensor) -> bool:
    if theirs.shape != ours.shape:  # that code interpolates it at each pass, we do once
        grid = theirs.float().permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=ours.shape[1:3], mode="bicubic", align_corners=False)
        theirs = grid.permute(0, 2, 3, 1)
        return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=0, atol=1e-6)
    return torch.equal(theirs, ours.to(theirs.dtype))


def _notes(read: Published, base: str, size: int, maximum: float) -> list[str]:
    """What the user of an imported checkpoint should know."""
    low_rank = f"{'AdaLoRA' if read.adaptation.endswith('adalora') else 'LoRA'} of rank {read.rank}, alpha 1"
    what = low_rank if read.rank else "bottleneck adapters with GELU"
    notes = [f"read: {what} in the encoder, the whole mask decoder; base {base}, images of {size} x {size} pixels"]
    if read.mobile:
        notes.append("kept: batch normalisation has the statistics of its training data")
        if not read.rank:
            notes.append("kept: the adapter beside an MLP sees tokens before the norm")
        elif read.adaptation.endswith("_lora"):
            notes.append("kept: in the attention, the first and the last third of the fused layer change")
    elif read.efficient:
        notes.append("kept: the encoder's MLPs have weights of their own (that code does not load EfficientSAM's)")
        notes.append("kept: points lie where an image of 1024 x 1024 would have them, whatever the size")
    else:
        notes.append("kept: SAM's relative-position tables are zero (that code does not load them)")
        notes.append("kept: self-attention in the decoder reads prompt embeddings as values, and adds them")
        if not read.rank:
            notes.append("kept: tokens that pad a window are normalised with the others")
    notes.append(f"kept: photographs were between 0 and {maximum:g} there; here the task says how they become so")
    notes.append("not kept: sizes other than this; a further mask (-multimask_output): the first one is given")
    if read.volumes is None and not read.mobile and not read.rank:
        notes.append(
            "unknown: the file does not say whether it was trained on volumes (-thd): its depth adapters are left"
        )
    notes.append(
        "it learned from one click on an image: automatic masks, boxes and further clicks are not what it knows"
    )
    return notes
