"""What sessions are worth: figures against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate

from medsa_nets.interaction.evaluation import run_simulated
from medsa_nets.interaction.metrics import SessionCurve, measure, summarise
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.interaction.users import SimulatedUser


def curve(*dice: float, nsd: float = 0.5) -> SessionCurve:
    return SessionCurve(list(dice), [nsd] * len(dice), [1.0] * (len(dice) - 1))


def test_areas_are_those_of_the_challenge() -> None:
    dice = [0.9, 0.1, 0.3, 0.5, 0.7, 0.8, 0.85]  # before the first click, then six clicks
    found = curve(*dice)
    # CVPR25_iter_eval.py: cumulative_trapezoid(np.array(dscs[-n_clicks:]), np.arange(n_clicks))[-1]
    assert found.area() == pytest.approx(integrate.cumulative_trapezoid(np.array(dice[1:6]), np.arange(5))[-1])
    nsd = [0.0, 0.5, 0.5, 0.5, 0.5]  # 0 where Dice is 0.2 or less
    assert found.area("nsd") == pytest.approx(integrate.cumulative_trapezoid(np.array(nsd), np.arange(5))[-1])


def test_a_session_that_ended_early_keeps_its_last_mask() -> None:
    assert curve(0.5, 1.0).after(10) == 1.0
    assert curve(0.5, 1.0).area() == pytest.approx(4.0)


def test_a_table_says_how_many_never_reach_a_goal() -> None:
    row = summarise([curve(0.7, 0.82, 0.91), curve(0.86, 0.84, 0.87), curve(0.1, 0.2)])
    assert row["clicks_to_80"] == pytest.approx(0.5)
    assert row["never_to_80"] == pytest.approx(1 / 3)
    assert row["clicks_to_85"] == pytest.approx(1.0)
    assert row["clicks_to_90"] == 2.0
    assert row["never_to_90"] == pytest.approx(2 / 3)
    assert row["dice_after_1"] == pytest.approx((0.82 + 0.84 + 0.2) / 3)
    assert row["harmful_clicks"] == pytest.approx(1 / 5)
    assert row["obeyed"] == 1.0
    assert math.isnan(summarise([curve(0.1)])["clicks_to_90"])


def test_dice_and_surface_dice_are_those_of_their_definitions() -> None:
    a, b = np.zeros((12, 12, 8), dtype=bool), np.zeros((12, 12, 8), dtype=bool)
    a[2:8, 2:8, 2:6], b[2:8, 2:8, 3:7] = True, True
    dice, nsd = measure(a, b, [1, 1, 3], 2.0)
    assert dice == pytest.approx(2 * 36 * 3 / (36 * 4 * 2))
    assert 0.0 < nsd < 1.0  # the two faces lie 3 mm apart
    assert measure(a, b, [1, 1, 3], 3.0)[1] == pytest.approx(1.0)
    assert measure(a, a, [1, 1, 1], 0.0) == (1.0, 1.0)
    empty = np.zeros_like(a)
    assert measure(empty, empty, [1, 1, 1], 1.0) == (1.0, 1.0)
    assert measure(a, empty, [1, 1, 1], 1.0) == (0.0, 0.0)


def test_a_simulated_session_counts_clicks_and_obedience(stand_in: type) -> None:
    session = InteractiveSession(stand_in(volumes=True), start="nothing")
    session.open("image_1")
    target = np.zeros(session.file_shape, dtype=bool)
    target[2:6, 2:5, 1:4] = True
    found = run_simulated(session, target, "spleen", SimulatedUser(), np.random.default_rng(0), clicks=4)
    assert len(found.dice) == len(found.nsd) == 5
    assert found.dice[0] == 0.0
    assert found.obeyed == [1.0] * 4
    again = run_simulated(session, target, "spleen", SimulatedUser(), np.random.default_rng(0), clicks=4)
    assert again.dice == found.dice
    near = target.copy()
    near[2] = False  # a mask of another tool
    corrected = run_simulated(
        session, target, "spleen", SimulatedUser(), np.random.default_rng(0), clicks=1, start_from=near
    )
    assert corrected.dice[0] == pytest.approx(2 * 27 / (27 + 36))
    assert corrected.obeyed == [1.0]
