"""Every base with a narrow encoder: as it is otherwise, and quick enough for tests.

A base of a kind that is known here needs no line; a new kind of encoder needs its widths in :data:`NARROW`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn

from medsa_nets.networks import EfficientViTEncoder, HieraEncoder, ImageEncoderViT, PlainViTEncoder, TinyViTEncoder
from medsa_nets.weights import BASES, Base

NARROW: dict[type[nn.Module], dict[str, Any]] = {
    ImageEncoderViT: {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)},
    TinyViTEncoder: {"features": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
    HieraEncoder: {"features": 8, "stages": (1, 2, 3, 1), "global_blocks": (4,)},
    PlainViTEncoder: {"embed_dim": 32, "depth": 2, "num_heads": 2},
    EfficientViTEncoder: {
        "features": (8, 8, 16, 16, 32),
        "head_features": 16,
        "neck_features": 16,
        "depths": (1, 1, 1, 1, 1),
        "neck_depth": 1,
    },
}


def encoder_of(base: Base) -> nn.Module:
    """The base's image encoder, without memory for its weights."""
    with torch.device("meta"):
        encoder: nn.Module = base.encoder(img_size=(base.img_size, base.img_size))
    return encoder


def narrow(base: Base) -> Base:
    """The base with a narrow encoder, and no file of its own."""
    widths = NARROW[type(encoder_of(base))]
    return dataclasses.replace(base, encoder=partial(base.encoder, **widths), url="", sha256=None, packaged=None)


def kinds() -> list[str]:
    """A base of each kind: of encoder with its stride, prompt encoder and mask decoder."""
    found: dict[tuple[Any, ...], str] = {}
    for name, base in BASES.items():
        encoder = encoder_of(base)
        found.setdefault((type(encoder), encoder.stride, base.prompt_encoder, base.mask_decoder), name)
    return list(found.values())
