"""Segment a long list of studies with several worker processes, on this machine or on a Dask cluster.

    python -m medsa_nets.cluster --config_file configs/inference.yaml --dataset_dir STUDIES --output_dir OUT --workers 4

runs a bundle's ``inference.yaml`` (a list of files lays overlays over it) for each study of ``STUDIES``. What a study
gives appears in ``OUT`` when it is whole. A study that a killed worker held is done again by another one; a study that
can't be segmented is reported and does not stop the others; a second run with the same settings, adapter and files
skips what is done. ``OUT/summary.csv`` lists each study with its worker, its seconds and how it ended; the exit status
is not 0 where a study failed. Every other option overrides a setting of the configuration, as ``--backend openvino``.

``--scheduler tcp://HOST:8786`` takes the workers of a Dask cluster instead (``dask scheduler``, and on each machine
``dask worker tcp://HOST:8786 --nthreads 1``); studies, output folder and bundle must lie at one path on all machines.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from tqdm import tqdm

from medsa_nets.backends import expect_images
from medsa_nets.bundles import Bundle, read
from medsa_nets.commands import command_with_settings
from medsa_nets.data import check_names, image_path
from medsa_nets.data.atomic import make_writable, temporary_name
from medsa_nets.errors import ClusterError, DataError, OutputError, describe, find_cause
from medsa_nets.transforms import check_prompt_keys

SHARE = "studies_of_a_worker"  # beside the bundle's own settings: how many a worker is going to segment
COLUMNS = ("study", "worker", "seconds", "status", "message")
RECORDS = ".medsa_done"  # in the output folder: a file for each study that is done
PARTS = ".medsa_part_"  # in the output folder: what a worker is writing


class _Inference:
    """A bundle's inference, made once in a worker: the network is loaded, studies are put in one after the other."""

    def __init__(self, config: dict[str, Any], meta: dict[str, Any], output_dir: str) -> None:
        self.output_dir = Path(output_dir)
        self.part = self.output_dir / f"{PARTS}{socket.gethostname()}_{os.getpid()}"
        parser = Bundle({**config, "output_dir": str(self.part), "num_workers": 0}, meta).parser()
        handlers = parser["handlers"]
        # The adapter is loaded here, not at every start of the evaluator; workers' own bars would mix with the summary.
        loaders = [h for h in handlers if str(h.get("_target_")).endswith("CheckpointLoader")]
        quiet = ("CheckpointLoader", "Progress", "StatsHandler")
        parser["handlers"] = [h for h in handlers if not str(h.get("_target_")).endswith(quiet)]
        parser["adapter_loaders"] = loaders
        for name in ("inferer", "slab_inferer"):
            if name in parser and "progress" in parser[name]:
                parser[f"{name}#progress"] = False
        parser["dataset#data"] = [{}]
        if "initialize" in parser:
            parser.get_parsed_content("initialize")
        self.evaluator = parser.get_parsed_content("evaluator")
        self.dataset = parser.get_parsed_content("dataset")
        expect_images(self.evaluator.network, config.get(SHARE, 0))
        for index in range(len(loaders)):
            loader = parser.get_parsed_content(f"adapter_loaders#{index}")
            if loader is not None:  # none where it is disabled
                loader.logger = self.evaluator.logger
                loader(self.evaluator)

    def segment(self, entry: dict[str, Any]) -> list[str]:
        """Segment one study; returns the names of the files that it gave."""
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        try:
            self.dataset.data = [entry]
            self.evaluator.run()
            files = sorted(path.relative_to(self.part) for path in self.part.rglob("*") if path.is_file())
            if not files:
                raise OutputError(f"{entry['image']}: the bundle's inference ended without writing a file.")
            for file in files:
                (self.output_dir / file).parent.mkdir(parents=True, exist_ok=True)
                (self.part / file).replace(self.output_dir / file)
            return [str(file) for file in files]
        finally:
            shutil.rmtree(self.part, ignore_errors=True)


_bundles: dict[str, _Inference] = {}  # of a worker process
_lock = threading.Lock()  # a bundle segments one study at a time


def segment_study(
    job: str, config: dict[str, Any], meta: dict[str, Any], entry: dict[str, Any], output_dir: str
) -> dict[str, Any]:
    """Segment one study in a worker; what goes wrong with it is part of the answer.

    Args:
        job: name of configuration and adapter; the worker's bundle is made anew for another one.
        config: configuration of the bundle's inference.
        meta: the bundle's metadata.
        entry: of the bundle's data list, with ``image``.
        output_dir: where the files go.

    Returns:
        A row of the summary, see :data:`COLUMNS`.
    """
    worker, start = f"{socket.gethostname()}:{os.getpid()}", time.perf_counter()
    row = {"study": entry["image"], "worker": worker, "status": "done", "message": ""}
    with _lock:
        try:
            record = _record(job, entry, output_dir)
            known = _read_record(record, output_dir)
            if known is not None:  # a worker was lost after it had finished this study, before it could tell
                return known
            if job not in _bundles:
                _bundles.clear()
                _bundles[job] = _Inference(config, meta, output_dir)
            files = _bundles[job].segment(entry)
            row["seconds"] = round(time.perf_counter() - start, 2)
            record.parent.mkdir(exist_ok=True)
            with temporary_name(record) as part:
                part.write_text(json.dumps({**row, "files": files}), encoding="utf-8")
        except Exception as error:  # of any library: one study must not stop the others
            _bundles.clear()  # an engine that an error has stopped does not start again
            row["seconds"] = round(time.perf_counter() - start, 2)
            row["status"], row["message"] = "failed", str(find_cause(error) or describe(error))
    return row


def _record(job: str, entry: dict[str, Any], output_dir: str) -> Path:
    """Where it is noted that a study is done; the name holds what the result depends on."""
    path = Path(entry["image"])
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((job, str(path), state)).encode()).hexdigest()
    return Path(output_dir) / RECORDS / f"{digest[:32]}.json"


def _read_record(record: Path, output_dir: str) -> dict[str, Any] | None:
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    there = all((Path(output_dir) / file).is_file() for file in known.pop("files"))
    return known if there else None


def _list_studies(parser: ConfigParser) -> list[dict[str, Any]]:
    """The bundle's own list of data, each study with a name of its own."""
    entries = [dict(entry) for entry in read(parser, "dataset#data")]
    for entry in entries:
        if not isinstance(entry["image"], (str, os.PathLike)):
            raise DataError(
                f"{image_path(entry)}: a study whose channels are files of their own; expected one file each. Join "
                "them into a file with the channels last, or segment by monai.bundle run inferring."
            )
        entry["image"] = os.path.abspath(entry["image"])  # a link keeps its own name
    check_names(entry["image"] for entry in entries)
    return entries


def _job(config: dict[str, Any], parser: ConfigParser) -> str:
    """Name of a run's settings and adapter: two runs of one name give the same masks."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in config.items() if k != "dataset_dir"}, default=str).encode())
    checkpoint = read(parser, "checkpoint") if "checkpoint" in parser else None
    if checkpoint and Path(checkpoint).is_file():
        digest.update(Path(checkpoint).read_bytes())
    return digest.hexdigest()


def connect(workers: int, scheduler: str | None) -> tuple[Any, Any]:
    """A Dask client and, where none is named, the cluster of processes on this machine that it belongs to.

    Args:
        workers: processes on this machine, of one thread each.
        scheduler: address of a Dask scheduler, or none.

    Raises:
        ClusterError: when Dask is missing, or no scheduler answers.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ClusterError(
            "Several workers need dask[distributed], which is not installed. Install it with: "
            "pip install 'medsa[cluster]'"
        ) from error
    if scheduler is None:
        # one thread a worker; memory is the system's to limit, torch's is not Dask's to count
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=None
        )
        return Client(cluster), cluster
    try:
        return Client(scheduler, timeout=15), None
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"--scheduler {scheduler}: no Dask scheduler answers there ({describe(error)}). Start one with: dask "
            "scheduler, or leave the option out for workers on this machine."
        ) from error


def segment_all(
    *,
    config_file: str | Sequence[str],
    dataset_dir: str,
    output_dir: str,
    meta_file: str | None = None,
    workers: int = 2,
    scheduler: str | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Segment each study of a folder once, see this module's text.

    Args:
        config_file: a bundle's ``inference.yaml``, or a list of it and overlays.
        dataset_dir: folder of studies, as the bundle takes it.
        output_dir: folder of the results.
        meta_file: the bundle's metadata; none takes ``metadata.json`` beside the first configuration.
        workers: processes on this machine, where no scheduler is named.
        scheduler: address of a Dask scheduler.
        settings: override the configuration's.

    Returns:
        Rows of the summary, see :data:`COLUMNS`, in the order of the studies; ``status`` is ``done``, ``skipped`` (done
        by an earlier run) or ``failed``.

    Raises:
        DataError: when there are no studies, or two whose results would have one name.
        ClusterError: when Dask is missing, no scheduler answers, or ``workers`` is below 1.
    """
    if workers < 1:
        raise ClusterError(f"--workers must be 1 or more, got {workers}.")
    files = [config_file] if isinstance(config_file, str) else list(config_file)
    dataset_dir = os.path.abspath(Path(dataset_dir).expanduser())
    bundle = Bundle.of_files(files, {**settings, "dataset_dir": dataset_dir}, meta_file)
    parser, config, meta = bundle.parser(), bundle.whole(), bundle.metadata
    out = Path(output_dir).expanduser().resolve()
    make_writable(out, "--output_dir")
    studies, job = _list_studies(parser), _job(config, parser)
    check_prompt_keys(config.get("prompts"), studies)

    rows: dict[str, dict[str, Any]] = {}
    for entry in studies:
        known = _read_record(_record(job, entry, str(out)), str(out))
        if known is not None:
            rows[entry["image"]] = {**known, "status": "skipped"}
    waiting = [entry for entry in studies if entry["image"] not in rows]
    if waiting:
        for row in _run(job, config, meta, waiting, str(out), workers, scheduler):
            rows[row["study"]] = row
    ordered = [rows[entry["image"]] for entry in studies]
    _write_summary(ordered, out / "summary.csv")
    return ordered


def _run(
    job: str,
    config: dict[str, Any],
    meta: dict[str, Any],
    waiting: list[dict[str, Any]],
    out: str,
    workers: int,
    scheduler: str | None,
) -> list[dict[str, Any]]:
    client, cluster = connect(min(workers, len(waiting)), scheduler)
    config = {**config, SHARE: math.ceil(len(waiting) / workers)}
    from distributed import as_completed

    rows = []
    try:
        # Results are small and are fetched at once, so that no worker's death takes finished ones along.
        futures = [client.submit(segment_study, job, config, meta, entry, out, pure=False) for entry in waiting]
        studies = {future.key: entry["image"] for future, entry in zip(futures, waiting)}
        with tqdm(total=len(waiting), desc="studies", unit="study") as bar:
            for future in as_completed(futures):
                error = future.exception()
                if error is None:
                    rows.append(future.result())
                else:  # the study killed several workers, or a worker can't import this package
                    rows.append(_failure(studies[future.key], error))
                bar.update()
    finally:
        client.close()
        if cluster is not None:
            cluster.close()
    for part in Path(out).glob(f"{PARTS}*"):  # of workers that were killed
        shutil.rmtree(part, ignore_errors=True)
    return rows


def _failure(study: str, error: BaseException) -> dict[str, Any]:
    text = f"its worker was lost each time it was tried ({describe(error)})"
    return {"study": study, "worker": "", "seconds": "", "status": "failed", "message": text}


def _write_summary(rows: list[dict[str, Any]], path: Path) -> None:
    with temporary_name(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def segment_studies(config_file: Any, dataset_dir: str, output_dir: str, **settings: Any) -> int:
    """Segment each study of a folder once with several processes; every other option is a setting of the bundle.

    Args:
        config_file: a bundle's inference.yaml, or a list of it and overlays.
        dataset_dir: folder of studies, as the bundle takes it.
        output_dir: folder of the results; summary.csv there lists the studies.
        settings: workers, scheduler, meta_file, and settings of the configuration.
    """
    rows = segment_all(config_file=config_file, dataset_dir=dataset_dir, output_dir=output_dir, **settings)
    width = max(len(Path(row["study"]).name) for row in rows)
    for row in rows:
        seconds = f"{row['seconds']:.1f} s" if row["seconds"] != "" else ""
        name = Path(row["study"]).name
        print(f"{name:<{width}}  {row['status']:<7}  {seconds:>8}  {row['worker']}  {row['message']}".rstrip())
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "skipped", "failed")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; {output_dir}/summary.csv")
    return 1 if counts["failed"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; an error of this package ends it with 2, a study that failed with 1."""
    return command_with_settings(segment_studies, arguments, name="python -m medsa_nets cluster")


if __name__ == "__main__":
    from medsa_nets import cluster  # workers import it by this name, not as __main__

    sys.exit(cluster.main())
