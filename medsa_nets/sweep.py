"""Train a bundle with several settings, one run after the other or on a Dask cluster, and compare what they reach.

    python -m medsa_nets sweep --config_file configs/train.yaml --dataset_dir DATA --output_dir SWEEP \\
        --vary "{learning_rate: [0.001, 0.0003], adapter_dim: [8, 32]}" --max_epochs 5

trains each combination (here four) in a folder of its own, ``SWEEP/runs/NAME``: its adapter in ``models``, its log in
``eval``. ``--draws 8`` trains eight random combinations instead; a value may then also come from a range, as
``{learning_rate: {low: 0.0001, high: 0.01, log: true}}``. After a kill, the same command goes on: a run that ended is
not repeated, one that was cut goes on from its last epoch. ``SWEEP/sweep.csv``, ``sweep.md`` and ``sweep.png`` list and
draw the best validation of each run. Every other option overrides a setting of the configuration for all runs.

``--workers 4`` trains in four processes, ``--scheduler tcp://HOST:8786`` on the workers of a Dask cluster; data, bundle
and output folder must lie at one path on all machines.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import itertools
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.utils import str2bool
from PIL import Image, ImageDraw

from medsa_nets.bundles import Bundle, read
from medsa_nets.cluster import connect
from medsa_nets.commands import command_with_settings
from medsa_nets.data.atomic import make_folder, make_writable, temporary_name
from medsa_nets.errors import SettingError, describe, find_cause

logger = logging.getLogger(__name__)
OWN = ("bundle_root", "ckpt_dir", "output_dir", "resume")  # settings that each run gets from the sweep
COLUMNS = ("run", "status", "metric", "best", "epoch", "seconds", "message")  # beside the settings that vary
RESULT = "result.json"  # in the folder of a run that ended
RANGE = {"low", "high", "log"}


def combinations(vary: Mapping[str, Any], draws: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """The settings of each run.

    Args:
        vary: settings, each with a list of values or, for draws, a range: ``low``, ``high`` and, if the logarithm is to
            be uniform, ``log``.
        draws: number of random combinations; 0 takes the grid of all.
        seed: of the draws.

    Raises:
        SettingError: when a setting has neither values nor a range, or a grid has a range.
    """
    if not isinstance(vary, Mapping) or not vary:
        raise SettingError(
            f'--vary: expected settings with values, as "{{learning_rate: [0.001, 0.01]}}", got {vary!r}.'
        )
    for name, values in vary.items():
        if isinstance(values, Mapping):
            _check_range(name, values, draws)
        elif not isinstance(values, (list, tuple)) or not values:
            raise SettingError(f"--vary: {name} needs a list of values or a range, got {values!r}.")
    if draws < 0:
        raise SettingError(f"--draws must be 0 (the grid) or more, got {draws}.")
    if not draws:
        return [dict(zip(vary, values)) for values in itertools.product(*vary.values())]
    generator = random.Random(seed)
    return [{name: _draw(values, generator) for name, values in vary.items()} for _ in range(draws)]


def _check_range(name: str, values: Mapping[str, Any], draws: int) -> None:
    low, high = values.get("low", math.nan), values.get("high", math.nan)
    if set(values) - RANGE or not all(isinstance(end, (int, float)) for end in (low, high)) or not low < high:
        raise SettingError(f"--vary: the range of {name} needs low < high (and log, if wanted), got {dict(values)}.")
    if str2bool(values.get("log", False)) and low <= 0:
        raise SettingError(f"--vary: the logarithm of {name} needs low above 0, got {low}.")
    if not draws:
        raise SettingError(f"--vary: {name} has a range; a grid needs a list of values. Pass --draws for random ones.")


def _draw(values: Any, generator: random.Random) -> Any:
    if not isinstance(values, Mapping):
        return generator.choice(list(values))
    low, high = values["low"], values["high"]
    if str2bool(values.get("log", False)):
        found = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        found = generator.uniform(low, high)
    whole = isinstance(low, int) and isinstance(high, int)
    return round(found) if whole else float(f"{found:.4g}")


def sweep(
    *,
    config_file: str | Sequence[str],
    dataset_dir: str,
    output_dir: str,
    vary: Mapping[str, Any],
    draws: int = 0,
    draw_seed: int = 0,
    meta_file: str | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train a bundle with each combination of settings, see this module's text.

    Args:
        config_file: a bundle's ``train.yaml``, or a list of it and overlays.
        dataset_dir: the data, as the bundle takes them.
        output_dir: folder of the runs and of what compares them.
        vary: see :func:`combinations`.
        draws: number of random combinations; 0 takes the grid of all.
        draw_seed: of the draws.
        meta_file: the bundle's metadata; none takes ``metadata.json`` beside the first configuration.
        workers: processes on this machine, where no scheduler is named; 1 trains in this one.
        scheduler: address of a Dask scheduler.
        settings: override the configuration's, for all runs.

    Returns:
        A row for each run, the best first: what varied and :data:`COLUMNS`. ``status`` is ``done``, ``skipped`` (ended
        in an earlier sweep) or ``failed``.

    Raises:
        SettingError: when a name is none of the configuration's, or values can't be combined; before the first run.
        ClusterError: when Dask is missing, or no scheduler answers.
    """
    if workers < 1:
        raise SettingError(f"--workers must be 1 or more, got {workers}.")
    wanted = combinations(vary, draws, draw_seed)
    files = [config_file] if isinstance(config_file, str) else list(config_file)
    _check_names(Bundle.of_files(files, {}, meta_file), [*vary, *settings])
    data = os.path.abspath(Path(dataset_dir).expanduser())
    out = Path(output_dir).expanduser().resolve()
    make_writable(out, "--output_dir")
    runs: dict[str, tuple[dict[str, Any], Bundle]] = {}
    for values in wanted:
        bundle = Bundle.of_files(files, {**settings, "dataset_dir": data, **values}, meta_file)
        text = json.dumps(bundle.config, sort_keys=True, default=str)
        runs.setdefault(hashlib.sha256(text.encode()).hexdigest()[:12], (values, bundle))
    rows = {name: _known(out / "runs" / name) for name in runs}
    waiting = [name for name, row in rows.items() if row is None]
    arguments = {name: (runs[name][1].whole(), runs[name][1].metadata, str(out / "runs" / name)) for name in waiting}
    if workers == 1 and scheduler is None:
        for name in waiting:
            rows[name] = train_run(*arguments[name])
            _write(_ordered(rows, runs), list(vary), out)
    elif waiting:
        _train_on_cluster(arguments, rows, min(workers, len(waiting)), scheduler)
    ordered = _ordered(rows, runs)
    _write(ordered, list(vary), out)
    return ordered


def _check_names(bundle: Bundle, names: Sequence[str]) -> None:
    parser = bundle.parser()
    for name in names:
        if name in OWN:
            raise SettingError(f"{name} is each run's own: it can be neither varied nor set in a sweep.")
        if name not in parser:
            near = difflib.get_close_matches(name, bundle.config, 3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise SettingError(f"There is no setting {name!r} in {bundle.source}'s configuration.{hint}")


def _known(folder: Path) -> dict[str, Any] | None:
    """What a run gave that ended in an earlier sweep."""
    try:
        return {**json.loads((folder / RESULT).read_text(encoding="utf-8")), "status": "skipped"}
    except (FileNotFoundError, ValueError):
        return None


def train_run(config: dict[str, Any], meta: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train once, or go on with what was cut; what goes wrong is part of the answer.

    Args:
        config: configuration of the bundle's training.
        meta: the bundle's metadata.
        folder: of the run.

    Returns:
        Some of :data:`COLUMNS`.
    """
    place, start = make_folder(folder), time.perf_counter()
    own = {"ckpt_dir": str(place / "models"), "output_dir": str(place / "eval"), "resume": True}
    parser = Bundle({**config, **own}, meta).parser()
    row: dict[str, Any] = {"status": "done", "metric": "", "best": None, "epoch": None, "message": ""}
    try:
        if "initialize" in parser:
            parser.get_parsed_content("initialize")
        read(parser, "training")
        state = parser.get_parsed_content("validate#evaluator").state
        if state.best_metric_epoch >= 0:  # -1: nothing was validated
            row |= {"metric": state.key_metric_name, "best": float(state.best_metric), "epoch": state.best_metric_epoch}
    except Exception as error:  # of any library: one run must not stop the others
        logger.debug("%s failed", place, exc_info=True)
        row |= {"status": "failed", "message": str(find_cause(error) or describe(error))}
    row["seconds"] = round(time.perf_counter() - start, 1)
    if row["status"] == "done":
        with temporary_name(place / RESULT) as part:
            part.write_text(json.dumps(row), encoding="utf-8")
    return row


def _train_on_cluster(
    arguments: Mapping[str, tuple[dict[str, Any], dict[str, Any], str]],
    rows: dict[str, dict[str, Any] | None],
    workers: int,
    scheduler: str | None,
) -> None:
    client, cluster = connect(workers, scheduler)
    from distributed import as_completed

    try:  # a worker's process may start no others, for reading data either
        futures = {
            client.submit(train_run, {**config, "num_workers": 0}, meta, folder, pure=False): name
            for name, (config, meta, folder) in arguments.items()
        }
        for future in as_completed(futures):
            lost = future.exception()
            message = f"its worker was lost each time it was tried ({describe(lost)})" if lost else ""
            rows[futures[future]] = {"status": "failed", "message": message} if lost else future.result()
    finally:
        client.close()
        if cluster is not None:
            cluster.close()


def _ordered(
    rows: Mapping[str, dict[str, Any] | None], runs: Mapping[str, tuple[dict[str, Any], Bundle]]
) -> list[dict[str, Any]]:
    """Rows of the runs that ended, the best first, those without a figure last."""
    found = [{**dict.fromkeys(COLUMNS, ""), **runs[name][0], "run": name, **row} for name, row in rows.items() if row]
    return sorted(found, key=lambda row: math.inf if row["best"] in (None, "") else -row["best"])


def _write(rows: Sequence[Mapping[str, Any]], varied: Sequence[str], out: Path) -> None:
    """Write the tables and the plot."""
    columns = [*varied, *COLUMNS]
    with temporary_name(out / "sweep.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    shown = [[_text(row[name]) for name in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *shown]
    with temporary_name(out / "sweep.md") as part:
        part.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
    with temporary_name(out / "sweep.png") as part:
        draw(rows, varied).save(part, format="PNG")


def _text(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def draw(rows: Sequence[Mapping[str, Any]], varied: Sequence[str], side: int = 320) -> Image.Image:
    """A panel for each setting that varied: its values along, the best validation of each run above.

    Args:
        rows: of :func:`sweep`.
        varied: names of the settings.
        side: of a panel, in pixels.
    """
    rows = [row for row in rows if isinstance(row["best"], float)]
    picture = Image.new("RGB", (side * len(varied), side), "white")
    pen, margin = ImageDraw.Draw(picture), 44
    bests = [row["best"] for row in rows] or [0.0]
    low, high = min(bests), max(bests)
    span = (high - low) or 1.0
    for panel, name in enumerate(varied):
        left, right, top, bottom = side * panel + margin, side * (panel + 1) - 12, 28, side - margin
        pen.rectangle((left, top, right, bottom), outline="gray")
        title = f"{rows[0]['metric']} by {name}" if rows else f"{name}: no run has ended"
        pen.text((left, 8), title, fill="black")
        pen.text((side * panel + 4, top), f"{high:.3f}", fill="black")
        pen.text((side * panel + 4, bottom - 10), f"{low:.3f}", fill="black")
        values = sorted({_text(row[name]) for row in rows}, key=_as_number)
        for place, value in enumerate(values):
            x = left + (place + 0.5) * (right - left) / len(values)
            if len(values) <= 5 or place in (0, len(values) - 1):  # as many as there is room for
                pen.text((x - 3 * len(value), bottom + 6), value, fill="black")
            for row in rows:
                if _text(row[name]) == value:
                    y = bottom - 8 - (row["best"] - low) / span * (bottom - top - 16)
                    pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline="navy", fill="cornflowerblue")
    return picture


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; an error of this package ends it with 2, a run that failed with 1."""

    def run(config_file: Any, dataset_dir: str, output_dir: str, vary: Any, **settings: Any) -> int:
        """Train a bundle with several settings, and compare what they reach; other options are settings of the bundle.

        Args:
            config_file: a bundle's train.yaml, or a list of it and overlays.
            dataset_dir: the data, as the bundle takes them.
            output_dir: folder of the runs; sweep.csv, sweep.md and sweep.png there compare them.
            vary: "{learning_rate: [0.001, 0.0003], adapter_dim: [8, 32]}"; with --draws also ranges.
            settings: draws, draw_seed, workers, scheduler, meta_file, and settings of the configuration.
        """
        rows = sweep(config_file=config_file, dataset_dir=dataset_dir, output_dir=output_dir, vary=vary, **settings)
        print((Path(output_dir).expanduser() / "sweep.md").read_text(encoding="utf-8"), end="")
        return 1 if any(row["status"] == "failed" for row in rows) else 0

    return command_with_settings(run, arguments, name="python -m medsa_nets sweep")


if __name__ == "__main__":
    from medsa_nets import sweep as module  # workers import it by this name, not as __main__

    sys.exit(module.main())
