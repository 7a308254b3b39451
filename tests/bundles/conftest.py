"""Fixtures that the bundles' tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def cli(request: pytest.FixtureRequest) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m monai.bundle ARGUMENTS --OPTION VALUE`` in the bundle that the test module is about.

    ``processes`` starts as many with torchrun, on the CPU.
    """

    def call(
        *arguments: str, cwd: Path | None = None, processes: int = 1, **options: object
    ) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "monai.bundle", *arguments]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if processes > 1 else None
        folder = cwd or request.module.BUNDLE
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)

    return call
