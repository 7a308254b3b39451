"""MedSA: Medical SAM Adapter (arXiv 2304.12620) for MONAI bundles."""

from medsa_nets import (
    backends,
    bundles,
    data,
    embeddings,
    engines,
    errors,
    handlers,
    inferers,
    losses,
    machine,
    metrics,
    networks,
    precision,
    prompts,
    runtime,
    training,
    transforms,
    visualize,
    weights,
)
from medsa_nets.backends import use_backend
from medsa_nets.build import build_medsa, parameter_table
from medsa_nets.errors import BackendError, DataError, MedSAError, WeightsError
from medsa_nets.networks import MedSA, VolumeMedSA
from medsa_nets.weights.bases import BASES, Base

__version__ = "0.1.0"

__all__ = [
    "BASES",
    "BackendError",
    "Base",
    "DataError",
    "MedSA",
    "MedSAError",
    "VolumeMedSA",
    "WeightsError",
    "backends",
    "build_medsa",
    "bundles",
    "data",
    "embeddings",
    "engines",
    "errors",
    "handlers",
    "inferers",
    "losses",
    "machine",
    "metrics",
    "networks",
    "parameter_table",
    "precision",
    "prompts",
    "runtime",
    "training",
    "transforms",
    "use_backend",
    "visualize",
    "weights",
]
