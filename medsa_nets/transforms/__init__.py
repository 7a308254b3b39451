"""MONAI transforms for masks, prompts and volumes."""

from medsa_nets.transforms.masks import BinarizeMaskd
from medsa_nets.transforms.overlays import SaveOverlayd
from medsa_nets.transforms.prompts import (
    PromptsToNetworkd,
    ReadPromptsd,
    SamplePromptsd,
    to_source_grid,
    to_tensor_grid,
)
from medsa_nets.transforms.volumes import (
    CheckLabelsd,
    LoadVolumed,
    MasksToLabeld,
    SampleClassPromptsd,
    all_classes,
)

__all__ = [
    "BinarizeMaskd",
    "CheckLabelsd",
    "LoadVolumed",
    "MasksToLabeld",
    "PromptsToNetworkd",
    "ReadPromptsd",
    "SampleClassPromptsd",
    "SamplePromptsd",
    "SaveOverlayd",
    "all_classes",
    "to_source_grid",
    "to_tensor_grid",
]
