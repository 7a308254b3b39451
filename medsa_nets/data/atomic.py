"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from glob import escape
from pathlib import Path
from typing import Any

from medsa_nets.errors import CANNOT_WRITE, OutputError, describe


def make_folder(folder: str | Path) -> Path:
    """Make a folder and those above it.

    Raises:
        OutputError: when that can't be done, as where a file has its name.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of that name" if folder.is_file() else error.strerror
        raise OutputError(f"{folder}: the folder can't be made ({reason}). Name another one.") from error
    return folder


def make_writable(folder: str | Path, option: str) -> Path:
    """Make a folder that results go to, and test whether files can be written there.

    Args:
        folder: the folder.
        option: what names another one, as ``--output_dir``.

    Raises:
        OutputError: when it can't be made or written to.
    """
    folder = Path(folder)
    check_writable(folder, option)
    with _named(folder, option):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_writable(folder: str | Path, option: str) -> None:
    """Test whether files can be written to a folder, before the work begins. Nothing is left behind.

    Args:
        folder: the folder. Where it does not exist, it is tested whether it can be made.
        option: what names another one, as ``--output_dir``.

    Raises:
        OutputError: when it can't be made or written to.
    """
    folder = Path(folder)
    with _named(folder, option):
        above = _existing(folder)
        new = nullcontext(above) if above == folder else tempfile.TemporaryDirectory(dir=above, prefix=".medsa-")
        with new as place, tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next((path for path in (folder, *folder.parents) if path.exists() or path.is_symlink()), folder)


@contextmanager
def _named(folder: Path, option: str) -> Iterator[None]:
    """Name the folder and the option in what goes wrong."""
    try:
        yield
    except OSError as error:
        above = _existing(folder)
        reason = error.strerror if above.is_dir() else f"{above} is no folder"
        raise OutputError(
            f"output {folder}: it can't be written ({reason}). Make room, change its permissions, or name another "
            f"folder ({option})."
        ) from error


@contextmanager
def temporary_name(path: str | Path) -> Iterator[Path]:
    """A name beside ``path``, with its suffix; renamed to ``path`` when the block ends well, else removed.

    Raises:
        OutputError: when the disk is full, or the folder is not there or may not be written to; what stood under
            ``path`` stays.
    """
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno not in CANNOT_WRITE or error.filename not in (None, str(part), str(path)):
            raise
        raise OutputError(
            f"{path}: it can't be written ({error.strerror}). Make room in {path.parent}, close what has it open, "
            "or name another folder; what stood there before is unchanged."
        ) from error
    finally:
        with suppress(OSError):  # where the folder is gone, or is no folder, nothing is left there
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
        make_folder(Path(filename).parent)
        with temporary_name(filename) as part:
            try:
                super().write(part, verbose=verbose, **kwargs)  # type: ignore[misc]
            except RuntimeError as error:  # ITK has no error of its own for a disk that is full
                raise OutputError(
                    f"{filename}: it can't be written ({describe(error)}). Make room in {Path(filename).parent}, or "
                    "name another folder; what stood there before is unchanged."
                ) from error
