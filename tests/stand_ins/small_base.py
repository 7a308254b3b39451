"""Registers a base for tests of wiring, ``small``, in this process and in those that find this folder on their path.

It has LiteMedSAM's architecture with narrow layers, and its weights are random ones (``tests/conftest.py``): what it
segments means nothing, but it goes through configurations, servers and files as any base does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from medsa_nets.networks import TinyViTEncoder
from medsa_nets.weights.bases import BASES


def small_encoder(*, img_size: tuple[int, int], **settings: Any) -> nn.Module:
    return TinyViTEncoder(features=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), **settings)


SMALL = dataclasses.replace(
    BASES["lite_medsam"], name="small", encoder=small_encoder, filename="small.pth", url="", sha256=None, packaged=None
)
BASES[SMALL.name] = SMALL
