"""MONAI transforms for masks, prompts and volumes."""

from medsa_nets.transforms.clicks import ReadClicksd
from medsa_nets.transforms.facts import describe_transform
from medsa_nets.transforms.masks import BinarizeMaskd
from medsa_nets.transforms.overlays import SaveOverlayd, SaveVolumeOverlayd
from medsa_nets.transforms.prompts import (
    EnforceUserPromptsd,
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
    keep_main_components,
)

__all__ = [
    "ABSENT",
    "BinarizeMaskd",
    "CheckLabelsd",
    "EnforceUserPromptsd",
    "HighestProbabilityd",
    "LoadImageVolumed",
    "MasksToSourceLabeld",
    "MatchOrientationd",
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
    "describe_transform",
    "keep_main_components",
    "to_source_grid",
    "to_tensor_grid",
]
