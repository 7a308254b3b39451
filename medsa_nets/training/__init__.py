"""Training: steps, checkpoints, the schedule, what is shown of it; sessions of clicks, and stages."""

from medsa_nets.training.averaging import WeightAverage
from medsa_nets.training.budget import RankBudget
from medsa_nets.training.checkpoint import StartFrom, TrainingCheckpoint, data_files, save_atomically
from medsa_nets.training.progress import EpochLoss, MetricsSaver, Progress, SampleOverlays
from medsa_nets.training.schedule import EarlyStop, EpochSeed, TimeLimit, trainable_parameters
from medsa_nets.training.step import (
    PromptedIteration,
    answer_prompts,
    beside_another,
    call_through,
    choose_classes,
    correct,
)
from medsa_nets.training.volume_step import VolumeIteration, train_slices

__all__ = [
    "EarlyStop",
    "EpochLoss",
    "EpochSeed",
    "MetricsSaver",
    "Progress",
    "PromptedIteration",
    "RankBudget",
    "SampleOverlays",
    "StartFrom",
    "TimeLimit",
    "TrainingCheckpoint",
    "VolumeIteration",
    "WeightAverage",
    "answer_prompts",
    "beside_another",
    "call_through",
    "choose_classes",
    "correct",
    "data_files",
    "save_atomically",
    "train_slices",
    "trainable_parameters",
]
