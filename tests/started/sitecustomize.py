"""What a process that tests start does first: it lacks what ``MEDSA_TEST_LACKS`` names, and knows the base of tests.

MONAI imports some large packages wherever they are, for parts of it that nothing here uses: a third of its time. The
base (``small_base``, where it is on the path) is added once the package is imported, which many processes never do.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

BASES = "medsa_nets.weights.bases"


class AddBase(importlib.abc.MetaPathFinder):
    """Imports ``small_base`` after the table of bases."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != BASES:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        execute = found.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            import small_base  # noqa: F401

        found.loader.exec_module = execute_and_add
        return found


for lacking in os.environ.get("MEDSA_TEST_LACKS", "").split():
    sys.modules.setdefault(lacking, None)  # type: ignore[arg-type]
if importlib.util.find_spec("small_base") is not None:
    if BASES in sys.modules:
        import small_base  # noqa: F401
    else:
        sys.meta_path.insert(0, AddBase())
