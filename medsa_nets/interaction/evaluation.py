"""Sessions of a simulated user on images whose truth is known."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import MetaTensor
from PIL import Image
from tqdm import tqdm

from medsa_nets.data import image_path, output_name, save_png, stable_seed, unique_names
from medsa_nets.data.atomic import make_folder, temporary_name
from medsa_nets.errors import DataError
from medsa_nets.inferers import PromptInferer, VolumeInferer
from medsa_nets.interaction.answers import AnswerSettings, answer_identity
from medsa_nets.interaction.grids import Grids
from medsa_nets.interaction.metrics import SessionCurve, summarise
from medsa_nets.interaction.refinement import beside
from medsa_nets.interaction.segmenters import NetworkSegmenter, load_adapter
from medsa_nets.interaction.session import STARTS, InteractiveSession
from medsa_nets.interaction.users import SimulatedUser
from medsa_nets.runtime import unwrap, writes_files
from medsa_nets.visualize import draw_curves, overlay, side_by_side

logger = logging.getLogger(__name__)
KEPT = "sessions.json"


def run_simulated(
    session: InteractiveSession,
    target: np.ndarray,
    class_name: str | int | None,
    user: SimulatedUser,
    random: np.random.Generator,
    clicks: int = 10,
    spacing: Sequence[float] | None = None,
    tolerance: float = 2.0,
    start_from: np.ndarray | None = None,
) -> SessionCurve:
    """Let a simulated user correct the mask of a class of the open image.

    Args:
        session: with an image open; its prompts are forgotten first.
        target: boolean, on the grid of the image's file.
        class_name: name or id of the class.
        user: places the clicks.
        random: source of randomness, by image and class.
        clicks: most clicks.
        spacing: size of the file's voxels in mm; none takes 1.
        tolerance: of the surface Dice, in mm.
        start_from: mask on that grid to correct; none takes the session's own.

    Returns:
        Dice, surface Dice and obedience after 0 to ``clicks`` clicks; shorter where nothing was wrong any more.
    """
    session.reset()
    spacing = [1.0] * target.ndim if spacing is None else spacing
    curve = SessionCurve()
    mask = session.mask(class_name) if start_from is None else session.start_from(start_from, class_name)
    curve.add(mask, target, spacing, tolerance)
    said: dict[tuple[int, ...], int] = {}
    for _ in range(clicks):
        click = user.click(mask, target, random)
        if click is None:
            break
        voxel, label = click
        mask = session.point(voxel.tolist(), label, class_name)
        said[tuple(int(v) for v in voxel)] = label
        curve.obeyed.append(float(np.mean([mask[place] == bool(wanted) for place, wanted in said.items()])))
        curve.add(mask, target, spacing, tolerance)
    return curve


class SessionEvaluation:
    """Measures an adapter by sessions of clicks: what ``evaluate.yaml`` runs with ``prompt: session``.

    On each image, and for each class that it holds, a simulated user corrects the session's own mask click by click,
    once from the automatic mask and once from nothing; every class has sessions of its own. Masks are measured on the
    grid of the image's file. Sessions that an interrupted run has measured are not repeated. In a distributed run each
    process takes its share of the images.

    Files below ``output_dir``:

    - ``metrics.csv``: the means over all sessions (:func:`~medsa_nets.interaction.metrics.summarise`) as
      ``val_dice_after_1`` and so on, from the automatic mask; those of sessions that began with nothing as
      ``val_dice_from_nothing_1``, ``val_nsd_from_nothing_1``, ``val_dsc_auc_from_nothing`` and so on;
    - ``sessions.csv``: a row for each session with Dice after each click;
    - ``sessions.png``: mean Dice over clicks, and the session that ended worst;
    - ``sessions.json``: what a run that goes on needs.

    Args:
        network: the network.
        inferer: the bundle's.
        dataset: items with ``image`` as the network sees it, and ``label``, not resampled: foreground above 0.5
            (images), or 0 and 1 + class id (volumes).
        classes: names of the classes, in the order of their ids.
        output_dir: folder of the results.
        checkpoint: file of the adapter, which :meth:`run` loads; none or empty measures the network as it is.
        clicks: most clicks of a session.
        user: places the clicks; none takes that of the CVPR 2025 challenge on interactive segmentation, at the centre
            of the largest error.
        tolerance: of the surface Dice, in mm (pixels of photographs).
        settings: how answers are made; none takes the usual ones.
        starts: what sessions begin with, some of ``automatic`` and ``nothing``.
        seed: of the user.

    Raises:
        ValueError: when ``clicks`` is below 1 or a start is unknown.
    """

    def __init__(
        self,
        network: Any,
        inferer: PromptInferer | VolumeInferer,
        dataset: Any,
        classes: Sequence[str],
        output_dir: str | Path,
        checkpoint: str | Path | None = None,
        clicks: int = 10,
        user: SimulatedUser | None = None,
        tolerance: float = 2.0,
        settings: AnswerSettings | None = None,
        starts: Sequence[str] = STARTS,
        seed: int = 0,
    ) -> None:
        if clicks < 1:
            raise ValueError(f"clicks must be 1 or more, got {clicks}.")
        if not starts or set(starts) - set(STARTS):
            raise ValueError(f"starts must be some of {', '.join(STARTS)}, got {list(starts)}.")
        self.network = network
        self.inferer = inferer
        self.dataset = dataset
        self.names = unique_names(image_path(entry) for entry in getattr(dataset, "data", ()))
        self.classes = list(classes)
        self.output_dir = Path(output_dir)
        self.checkpoint = checkpoint
        self.clicks = clicks
        self.user = user or SimulatedUser()
        self.tolerance = tolerance
        self.settings = settings or AnswerSettings()
        self.starts = list(starts)
        self.seed = seed

    def run(self) -> dict[str, float]:
        """Measure, write the files, and return the figures.

        Raises:
            DataError: when no image holds any of the classes.
            WeightsError: when the adapter is missing, damaged or another one's.
        """
        network: Any = unwrap(self.network)
        if self.checkpoint:
            load_adapter(network, self.checkpoint)
        segmenter = NetworkSegmenter(network, None, self.classes, self.inferer, beside(self.checkpoint))
        rank, processes = idist.get_rank(), idist.get_world_size()
        state = self.output_dir / (KEPT if processes == 1 else f"{rank}_{KEPT}")
        make_folder(self.output_dir)
        identity = self._identity(segmenter)
        known = _read_kept(state, identity)
        indices = range(rank, len(self.dataset), processes)
        for index in tqdm(indices, desc="sessions", disable=not writes_files()):
            for key, curve in self._of_image(segmenter, index, known):
                known[key] = curve
            _write_text(state, json.dumps({"identity": identity, "sessions": known}))
        measured = _gathered(known)
        if not measured:
            raise DataError(
                f"no image holds any of the classes {', '.join(self.classes)}: there is nothing to correct."
            )
        figures = self._figures(measured)
        if writes_files():
            _write_text(self.output_dir / "metrics.csv", "".join(f"{k},{v}\n" for k, v in figures.items()))
            self._write_sessions(measured)
            save_png(self._picture(segmenter, measured), self.output_dir / "sessions.png")
            for name, value in figures.items():
                logger.info("%s %.4f", name, value)
        return figures

    def _identity(self, segmenter: NetworkSegmenter) -> str:
        """What measured sessions depend on, beside the images."""
        user = {"shares": self.user.shares.tolist(), "jitter": self.user.jitter, "apart": self.user.apart}
        answers = dataclasses.asdict(self.settings.of(3 if segmenter.volumes else 2))
        settings = {
            "network": answer_identity(self.settings, segmenter), "inferer": str(segmenter.inferer.amp),
            "turns": getattr(segmenter.inferer, "turns", None),
            "user": user, "seed": self.seed,
            "answers": answers, "clicks": self.clicks, "tolerance": self.tolerance,
            "classes": self.classes,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _targets(self, index: int) -> tuple[str, MetaTensor, dict[int, np.ndarray]]:
        """An image of the data set: its name, its tensor, and the truth of its classes on the file's grid."""
        item = self.dataset[index]
        image, label = item["image"], item["label"]
        targets = target_masks(label, len(self.classes), image.dim() == 4)
        path = str(image.meta.get("filename_or_obj", index))
        return self.names.get(path) or output_name(path), image, targets

    def _of_image(
        self, segmenter: NetworkSegmenter, index: int, known: Mapping[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Sessions of an image that were not measured before."""
        name, image, targets = self._targets(index)
        for start in self.starts:
            session = InteractiveSession(segmenter, self.settings, start)
            opened = False
            for k, target in targets.items():
                key = " | ".join([start, str(index), name, self.classes[k]])
                if key in known:
                    continue
                if not opened:
                    session.open(image)
                    opened = True
                spacing = _file_spacing(session) if segmenter.volumes else None
                random = np.random.default_rng(stable_seed(self.seed, name, self.classes[k]))
                curve = run_simulated(session, target, k, self.user, random, self.clicks, spacing, self.tolerance)
                yield key, dataclasses.asdict(curve)

    def _figures(self, measured: Mapping[str, Any]) -> dict[str, float]:
        out = {}
        for start in self.starts:
            curves = [_curve(row) for key, row in measured.items() if key.startswith(f"{start} |")]
            for name, value in summarise(curves).items() if curves else ():
                if start == "automatic":
                    out[f"val_{name}"] = value
                elif "_after_" in name:
                    if not name.endswith("_after_0"):
                        out[f"val_{name.replace('_after_', '_from_nothing_')}"] = value
                else:
                    out[f"val_{name}_from_nothing"] = value
        return out

    def _write_sessions(self, measured: Mapping[str, Any]) -> None:
        head = [
            "start",
            "index",
            "image",
            "class",
            *(f"dice_after_{n}" for n in range(self.clicks + 1)),
            "harmful",
            "obeyed",
        ]
        path = self.output_dir / "sessions.csv"
        with temporary_name(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            for key, row in sorted(measured.items()):
                curve = _curve(row)
                dice = [f"{value:.4f}" for value in curve.dice] + [""] * (self.clicks + 1 - len(curve.dice))
                obeyed = f"{min(curve.obeyed, default=1.0):.4f}"
                writer.writerow([*_parts(key), *dice, sum(curve.harmful()), obeyed])

    def _picture(self, segmenter: NetworkSegmenter, measured: Mapping[str, Any]) -> Image.Image:
        """Mean Dice over clicks, and the session that ended worst: its first mask, and its last one with the clicks."""
        lines = {}
        for start in self.starts:
            curves = [_curve(row) for key, row in measured.items() if key.startswith(f"{start} |")]
            name = {"automatic": "from the automatic mask", "nothing": "from nothing"}[start]
            lines[name] = [float(np.mean([c.after(n) for c in curves])) for n in range(self.clicks + 1)]
        chart = draw_curves(lines, "clicks", f"mean Dice of {len(measured)} sessions")
        worst = min(measured, key=lambda key: measured[key]["dice"][-1])
        start, index, name, class_name = _parts(worst)
        _, image, targets = self._targets(int(index))
        k = self.classes.index(class_name)
        session = InteractiveSession(segmenter, self.settings, start)
        session.open(image)
        random = np.random.default_rng(stable_seed(self.seed, name, class_name))
        first = session.mask(k)
        run_simulated(session, targets[k], k, self.user, random, self.clicks, None, self.tolerance)
        clicks = session.prompts(k)
        places = np.array([click.positions[0] for click in clicks]).reshape(-1, targets[k].ndim)
        labels = np.array([click.label for click in clicks])
        target, last = targets[k], session.mask(k)
        grids, plane = session.grids, tuple(slice(0, n) for n in target.shape)
        here = np.ones(len(places), dtype=bool)
        if target.ndim == 3:  # the slice with most errors
            z = int((last != target).sum((0, 1)).argmax())
            plane, here = (*plane[:2], slice(z, z + 1)), np.rint(places[:, 2]) == z
        grey = np.stack([grids.on_file(channel, plane).numpy() for channel in image.as_tensor().cpu()])
        grey = np.broadcast_to(grey.reshape(len(grey), *target.shape[:2]), (3, *target.shape[:2]))
        pictures = [chart]
        for mask, clicked in ((first, False), (last, True)):
            pictures.append(
                overlay(
                    grey,
                    prediction=mask[plane].reshape(target.shape[:2]),
                    label=target[plane].reshape(target.shape[:2]),
                    point_coords=places[here][:, :2] if clicked else None,
                    point_labels=labels[here] if clicked else None,
                )
            )
        before, after = measured[worst]["dice"][0], measured[worst]["dice"][-1]
        return side_by_side(
            pictures,
            f"worst of {len(measured)}: {name}, {class_name}, from {start}: Dice {before:.3f}, {after:.3f} after "
            f"{len(clicks)} clicks (label green, mask red)",
        )


def target_masks(label: MetaTensor, classes: int, volumes: bool) -> dict[int, np.ndarray]:
    """Truth of the classes that an image holds, boolean on the grid of its label's file, by their ids.

    Args:
        label: (1, spatial…), foreground above 0.5 (images), or 0 and 1 + class id (volumes); of images with several
            classes a mask for each (classes, spatial…).
        classes: how many there are.
        volumes: whether it is of a volume.
    """
    grids = Grids(label)
    place = tuple(slice(0, n) for n in grids.file_shape)
    masks = label.as_tensor().float().cpu()
    out = {}
    for k in range(classes):
        values = masks[k if len(masks) > 1 else 0]
        mask = grids.on_file((values == k + 1).float() if volumes else (values > 0.5).float(), place).numpy() > 0.5
        if mask.any():
            out[k] = mask
    return out


def _parts(key: str) -> list[str]:
    """Start, index, name of the image (which may hold what parts them) and class of a session."""
    start, index, rest = key.split(" | ", 2)
    return [start, index, *rest.rsplit(" | ", 1)]


def _curve(row: Mapping[str, Any]) -> SessionCurve:
    return SessionCurve(row["dice"], row["nsd"], row["obeyed"])


def _file_spacing(session: InteractiveSession) -> list[float]:
    """Size of the voxels of a volume's file, in mm."""
    dims = session.grids.dims
    return np.linalg.norm(session.grids.world[:dims, :dims], axis=0).tolist()


def _read_kept(path: Path, identity: str) -> dict[str, Any]:
    """Sessions that an earlier run has measured; none where it measured something else."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return dict(kept["sessions"]) if kept["identity"] == identity else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_text(path: Path, text: str) -> None:
    with temporary_name(path) as part:
        part.write_text(text, encoding="utf-8")


def _gathered(known: dict[str, Any]) -> dict[str, Any]:
    """Sessions of all processes."""
    if idist.get_world_size() == 1:
        return known
    parts: list[dict[str, Any] | None] = [None] * idist.get_world_size()
    torch.distributed.all_gather_object(parts, known)
    return {key: row for part in parts if part for key, row in part.items()}
