"""MONAI transforms for masks and prompts."""

from medsa_nets.transforms.masks import BinarizeMaskd
from medsa_nets.transforms.overlays import SaveOverlayd
from medsa_nets.transforms.prompts import (
    PromptsToNetworkd,
    ReadPromptsd,
    SamplePromptsd,
    to_source_grid,
    to_tensor_grid,
)

__all__ = [
    "BinarizeMaskd",
    "PromptsToNetworkd",
    "ReadPromptsd",
    "SamplePromptsd",
    "SaveOverlayd",
    "to_source_grid",
    "to_tensor_grid",
]
