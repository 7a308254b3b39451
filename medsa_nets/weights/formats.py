"""Formats of weights: what a file holds, under segment-anything's parameter names. No other module knows them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsa_nets.errors import WeightsError, describe


def read_state(path: str | Path, expected: str) -> dict[str, Tensor]:
    """Read a state dictionary of tensors, as such or under ``model`` or ``state_dict``. Nothing in it is executed.

    Args:
        path: a file of PyTorch or safetensors.
        expected: what the file should hold, for errors.

    Raises:
        WeightsError: when the file is missing, unreadable or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file. Expected {expected}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile, pickle and safetensors each raise errors of their own
        raise WeightsError(
            f"{path}: not readable as weights ({describe(error)}). Expected a "
            "PyTorch state dictionary or a safetensors file; fetch it again."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise WeightsError(f"{path}: no state dictionary of tensors. Expected {expected}.")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def read_base_file(path: str | Path) -> dict[str, Tensor]:
    """Read a base model's file into segment-anything's parameter names.

    Args:
        path: a file of segment-anything, MedSAM, MobileSAM, LiteMedSAM, EfficientSAM, EfficientViT-SAM or SAM 2, or of
            Hugging Face ``SamModel`` (``model.safetensors`` or ``pytorch_model.bin``). Nothing in it is executed.

    Returns:
        State dictionary with keys ``image_encoder.…``, ``prompt_encoder.…``, ``mask_decoder.…``.

    Raises:
        WeightsError: when the file is missing, unreadable or of another kind of model.
    """
    state = read_state(path, "the weights of a base model (sam_checkpoint)")
    if any(name.startswith("vision_encoder.") for name in state):
        state = from_hugging_face(state)
    elif any(name.startswith("sam_mask_decoder.") for name in state):
        state = from_sam2(state)
    elif "prompt_encoder.invalid_points.weight" in state:
        state = from_efficient_sam(state)
    elif any(name.startswith("image_encoder.backbone.stages.0.op_list.") for name in state):
        state = from_efficient_vit(state)
    # MobileSAM's file carries the classifier that its encoder was distilled with; segmentation does not use it.
    unused = ("image_encoder.head.", "image_encoder.norm_head.", "pixel_mean", "pixel_std")
    return {name: tensor for name, tensor in state.items() if not name.startswith(unused)}


_HUGGING_FACE_NAMES = (
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.layers\.0\.", r"\1.layers.1."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.proj_in\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.proj_out\.", r"\1.layers.2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
)

_MLPS = r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))"
_EFFICIENT_SAM_NAMES = (
    (r"^(image_encoder\.blocks\.\d+\.mlp)\.fc(\d)\.", r"\1.lin\2."),
    (r"^(mask_decoder\.transformer\.layers\.\d\.mlp)\.layers\.0\.0\.", r"\1.lin1."),
    (r"^(mask_decoder\.transformer\.layers\.\d\.mlp)\.fc\.", r"\1.lin2."),
    (rf"^{_MLPS}\.layers\.(\d)\.0\.", r"\1.layers.\2."),
    (rf"^{_MLPS}\.fc\.", r"\1.layers.2."),
    (r"^mask_decoder\.final_output_upscaling_layers\.0\.([01])\.", r"mask_decoder.output_upscaling.\1."),
    (r"^mask_decoder\.final_output_upscaling_layers\.1\.0\.", "mask_decoder.output_upscaling.3."),
)


def from_efficient_sam(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of EfficientSAM to segment-anything's, where there is one; its position table loses the class token."""
    out = {}
    for name, tensor in state.items():
        for pattern, replacement in _EFFICIENT_SAM_NAMES:
            name = re.sub(pattern, replacement, name)
        if name == "image_encoder.pos_embed" and tensor.dim() == 3:
            side = math.isqrt(tensor.shape[1] - 1)
            if side**2 == tensor.shape[1] - 1:  # else the loader names its shape
                tensor = tensor[:, 1:].reshape(1, side, side, -1)
        out[name] = tensor
    return out


_EFFICIENT_VIT_NAMES = (
    (r"^(image_encoder)\.backbone\.stages\.0\.op_list\.0\.", r"\1.stages.0.0.conv."),
    (r"^(image_encoder)\.backbone\.stages\.(\d)\.op_list\.(\d+)\.", r"\1.stages.\2.\3."),
    (r"^(image_encoder)\.neck\.input_ops\.(\d)\.op_list\.0\.", r"\1.inputs.\2."),
    (r"^(image_encoder)\.neck\.middle\.op_list\.(\d+)\.", r"\1.middle.\2."),
    (r"^(image_encoder)\.neck\.output_ops\.0\.op_list\.0\.", r"\1.output."),
    (r"\.context_module\.main\.", ".attn."),
    (r"\.local_module\.main\.inverted_conv\.", ".mlp.lin1."),
    (r"\.local_module\.main\.", ".mlp."),
    (r"^(image_encoder\.(?:stages\.\d|middle)\.\d+)\.main\.", r"\1."),
)


def from_efficient_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of EfficientViT-SAM to this package's; pointwise convolutions of its attention blocks to linear layers."""
    out = {}
    for name, tensor in state.items():
        normed = re.sub(r"\.conv\.(weight|bias)$", ".norm.weight", name) in state
        for pattern, replacement in _EFFICIENT_VIT_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.startswith("image_encoder."):
            name = re.sub(r"\.conv\.(weight|bias)$", r".c.\1" if normed else r".\1", name)
            name = re.sub(r"(\.\w+)\.norm\.", r"\1.bn.", name)
            if re.search(r"\.(attn\.qkv|mlp\.lin1)\.weight$", name) and tensor.dim() == 4:
                tensor = tensor.flatten(1)
        out[name] = tensor
    return out


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of Hugging Face ``SamModel`` to segment-anything's."""
    out = {}
    for name, tensor in state.items():
        if name == "prompt_encoder.shared_embedding.positional_embedding":
            continue  # the same matrix as shared_image_embedding's
        for pattern, replacement in _HUGGING_FACE_NAMES:
            changed = re.sub(pattern, replacement, name)
            if changed != name:
                name = changed
                break
        out[re.sub(r"\.layer_norm(\d)\.", r".norm\1.", name)] = tensor
    return out


# of SAM 2's files: what joins the frames of a video
_VIDEO = (
    "memory_attention.",
    "memory_encoder.",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_embed_spatial",
    "no_obj_ptr",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
    "mask_downsample.",
)
_SAM2_NAMES = (
    (r"^sam_mask_decoder\.(conv_s[01])\.", r"image_encoder.\1."),  # what an image needs once
    (r"^no_mem_embed$", "image_encoder.no_mem_embed"),
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
)


def from_sam2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of SAM 2 to this package's, without what only videos need (memory, object pointers)."""
    out = {}
    for name, tensor in state.items():
        if name.startswith(_VIDEO):
            continue
        for pattern, replacement in _SAM2_NAMES:
            name, changed = re.subn(pattern, replacement, name)
            if changed:
                break
        name = re.sub(r"\.mlp\.layers\.0\.", ".mlp.lin1.", name)
        out[re.sub(r"\.mlp\.layers\.1\.", ".mlp.lin2.", name)] = tensor
    return out
