"""What would break on Windows or macOS and can be seen from here: names in the code, and workers that are spawned."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run

from medsa_nets.data.phantoms import write_phantoms

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "medsa_nets").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

POSIX_MODULES = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    "os": {"fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "killpg", "setsid", "nice", "mkfifo", "uname",
           "chown", "sched_getaffinity", "sysconf", "getloadavg", "statvfs", "symlink", "wait"},
    "signal": {"SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "alarm"},
    "socket": {"AF_UNIX"},
}  # fmt: skip
PROCESS_OPTIONS = {"preexec_fn", "start_new_session", "process_group", "pass_fds"}
ABSOLUTE = re.compile(r"^((/tmp|/dev|/proc|/sys|/etc|/usr|/home)(/|$)|[A-Za-z]:\\)")


def traps(source: str) -> Iterator[tuple[int, str]]:
    """Lines of a module that hold what one of the systems lacks, and what it is.

    What stands in a ``try`` that catches its absence is left out, and lines that say why they are ``# portable:``.
    """
    lines, tree = source.splitlines(), ast.parse(source)
    caught: dict[ast.AST, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            names = {name.id for handler in node.handlers if handler.type is not None
                     for name in ast.walk(handler.type) if isinstance(name, ast.Name)}  # fmt: skip
            for inner in (inner for statement in node.body for inner in ast.walk(statement)):
                caught[inner] = caught.get(inner, set()) | names
    for node in ast.walk(tree):
        found = trap(node)
        if found and absence(found) not in caught.get(node, ()) and "# portable:" not in lines[node.lineno - 1]:
            yield node.lineno, found


def absence(found: str) -> str:
    """The error that a trap raises on a system that lacks what it names."""
    if found.startswith("module"):
        return "ImportError"
    if found.startswith("CDLL"):
        return "TypeError"
    return "OSError" if found.endswith("of one system") else "AttributeError"


def trap(node: ast.AST) -> str:
    """What is wrong with a piece of code, or nothing."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if absent := POSIX_MODULES & {name.split(".")[0] for name in names}:
            return f"module {absent.pop()}: POSIX alone"
        if isinstance(node, ast.ImportFrom) and POSIX_NAMES.get(node.module or "", set()) & {
            a.name for a in node.names
        }:
            return f"from {names[0]}: a name of POSIX alone"
    if isinstance(node, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if node.attr in POSIX_NAMES.get(owner, ()):
            return f"{owner}.{node.attr}: POSIX alone"
        if node.attr in ("symlink_to", "hardlink_to"):
            return f"{node.attr}: needs a privilege on Windows; copy"
        if owner == "os" and node.attr == "rename":
            return "os.rename: fails on Windows where the target exists; os.replace"
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "rename" and isinstance(node.func, ast.Attribute):
            return "rename: fails on Windows where the target exists; replace"
        if name in ("get_context", "set_start_method") and any(
            isinstance(a, ast.Constant) and a.value in ("fork", "forkserver") for a in node.args
        ):
            return f"{name}: fork is POSIX alone"
        if name == "CDLL" and node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value is None:
            return "CDLL(None): no library of that name on Windows"
        if name == "NamedTemporaryFile" and not any(keyword.arg == "delete" for keyword in node.keywords):
            return "NamedTemporaryFile: can't be opened again on Windows before it is closed"
        if found := PROCESS_OPTIONS & {keyword.arg for keyword in node.keywords}:
            return f"{found.pop()}: POSIX alone"
        if name == "chmod":
            return "chmod: Windows knows read-only alone"
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and ABSOLUTE.match(node.value):
        return f"{node.value!r}: a path of one system"
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else ()
    if any(isinstance(side, ast.Constant) and side.value in ("/", "\\") for side in sides):
        return "a path joined by +: pathlib"
    return ""


@pytest.mark.parametrize("path", [*PACKAGE, ROOT / "make.py"], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_package_has_nothing_that_one_of_the_systems_lacks(path: Path) -> None:
    assert list(traps(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_test_stops_the_collection_on_windows(path: Path) -> None:
    top = ast.Module(body=ast.parse(path.read_text(encoding="utf-8")).body, type_ignores=[])
    imports = [node for node in top.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [found for node in imports if (found := trap(node))] == []


@pytest.mark.parametrize(
    "line",
    ["import fcntl", "from os import fork", "os.fork()", "os.sysconf('SC_PAGE_SIZE')", "ctypes.CDLL(None)",
     "os.kill(pid, signal.SIGKILL)", "open('/tmp/a')", "os.rename(a, b)", "path.rename(b)", "folder + '/' + name",
     "get_context('fork')", "NamedTemporaryFile(suffix='.nii')", "Popen(a, start_new_session=True)",
     "path.symlink_to(other)", "import resource as r", "try:\n    os.fork()\nexcept OSError:\n    pass",
     "try:\n    open('/proc/cpuinfo')\nexcept KeyError:\n    pass"],
)  # fmt: skip
def test_each_trap_is_seen(line: str) -> None:
    assert list(traps(line))


def test_files_of_the_repository_have_names_that_windows_takes() -> None:
    reserved = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
    folders = ("medsa_nets", "tests", "bundles")
    names = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*")]
    assert [name for name in names if re.search(r'[<>:"\\|?*]|[ .](/|$)', name)] == []
    assert [name for name in names if any(reserved.match(part) for part in name.split("/"))] == []
    assert len({name.lower() for name in names}) == len(set(names))


@pytest.mark.parametrize(("bundle", "files"), [("medsa_isic", ["train"]), ("medsa_btcv", ["train"]),
                                               ("medsa_btcv", ["train", "hippocampus"])])  # fmt: skip
def test_what_workers_are_given_can_be_sent_to_them(tmp_path: Path, bundle: str, files: list[str]) -> None:
    """Windows and macOS start workers anew and send them the dataset; a lambda in a configuration can't be sent."""
    folder = ROOT / "bundles" / bundle
    if bundle == "medsa_isic":
        write_phantoms(tmp_path, training=1, validation=1, size=32)
    else:
        for name in ("imagesTr", "labelsTr"):
            (tmp_path / name).mkdir()
            for i in range(2):
                nib.save(nib.Nifti1Image(np.zeros((8, 8, 4), np.uint8), np.eye(4)), tmp_path / name / f"{i}.nii.gz")
        cases = [f'{{"image": "imagesTr/{i}.nii.gz", "label": "labelsTr/{i}.nii.gz"}}' for i in range(2)]
        (tmp_path / "dataset_0.json").write_text(
            f'{{"training": [{cases[0]}], "validation": [{cases[1]}]}}', encoding="utf-8"
        )
    parser = ConfigParser(ConfigParser.load_config_files([str(folder / "configs" / f"{name}.yaml") for name in files]))
    parser.update({"bundle_root": str(folder), "dataset_dir": str(tmp_path), "cache": "none"})
    for part in ("train", "validate"):
        loader = parser.get_parsed_content(f"{part}#dataloader")
        assert len(loader.dataset) == 1
        ForkingPickler.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn))


@pytest.fixture
def spawn() -> Iterator[None]:
    """Processes start as on Windows and macOS, where none is a copy of its parent."""
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    yield
    torch.multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("lite_medsam_file", "spawn")
def test_a_bundle_trains_with_workers_that_are_spawned(tmp_path: Path) -> None:
    folder = ROOT / "bundles" / "medsa_isic"
    data = write_phantoms(tmp_path / "data", training=2, validation=1, size=32)
    run("training", config_file=str(folder / "configs" / "train.yaml"), bundle_root=str(folder),
        meta_file=str(folder / "configs" / "metadata.json"), dataset_dir=str(data), ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "out"), image_size=64, batch_size=2, max_epochs=1, num_workers=1, samples_interval=0,
        amp=False)  # fmt: skip
    assert (tmp_path / "models" / "model.pt").is_file()
    assert "val_mean_dice" in (tmp_path / "out" / "training.log").read_text(encoding="utf-8")
