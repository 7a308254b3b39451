"""Pictures of masks on their images, written as part of a pipeline."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medsa_nets.data.photographs import PhotographReader, save_png
from medsa_nets.data.volumes import volume_id
from medsa_nets.prompts import PROMPT_KEYS
from medsa_nets.transforms.prompts import to_source_grid
from medsa_nets.visualize import overlay_sample, overlay_volume


class SaveOverlayd(MapTransform):
    """Draw mask, label and prompts on the photograph that they belong to, at its own size, as ``<name>_overlay.png``.

    Args:
        keys: key of the mask (1, W, H), at the photograph's size.
        output_dir: folder of the pictures.
        label_key: key of the label, at the same size; none draws no label.
        image_key: key of the image, whose metadata name the file and its grid.
        limit: pictures to write; 0 writes one for every image.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str,
        label_key: str | None = None,
        image_key: str = "image",
        limit: int = 0,
    ) -> None:
        super().__init__(keys)
        self.folder = Path(output_dir)
        self.label_key = label_key
        self.image_key = image_key
        self.limit = limit
        self.written = 0
        self.reader = PhotographReader(mode="RGB")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the picture; the data stay as they are."""
        out = dict(data)
        if self.limit and self.written >= self.limit:
            return out
        for key in self.key_iterator(out):
            image = out[self.image_key]
            path = Path(str(image.meta["filename_or_obj"]))
            array, _ = self.reader.get_data(self.reader.read(path))
            prompts = {k: torch.as_tensor(out[k]) for k in PROMPT_KEYS if k in out}
            for name in prompts.keys() & {"point_coords", "boxes"}:
                shape = prompts[name].shape
                prompts[name] = to_source_grid(prompts[name].reshape(-1, 2).cpu(), image).reshape(shape)
            picture = overlay_sample(
                torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1) / 255.0,
                prediction=torch.as_tensor(out[key]),
                label=torch.as_tensor(out[self.label_key]) if self.label_key else None,
                prompts=prompts,
            )
            save_png(picture, self.folder / f"{path.stem}_overlay.png")
            self.written += 1
        return out


class SaveVolumeOverlayd(MapTransform):
    """Draw three planes of a volume with mask, label and prompts as ``<name>_overlay.png``.

    Place it where masks are still in the network's grid, before ``Invertd``.

    Args:
        keys: key of the logits (K, X, Y, Z).
        output_dir: folder of the pictures.
        label_key: key of the label, at any spacing; none, or an item without it, draws no label.
        image_key: key of the image as the network saw it.
        limit: pictures to write; 0 writes one for every volume.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str,
        label_key: str | None = None,
        image_key: str = "image",
        limit: int = 0,
    ) -> None:
        super().__init__(keys)
        self.folder = Path(output_dir)
        self.label_key = label_key
        self.image_key = image_key
        self.limit = limit
        self.written = 0

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the picture; the data stay as they are."""
        out = dict(data)
        if self.limit and self.written >= self.limit:
            return out
        for key in self.key_iterator(out):
            image = out[self.image_key]
            label = out.get(self.label_key) if self.label_key else None
            if label is not None:
                resized = torch.nn.functional.interpolate(torch.as_tensor(label)[None].float(), size=image.shape[1:])
                label = resized[0]
            picture = overlay_volume(
                image,
                torch.as_tensor(out[key]),
                label=label,
                prompts={k: torch.as_tensor(out[k]) for k in PROMPT_KEYS if k in out},
            )
            save_png(picture, self.folder / f"{volume_id(str(image.meta['filename_or_obj']))}_overlay.png")
            self.written += 1
        return out
