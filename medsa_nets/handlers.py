"""Names that configurations made before :mod:`medsa_nets.training` and :mod:`medsa_nets.runtime` ask for here."""

from medsa_nets.runtime import for_this_process, unwrap, writes_files
from medsa_nets.training import (
    EarlyStop,
    EpochLoss,
    EpochSeed,
    MetricsSaver,
    Progress,
    SampleOverlays,
    StartFrom,
    TimeLimit,
    TrainingCheckpoint,
    data_files,
    save_atomically,
)

__all__ = [
    "EarlyStop",
    "EpochLoss",
    "EpochSeed",
    "MetricsSaver",
    "Progress",
    "SampleOverlays",
    "StartFrom",
    "TimeLimit",
    "TrainingCheckpoint",
    "data_files",
    "for_this_process",
    "save_atomically",
    "unwrap",
    "writes_files",
]
