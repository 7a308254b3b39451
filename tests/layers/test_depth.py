from __future__ import annotations

import pytest
import torch

from medsa_nets.layers import DepthBranch, DistantPrompt


def qkv(depth: int, volumes: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(volumes * depth, 3, 5, 2, 4, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("depth", [1, 2, 7, 40])
def test_tokens_of_one_position_attend_to_each_other_along_depth(depth):
    branch = DepthBranch(8, num_heads=2, max_distance=3)
    with torch.no_grad():
        branch.bias.normal_()
    q, k, v = qkv(depth)
    found = branch.attend(q, k, v, depth)
    assert found.shape == (2 * depth, 3, 5, 8)
    for volume, row, column, head in ((0, 0, 0, 0), (1, 2, 4, 1), (1, 1, 3, 0)):
        a, b, c = (x[volume * depth : (volume + 1) * depth, row, column, head] for x in (q, k, v))
        scores = a @ b.T / 2.0  # sqrt(4)
        for i in range(depth):
            for j in range(depth):
                scores[i, j] += branch.bias[head, max(-3, min(3, i - j)) + 3]
        expected = scores.softmax(-1) @ c
        slices = found[volume * depth : (volume + 1) * depth, row, column, 4 * head : 4 * head + 4]
        torch.testing.assert_close(slices, expected, atol=1e-5, rtol=1e-5)


def test_a_fresh_branch_adds_nothing_and_has_no_bias():
    branch = DepthBranch(8, num_heads=2)
    assert torch.equal(branch(torch.randn(4, 3, 5, 8), torch.randn(8, 8), torch.randn(8)), torch.zeros(4, 3, 5, 8))
    assert torch.equal(branch.bias, torch.zeros_like(branch.bias))


def test_one_matrix_projects_and_narrows_as_two_do_one_after_the_other():
    branch, projection = DepthBranch(64, num_heads=2), torch.nn.Linear(64, 64).requires_grad_(False)
    torch.nn.init.normal_(branch.adapter.up.weight)
    x = torch.randn(4, 16, 16, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, expected = branch(x, projection.weight, projection.bias), branch.adapter(projection(y))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), [x, *branch.adapter.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [y, *branch.adapter.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_distant_prompts_say_nothing_at_the_start_and_nothing_on_their_own_slice():
    adapter = DistantPrompt(16)
    tokens, distance = torch.randn(3, 4, 16), torch.tensor([[0.0, 1, -1, 5]]).expand(3, -1)
    assert torch.equal(adapter(tokens, distance), torch.zeros(3, 4, 16))
    torch.nn.init.normal_(adapter.up.weight)
    told = adapter(tokens, distance)
    assert torch.equal(told[:, 0], torch.zeros(3, 16))
    assert (told[:, 1:].abs().amax(-1) > 0).all()


def test_distant_prompts_tell_above_from_below_and_near_from_far():
    adapter = DistantPrompt(16)
    torch.nn.init.normal_(adapter.up.weight)
    tokens = torch.randn(1, 1, 16).expand(1, 6, -1)
    told = adapter(tokens, torch.tensor([[1.0, -1, 2, 17, 100, -100]]))[0]
    assert torch.pdist(told).min() > 1e-3
