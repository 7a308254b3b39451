"""Linear maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers import fast


def multiply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: (..., in) to (..., out); not for TorchScript."""
    return fast.multiply(x, weight, bias) if fast.is_on() else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript leaves out what this alone holds)
            if fast.is_on():
                return fast.apply_linear(self, input)
        return F.linear(input, self.weight, self.bias)
