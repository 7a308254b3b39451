"""What a click means for the voxels around it, learned from sessions of a simulated user: what all kinds share."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from medsa_nets.data.atomic import temporary_name
from medsa_nets.errors import WeightsError
from medsa_nets.errors import describe as error_text
from medsa_nets.interaction.grids import Place

LIMIT = 8.0  # of the logits that it sees
POINTS = 8  # of a scribble that are taken as clicks, one after the other


@dataclass(frozen=True)
class Click:
    """A click on a mask, and what there is around it.

    Attributes:
        voxel: (dims,).
        label: 1 foreground, 0 background.
        previous: logits (spatial…) that the user saw.
        values: logits (spatial…) of the answer so far.
        image: (C, spatial…), in [0, 1].
        others: voxels (N, dims) of the other marks.
        labels: (N,) of these.
        spacing: size of a voxel along each axis.
    """

    voxel: np.ndarray
    label: int
    previous: np.ndarray
    values: np.ndarray
    image: np.ndarray
    others: np.ndarray
    labels: np.ndarray
    spacing: Sequence[float] | np.ndarray


class Refinement(nn.Module):
    """Logits around a click. What clicks mean depends on the masks that they correct: it lies beside the adapter whose
    masks taught it. Untrained, it changes nothing.

    Args:
        dims: 2 (images) or 3 (volumes).
        reach: distance from the click up to which logits may change.
        asks: whether it refines answers that the network gives to each click anew, or corrects the mask before alone.
        certainty: logit that a voxel within ``reach`` must have on its new side to change sides; the others stay as
            the user saw them. It costs a part of what clicks gain and lets fewer of them do harm.

    Raises:
        ValueError: when ``dims`` is another, ``reach`` is below 1 or ``certainty`` below 0.
    """

    kinds: ClassVar[dict[str, type[Refinement]]] = {}
    kind: ClassVar[str]

    def __init__(self, dims: int, reach: float, asks: bool = False, certainty: float = 0.0) -> None:
        super().__init__()
        if dims not in (2, 3) or reach < 1 or certainty < 0:
            raise ValueError(
                f"expected dims 2 or 3, a reach of 1 and a certainty of 0 or more, got {dims}, {reach} and {certainty}."
            )
        self.dims, self.reach, self.asks, self.certainty = dims, float(reach), bool(asks), float(certainty)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Refinement.kinds[cls.kind] = cls

    @abstractmethod
    def added(self, click: Click) -> tuple[Place, np.ndarray, np.ndarray]:
        """What a click adds to logits around it.

        Returns:
            A box around the click, where in it logits may change (boolean), and what is added to them there (M,).
        """

    @property
    @abstractmethod
    def unit(self) -> str:
        """Of the reach, as people read it."""

    @abstractmethod
    def form(self) -> Any:
        """What it is built from, as JSON; :meth:`of_form` reads it."""

    @classmethod
    @abstractmethod
    def of_form(cls, form: Any) -> Refinement:
        """Build one of its form, without weights.

        Raises:
            ValueError: when the form is another version's.
        """

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its form and weights."""
        digest = hashlib.sha256(json.dumps(self.form()).encode())
        for tensor in self.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write it to a file, whole or not at all."""
        with temporary_name(path) as part:
            torch.save({"form": self.form(), "state": self.state_dict()}, part)

    @staticmethod
    def load(path: str | Path) -> Refinement:
        """Read one of any kind from a file that :meth:`save` wrote.

        Args:
            path: of the file.

        Raises:
            WeightsError: when the file is missing, damaged or something else.
        """
        path = Path(path)
        if not path.is_file():
            raise WeightsError(f"{path}: there is no such file. Name a refinement, which configs/refine.yaml trains.")
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
            form = kept["form"]
            out = Refinement.kinds[form["kind"] if isinstance(form, dict) else "voxels"].of_form(form)
            out.load_state_dict(kept["state"])
        except Exception as error:  # torch names damaged files in many ways
            raise WeightsError(
                f"{path}: no refinement of clicks of this version ({error_text(error)}). Train one with "
                "configs/refine.yaml of a bundle."
            ) from error
        return out.eval().requires_grad_(False)


@torch.no_grad()
def refine(
    refinement: Refinement,
    previous: np.ndarray,
    values: np.ndarray,
    image: np.ndarray,
    voxels: np.ndarray,
    labels: np.ndarray,
    newest: int,
    spacing: Sequence[float] | np.ndarray,
    certainty: float | None = None,
) -> np.ndarray:
    """Logits that take the newest click for what such clicks mostly meant.

    Args:
        refinement: learnt from sessions.
        previous: logits (spatial…) that the user saw.
        values: logits (spatial…) of the answer so far: the network's, with clicks as measurements.
        image: (C, spatial…), in [0, 1].
        voxels: (N, dims) that are marked, oldest first.
        labels: (N,): 1 foreground, 0 background.
        newest: how many of them the newest prompt marked; of a scribble, a few points are clicks one after the other.
        spacing: size of a voxel along each axis.
        certainty: see :class:`Refinement`; none takes the refinement's own.

    Returns:
        Logits (spatial…), other than ``values`` within the refinement's reach of the newest marks alone.
    """
    places: list[Place] = []
    marks = np.linspace(len(voxels) - newest, len(voxels) - 1, min(newest, POINTS)).round().astype(int)
    for mark in marks:
        others = np.delete(voxels, mark, 0), np.delete(labels, mark)
        click = Click(voxels[mark], int(labels[mark]), previous, values, image, *others, spacing)
        place, inside, added = refinement.added(click)
        values = add(values, place, inside, added)
        places.append(place)
    certainty = refinement.certainty if certainty is None else certainty
    for place in places if certainty else []:
        before, after = previous[place], values[place]
        doubtful = ((before > 0) != (after > 0)) & (np.abs(after) < certainty)
        after[doubtful] = before[doubtful]
    return values


def add(values: np.ndarray, place: Place, inside: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Logits with what :meth:`Refinement.added` says; those that change sides count up to ``LIMIT``."""
    out = values.copy()
    before = values[place][inside]
    after = before.clip(-LIMIT, LIMIT) + added
    out[place][inside] = np.where((after > 0) == (before > 0), before + added, after)
    return out


def box(centre: np.ndarray, half: np.ndarray, shape: tuple[int, ...]) -> Place:
    """The box (dims,) within a grid that reaches ``half`` voxels from a centre."""
    return tuple(slice(max(0, int(c - h)), min(n, int(c + h) + 1)) for c, h, n in zip(centre, half, shape))
