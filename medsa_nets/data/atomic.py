"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from medsa_nets.errors import OutputError

# full, over quota, larger than allowed, read-only, not permitted
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


@contextmanager
def temporary_name(path: str | Path) -> Iterator[Path]:
    """A name beside ``path``, with its suffix; renamed to ``path`` when the block ends well, else removed.

    Raises:
        OutputError: when the disk is full or the folder may not be written to; what stood under ``path`` stays.
    """
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename not in (None, str(part), str(path)):
            raise
        raise OutputError(
            f"{path}: it can't be written ({error.strerror}). Make room in {path.parent}, close what has it open, "
            "or name another folder; what stood there before is unchanged."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files of ``path`` that processes of this machine left when they were killed."""
    path = Path(path)
    for part in path.parent.glob(f".*.{escape(path.name)}"):
        pid = part.name[1 : -len(path.name) - 1]
        if pid.isdecimal() and not _is_alive(int(pid)):
            part.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl+C
        return True
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


class AtomicWriter:
    """Mixed into one of MONAI's image writers: writes under a temporary name and renames."""

    def write(self, filename: Any, verbose: bool = False, **kwargs: Any) -> None:
        """Write the image to ``filename``, whole or not at all."""
        with temporary_name(filename) as part:
            super().write(part, verbose=verbose, **kwargs)  # type: ignore[misc]
