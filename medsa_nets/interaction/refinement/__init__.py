"""What a click means for the voxels around it, learned from sessions of a simulated user who sees the answers."""

from medsa_nets.interaction.refinement.base import Click, Refinement, refine
from medsa_nets.interaction.refinement.crops import CropRefinement
from medsa_nets.interaction.refinement.files import beside, describe_file, is_refinement, kept, place_beside
from medsa_nets.interaction.refinement.voxels import VoxelRefinement

__all__ = [
    "Click",
    "CropRefinement",
    "Refinement",
    "VoxelRefinement",
    "beside",
    "describe_file",
    "is_refinement",
    "kept",
    "place_beside",
    "refine",
]
