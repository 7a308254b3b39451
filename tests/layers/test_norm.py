from __future__ import annotations

import torch

from medsa_nets.layers import LayerNorm2d


def test_layer_norm_2d_equals_segment_anything(segment_anything, randomise):
    reference = randomise(segment_anything.modeling.common.LayerNorm2d(12))
    ours = LayerNorm2d(12)
    ours.load_state_dict(reference.state_dict())
    x = 3.0 + 2.0 * torch.randn(2, 12, 5, 7)
    torch.testing.assert_close(ours(x), reference(x), atol=1e-5, rtol=1e-5)
