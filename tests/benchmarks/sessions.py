"""Sessions of a simulated user on held-out lesions and hippocampi, variant by variant of how answers are made.

    python tests/benchmarks/sessions.py --lesions /path/to/ISIC2017 --hippocampus /path/to/Task04_Hippocampus
        --limit 36 --variants default,network --output_dir results

Each variant corrects the same images (the validation split of the bundle's ``train.yaml``) by clicks at the centre of
the largest error of its own masks, from the automatic mask and from nothing. ``--starts`` takes masks of another tool,
made from the truth, as well (eroded, dilated, shifted, leaked, other), and ``--users`` other users. Variants of
``peers.py`` (boxes, feedback, oracle, walker) are other means of the same user: ``boxes`` is one answer without clicks,
and ``walker`` needs scikit-image. Lesions are measured at the size of their files, hippocampi on their own grid, both
parts as sessions of their own. The surface Dice has a tolerance of 2 mm (lesions: 2 pixels). Measured sessions are kept
in ``sessions.json`` and not repeated; ``sessions.md`` holds the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import LoadImage
from peers import PEERS

from medsa_nets.data import PhotographReader, load_datalist, load_volume_datalist, read_volume, stable_seed
from medsa_nets.interaction.answers import AnswerSettings
from medsa_nets.interaction.evaluation import run_simulated
from medsa_nets.interaction.metrics import STEPS, SessionCurve, summarise
from medsa_nets.interaction.session import STARTS, InteractiveSession
from medsa_nets.interaction.users import SimulatedUser
from medsa_nets.prompts.observations import Kernel
from medsa_nets.training.sessions import SPOILT, spoil
from medsa_nets.transforms import MatchOrientationd

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
KINDS = {
    "lesions": ("medsa_isic", [], None),
    "hippocampus": ("medsa_btcv", ["hippocampus.yaml"], ["anterior", "posterior"]),
}
USERS = {"centre": {}, "uniform": {"centre": 0, "uniform": 1}, "border": {"centre": 0, "border": 1},
         "jitter": {"jitter": 3}, "apart": {"apart": True}}  # fmt: skip


def variant(text: str) -> AnswerSettings:
    """``default``, or settings as ``rule=free:reach=4:length=3:contrast=0.15:network=first:interpolate=0``.

    ``refinement=`` goes without what clicks were learned to mean; ``refinement=:network=first`` asks the network no
    more once there is a mask, so that clicks are interpolated (kriging) and nothing else.
    """
    values: dict[str, Any] = {}
    kernel: dict[str, float] = {}
    for part in [] if text == "default" else text.split(":"):
        name, _, value = part.partition("=")
        if name in ("length", "contrast", "margin"):
            kernel[name] = float(value)
        elif name == "interpolate":
            values[name] = value not in ("0", "false")
        else:
            values[name] = float(value) if name in ("reach", "certainty", "blend", "depth") else value
    return AnswerSettings(**values, kernel=Kernel(**kernel) if kernel else None)


def items(
    kind: str, folder: Path, limit: int, skip: int
) -> Iterator[tuple[str, list[tuple[str | None, np.ndarray]], list[float]]]:
    """Path of each image, its classes with their truth on the file's grid, and its spacing."""
    if kind == "lesions":
        left_out = {entry["image"] for entry in load_datalist("validation", folder, None, limit=skip)} if skip else ()
        for entry in load_datalist("validation", folder, None, limit=skip + limit):  # chosen by a hash of their names
            if entry["image"] in left_out:
                continue
            label = LoadImage(reader=PhotographReader(mode="L"), image_only=True)(entry["label"])
            yield entry["image"], [(None, np.asarray(label) > 127)], [1.0, 1.0]
        return
    classes = KINDS[kind][2] or []
    first = load_volume_datalist("validation", folder, None, classes=classes, limit=skip) if skip else []
    left_out = {entry["image"] for entry in first}
    for entry in load_volume_datalist("validation", folder, None, classes=classes, limit=skip + limit):
        if entry["image"] in left_out:
            continue
        pair = {"image": read_volume(entry["image"]), "label": read_volume(entry["label"])}
        label = MatchOrientationd("label")(pair)["label"][0].numpy()
        spacing = [float(s) for s in pair["image"].pixdim]
        yield entry["image"], [(name, label == i + 1) for i, name in enumerate(classes)], spacing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lesions", type=Path, help="the ISIC 2017 data set")
    parser.add_argument("--hippocampus", type=Path, help="the hippocampus data set")
    parser.add_argument("--limit", type=int, default=36, help="images of each kind")
    parser.add_argument("--skip", type=int, default=0, help="images to leave out: those of a smaller limit")
    parser.add_argument("--clicks", type=int, default=10)
    parser.add_argument(
        "--variants", default="default", help=f"settings, separated by commas; see variant(). Or {', '.join(PEERS)}"
    )
    parser.add_argument("--peer_base", default="lite_medsam", help="the base of boxes and feedback")
    parser.add_argument("--starts", default="automatic,nothing", help=", ".join(["automatic", "nothing", *SPOILT]))
    parser.add_argument("--users", default="centre", help=", ".join(USERS))
    parser.add_argument("--checkpoint", help="another adapter")
    parser.add_argument("--output_dir", type=Path, default=Path("sessions"))
    options = parser.parse_args()
    root = options.output_dir.resolve()
    root.mkdir(parents=True, exist_ok=True)
    state = root / "sessions.json"
    report: dict[str, dict[str, list[float]]] = json.loads(state.read_text()) if state.is_file() else {}
    for kind, (bundle, overlays, _) in KINDS.items():
        folder = getattr(options, kind)
        if folder is None:
            continue
        config = {"checkpoint": options.checkpoint} if options.checkpoint else {}
        first = InteractiveSession.from_bundle(BUNDLES / bundle, overlays, config=config)
        for path, targets, spacing in items(kind, folder, options.limit, options.skip):
            for start, text in itertools.product(options.starts.split(","), options.variants.split(",")):
                start = "truth" if text == "boxes" else start  # the box's: once, whatever else starts from
                own = InteractiveSession(
                    first.segmenter,
                    AnswerSettings() if text in PEERS else variant(text),
                    start if start in STARTS else "automatic",
                )
                session: Any = PEERS[text](own, options.peer_base) if text in PEERS else own
                opened = False
                for place in options.users.split(","):
                    for name, target in targets:
                        key = " | ".join([kind, start, text, place, Path(path).name, name or ""])
                        if key in report or not target.any():
                            continue
                        if not opened:
                            session.open(path)
                            opened = True
                        random = np.random.default_rng(stable_seed(0, Path(path).name, name or ""))
                        wrong = spoil(target, random, start) if start in SPOILT else None
                        began = time.perf_counter()
                        if text in ("boxes", "oracle"):
                            session.show(target, random)
                        curve = run_simulated(
                            session, target, name, SimulatedUser(**USERS[place]), random,
                            0 if text == "boxes" else options.clicks, spacing, start_from=wrong,
                        )  # fmt: skip
                        seconds = (time.perf_counter() - began) / max(1, len(curve.obeyed))
                        report[key] = {**dataclasses.asdict(curve), "seconds": [seconds]}
            state.write_text(json.dumps(report))
    write(report, root)


def write(report: dict[str, dict[str, list[float]]], root: Path) -> None:
    """Write the table, a row for each kind, start, variant and user."""
    columns = [*(f"dice_after_{n}" for n in STEPS), "clicks_to_80", "never_to_80", "clicks_to_85", "never_to_85",
               "clicks_to_90", "never_to_90", "dsc_auc", "nsd_auc", "harmful_clicks", "obeyed"]  # fmt: skip
    lines = ["| sessions | n | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for group in dict.fromkeys(key.rsplit(" | ", 2)[0] for key in report):
        rows = [v for k, v in report.items() if k.rsplit(" | ", 2)[0] == group]
        curves = [SessionCurve(row["dice"], row["nsd"], row["obeyed"]) for row in rows]
        values = summarise(curves)
        clicked = any(curve.obeyed for curve in curves)  # what takes no clicks has one figure
        cells = [f"{values[name]:.3f}" if clicked or name == "dice_after_0" else "" for name in columns]
        lines.append(f"| {group.replace(' | ', ', ')} | {len(curves)} | " + " | ".join(cells) + " |")
    (root / "sessions.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
