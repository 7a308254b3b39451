"""SAM 2's own networks, from a checkout of its code: the reference of the bases that come from it.

Its folder is named by ``$MEDSA_SAM2_CODE`` (github.com/facebookresearch/sam2, commit 2b90b9f; nothing of it is part of
this repository). Only the files of its networks are imported; stand-ins take the place of packages that they name and
do not compute with, and its configurations are read here.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

VARIABLE = "MEDSA_SAM2_CODE"
CONFIGS = {"sam2_hiera_t": "sam2.1_hiera_t.yaml", "sam2_hiera_s": "sam2.1_hiera_s.yaml"}


def folder() -> Path | None:
    """The checkout, or none where there is none."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named and (Path(named) / "sam2" / "modeling").is_dir() else None


def _stand_ins(code: Path) -> dict[str, types.ModuleType]:
    found = {name: types.ModuleType(name) for name in ("sam2", "iopath", "iopath.common", "iopath.common.file_io")}
    found["sam2"].__path__ = [str(code / "sam2")]  # its own __init__ starts hydra
    vars(found["iopath.common.file_io"])["g_pathmgr"] = None
    return found


class Code:
    """Imports the networks as long as a block of ``with`` runs."""

    def __init__(self, code: Path) -> None:
        self.code = code

    def __enter__(self) -> None:
        self.kept = {name: sys.modules.pop(name) for name in list(sys.modules) if self._is_of_it(name)}
        sys.modules.update(_stand_ins(self.code))

    def __exit__(self, *_: object) -> None:
        for name in [name for name in sys.modules if self._is_of_it(name)]:
            del sys.modules[name]
        sys.modules.update(self.kept)

    @staticmethod
    def _is_of_it(name: str) -> bool:
        return name.split(".")[0] in ("sam2", "iopath")


def _make(settings: Any) -> Any:
    """What a configuration describes, as hydra makes it."""
    if isinstance(settings, list):
        return [_make(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    made = {name: _make(value) for name, value in settings.items() if name != "_target_"}
    if "_target_" not in settings:
        return made
    module, name = settings["_target_"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**made)


def build(code: Path, base: str, image_size: int = 1024, **trunk: Any) -> Any:
    """That code's network of a base, without weights; with the memory of videos too.

    Args:
        code: its folder.
        base: a key of :data:`CONFIGS`.
        image_size: side of its images.
        trunk: widths and depths of the trunk in place of the configuration's.
    """
    text = (code / "sam2" / "configs" / "sam2.1" / CONFIGS[base]).read_text(encoding="utf-8")
    settings = yaml.safe_load(text)["model"]
    settings["memory_encoder"]["fuser"]["layer"]["layer_scale_init_value"] = 1e-6  # a text to this reader of YAML
    settings["image_size"] = image_size
    settings["image_encoder"]["trunk"].update(trunk)
    width = settings["image_encoder"]["trunk"]["embed_dim"]
    settings["image_encoder"]["neck"]["backbone_channel_list"] = [8 * width, 4 * width, 2 * width, width]
    with Code(code):
        return _make(settings).eval()


@torch.no_grad()
def encode(network: Any, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Embedding and finer maps of normalised images (B, 3, H, W), as that code's predictor of images keeps them."""
    features = network.forward_image(image)["backbone_fpn"]
    return features[-1] + network.no_mem_embed.reshape(1, -1, 1, 1), features[:-1]


@torch.no_grad()
def decode(
    network: Any,
    encoded: tuple[Tensor, list[Tensor]],
    points: tuple[Tensor, Tensor] | None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (N, 1, 4 h, 4 w) and estimated IoU (N, 1) of a single mask, as that code's predictor computes them.

    Args:
        network: of :func:`build`.
        encoded: of one image, from :func:`encode`.
        points: (N, P, 2) in (x, y) pixels and (N, P): 1 foreground, 0 background, 2 and 3 the corners of a box.
        masks: earlier logits (N, 1, 4 h, 4 w), or none.
    """
    sparse, dense = network.sam_prompt_encoder(points=points, boxes=None, masks=masks)
    logits, iou, _, _ = network.sam_mask_decoder(
        image_embeddings=encoded[0],
        image_pe=network.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
        repeat_image=sparse.shape[0] > 1,
        high_res_features=encoded[1],
    )
    return logits, iou


VIDEOS = ("memory_", "maskmem_", "no_mem_pos", "no_obj", "obj_ptr", "mask_downsample")  # names of what images leave


def as_file(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A base's state dictionary under the names that SAM 2's files give them."""
    found = {}
    for name, tensor in base.items():
        name = name.replace(".mlp.lin1.", ".mlp.layers.0.").replace(".mlp.lin2.", ".mlp.layers.1.")
        if name.startswith("image_encoder.conv_s"):
            name = name.replace("image_encoder.", "mask_decoder.")
        name = f"sam_{name}" if name.startswith(("prompt_encoder.", "mask_decoder.")) else name
        found[name.replace("image_encoder.no_mem", "no_mem")] = tensor
    return found


def digest(state: Mapping[str, Tensor]) -> tuple[int, str]:
    """Number of entries, and the SHA-256 of their names and shapes."""
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()
