"""Fixtures that the bundles' tests share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def cli(request: pytest.FixtureRequest) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m monai.bundle ARGUMENTS --OPTION VALUE`` in the bundle that the test module is about."""

    def call(*arguments: str, cwd: Path | None = None, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "monai.bundle", *arguments]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        return subprocess.run(command, cwd=cwd or request.module.BUNDLE, capture_output=True, text=True, timeout=600)

    return call
