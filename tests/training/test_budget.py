"""AdaLoRA's budget of ranks: the published schedule, the regulariser, and a training that is cut and resumed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medsa_nets.layers import LoRA, LowRank, LowRankLinear
from medsa_nets.training.budget import RankBudget, allowed_ranks


class Two(nn.Module):
    """Two layers, of which the first alone matters to the loss of :func:`steps`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Module() for _ in range(2))
        self.a.qkv, self.b.qkv = nn.Linear(8, 24), nn.Linear(8, 24)

    def forward(self, x):
        return self.a.qkv(x).pow(2).mean() + 1e-4 * self.b.qkv(x).mean()


def make(rank=2):
    torch.manual_seed(0)
    network = Two()
    LoRA(rank=rank, singular=True).install(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora." in name)
    trained = [p for p in network.parameters() if p.requires_grad]
    return network, torch.optim.AdamW(trained, lr=0.05)


def steps(network, optimizer, first, last, **settings):
    """Steps ``first`` to ``last`` of a training of 40, with the handler called as the trainer calls it."""
    budget = RankBudget(network, rank=2, total_steps=40, interval=2, **settings)
    engine = SimpleNamespace(optimizer=optimizer)
    for step in range(first, last):
        optimizer.zero_grad(set_to_none=True)
        network(torch.randn(16, 8, generator=torch.Generator().manual_seed(step))).backward()
        budget.before_step(engine)
        optimizer.step()
        budget.after_step(engine)
    return budget


def changes(network):
    return [m for m in network.modules() if isinstance(m, LowRank)]


def test_the_schedule_is_flat_then_cubic_then_flat():
    curve = [allowed_ranks(t, start=30, end=10, warmup=10, last=50) for t in range(60)]
    assert curve[:11] == [30] * 11
    assert curve[30] == 10 + round(20 * 0.5**3)
    assert curve[50:] == [10] * 10
    assert curve == sorted(curve, reverse=True)


def test_the_regulariser_has_the_gradient_of_its_definition():
    network, optimizer = make()
    with torch.no_grad():
        for change in changes(network):
            change.A.normal_()
            change.B.normal_()
    RankBudget(network, rank=2, total_steps=10, orthogonality=0.3).before_step(SimpleNamespace(optimizer=optimizer))
    found = [(m.A.grad.clone(), m.B.grad.clone()) for m in changes(network)]
    optimizer.zero_grad()
    total = 0
    for change in changes(network):
        for p, q in zip(change.B, change.A):
            eye = torch.eye(change.rank)
            total = total + (p.T @ p - eye).pow(2).sum() + (q @ q.T - eye).pow(2).sum()
    (0.3 * total).backward()
    for change, (a, b) in zip(changes(network), found):
        torch.testing.assert_close(a, change.A.grad)
        torch.testing.assert_close(b, change.B.grad)


def test_the_budget_is_kept_and_goes_where_it_matters():
    network, optimizer = make()
    budget = steps(network, optimizer, 0, 40)
    first, second = (int((m.E != 0).sum()) for m in changes(network))
    assert (budget.start, budget.end) == (12, 8)  # two parts of two layers: 3 at the start, 2 on average at the end
    assert first + second == 8
    assert first > second


def test_factors_become_orthogonal():
    def distance(network):
        grams = [p.T @ p - torch.eye(m.rank) for m in changes(network) for p in m.B]
        return sum(float(g.detach().pow(2).sum()) for g in grams)

    (with_it, optimizer), (without, other) = make(), make()
    steps(with_it, optimizer, 0, 40)
    steps(without, other, 0, 40, orthogonality=0.0)
    assert distance(with_it) < 0.2 * distance(without)


def test_a_resumed_training_goes_on_with_what_the_optimizers_state_holds(tmp_path):
    whole, optimizer = make()
    steps(whole, optimizer, 0, 40)
    cut, optimizer = make()
    steps(cut, optimizer, 0, 17)
    torch.save({"network": cut.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    again, optimizer = make()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    steps(again, optimizer, 17, 40)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_step_that_overflowed_changes_nothing():
    network, optimizer = make()
    budget = steps(network, optimizer, 0, 3)
    before = {p: dict(state) for p, state in optimizer.state.items()}
    for change in changes(network):
        change.A.grad = torch.full_like(change.A, float("inf"))
    engine = SimpleNamespace(optimizer=optimizer)
    budget.before_step(engine)
    budget.after_step(engine)
    assert all(optimizer.state[p][key] is value for p, state in before.items() for key, value in state.items())


def test_without_singular_values_nothing_is_attached():
    network = nn.Sequential(LowRankLinear(nn.Linear(4, 4), rank=2))
    RankBudget(network, rank=2, total_steps=10).attach(None)


@pytest.mark.parametrize("settings", [{"warmup": 0.7, "final": 0.5}, {"beta": 1.0}, {"interval": 0}])
def test_shares_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="got"):
        RankBudget(Two(), rank=2, total_steps=10, **settings)
