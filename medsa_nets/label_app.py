"""What MedSA adds to MONAI Label's app for bundles: a model for scribbles beside each one that takes clicks.

It runs in MONAI Label's server alone, which imports it from the ``main.py`` that ``python -m medsa_nets label`` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.tasks.infer.basic_infer import CallBackTypes

CLICKS, SCRIBBLES = "deepedit", "scribbles"


class ScribblesInferTask(InferTask):
    """Answers scribbles, which come as a label map, by the sessions of a model that takes clicks.

    3D Slicer's module offers scribbles to models of this type alone, and takes the reply for a mask of the class that
    it names (``selected_label_name``).

    Args:
        clicks: the model that takes clicks.
    """

    def __init__(self, clicks: Any) -> None:
        labels = {name: value for name, value in clicks.labels.items() if name != "background"}
        super().__init__(InferType.SCRIBBLES, labels, clicks.dimension, clicks.description, clicks.config())
        self.clicks = clicks

    def is_valid(self) -> bool:
        """Whether it can answer."""
        return bool(self.clicks.is_valid())

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Answer a request: file of the mask of the class that was drawn on, or of all, and parameters."""
        name = str(request.get("selected_label_name") or "").lower()
        value = self.labels.get(name)
        key = self.clicks.output_label_key

        def keep(data: dict[str, Any]) -> dict[str, Any]:
            if value is not None:
                data[key] = (data[key] == value) * 1
            return data

        found: tuple[str | None, dict[str, Any]] = self.clicks(request, {CallBackTypes.POST_TRANSFORMS: keep})
        return found


def with_scribbles(app: Any) -> Any:
    """MONAI Label's app for bundles with a model for scribbles, ``NAME_scribbles``, beside each that takes clicks."""

    class App(app, MONAILabelApp):  # the server looks for a class that names this base
        """MONAI Label's app for bundles, which takes scribbles too."""

        def init_infers(self) -> dict[str, Any]:
            models = dict(super().init_infers())
            for name, model in list(models.items()):
                if model.type == InferType.DEEPEDIT and model.is_valid():
                    models[f"{name.removesuffix(f'_{CLICKS}')}_{SCRIBBLES}"] = ScribblesInferTask(model)
            return models

    return App
