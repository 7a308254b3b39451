"""Fast forms of the layers: they give the results of the plain forms, up to rounding.

A layer's own file holds the plain form, and hands over to a function of this folder where :func:`is_on` says so:
matrix products by oneDNN, attention in pieces, weights and tables of frozen layers kept until they change. Which of
several ways is taken is measured on the machine (:mod:`~medsa_nets.layers.fast.choices`). TorchScript compiles the
plain form, and tracers see PyTorch's own operations. :func:`plain_layers` switches all of it off.
"""

from medsa_nets.layers.fast.attention import attend, attend_by_columns, attend_map
from medsa_nets.layers.fast.convolution import convolve
from medsa_nets.layers.fast.dispatch import is_exporting, is_on, plain_layers
from medsa_nets.layers.fast.groups import in_groups
from medsa_nets.layers.fast.kept import Kept, remember
from medsa_nets.layers.fast.linear import apply_linear, linear_twice, multiply

__all__ = [
    "Kept",
    "apply_linear",
    "attend",
    "attend_by_columns",
    "attend_map",
    "convolve",
    "in_groups",
    "is_exporting",
    "is_on",
    "linear_twice",
    "multiply",
    "plain_layers",
    "remember",
]
