"""Prompts: the value that says what is asked of the network, how it is drawn, and how it travels with an image."""

from medsa_nets.prompts.images import prompts_of, prompts_of_batch, with_prompts
from medsa_nets.prompts.sampling import (
    PROTOCOLS,
    VOLUME_PROTOCOLS,
    PromptSampler,
    add_correction,
    bounding_box,
    class_masks,
    class_protocol_prompts,
    error_point,
    jitter_box,
    overlapping_box,
    protocol_prompts,
    random_points,
)
from medsa_nets.prompts.value import Prompts, transform_positions

__all__ = [
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
    "overlapping_box",
    "prompts_of",
    "prompts_of_batch",
    "protocol_prompts",
    "random_points",
    "transform_positions",
    "with_prompts",
]
