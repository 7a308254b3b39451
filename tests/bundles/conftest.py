"""Fixtures that the bundles' tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..forks import Forks


@pytest.fixture
def cli(request: pytest.FixtureRequest, forks: Forks) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m monai.bundle ARGUMENTS --OPTION VALUE`` in the bundle that the test module is about.

    ``processes`` starts as many with torchrun, on the CPU.
    """

    def call(
        *arguments: str, cwd: Path | None = None, processes: int = 1, **options: object
    ) -> subprocess.CompletedProcess[str]:
        folder = cwd or request.module.BUNDLE
        told = [*arguments, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
        if processes == 1:
            return forks.run(["-m", "monai.bundle", *told], folder)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, "-m", "monai.bundle", *told]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)

    return call
