"""Names that configurations made before :mod:`medsa_nets.training` and :mod:`medsa_nets.runtime` ask for here."""

from medsa_nets.prompts.earlier import LIMIT, as_earlier
from medsa_nets.runtime import join_processes, keep_freed_memory, plain, release_freed_memory
from medsa_nets.training import (
    PromptedIteration,
    VolumeIteration,
    answer_prompts,
    beside_another,
    call_through,
    correct,
    train_slices,
    trainable_parameters,
)

__all__ = [
    "LIMIT",
    "PromptedIteration",
    "VolumeIteration",
    "answer_prompts",
    "as_earlier",
    "beside_another",
    "call_through",
    "correct",
    "join_processes",
    "keep_freed_memory",
    "plain",
    "release_freed_memory",
    "train_slices",
    "trainable_parameters",
]
