"""Layers: adapters and the small parts of the encoders."""

from medsa_nets.layers.adapters import HYPER_PROMPTING_FORMS, Adaptation, Adapter, Bottlenecks, HyperPromptingAdapter
from medsa_nets.layers.common import (
    ConvBN,
    LayerNorm2d,
    MLPBlock,
    attend,
    attend_map,
    cut_windows,
    join_windows,
    split_windows,
)
from medsa_nets.layers.depth import DepthBranch, DistantPrompt
from medsa_nets.layers.feedback import ClickFeedback
from medsa_nets.layers.linear import Linear, multiply_linear, remember

__all__ = [
    "HYPER_PROMPTING_FORMS",
    "Adaptation",
    "Adapter",
    "Bottlenecks",
    "ClickFeedback",
    "ConvBN",
    "DepthBranch",
    "DistantPrompt",
    "HyperPromptingAdapter",
    "LayerNorm2d",
    "Linear",
    "MLPBlock",
    "attend",
    "attend_map",
    "cut_windows",
    "join_windows",
    "multiply_linear",
    "remember",
    "split_windows",
]
