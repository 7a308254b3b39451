"""Layers: adapters and the small parts of the encoders."""

from medsa_nets.layers import fast
from medsa_nets.layers.adapters import HYPER_PROMPTING_FORMS, Adaptation, Adapter, Bottlenecks, HyperPromptingAdapter
from medsa_nets.layers.attention import attend, attend_map
from medsa_nets.layers.channels import ChannelProjection
from medsa_nets.layers.convolution import ConvBN
from medsa_nets.layers.depth import DepthBranch, DistantPrompt, LinearDepthBranch
from medsa_nets.layers.feedback import ClickFeedback
from medsa_nets.layers.linear import Linear, multiply_linear
from medsa_nets.layers.lora import Frozen, LoRA, LowRank, LowRankLinear, merge_low_rank
from medsa_nets.layers.mlp import MLPBlock
from medsa_nets.layers.norm import LayerNorm2d
from medsa_nets.layers.published import PublishedAdapters, PublishedDecoder, PublishedLoRA
from medsa_nets.layers.windows import cut_windows, join_windows, split_windows

__all__ = [
    "HYPER_PROMPTING_FORMS",
    "Adaptation",
    "Adapter",
    "Bottlenecks",
    "ChannelProjection",
    "ClickFeedback",
    "ConvBN",
    "DepthBranch",
    "DistantPrompt",
    "Frozen",
    "HyperPromptingAdapter",
    "LayerNorm2d",
    "Linear",
    "LinearDepthBranch",
    "LoRA",
    "LowRank",
    "LowRankLinear",
    "MLPBlock",
    "PublishedAdapters",
    "PublishedDecoder",
    "PublishedLoRA",
    "attend",
    "attend_map",
    "cut_windows",
    "fast",
    "join_windows",
    "merge_low_rank",
    "multiply_linear",
    "split_windows",
]
