"""Sessions of a simulated user on images whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medsa_nets.interaction.metrics import SessionCurve
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.interaction.users import SimulatedUser


def run_simulated(
    session: InteractiveSession,
    target: np.ndarray,
    class_name: str | int | None,
    user: SimulatedUser,
    random: np.random.Generator,
    clicks: int = 10,
    spacing: Sequence[float] | None = None,
    tolerance: float = 2.0,
) -> SessionCurve:
    """Let a simulated user correct the mask of a class of the open image.

    Args:
        session: with an image open; its prompts are forgotten first.
        target: boolean, on the grid of the image's file.
        class_name: name or id of the class.
        user: places the clicks.
        random: source of randomness, by image and class.
        clicks: most clicks.
        spacing: size of the file's voxels in mm; none takes 1.
        tolerance: of the surface Dice, in mm.

    Returns:
        Dice, surface Dice and obedience after 0 to ``clicks`` clicks; shorter where nothing was wrong any more.
    """
    session.reset()
    spacing = [1.0] * target.ndim if spacing is None else spacing
    curve = SessionCurve()
    mask = session.mask(class_name)
    curve.add(mask, target, spacing, tolerance)
    said: dict[tuple[int, ...], int] = {}
    for _ in range(clicks):
        click = user.click(mask, target, random)
        if click is None:
            break
        voxel, label = click
        mask = session.point(voxel.tolist(), label, class_name)
        said[tuple(int(v) for v in voxel)] = label
        curve.obeyed.append(float(np.mean([mask[place] == bool(wanted) for place, wanted in said.items()])))
        curve.add(mask, target, spacing, tolerance)
    return curve
