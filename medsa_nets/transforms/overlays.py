"""Pictures of masks on their images, written as part of a pipeline."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform, SaveImage
from PIL import Image

from medsa_nets.data.outputs import NamedOutputs, class_postfix, image_path, output_name, unique_names
from medsa_nets.data.photographs import AtomicPILWriter, PhotographReader, save_png
from medsa_nets.prompts import prompts_of
from medsa_nets.transforms.prompts import tensor_to_source
from medsa_nets.visualize import overlay_sample, overlay_volume


class SaveOverlayd(MapTransform):
    """Draw mask, label and prompts on the photograph that they belong to, at its own size, as ``<name>_overlay.png``.

    Args:
        keys: key of the mask (1, W, H), or those of classes (classes, W, H), at the photograph's size.
        output_dir: folder of the pictures.
        label_key: key of the label, at the same size; none draws no label.
        image_key: key of the image, whose metadata name the file and its grid.
        limit: pictures to write; 0 writes one for every image.
        data: entries of all images, with ``image``, so that those of one name in several folders get pictures of
            their own (:func:`~medsa_nets.data.unique_names`); none names each by its file alone.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str,
        label_key: str | None = None,
        image_key: str = "image",
        limit: int = 0,
        data: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(keys)
        self.folder = Path(output_dir)
        self.label_key = label_key
        self.image_key = image_key
        self.limit = limit
        self.names = unique_names(image_path(entry) for entry in data)
        self.written = 0
        self.reader = PhotographReader(mode="RGB")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the picture; the data stay as they are."""
        out = dict(data)
        for key in self.key_iterator(out):
            if self.limit and self.written >= self.limit:
                break
            name = self.name(str(out[self.image_key].meta["filename_or_obj"]))
            save_png(self.draw(out, key), self.folder / f"{name}_overlay.png")
            self.written += 1
        return out

    def name(self, path: str) -> str:
        """What the picture of a file is called."""
        return self.names.get(path) or output_name(path)

    def draw(self, data: Mapping[Hashable, Any], key: Hashable) -> Image.Image:
        """The picture of the mask under ``key``."""
        image = data[self.image_key]
        array, _ = self.reader.get_data(self.reader.read(Path(str(image.meta["filename_or_obj"]))))
        return overlay_sample(
            torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1) / 255.0,
            prediction=torch.as_tensor(data[key]),
            label=torch.as_tensor(data[self.label_key]) if self.label_key else None,
            prompts=prompts_of(image).through(tensor_to_source(image)),
        )


class SaveImageClassesd(MapTransform):
    """Write a picture for each class of an image, ``<name>_<class>_<postfix>.png``: values from 0 to 1 as 0 to 255.

    Args:
        keys: key of masks or probabilities (classes, W, H), at the photograph's size, with its metadata.
        output_dir: folder of the pictures.
        classes: names of the classes, in the order of their ids (:func:`~medsa_nets.data.class_postfix`).
        postfix: what stands behind the class.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str, classes: Sequence[str], postfix: str = "segmentation"
    ) -> None:
        super().__init__(keys)
        self.savers = [
            SaveImage(
                folder_layout=NamedOutputs(output_dir, class_postfix(name, postfix), ".png"),
                output_ext=".png",
                resample=False,
                scale=255,
                writer=AtomicPILWriter,
                print_log=False,
            )
            for name in classes
        ]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the pictures; the data stay as they are."""
        out = dict(data)
        for key in self.key_iterator(out):
            for k, save in enumerate(self.savers):
                save(out[key][k : k + 1])
        return out


class SaveVolumeOverlayd(SaveOverlayd):
    """Draw three planes of a volume with mask, label and prompts as ``<name>_overlay.png``.

    Place it where masks are still in the network's grid, before ``Invertd``.

    Args:
        keys: key of the logits (K, X, Y, Z).
        output_dir: folder of the pictures.
        label_key: key of the label, at any spacing; none, or an item without it, draws no label.
        image_key: key of the image as the network saw it.
        limit: pictures to write; 0 writes one for every volume.
        data: see :class:`SaveOverlayd`.
    """

    def draw(self, data: Mapping[Hashable, Any], key: Hashable) -> Image.Image:
        """The three planes of the masks under ``key``."""
        image = data[self.image_key]
        label = data.get(self.label_key) if self.label_key else None
        if label is not None:
            label = F.interpolate(torch.as_tensor(label)[None].float(), size=image.shape[1:])[0]
        return overlay_volume(image, torch.as_tensor(data[key]), label=label, prompts=prompts_of(image))
