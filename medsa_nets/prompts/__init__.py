"""Prompts: the value that says what is asked of the network, and how it is drawn."""

from medsa_nets.prompts.sampling import (
    PROMPT_KEYS,
    PROTOCOLS,
    VOLUME_PROTOCOLS,
    PromptSampler,
    add_correction,
    bounding_box,
    class_masks,
    class_protocol_prompts,
    error_point,
    jitter_box,
    join_prompts,
    mirror_prompts,
    overlapping_box,
    protocol_prompts,
    random_points,
    relative_to_slice,
)
from medsa_nets.prompts.value import Prompts, transform_positions

__all__ = [
    "PROMPT_KEYS",
    "PROTOCOLS",
    "VOLUME_PROTOCOLS",
    "PromptSampler",
    "Prompts",
    "add_correction",
    "bounding_box",
    "class_masks",
    "class_protocol_prompts",
    "error_point",
    "jitter_box",
    "join_prompts",
    "mirror_prompts",
    "overlapping_box",
    "protocol_prompts",
    "random_points",
    "relative_to_slice",
    "transform_positions",
]
