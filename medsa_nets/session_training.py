"""Names that configurations made before :mod:`medsa_nets.training.sessions` ask for here."""

from medsa_nets.training.sessions import (
    SessionIteration,
    SessionSampler,
    VolumeSessionIteration,
    nearness,
    run_session,
    spoil,
)

__all__ = ["SessionIteration", "SessionSampler", "VolumeSessionIteration", "nearness", "run_session", "spoil"]
