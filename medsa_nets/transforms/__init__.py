"""MONAI transforms for masks, prompts and volumes."""

from medsa_nets.transforms.clicks import PromptsInMetad, ReadClicksd, prompts_of
from medsa_nets.transforms.masks import BinarizeMaskd
from medsa_nets.transforms.overlays import SaveOverlayd, SaveVolumeOverlayd
from medsa_nets.transforms.prompts import (
    PromptsToNetworkd,
    ReadPromptsd,
    SamplePromptsd,
    to_source_grid,
    to_tensor_grid,
)
from medsa_nets.transforms.volumes import (
    ABSENT,
    CheckLabelsd,
    HighestProbabilityd,
    LoadImageVolumed,
    MasksToSourceLabeld,
    MatchOrientationd,
    ReadClassPromptsd,
    SampleClassPromptsd,
    SpacingBesidePathsd,
    all_classes,
)

__all__ = [
    "ABSENT",
    "BinarizeMaskd",
    "CheckLabelsd",
    "HighestProbabilityd",
    "LoadImageVolumed",
    "MasksToSourceLabeld",
    "MatchOrientationd",
    "PromptsInMetad",
    "PromptsToNetworkd",
    "ReadClassPromptsd",
    "ReadClicksd",
    "ReadPromptsd",
    "SampleClassPromptsd",
    "SamplePromptsd",
    "SaveOverlayd",
    "SaveVolumeOverlayd",
    "SpacingBesidePathsd",
    "all_classes",
    "prompts_of",
    "to_source_grid",
    "to_tensor_grid",
]
