"""Images for tests of servers, their files, and what users do on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from medsa_nets.interaction.session import InteractiveSession

SPACING = tuple(float(np.float32(v)) for v in (0.6, 0.5, 1.0))  # as files hold it: half a voxel is the same in both
# What users do; "reset" gives an object up, "buffer" begins another one.
KINDS = (
    ["point"] * 6 + ["scribble"] * 2 + ["box"] * 2 + ["lasso"] * 2 + ["mask"] * 2 + ["undo"] * 4 + ["reset", "buffer"]
)


def make_volume(seed: int = 0, shape: tuple[int, int, int] = (20, 24, 22)) -> np.ndarray:
    """A volume of blocks (1, X, Y, Z)."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 500, [-(-n // 4) for n in shape])
    return np.kron(blocks, np.ones((4, 4, 4)))[: shape[0], : shape[1], : shape[2]][None].astype(np.int16)


def make_photograph(seed: int = 0, shape: tuple[int, int] = (60, 45)) -> np.ndarray:
    """A photograph of blocks (3, X, Y, 1)."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 255, (3, -(-shape[0] // 10), -(-shape[1] // 10)))
    return np.kron(blocks, np.ones((1, 10, 10)))[:, : shape[0], : shape[1], None].astype(np.uint8)


def write_volume(volume: np.ndarray, path: Path) -> Path:
    """The file that holds what a client sends (1, X, Y, Z)."""
    image = nibabel.Nifti1Image(volume[0], np.diag([*SPACING, 1.0]))
    image.header.set_zooms(SPACING)
    nibabel.save(image, path)
    return path


def write_photograph(photograph: np.ndarray, path: Path) -> Path:
    """The file that holds what a client sends (3, X, Y, 1): x and y of the picture are its first axes."""
    Image.fromarray(photograph[..., 0].transpose(2, 1, 0)).save(path)
    return path


def random_action(random: np.random.Generator, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Something that a user may do on an image (X, Y, Z)."""
    flat = shape[2] == 1
    kind = str(random.choice(KINDS))
    out: dict[str, Any] = {"kind": kind, "label": int(random.integers(2))}
    low = np.array([random.integers(0, max(1, n - 6)) for n in shape])
    size = np.array([random.integers(3, 7) if n > 6 else 1 for n in shape])
    axis = 2 if flat else int(random.integers(3))
    if kind == "point":
        out["position"] = [int(random.integers(n)) for n in shape]
    elif kind == "scribble":
        drawn = np.zeros(shape, np.uint8)
        voxel = np.array([random.integers(n) for n in shape])
        for _ in range(8):
            drawn[tuple(voxel)] = 1
            voxel = np.clip(voxel + random.integers(-1, 2, 3), 0, np.array(shape) - 1)
        out["drawn"] = drawn
    elif kind == "box":
        out["box"] = np.stack([low, low + size], axis=1)
    elif kind == "lasso":
        size[axis] = 1
        out["box"] = np.stack([low, low + size], axis=1)
        out["axis"] = axis
        out["drawn"] = np.zeros(shape, np.uint8)
        out["drawn"][tuple(slice(a, b) for a, b in out["box"])] = 1
    elif kind == "mask":
        drawn = np.zeros(shape, np.uint8)
        drawn[tuple(slice(a, a + 2 * s) for a, s in zip(low, size))] = 1
        out["drawn"] = drawn
    return out


def send(client: Any, action: dict[str, Any], runs: bool = True) -> None:
    """Let a published client say an action, unless it is ``buffer``; ``runs`` asks for its answer at once."""
    kind, include = action["kind"], bool(action["label"])
    if kind == "undo":
        client.undo()
    elif kind == "reset":
        client.reset_interactions()
    elif kind == "point":
        client.add_point_interaction(action["position"], include, run_prediction=runs)
    elif kind == "box":
        client.add_bbox_interaction(action["box"].tolist(), include, run_prediction=runs)
    elif kind == "mask":
        client.add_initial_seg_interaction(action["drawn"])
    elif kind == "lasso":
        box = action["box"]
        crop = action["drawn"][tuple(slice(a, b) for a, b in box)]
        client.add_lasso_interaction(crop, include, run_prediction=runs, interaction_bbox=box.tolist())
    elif kind == "scribble":
        client.add_scribble_interaction(action["drawn"], include, run_prediction=runs)


def tell(session: InteractiveSession, counts: list[int], action: dict[str, Any], class_name: str) -> None:
    """Tell a session in this process what a client says by an action.

    Args:
        session: on the same image.
        counts: prompts of each interaction so far; changed.
        action: from :func:`random_action`.
        class_name: of what is segmented.
    """
    kind, label = action["kind"], action["label"]
    if kind == "undo":
        for _ in range(counts.pop() if counts else 0):
            session.undo(class_name)
        return
    if kind == "reset":
        session.reset(class_name)
        counts.clear()
        return
    dims = len(session.file_shape)

    def outline(axis: int, z: int) -> np.ndarray:
        """Corners of a box's section across an axis."""
        a, b = (k for k in range(3) if k != axis)
        (a0, b0), (a1, b1) = action["box"][[a, b], 0], action["box"][[a, b], 1] - 1
        corners = np.zeros((4, 3))
        corners[:, axis], corners[:, a], corners[:, b] = z, (a0, a0, a1, a1), (b0, b1, b1, b0)
        return corners[:, :dims]

    before = len(session.prompts())
    if kind == "point":
        session.point(action["position"][:dims], label, class_name)
    elif kind == "scribble":
        session.scribble(np.argwhere(action["drawn"])[:, :dims], label, class_name)
    elif kind == "mask":
        session.start_from(action["drawn"].reshape(session.file_shape), class_name)
    elif kind == "lasso":
        session.lasso(outline(action["axis"], action["box"][action["axis"], 0]), label, class_name)
    elif label:
        session.box(action["box"][:dims, 0], action["box"][:dims, 1] - 1, class_name)
    else:  # what a box excludes, slice by slice
        box = action["box"]
        axis = 2 if dims == 2 else int(np.argmin(box[:, 1] - box[:, 0]))
        for z in range(*box[axis]):
            session.lasso(outline(axis, z), 0, class_name)
    counts.append(len(session.prompts()) - before)
