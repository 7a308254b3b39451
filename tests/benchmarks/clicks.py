"""A simulated user who corrects masks by clicks: MedSA's adapters beside LiteMedSAM alone.

    python tests/benchmarks/clicks.py --scans /path/to/ct --dataset_dir /path/to/Task04_Hippocampus --output_dir results

The user clicks at the centre of the largest connected error (missing or surplus), up to ten times for each organ of
each volume; each network is corrected on its own errors. MedSA answers as in the bundle's ``inference.yaml`` for an
annotation server: every click reaches the whole volume. LiteMedSAM answers slice by slice, each click in its slice, at
the grid that suits it (about 256 pixels). Dice is measured on the file's grid. ``ct_b`` and the hippocampus volumes did
not train their adapters; ``ct_a`` did train ``model.pt``. The CTs' labels are TotalSegmentator's. Writes
clicks.{md,json,png}; measured sessions are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from other_hospital import renumber
from scipy import ndimage
from tqdm import tqdm

from medsa_nets import build_medsa
from medsa_nets.data import load_volume_datalist, read_volume
from medsa_nets.prompts import Prompts
from medsa_nets.transforms import MasksToSourceLabeld, MatchOrientationd, to_tensor_grid

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
CLICKS = 10
GOALS = (0.85, 0.90)
# what each network sees: overlays and settings over inference.yaml
GRIDS = {
    "hippocampus": {"MedSA": (["hippocampus.yaml"], {}),
                    "LiteMedSAM": (["hippocampus.yaml"], {"pixdim": [0.2, 0.2, 1.0]})},
    "ct": {"MedSA": ([], {}), "LiteMedSAM": ([], {"pixdim": [1.5, 1.5, 2.0]})},
}  # fmt: skip
Answer = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


class Tool:
    """One network on one kind of volumes."""

    def __init__(self, kind: str, name: str) -> None:
        overlays, settings = GRIDS[kind][name]
        parser = ConfigParser()
        parser.read_config([str(BUNDLE / "configs" / f) for f in ("inference.yaml", "server.yaml", *overlays)])
        parser.update({"bundle_root": str(BUNDLE), "amp": "auto", **settings})
        self.adapted = name == "MedSA"
        self.preprocessing = parser.get_parsed_content("preprocessing")
        self.classes: list[str] = parser.get_parsed_content("classes")
        self.network = parser.get_parsed_content("network") if self.adapted else build_medsa("lite_medsam").eval()
        if self.adapted:
            checkpoint = torch.load(parser.get_parsed_content("checkpoint"), weights_only=True)
            self.network.load_state_dict(checkpoint)
            self.inferer = parser.get_parsed_content("inferer").inferer
            self.inferer.every_class = self.inferer.progress = False
        self.network.eval()

    def open(self, path: str) -> Answer:
        """Open a volume: what answers clicks (P, 3) in the file's grid, their labels (P,), and a class by a mask."""
        image = self.preprocessing({"image": path})["image"]
        embeddings: dict[int, torch.Tensor] = {}

        @torch.no_grad()
        def answer(points: np.ndarray, labels: np.ndarray, index: int) -> np.ndarray:
            coords = to_tensor_grid(torch.from_numpy(points).float(), image)
            logits = torch.full((1, *image.shape[1:]), -20.0)
            if self.adapted:
                prompts = Prompts(
                    points=coords[None], labels=torch.from_numpy(labels)[None], classes=torch.tensor([index])
                )
                logits = self.inferer(image[None], self.network, prompts=prompts)[0]
            else:
                slices = coords[:, 2].round().long().clamp(0, image.shape[3] - 1)
                for z in slices.unique().tolist():
                    own = slices == z
                    logits[0, ..., z] = self._slice(image, embeddings, z, coords[own, :2], labels[own.numpy()])
            pred = MetaTensor(logits, affine=image.affine)
            return MasksToSourceLabeld("pred")({"image": image, "pred": pred})["pred"][0].numpy() > 0

        return answer

    def _slice(
        self, image: MetaTensor, embeddings: dict[int, torch.Tensor], z: int, coords: torch.Tensor, labels: np.ndarray
    ) -> torch.Tensor:
        height, width = image.shape[1:3]
        stride = self.network.stride
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if z not in embeddings:
                plane = torch.nn.functional.pad(image.as_tensor()[..., z], (0, -width % stride, 0, -height % stride))
                embeddings[z] = self.network.encode_image(plane[None].expand(1, 3, -1, -1))
            logits = self.network.decode(
                embeddings[z], point_coords=coords[None, None], point_labels=torch.from_numpy(labels)[None, None]
            )
        return logits[0, 0, :height, :width].float()


def next_click(mask: np.ndarray, truth: np.ndarray) -> tuple[list[int], float] | None:
    """The centre of the largest error, and whether it is foreground (1.0) or background (0.0); none without error."""
    errors, count = ndimage.label(mask != truth)
    if not count:
        return None
    sizes = np.bincount(errors.ravel())
    sizes[0] = 0
    depth = ndimage.distance_transform_edt(np.pad(errors == sizes.argmax(), 1))[1:-1, 1:-1, 1:-1]
    place = np.unravel_index(int(depth.argmax()), depth.shape)
    return [int(v) for v in place], float(truth[place])


def session(answer: Answer, truth: np.ndarray, index: int) -> list[float]:
    """Dice after each click."""
    mask = np.zeros_like(truth)
    points: list[list[int]] = []
    labels: list[float] = []
    dice: list[float] = []
    for _ in range(CLICKS):
        click = next_click(mask, truth)
        if click is not None:
            points.append(click[0])
            labels.append(click[1])
            mask = answer(np.array(points, np.float32), np.array(labels, np.float32), index)
        dice.append(2.0 * float((mask & truth).sum()) / float(mask.sum() + truth.sum()))
    return dice


def studies(options: argparse.Namespace, root: Path) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name, kind, and paths of images and labels."""
    out: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    if options.scans is not None:
        scans = options.scans.resolve()
        for name, image in (("ct_b", "ct_b_dicom"), ("ct_a (trained on)", "ct_a.nii.gz")):
            renumber(scans / f"{name[:4]}_totalsegmentator.nii.gz", root / f"{name[:4]}_label.nii.gz")
            out[name] = ("ct", [(str(scans / image), str(root / f"{name[:4]}_label.nii.gz"))])
    if options.dataset_dir is not None:
        entries = load_volume_datalist("validation", str(options.dataset_dir), None, classes=["anterior", "posterior"],
                                       validation_fraction=0.2, limit=options.volumes)  # fmt: skip
        out["hippocampus"] = ("hippocampus", [(entry["image"], entry["label"]) for entry in entries])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=Path, help="folder with ct_a and ct_b")
    parser.add_argument("--dataset_dir", type=Path, help="the hippocampus data set")
    parser.add_argument("--volumes", type=int, default=10, help="hippocampus volumes to annotate")
    parser.add_argument("--output_dir", type=Path, default=Path("clicks"))
    options = parser.parse_args()
    root = options.output_dir.resolve()
    root.mkdir(parents=True, exist_ok=True)
    state = root / "clicks.json"
    report: dict[str, list[float]] = json.loads(state.read_text()) if state.is_file() else {}
    sets = studies(options, root)
    for name, (kind, files) in sets.items():
        for network in ("MedSA", "LiteMedSAM"):
            tool = Tool(kind, network)
            for image, label in tqdm(files, desc=f"{name}, {network}"):
                pair = MatchOrientationd("label")({"image": read_volume(image), "label": read_volume(label)})
                truth = pair["label"][0].numpy()
                answer = None
                for index in range(len(tool.classes)):
                    key = f"{name} | {network} | {Path(image).name} | {tool.classes[index]}"
                    if key not in report and (truth == index + 1).any():
                        answer = answer or tool.open(image)
                        report[key] = session(answer, truth == index + 1, index)
                        state.write_text(json.dumps(report, indent=1))
                        print(key, [round(d, 3) for d in report[key]], flush=True)
    write(report, list(sets), root)


def write(report: dict[str, list[float]], names: list[str], root: Path) -> None:
    """Write a table and a picture of the curves."""
    heads = ["volumes", "network", *(str(i + 1) for i in range(CLICKS)), *(f"clicks to {goal}" for goal in GOALS)]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        for network, colour in (("MedSA", "tab:red"), ("LiteMedSAM", "tab:gray")):
            curves = np.array([v for k, v in report.items() if k.startswith(f"{name} | {network} |")])
            axis.plot(range(1, CLICKS + 1), curves.mean(0), color=colour, marker="o", label=network)
            needed = []
            for goal in GOALS:
                reached = curves >= goal
                first = np.where(reached.any(1), reached.argmax(1) + 1, CLICKS)
                needed.append(f"{first.mean():.1f} ({reached.any(1).sum()} of {len(curves)})")
            cells = [name, network, *(f"{v:.3f}" for v in curves.mean(0)), *needed]
            lines.append("| " + " | ".join(cells) + " |")
        axis.set(title=f"{name}: {len(curves)} organs", xlabel="clicks", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean Dice")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(root / "clicks.png", dpi=80)
    lines.append(
        f"\nMean Dice after each click; mean number of clicks to a Dice ({CLICKS} where it is not reached), and how "
        "many organs reach it."
    )
    (root / "clicks.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
