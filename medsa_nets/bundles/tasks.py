"""Facts of a task, which stand once in a bundle, in ``configs/tasks/NAME.yaml``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from yaml import YAMLError

from medsa_nets.errors import DataError

LIKE = "like"


class Facts(dict[str, Any]):
    """Facts of a task by name; one that is asked for and missing is an error that names the file.

    Args:
        facts: the facts.
        source: file that they come from.
    """

    def __init__(self, facts: Mapping[str, Any], source: Path) -> None:
        super().__init__(facts)
        self.source = source

    def __missing__(self, name: str) -> Any:
        raise DataError(f"{self.source}: it does not say {name!r}, which this bundle's configurations ask for. Add it.")


def read_task(task: str, bundle_root: str | Path) -> Facts:
    """Read the facts of a task: its classes, their codes, its grid, intensities, slabs, and the adapter's form.

    A file may begin with another one's facts (``like: btcv``) and say only what differs.

    Args:
        task: name of a file of the bundle's ``configs/tasks``, without its suffix.
        bundle_root: folder of the bundle. Where it has no such file, the folders on Python's path are looked through:
            ``monai.bundle run`` puts the bundle's there, wherever it is started.

    Returns:
        The facts by name.

    Raises:
        DataError: when there is no such task, its file can't be read, or tasks are like each other in a circle.
    """
    folders = [Path(root) / "configs" / "tasks" for root in (bundle_root, *sys.path)]
    folder = next((folder for folder in folders if (folder / f"{task}.yaml").is_file()), None)
    if folder is None:
        there = sorted(path.stem for path in folders[0].glob("*.yaml"))
        known = f"There is {', '.join(there)}." if there else "Pass the bundle's folder (--bundle_root)."
        raise DataError(f"task {task!r}: there is no file {folders[0] / f'{task}.yaml'}. {known}")
    return Facts(_read(folder, task, ()), folder / f"{task}.yaml")


def _read(folder: Path, task: str, before: tuple[str, ...]) -> dict[str, Any]:
    path = folder / f"{task}.yaml"
    if task in before:
        raise DataError(f"{path}: tasks are like each other in a circle ({' -> '.join([*before, task])}).")
    try:
        facts = ConfigParser.load_config_file(str(path))
    except (OSError, ValueError, YAMLError) as error:
        raise DataError(f"{path}: the facts of the task can't be read ({error}).") from error
    if not isinstance(facts, dict):
        raise DataError(f"{path}: expected names with values, as 'classes: [lesion]'.")
    like = facts.pop(LIKE, None)
    return facts if like is None else {**_read(folder, str(like), (*before, task)), **facts}
