"""Layers: adapters and the small parts of the encoders."""

from medsa_nets.layers.adapters import HYPER_PROMPTING_FORMS, Adapter, HyperPromptingAdapter
from medsa_nets.layers.common import ConvBN, LayerNorm2d, MLPBlock, attend, merge_windows, partition_windows
from medsa_nets.layers.depth import DepthBranch, DistantPrompt

__all__ = [
    "HYPER_PROMPTING_FORMS",
    "Adapter",
    "ConvBN",
    "DepthBranch",
    "DistantPrompt",
    "HyperPromptingAdapter",
    "LayerNorm2d",
    "MLPBlock",
    "attend",
    "merge_windows",
    "partition_windows",
]
