"""Fixtures that the bundles' tests share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ..forks import Forks


@pytest.fixture
def cli(request: pytest.FixtureRequest, forks: Forks) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m monai.bundle ARGUMENTS --OPTION VALUE`` in the bundle that the test module is about.

    ``processes`` run it together on the CPU, as torchrun starts them.
    """

    def call(
        *arguments: str, cwd: Path | None = None, processes: int = 1, **options: object
    ) -> subprocess.CompletedProcess[str]:
        told = [*arguments, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
        on_cpu = {"CUDA_VISIBLE_DEVICES": ""} if processes > 1 else {}
        return forks.run(["-m", "monai.bundle", *told], cwd or request.module.BUNDLE, processes=processes, **on_cpu)

    return call
