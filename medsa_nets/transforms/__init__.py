"""MONAI transforms for masks, prompts and volumes."""

from medsa_nets.transforms.anatomy import CheckAnatomyd, SaveImageWarningsd
from medsa_nets.transforms.clicks import ReadClicksd
from medsa_nets.transforms.facts import describe_transform, enabled, make_transform
from medsa_nets.transforms.masks import BinarizeMaskd, ChooseRaterd, ClassMapd, ClassMasksd, SeparateClassesd
from medsa_nets.transforms.overlays import SaveImageClassesd, SaveOverlayd, SaveVolumeOverlayd
from medsa_nets.transforms.prompts import (
    EnforceUserPromptsd,
    PromptsToNetworkd,
    ReadPromptsd,
    SamplePromptsd,
    check_prompt_keys,
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
    RenumberLabelsd,
    SampleClassPromptsd,
    SpacingBesidePathsd,
    all_classes,
    keep_main_components,
)

__all__ = [
    "ABSENT",
    "BinarizeMaskd",
    "CheckAnatomyd",
    "CheckLabelsd",
    "ChooseRaterd",
    "ClassMapd",
    "ClassMasksd",
    "EnforceUserPromptsd",
    "HighestProbabilityd",
    "LoadImageVolumed",
    "MasksToSourceLabeld",
    "MatchOrientationd",
    "PromptsToNetworkd",
    "ReadClassPromptsd",
    "ReadClicksd",
    "ReadPromptsd",
    "RenumberLabelsd",
    "SampleClassPromptsd",
    "SamplePromptsd",
    "SaveImageClassesd",
    "SaveImageWarningsd",
    "SaveOverlayd",
    "SaveVolumeOverlayd",
    "SeparateClassesd",
    "SpacingBesidePathsd",
    "all_classes",
    "check_prompt_keys",
    "describe_transform",
    "enabled",
    "keep_main_components",
    "make_transform",
    "to_source_grid",
    "to_tensor_grid",
]
