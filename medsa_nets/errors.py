"""Errors that users meet; each names the file or field, what was expected, and what to do."""

from __future__ import annotations

import os
import sys
from types import TracebackType


class MedSAError(Exception):
    """Base class of this package's errors."""


class DataError(MedSAError, ValueError):
    """A data list, image, mask or prompt that can't be used."""


class SettingError(MedSAError, ValueError):
    """A setting of a configuration that has another value than it may have."""


class WeightsError(MedSAError, RuntimeError):
    """Weights that are missing, damaged, of an unknown format, or of another network."""


class OutputError(MedSAError, OSError):
    """A file that can't be written."""


class BackendError(MedSAError, RuntimeError):
    """An inference back end that is unknown, not installed, or can't compute what it is given."""


class ClusterError(MedSAError, RuntimeError):
    """A cluster of workers that can't be started or reached."""


def find_cause(error: BaseException | None) -> MedSAError | None:
    """The error of this package that another error was raised from, or none."""
    while error is not None and not isinstance(error, MedSAError):
        error = error.__cause__ or error.__context__
    return error


def describe(error: BaseException) -> str:
    """Kind of an error and the first line of what it says, to be quoted in another error's line."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])  # some have no text


def report_plainly() -> None:
    """End this process with one line, not a traceback, where an error of this package stops it.

    The engine around a bundle wraps errors in errors; users need the one that names their file. Every other error is
    shown in full, and so is every one where the environment variable ``MONAI_DEBUG`` is set.
    """
    previous = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = find_cause(error)
        if cause is None or os.environ.get("MONAI_DEBUG", "").lower() in ("1", "true"):
            previous(kind, error, trace)
        else:
            # A DataLoader's worker hands over its whole traceback as the message; what was said stands at its end.
            name = f"{type(cause).__module__}.{type(cause).__qualname__}: "
            print(f"\nerror: {str(cause).rpartition(name)[2].rstrip()}", file=sys.stderr)

    sys.excepthook = show
