"""Names that configurations made before :mod:`medsa_nets.training.stages` ask for here."""

from medsa_nets.training.stages import run_stages

__all__ = ["run_stages"]
