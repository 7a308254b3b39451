"""Layers: adapters and the small parts of the encoders."""

from medsa_nets.layers.adapters import HYPER_PROMPTING_FORMS, Adapter, HyperPromptingAdapter
from medsa_nets.layers.common import ConvBN, LayerNorm2d, MLPBlock, attend, merge_windows, partition_windows

__all__ = [
    "HYPER_PROMPTING_FORMS",
    "Adapter",
    "ConvBN",
    "HyperPromptingAdapter",
    "LayerNorm2d",
    "MLPBlock",
    "attend",
    "merge_windows",
    "partition_windows",
]
