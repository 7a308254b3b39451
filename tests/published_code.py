"""Networks of the published code of Medical SAM Adapter, from a checkout of it: the reference of what is imported.

Its folder is named by ``$MEDSA_PUBLISHED_CODE`` (github.com/SuperMedIntel/Medical-SAM-Adapter, commit 0add836; nothing
of it is part of this repository). Only the files of its networks are imported; stand-ins take the place of packages
that they name and do not compute with.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIABLE = "MEDSA_PUBLISHED_CODE"
SAM_PIXELS = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
VIT_B = {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11)}
TINY_VIT = {"embed_dims": [64, 128, 160, 320], "depths": [2, 2, 6, 2], "num_heads": [2, 4, 5, 10]}
_PACKAGES = {
    "models": "models",
    "models.sam": "models/sam",
    "models.efficient_sam": "models/efficient_sam",
    "models.MobileSAMv2": "models/MobileSAMv2",
    "models.MobileSAMv2.mobilesamv2": "models/MobileSAMv2/mobilesamv2",
}  # whose own __init__ imports more than the networks


def folder() -> Path | None:
    """The checkout, or none where there is none."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named and (Path(named) / "models" / "sam").is_dir() else None


def _stand_ins(code: Path) -> dict[str, types.ModuleType]:
    found: dict[str, types.ModuleType] = {}
    for name, place in _PACKAGES.items():
        found[name] = types.ModuleType(name)
        found[name].__path__ = [str(code / place)]
    drop_path = type("DropPath", (nn.Identity,), {})
    names: dict[str, dict[str, Any]] = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {
            "DropPath": drop_path,
            "to_2tuple": lambda side: (side, side),
            "trunc_normal_": nn.init.trunc_normal_,
        },
        "timm.models.registry": {"register_model": lambda function: function},
    }
    for name, members in names.items():
        found[name] = types.ModuleType(name)
        vars(found[name]).update(members)
    return found


def _import(code: Path, names: list[str]) -> list[types.ModuleType]:
    def of_it(name: str) -> bool:
        return name.split(".")[0] in ("models", "timm")

    kept = {name: module for name, module in sys.modules.items() if of_it(name)}
    for name in kept:
        del sys.modules[name]
    sys.modules.update(_stand_ins(code))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        for name in [name for name in sys.modules if of_it(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def build(
    code: Path, net: str, mod: str, image_size: int, encoder: dict[str, Any] | None = None, rank: int | None = None
) -> nn.Module:
    """That code's network, as its ``get_network`` makes it, without weights.

    Args:
        code: its folder.
        net: ``sam`` (a ViT), ``mobile_sam`` (a TinyViT) or ``efficient_sam``.
        mod: ``sam_adpt``, ``sam_lora`` or ``sam_adalora``.
        image_size: side of its images.
        encoder: widths and depths of the encoder; none takes those of ViT-B, MobileSAM, or EfficientSAM's ViT-T.
        rank: of LoRA; none takes that code's, 4.
    """
    if net == "efficient_sam":
        (module,) = _import(code, ["models.efficient_sam.efficient_sam"])
        args = types.SimpleNamespace(mod=mod, mid_dim=rank, thd=False, chunk=None, image_size=image_size)
        widths = encoder or {"embed_dim": 192, "num_heads": 3, "depth": 12}
        found: nn.Module = module.build_efficient_sam(args, widths["embed_dim"], widths["num_heads"])
        found.image_encoder.blocks = found.image_encoder.blocks[: widths["depth"]]
        return found.eval()
    place = "models.sam" if net == "sam" else "models.MobileSAMv2.mobilesamv2"
    modeling, common, encoders = _import(code, [f"{place}.modeling", "models.common", "models.ImageEncoder"])
    args = types.SimpleNamespace(mod=mod, mid_dim=rank, thd=False, chunk=None, image_size=image_size)
    grid = (image_size // 16, image_size // 16)
    if net == "sam":
        norm = partial(nn.LayerNorm, eps=1e-6)
        image_encoder = modeling.ImageEncoderViT(args=args, img_size=image_size, patch_size=16, mlp_ratio=4,
                                                 norm_layer=norm, qkv_bias=True, use_rel_pos=True, window_size=14,
                                                 out_chans=256, **(encoder or VIT_B))  # fmt: skip
        transformer, masks, own = common.TwoWayTransformer, 1, {"args": args}
    else:
        image_encoder = encoders.TinyViT(args=args, img_size=image_size, num_classes=1000, window_sizes=[7, 7, 14, 7],
                                         drop_path_rate=0.0, **(encoder or TINY_VIT))  # fmt: skip
        transformer, masks, own = modeling.TwoWayTransformer, 3, {}
    network: nn.Module = modeling.Sam(
        **own,
        image_encoder=image_encoder,
        prompt_encoder=modeling.PromptEncoder(embed_dim=256, image_embedding_size=grid, mask_in_chans=16,
                                              input_image_size=(image_size, image_size)),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=masks, transformer_dim=256, iou_head_depth=3, iou_head_hidden_dim=256,
            transformer=transformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)),
        pixel_mean=SAM_PIXELS[0],
        pixel_std=SAM_PIXELS[1],
    )  # fmt: skip
    return network.eval()


@torch.no_grad()
def segment(network: Any, photograph: Tensor, coords: Tensor, labels: Tensor) -> Tensor:
    """Logits (1, 1, H, W) as that code's validation computes them.

    Args:
        network: of :func:`build`.
        photograph: intensities in [0, 1] (1, 3, H, W); its data sets multiply by 255.
        coords: clicks (1, P, 2), (x, y) in pixels.
        labels: (1, P).
    """
    embedding = network.image_encoder(network.preprocess(255 * photograph))
    if hasattr(network, "decoder_max_num_input_points"):  # EfficientSAM: one click, as at 1024 x 1024; places for six
        points = F.pad(1024 / photograph.shape[2] * coords, (0, 0, 0, 6 - coords.shape[1]), value=-1.0)
        kinds = F.pad(labels, (0, 6 - labels.shape[1]), value=-1.0)
        sparse = network.prompt_encoder(coords=points, labels=kinds).unsqueeze(1)
        logits, _ = network.mask_decoder(embedding, network.prompt_encoder.get_dense_pe(), sparse, False)
        return F.interpolate(logits, size=photograph.shape[2:], mode="bilinear", align_corners=False)
    sparse, dense = network.prompt_encoder(points=(coords, labels), boxes=None, masks=None)
    logits, _ = network.mask_decoder(
        image_embeddings=embedding,
        image_pe=network.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return F.interpolate(logits, size=photograph.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def as_trained(network: nn.Module, base: dict[str, Tensor], seed: int = 0) -> dict[str, Any]:
    """A checkpoint as that code's training leaves it: a base's weights where it loads them, random ones elsewhere.

    Args:
        network: of :func:`build`; it is given these weights too.
        base: the base's state dictionary, under segment-anything's names.
        seed: of what trained.
    """
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    for name, tensor in state.items():
        trained = "_Adapter." in name or ".lora_" in name or name.startswith("mask_decoder.")
        if name.endswith(("attn.rel_h", "attn.rel_w")):
            tensor.zero_()
        elif name.endswith(("running_mean", "running_var")):  # a training moves them
            tensor.copy_(base[name] * (1.0 + 0.1 * torch.rand(tensor.shape, generator=generator)))
        elif name in base and not trained:
            tensor.copy_(base[name])
        elif tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.dim() > 1 and tensor.shape[0] > 1 else tensor.shape[-1]
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(".ranknum"):
                continue
            if ".lora_" in name:
                tensor.copy_(noise * (fan_in**-0.5 if name.endswith("A") else 0.5))
            elif tensor.dim() > 1:  # logits of the size that a training gives
                tensor.copy_(noise * fan_in**-0.5 * (3.0 if "hypernetworks" in name else 1.0))
            else:
                tensor.copy_(0.2 * noise + (1.0 if ".norm" in name and name.endswith("weight") else 0.0))
    network.load_state_dict(state)
    network.eval()  # TinyViT lays its attention's biases down when it changes its mode
    return {
        "epoch": 6, "model": "sam", "state_dict": {name: tensor.clone() for name, tensor in state.items()},
        "optimizer": {"state": {}, "param_groups": []}, "best_tol": 0.0,
        "path_helper": {"prefix": "logs/x", "ckpt_path": "logs/x/Model", "log_path": "logs/x/Log"},
    }  # fmt: skip
