from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from medsa_nets.errors import (
    BackendError,
    DataError,
    LowMemoryError,
    MedSAError,
    OutputError,
    SettingError,
    WeightsError,
    find_cause,
)

from .forks import Forks

ENGINE = """
from medsa_nets.errors import DataError, WeightsError, report_plainly
report_plainly()

class Engine:
    def run(self):
        try:
            {action}
        except {caught} as error:
            raise RuntimeError("applying transform LoadImaged") from error

try:
    Engine().run()
except RuntimeError as error:
    raise RuntimeError("bundle failed") from error
"""
WORKERS = """
from monai.data import DataLoader
from monai.transforms import Compose, LoadImaged
from medsa_nets.data import PhotographReader, SeededDataset
from medsa_nets.errors import report_plainly
report_plainly()
load = Compose([LoadImaged("image", reader=PhotographReader())])
list(DataLoader(SeededDataset([{{"image": "{path}"}}], load), batch_size=1, num_workers={workers}))
"""
PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def forked(forks: Forks, code: str, **environment: str) -> subprocess.CompletedProcess:
    return forks.run(["-c", code], timeout=300, **{"MONAI_DEBUG": "0", **environment})


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("kind", ["DataError", "WeightsError"])
def test_an_error_of_the_package_is_one_line(forks, kind):
    result = forked(forks, ENGINE.format(action=f"raise {kind}('a.jpg: not readable; replace it.')", caught=kind))
    assert result.returncode == 1
    assert lines(result.stderr) == ["error: a.jpg: not readable; replace it."]
    assert result.stdout == ""


def test_an_unrelated_error_keeps_its_traceback(forks):
    result = forked(forks, ENGINE.format(action="{}['missing']", caught="KeyError"))
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "KeyError: 'missing'" in result.stderr
    assert "error: " not in [line[:7] for line in lines(result.stderr)]


def test_debugging_shows_everything(forks):
    result = forked(forks, ENGINE.format(action="raise DataError('a.jpg')", caught="DataError"), MONAI_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "medsa_nets.errors.DataError: a.jpg" in result.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_data_loader_is_one_line_too(forks, tmp_path, workers):
    path = tmp_path / "lesion.jpg"
    path.write_bytes(b"")
    result = forked(forks, WORKERS.format(path=path, workers=workers))
    assert result.returncode == 1
    errors = [line for line in lines(result.stderr) if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {path}: not readable as an image")
    assert "Traceback" not in result.stderr


def test_the_cause_is_found_however_deep_it_lies():
    cause, context, outer = DataError("deep"), KeyError("in between"), RuntimeError("outer")
    context.__context__ = cause  # raised while the other was handled
    outer.__cause__ = context  # raise … from …
    assert find_cause(outer) is cause
    assert find_cause(cause) is cause
    assert find_cause(ValueError("unrelated")) is None
    assert find_cause(None) is None


@pytest.mark.timeout(60)
def test_the_search_for_the_cause_ends_where_a_chain_runs_in_a_circle():
    cause = DataError("damaged")

    def unwrap() -> None:  # as a dataset does, which takes the wrapping of MONAI off
        try:
            raise RuntimeError("applying transform") from cause
        except RuntimeError:
            raise cause from None

    with pytest.raises(DataError) as caught:
        unwrap()
    assert caught.value.__context__.__cause__ is caught.value
    assert find_cause(caught.value) is cause
    assert find_cause(raised(RuntimeError("outer"), caught.value)) is cause


@pytest.mark.parametrize(
    ("kind", "base"), [(BackendError, RuntimeError), (DataError, ValueError), (WeightsError, RuntimeError)]
)
def test_errors_are_caught_by_their_general_kind_too(kind, base):
    assert issubclass(kind, MedSAError)
    assert issubclass(kind, base)


def raised(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("Failed to allocate memory for image."),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    ],
    ids=lambda error: str(error)[:20] or type(error).__name__,
)
def test_a_lack_of_memory_says_what_to_lower(error):
    for shown in (error, raised(RuntimeError("applying transform"), error), raised(DataError("not readable"), error)):
        cause = find_cause(shown)
        assert isinstance(cause, LowMemoryError)
        assert "--slab_depth" in str(cause)
        assert "--batch_size" in str(cause)
    assert find_cause(RuntimeError("shapes differ")) is None


def test_memory_that_torch_can_not_have_ends_in_one_line(forks):
    pytest.importorskip("resource")
    code = (
        "import resource, torch; from medsa_nets.errors import report_plainly; report_plainly()\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30,) * 2)\n"
        "torch.zeros(2 * 2**30, dtype=torch.float64)"
    )
    result = forked(forks, code)
    assert result.returncode == 1
    assert len(lines(result.stderr)) == 1
    assert "not enough memory" in result.stderr


def test_names_that_the_locale_has_no_characters_for_are_printed_all_the_same():
    code = (
        "from medsa_nets.errors import DataError, report_plainly; report_plainly()\n"
        "print('M\\u00fcller.nii')\n"
        "raise DataError('M\\u00fcller.nii: damaged.')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MONAI_DEBUG": "0", **PLAIN_LOCALE}, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "M\\xfcller.nii" in result.stdout
    assert "M\\xfcller.nii: damaged." in result.stderr
    assert "UnicodeEncodeError" not in result.stderr


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/out/a.csv"), "/out/a.csv: "),
        (FileExistsError(errno.EEXIST, "File exists", "/out"), "/out: "),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/file/out"), "/file/out: "),
        (OSError(errno.ENOSPC, "No space left on device"), "/results or /models: "),
        (OSError(errno.EROFS, "Read-only file system", "/out/log"), "/out/log: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_can_not_be_written_is_named_with_its_cause(monkeypatch, error, named):
    monkeypatch.setattr("medsa_nets.errors.output_folders", ["/results", "/models"])
    for shown in (error, raised(RuntimeError("Failed to evaluate ConfigExpression"), error)):
        cause = find_cause(shown)
        assert isinstance(cause, OutputError)
        assert str(cause).startswith(named)
        assert error.strerror in str(cause)
        assert "--output_dir" in str(cause)
    assert find_cause(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) is None
    assert find_cause(PermissionError(errno.EACCES, "Permission denied")) is None  # of no file


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("medsa_nets.errors.OutputError: /out/a.png: it can't be written (File too large).", "/out/a.png: it"),
        ("OSError: [Errno 28] No space left on device: '/out/a.png'", "/out/a.png: it can't be used (No space left on"),
        ("PermissionError: [Errno 13] Permission denied: '/out'", "/out: it can't be used (Permission denied)"),
    ],
)
def test_an_error_that_a_library_has_put_into_its_own_message_is_found(line, expected):
    text = f"SaveImage cannot find a suitable writer.\nTraceback (most recent call last):\n  File x\n{line}\n"
    cause = find_cause(raised(RuntimeError("Failed to evaluate ConfigExpression"), RuntimeError(text)))
    assert isinstance(cause, OutputError)
    assert str(cause).startswith(expected)
    assert find_cause(RuntimeError(line)) is None  # no traceback: what it says is its own


def test_a_package_that_is_not_installed_is_named_with_how_to_get_it():
    from monai.utils import OptionalImportError, optional_import

    try:
        import medsa_no_such_package  # noqa: F401
    except ModuleNotFoundError as error:
        own = find_cause(raised(RuntimeError("Failed to instantiate"), error))
    assert isinstance(own, SettingError)
    assert "pip install medsa_no_such_package" in str(own)
    mlflow, _ = optional_import("mlflow.no_such_module")
    with pytest.raises(OptionalImportError) as caught:
        mlflow.set_tracking_uri("")
    cause = find_cause(raised(RuntimeError("Failed to instantiate"), caught.value))
    assert isinstance(cause, SettingError)
    assert "mlflow" in str(cause)
    assert "pip install 'medsa[mlflow]'" in str(cause)
    assert "--tracking" in str(cause)


def test_a_reader_does_not_speak_of_decoders_that_nobody_asked_for(forks):
    code = "from monai.transforms import LoadImage; LoadImage()"
    said = forked(forks, f"from medsa_nets.errors import report_plainly; report_plainly()\n{code}")
    assert said.returncode == 0
    assert "nvImageCodec" not in said.stderr
