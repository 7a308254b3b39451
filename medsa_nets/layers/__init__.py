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
from medsa_nets.layers.lora import Frozen, LoRA, LowRank, LowRankLinear, merge_low_rank

__all__ = [
    "HYPER_PROMPTING_FORMS",
    "Adaptation",
    "Adapter",
    "Bottlenecks",
    "ClickFeedback",
    "ConvBN",
    "DepthBranch",
    "DistantPrompt",
    "Frozen",
    "HyperPromptingAdapter",
    "LayerNorm2d",
    "Linear",
    "LoRA",
    "LowRank",
    "LowRankLinear",
    "MLPBlock",
    "attend",
    "attend_map",
    "cut_windows",
    "join_windows",
    "merge_low_rank",
    "multiply_linear",
    "remember",
    "split_windows",
]
