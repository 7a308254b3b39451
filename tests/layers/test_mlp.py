from __future__ import annotations

import torch
from torch import nn

from medsa_nets.layers import MLPBlock


def test_mlp_block_equals_segment_anything(segment_anything, randomise):
    reference = randomise(segment_anything.modeling.common.MLPBlock(12, 48, nn.GELU))
    ours = MLPBlock(features=12, hidden=48, activation=nn.GELU())
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), reference(x))
