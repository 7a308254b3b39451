"""MONAI transforms for masks and prompts."""

from medsa_nets.transforms.masks import BinarizeMaskd
from medsa_nets.transforms.prompts import PromptsToNetworkd, ReadPromptsd, SamplePromptsd, to_tensor_grid

__all__ = ["BinarizeMaskd", "PromptsToNetworkd", "ReadPromptsd", "SamplePromptsd", "to_tensor_grid"]
