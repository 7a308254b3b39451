"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def temporary_name(path: str | Path) -> Iterator[Path]:
    """A name beside ``path``, with its suffix; renamed to ``path`` when the block ends well, else removed."""
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class AtomicWriter:
    """Mixed into one of MONAI's image writers: writes under a temporary name and renames."""

    def write(self, filename: Any, verbose: bool = False, **kwargs: Any) -> None:
        """Write the image to ``filename``, whole or not at all."""
        with temporary_name(filename) as part:
            super().write(part, verbose=verbose, **kwargs)  # type: ignore[misc]
