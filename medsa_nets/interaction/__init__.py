"""Interaction: sessions of a user who corrects masks, what becomes of the clicks, and users that are simulated."""

from medsa_nets.interaction import refinement  # configurations of bundles name it

__all__ = ["refinement"]
