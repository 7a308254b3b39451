from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medsa_nets import machine
from medsa_nets.machine import limit_threads, usable_cpus, usable_memory
from medsa_nets.weights import weights_dir

PACKAGE = Path(machine.__file__).parent
CONFIGS = PACKAGE.parent / "bundles/medsa_isic/configs/inference.yaml"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


@pytest.fixture
def host(monkeypatch):
    """A host of 64 processors, all open to this process."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 64),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/on/the/host", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/a\n1:memory:/a", "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "200000",
          "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 2),
        ({"proc/self/cgroup": "3:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
)  # fmt: skip
def test_processors_follow_the_limit_of_a_container(host, tmp_path, files, expected):
    assert usable_cpus(write(tmp_path, files)) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": "1000000", "sys/fs/cgroup/a/b/memory.max": "max"},
        {"proc/self/cgroup": "4:memory:/a", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000000"},
    ],
)
def test_memory_follows_the_limit_of_a_container(tmp_path, files):
    assert usable_memory(tmp_path) > 1000000
    assert usable_memory(write(tmp_path, files)) == 1000000


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])  # ulimit -v, ulimit -d
def test_memory_follows_ulimit(forks, limit):
    pytest.importorskip("resource", reason="Windows has no ulimit")
    code = (
        f"import resource; resource.setrlimit(resource.{limit}, (6144000000, 6144000000))\n"
        "from medsa_nets.machine import usable_memory; print(usable_memory())"
    )
    assert forks.run(["-c", code]).stdout.split()[-1] == "6144000000"


def test_processors_follow_the_affinity(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}
    assert usable_cpus(write(tmp_path, files)) == 1


@pytest.mark.parametrize(
    ("usable", "set_before", "variable", "expected"), [(2, 8, "", 2), (2, 1, "", 1), (2, 8, "8", 8)]
)
def test_threads_follow_the_limit_unless_the_user_chose(monkeypatch, usable, set_before, variable, expected):
    for name in machine.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(machine, "usable_cpus", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(set_before)
        assert limit_threads() == torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_text_files_name_their_encoding():
    """Else what they hold depends on the user's locale."""
    unnamed = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node) and "encoding" not in {k.arg for k in node.keywords}:
                unnamed.append(f"{path}:{node.lineno}")
    assert not unnamed


def opens_text(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ("read_text", "write_text")
    mode = [a.value for a in [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
            if isinstance(a, ast.Constant)]  # fmt: skip
    return isinstance(call.func, ast.Name) and call.func.id == "open" and "b" not in "".join(mode)


def test_configurations_are_ascii():
    """MONAI reads them in the locale's encoding."""
    for path in (PACKAGE.parent / "bundles").glob("*/configs/**/*"):
        assert path.is_dir() or path.read_bytes().isascii(), path


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_a_home_that_is_absent_and_a_plain_locale_break_nothing(home, tmp_path):
    """The package imports, a bundle's network is built, and its adapter is saved and read."""
    code = (
        "from monai.bundle import ConfigParser\n"
        "import medsa_nets\n"
        "from medsa_nets.training import save_atomically\n"
        f"parser = ConfigParser(); parser.read_config({str(CONFIGS)!r})\n"
        f"parser['bundle_root'] = {str(CONFIGS.parent.parent)!r}\n"
        "parser['network_def#pretrained'] = False\n"
        "parser.get_parsed_content('initialize')\n"
        "network = parser.get_parsed_content('network')\n"
        "path = save_atomically(network.state_dict(), 'adapter.pt')\n"
        "medsa_nets.weights.check_adapter(path); print(medsa_nets.weights.weights_dir())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "USERPROFILE", "XDG_CACHE_HOME")}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    environment |= {"HOME": home} if home else {}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "adapter.pt").is_file()


def test_a_user_whom_the_system_does_not_know_has_a_folder_for_weights(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEDSA_WEIGHTS_DIR", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert weights_dir().name == "medsa"
