"""Errors that users meet; each names the file or field, what was expected, and what to do."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
import warnings
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


class LowMemoryError(MedSAError, MemoryError):
    """More memory was asked for than there is."""


# what torch (CPU, Windows, GPU), numpy, ITK and C++ say where memory can't be had
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "failed to allocate",
    "bad_alloc",
    "is killed by signal: killed",
)  # the last: of a DataLoader's worker, by the system
_LESS_MEMORY = (
    "In training, lower --batch_size (pictures), --patches_per_volume, the last number of --roi_size or "
    "--train_slab_depth (volumes), --prompt_draws or --image_size, pass --num_workers 0 and, for volumes, "
    "--checkpointing true and --cache disk. In inference, lower --slab_depth, --class_chunk or --cache_bytes, and take "
    "a coarser --pixdim only if the adapter was trained on it."
)


# full, over quota, larger than allowed, read-only, not permitted, no such folder, a file where a folder should be or
# the other way round, a name too long, a broken disk
CANNOT_WRITE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
    errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO,
)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # of these, what only writing meets
output_folders: list[str] = []  # where this process's run writes: what an error names that names no file

# packages of extras, and those that options of the engine around a bundle need
_INSTALL = {
    "dask": "'medsa[cluster]'",
    "distributed": "'medsa[cluster]'",
    "onnx": "'medsa[onnxruntime]'",
    "onnxruntime": "'medsa[onnxruntime]'",
    "onnxscript": "'medsa[onnxruntime]'",
    "openvino": "'medsa[openvino]'",
    "mlflow": "'medsa[mlflow]'",
}


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated, on a CPU or a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)
    )


def find_cause(error: BaseException | None) -> MedSAError | None:
    """The error of this package that another error was raised from, or none.

    A lack of memory, which libraries report in many ways, and which looks like a damaged file to what reads one, gives
    a :class:`LowMemoryError` that says what to lower; an error of the system about a file or a full disk an
    :class:`OutputError` that names it; a package that is not installed a :class:`SettingError` that says how to get it.
    Libraries that put another error's traceback into their own message (a DataLoader's worker, MONAI's ``SaveImage``)
    are read too.
    """
    found: MedSAError | None = None
    seen: set[int] = set()  # "raise cause from None" where the cause is handled: each stands in the other's chain
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MedSAError):
            found = found or error
        elif is_lack_of_memory(error):
            return LowMemoryError(f"There is not enough memory ({describe(error)}). {_LESS_MEMORY}")
        elif found is None:
            found = _quoted(error) or _system_error(error) or _missing_package(error)
        error = error.__cause__ or error.__context__
    return found


def _quoted(error: BaseException) -> MedSAError | None:
    """The error of this package, or of the system, whose traceback stands in another one's message."""
    text = str(error)
    if "Traceback (most recent call last)" not in text:
        return None
    for line in reversed(text.splitlines()):
        match = re.match(r"(?:medsa_nets\.errors\.)?(\w+): (.*)", line)
        if match is None:
            continue
        name, said = match.groups()
        kind = globals().get(name) if line.startswith("medsa_nets.errors.") else None
        if isinstance(kind, type) and issubclass(kind, MedSAError):
            return kind(said)
        system = re.match(r"\[Errno (\d+)\] ([^:]*)(?:: '(.*)')?$", said)
        if system is not None:
            code, reason, path = system.groups()
            return _system_error(OSError(int(code), reason, path) if path else OSError(int(code), reason))
    return None


def _system_error(error: BaseException) -> OutputError | None:
    """What the system said of a file, or of a disk that is full, as an error that says what to do."""
    if not isinstance(error, OSError) or error.errno not in CANNOT_WRITE:
        return None
    if error.filename is None and error.errno not in _FULL:
        return None
    place = str(error.filename) if error.filename is not None else " or ".join(output_folders) or "output"
    return OutputError(
        f"{place}: it can't be used ({error.strerror}). Make room there, change its permissions, or name another "
        "folder (--output_dir, --ckpt_dir)."
    )


def _missing_package(error: BaseException) -> SettingError | None:
    """How to get a package that an option needs."""
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").split(".")[0]
    elif type(error).__name__ == "OptionalImportError":  # of MONAI
        match = re.search(r"No module named '([\w.]+)'|import (\w+)", str(error))
        name = next((group for group in match.groups() if group), "").split(".")[0] if match else ""
    else:
        return None
    if not name or name == "medsa_nets":
        return None
    return SettingError(
        f"{name} is not installed, and a setting of this run needs it. Install it with: pip install "
        f"{_INSTALL.get(name, name)}"
        + (", or leave --tracking out." if name == "mlflow" else ", or leave that setting out.")
    )


def describe(error: BaseException) -> str:
    """Kind of an error and the first line of what it says, to be quoted in another error's line."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])  # some have no text


def print_anything() -> None:
    """Let standard output and error take every character, escaped where the locale (``LC_ALL=C``) has none for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def report_plainly() -> None:
    """End this process with one line, not a traceback, where an error of this package stops it.

    The engine around a bundle wraps errors in errors; users need the one that names their file. Every other error is
    shown in full, and so is every one where the environment variable ``MONAI_DEBUG`` is set. MONAI's note of a decoder
    of DICOM on GPUs that is not there, which each of its readers repeats, is left out.
    """
    print_anything()
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader: nvImageCodec decoder plugin did not register")
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
