"""MedSA: Medical SAM Adapter (arXiv 2304.12620) for MONAI bundles."""

from medsa_nets import (
    data,
    engines,
    errors,
    handlers,
    inferers,
    losses,
    metrics,
    networks,
    prompts,
    transforms,
    visualize,
    weights,
)
from medsa_nets.bases import BASES, Base, build_medsa, parameter_table
from medsa_nets.errors import DataError, MedSAError, WeightsError
from medsa_nets.networks import MedSA, VolumeMedSA

__version__ = "0.1.0"

__all__ = [
    "BASES",
    "Base",
    "DataError",
    "MedSA",
    "MedSAError",
    "VolumeMedSA",
    "WeightsError",
    "build_medsa",
    "data",
    "engines",
    "errors",
    "handlers",
    "inferers",
    "losses",
    "metrics",
    "networks",
    "parameter_table",
    "prompts",
    "transforms",
    "visualize",
    "weights",
]
