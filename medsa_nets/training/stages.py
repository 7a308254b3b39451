"""A training in stages, one command for all: each stage goes on from the adapter of the one before."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from monai.bundle import ConfigWorkflow

from medsa_nets.data.atomic import temporary_name
from medsa_nets.errors import DataError
from medsa_nets.weights import check_adapter

logger = logging.getLogger(__name__)
RECORD = "stage.json"
ADAPTER = "adapter.pt"


def run_stages(
    stages: Sequence[Mapping[str, Any]],
    *,
    bundle_root: str | Path,
    ckpt_dir: str | Path,
    output_dir: str | Path,
    checkpoint_filename: str = "model.pt",
    start_from: str | None = None,
    common: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> Path:
    """Train stage after stage; what a run that was stopped has finished is not done again, and the rest goes on.

    Each stage is a training by configuration files of the bundle, with an adapter, a state to resume from, and a log of
    its own below ``ckpt_dir`` and ``output_dir``. ``stages.csv`` in ``output_dir`` says what each one gained.

    Args:
        stages: for each ``name``, ``configs`` (files of the bundle's ``configs``, the first one a training), and
            ``settings`` (keys of them).
        bundle_root: folder of the bundle.
        ckpt_dir: folder of the adapters; that of the last stage is ``checkpoint_filename`` in it.
        output_dir: folder of logs and pictures.
        checkpoint_filename: name of the last stage's adapter.
        start_from: adapter that the first stage goes on from; none starts anew.
        common: keys for all stages, as ``dataset_dir``; a stage's own settings come before them.
        resume: whether what an earlier run has done counts; else every stage starts anew.

    Returns:
        Path of the adapter.

    Raises:
        DataError: when a stage lacks a name or configs, two have one name, or a file is missing.
    """
    root, adapters, outputs = Path(bundle_root), Path(ckpt_dir), Path(output_dir)
    _check(stages, root)
    rows: list[dict[str, Any]] = []
    before = start_from
    for stage in stages:
        folder = adapters / "stages" / stage["name"]
        settings = {**(common or {}), **stage.get("settings", {}), "start_from": before}
        recipe = _recipe(stage, settings, before)
        record = _read_record(folder / RECORD) if resume else None
        if record is not None and record["recipe"] == recipe and (folder / ADAPTER).is_file():
            logger.info("stage %s is done", stage["name"])
        else:
            if record is not None:
                logger.info("stage %s was done with other settings, or from another adapter: done again", stage["name"])
            record = _train(stage["name"], root, stage["configs"], settings, folder, outputs / stage["name"], resume)
            record["recipe"] = recipe
            _write(folder / RECORD, json.dumps(record, indent=2) + "\n")
        rows.append({"stage": stage["name"], **{k: v for k, v in record.items() if k != "recipe"}})
        before = str(folder / ADAPTER)
    assert before is not None
    target = adapters / checkpoint_filename
    if _writes():
        with temporary_name(target) as part:
            shutil.copyfile(check_adapter(before), part)
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _write(outputs / "stages.csv", table.getvalue())
    for row in rows:
        logger.info("stage %s: %s %.4f after %.0f minutes", row["stage"], row["metric"], row["after"], row["minutes"])
    logger.info("%s is the adapter of the last stage", target)
    return target


def _check(stages: Sequence[Mapping[str, Any]], root: Path) -> None:
    if not stages:
        raise DataError("stages: there is none. Name at least one, with its name and configs.")
    names = [stage.get("name") for stage in stages]
    for number, stage in enumerate(stages):
        if not stage.get("name") or not stage.get("configs"):
            raise DataError(
                f"stages: number {number + 1} has {', '.join(stage) or 'nothing'}; it needs name and configs."
            )
        for config in stage["configs"]:
            if not (root / "configs" / config).is_file():
                raise DataError(
                    f"stage {stage['name']}: there is no {root / 'configs' / config}. Name files of configs/."
                )
    if len(set(names)) < len(names):
        listed = ", ".join(map(str, names))
        raise DataError(f"stages: {listed} are not all different. Give each one a name of its own.")


def _recipe(stage: Mapping[str, Any], settings: Mapping[str, Any], before: str | None) -> str:
    """What decides a stage's adapter: its configs, its settings, and the adapter that it goes on from."""
    there = hashlib.sha256(Path(before).read_bytes()).hexdigest() if before is not None else ""
    own = {k: v for k, v in settings.items() if k not in ("start_from", "num_workers", "device")}
    text = json.dumps([stage["name"], list(stage["configs"]), own, there], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _train(
    name: str,
    root: Path,
    configs: Sequence[str],
    settings: Mapping[str, Any],
    folder: Path,
    output: Path,
    resume: bool,
) -> dict[str, Any]:
    """Run one stage to its end: the metric's name, its best value, and the minutes of this run."""
    logger.info("stage %s: %s", name, ", ".join(configs))
    started = time.monotonic()
    workflow = ConfigWorkflow(
        config_file=[str(root / "configs" / config) for config in configs],
        logging_file=False,  # the command's own stands
        run_id="training",
        bundle_root=str(root),
        ckpt_dir=str(folder),
        output_dir=str(output),
        checkpoint_filename=ADAPTER,
        resume=resume,
        **settings,
    )
    workflow.initialize()
    workflow.run()
    state = workflow.parser.get_parsed_content("validate#evaluator").state
    workflow.finalize()
    validated = getattr(state, "best_metric_epoch", -1) >= 0
    return {
        "metric": "validation Dice" if validated else "no validation",
        "after": float(state.best_metric) if validated else float("nan"),
        "minutes": round((time.monotonic() - started) / 60.0, 1),
    }


def _read_record(path: Path) -> dict[str, Any] | None:
    """What a finished stage left; none where it has not finished, or the file is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if {"recipe", "metric", "after", "minutes"} <= set(record) else None
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, text: str) -> None:
    if _writes():
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_name(path) as part:
            part.write_text(text, encoding="utf-8")


def _writes() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
