"""Describes a transform by plain values that can be stored and compared, and makes it again from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np
from monai.bundle import ConfigComponent
from monai.transforms import Compose, Transform

from medsa_nets.errors import DataError


def describe_transform(transform: Any) -> Any:
    """Name of a transform and the numbers that it was made with, for an adapter's task.

    Args:
        transform: a transform of arrays or of dictionaries, or a ``Compose`` of them.

    Returns:
        A dictionary of ``transform``, its name (that of the array transform inside a dictionary transform), and its
        numbers, truth values and lists of numbers; of a ``Compose``, a list of these; none where there is no transform.
    """
    if transform is None:  # a configuration may disable it
        return None
    if isinstance(transform, Compose):
        return [describe_transform(own) for own in transform.transforms]
    inner = next((own for own in _attributes(transform).values() if isinstance(own, Transform)), transform)
    numbers = {name: _number(value) for name, value in _attributes(inner).items() if not name.startswith("_")}
    return {"transform": type(inner).__name__, **{name: value for name, value in numbers.items() if value is not None}}


def _attributes(transform: Any) -> dict[str, Any]:
    return getattr(transform, "__dict__", {})


def _number(value: Any) -> Any:
    """A number, truth value or list of numbers as JSON has it; none for anything else."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Real):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return None
    values = [_number(own) for own in value] if not isinstance(value, dict) else []
    finite = all(isinstance(own, (int, float)) and math.isfinite(own) for own in values)
    return values if values and finite else None


def make_transform(settings: Mapping[str, Any], **own: Any) -> Any:
    """Make a transform that a task's facts describe.

    Args:
        settings: ``transform``, the name of a class of MONAI or the dotted path of another one, and its arguments.
        own: further arguments, in place of those of the same name.

    Returns:
        The transform.

    Raises:
        DataError: when the settings name no transform.
    """
    arguments = {**settings, **own}
    name = arguments.pop("transform", None)
    if not isinstance(name, str):
        raise DataError(f"a transform of a task: expected its name under 'transform', got {dict(settings)}.")
    return ConfigComponent({"_target_": name, **arguments}).instantiate()


def enabled(*transforms: Any) -> list[Any]:
    """Of the transforms of a configuration, those that it does not disable (``_disabled_``), in their order."""
    return [transform for transform in transforms if transform is not None]
