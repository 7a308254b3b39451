from __future__ import annotations

import pytest
import torch

from medsa_nets.layers import cut_windows, join_windows, split_windows


@pytest.mark.parametrize("size", [(14, 14), (28, 14), (16, 16), (9, 30), (3, 5)])
@pytest.mark.parametrize("window", [7, 14])
def test_windows_hold_the_tokens_of_segment_anything_s(segment_anything, size, window):
    module = segment_anything.modeling.image_encoder
    x = torch.randn(2, *size, 3)
    padded, _ = module.window_partition(x, window)
    parts = split_windows(*size, window)
    windows = [cut_windows(x, part, window) for part in parts]
    assert sum(w.shape[0] for w in windows) == padded.shape[0]  # as many windows, and none of their padding
    assert sum(w.shape[:3].numel() for w in windows) == 2 * size[0] * size[1]
    expected = {tuple(w[w.abs().sum(-1) > 0].flatten().tolist()) for w in padded}
    assert {tuple(w.flatten().tolist()) for part in windows for w in part} == expected
    assert torch.equal(join_windows(windows, parts, 2), x)
