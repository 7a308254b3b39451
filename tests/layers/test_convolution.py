from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medsa_nets.layers import ConvBN, fast


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "shape", [{"kernel_size": 1}, {"kernel_size": 3}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 3, "groups": 8}]
)
def test_conv_bn_equals_convolution_then_frozen_batch_norm(shape, training, randomise):
    ours = randomise(ConvBN(8, 16, **shape)).train(training)
    statistics = copy.deepcopy(ours.bn.state_dict())
    convolution = nn.Conv2d(8, 16, padding=shape["kernel_size"] // 2, bias=False, **shape)
    convolution.load_state_dict(ours.c.state_dict())
    norm = nn.BatchNorm2d(16).eval()
    norm.load_state_dict(statistics)
    x = torch.randn(2, 8, 9, 11)
    torch.testing.assert_close(ours(x), norm(convolution(x)), atol=1e-5, rtol=1e-5)
    with fast.plain_layers():
        assert torch.equal(ours(x), norm(convolution(x)))
    assert all(torch.equal(value, statistics[name]) for name, value in ours.bn.state_dict().items())
