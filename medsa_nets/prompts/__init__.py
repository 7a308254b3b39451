"""Prompts: the value that says what is asked of the network, how it is drawn, and how it travels with an image."""

from medsa_nets.prompts.images import (
    prompts_of,
    prompts_of_batch,
    user_prompts_of,
    user_prompts_of_batch,
    with_prompts,
    with_user_prompts,
)
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
from medsa_nets.prompts.user import UserPrompt, read_user_prompts
from medsa_nets.prompts.value import Prompts, transform_positions

__all__ = [
    "PROTOCOLS",
    "VOLUME_PROTOCOLS",
    "PromptSampler",
    "Prompts",
    "UserPrompt",
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
    "read_user_prompts",
    "transform_positions",
    "user_prompts_of",
    "user_prompts_of_batch",
    "with_prompts",
    "with_user_prompts",
]
