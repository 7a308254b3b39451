"""Warnings about organs whose layout contradicts what a file states of its directions and spacing."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medsa_nets.anatomy import check_anatomy
from medsa_nets.data.atomic import make_folder, temporary_name
from medsa_nets.data.outputs import image_path, output_name, unique_names
from medsa_nets.prompts import prompts_of, user_prompts_of

logger = logging.getLogger(__name__)
WARNINGS = "anatomy_warnings"


class CheckAnatomyd(MapTransform):
    """Compare organs that were found without prompts with a body's layout (:func:`~medsa_nets.anatomy.check_anatomy`).

    Warnings go to the log, to the entry ``anatomy_warnings``, and, where a server asks, to its reply. Place it where
    masks have come back to the grid of the image's file.

    Args:
        keys: keys of label maps (1, X, Y, Z) of 0 and 1 + class id, with affine.
        classes: names of the classes, in the order of their ids.
        image_key: key of the image; where prompts travel with it, the masks are its user's and are not judged.
        reply: whether warnings are also put into the entry ``result``, which MONAI Label sends to its viewer.
    """

    def __init__(
        self, keys: KeysCollection, classes: Sequence[str], image_key: str = "image", reply: bool = False
    ) -> None:
        super().__init__(keys)
        self.classes = list(classes)
        self.image_key = image_key
        self.reply = reply

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Warn; masks stay as they are."""
        out = dict(data)
        image = out[self.image_key]
        warnings: list[str] = []
        if not prompts_of(image) and not user_prompts_of(image):
            for key in self.key_iterator(out):
                label = out[key]
                values = label.as_tensor()[0].to(dtype=_smallest(len(self.classes))).cpu().numpy()
                warnings += check_anatomy(values, np.asarray(label.affine), self.classes)
        for text in warnings:
            logger.warning("%s: %s", image.meta.get("filename_or_obj", "image"), text)
        out[WARNINGS] = warnings
        if self.reply and warnings:
            result = out.get("result")
            out["result"] = {**(result if isinstance(result, Mapping) else {}), "warnings": warnings}
        return out


def _smallest(classes: int) -> Any:
    return torch.uint8 if classes < 256 else torch.int16


class SaveImageWarningsd(MapTransform):
    """Write what :class:`CheckAnatomyd` found as ``<name>_warnings.json`` beside the mask; nothing where it found none.

    Tools that write results themselves (MONAI Deploy) leave out transforms whose name starts with ``SaveImage``.

    Args:
        keys: key of the image, whose metadata name the file.
        output_dir: folder of the files.
        data: see :class:`~medsa_nets.data.NamedOutputs`.
    """

    def __init__(self, keys: KeysCollection, output_dir: str, data: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(keys)
        self.folder = Path(output_dir)
        self.names = unique_names(image_path(entry) for entry in data)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the file, or remove that of an earlier run."""
        out = dict(data)
        for key in self.key_iterator(out):
            name = str(out[key].meta["filename_or_obj"])
            path = self.folder / f"{self.names.get(name) or output_name(name)}_warnings.json"
            if out.get(WARNINGS):
                make_folder(self.folder)
                with temporary_name(path) as part:
                    text = json.dumps({"image": name, "warnings": out[WARNINGS]}, indent=1)
                    part.write_text(text + "\n", encoding="utf-8")
            else:
                path.unlink(missing_ok=True)
        return out
