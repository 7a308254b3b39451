"""The application: MONAI Deploy's operators around a bundle, one volume or photograph after the other."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from monai.data import MetaTensor
from monai.deploy.conditions import BooleanCondition
from monai.deploy.core import AppContext, Application, Image, IOType, Operator, OperatorSpec
from monai.deploy.core.domain.dicom_series import DICOMSeries
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator
from monai.deploy.operators.dicom_utils import ModelInfo
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator
from PIL import Image as Picture
from pydicom.uid import generate_uid

from medsa_nets.anatomy import check_anatomy
from medsa_nets.data import output_name, unique_names
from medsa_nets.data.photographs import save_png
from medsa_nets.deploy.objects import SidedSegmentDescription, measurement_report
from medsa_nets.deploy.report import Measurement, key_images, measure, write_report
from medsa_nets.deploy.settings import Settings
from medsa_nets.deploy.studies import Source
from medsa_nets.errors import OutputError, describe, find_cause

logger = logging.getLogger("medsa_nets.deploy")


@dataclass
class Outcome:
    """What became of the sources: folders of results, and a line for each failure."""

    folders: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def fail(self, source: Source, error: Exception) -> None:
        """Note that a source could not be segmented."""
        cause = find_cause(error)
        self.failures.append(f"{source.name}: {describe(error) if cause is None else cause}")
        logger.error("not segmented: %s", self.failures[-1], exc_info=error if cause is None else None)


@dataclass(frozen=True)
class Job:
    """A source on its way through the operators, with its image."""

    source: Source
    image: MetaTensor


class SourceOperator(Operator):
    """Reads one source after the other; those that can't be read are noted and passed over.

    Named outputs:
        image: MONAI Deploy's Image, on the grid and with the metadata that the bundle's transforms expect.
        job: the :class:`Job`.
    """

    def __init__(
        self, fragment: Application, *args: Any, sources: list[Source], outcome: Outcome, **kwargs: Any
    ) -> None:
        self.waiting = list(sources)
        self.outcome = outcome
        self.total = len(sources)
        self.more = BooleanCondition(fragment, name="more", enable_tick=True)
        super().__init__(fragment, self.more, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the outputs."""
        spec.output("image")
        spec.output("job")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Emit the next source that can be read."""
        while self.waiting:
            source = self.waiting.pop(0)
            logger.info("%d of %d: %s", self.total - len(self.waiting), self.total, source.name)
            try:
                image = source.read()
            except Exception as error:
                self.outcome.fail(source, error)
                continue
            meta = dict(image.meta)
            meta.setdefault("spacing", np.asarray(image.pixdim))
            meta.setdefault("original_affine", np.asarray(image.affine))
            op_output.emit(Image(np.asarray(image.as_tensor()), meta), "image")
            op_output.emit(Job(source, image), "job")
            break
        if not self.waiting:
            self.more.disable_tick()


class InferenceOperator(MonaiBundleInferenceOperator):
    """MONAI Deploy's inference of a bundle; an error is handed on, so that the next source gets its turn.

    Named inputs:
        image: MONAI Deploy's Image.

    Named outputs:
        pred: MONAI Deploy's Image of 0 and 1 + class id, or the error.
    """

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Segment one image."""
        try:
            super().compute(op_input, op_output, context)
        except Exception as error:
            op_output.emit(error, "pred")

    def predict(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Ask the bundle's inferer, with the network itself instead of MONAI Deploy's wrapper of a TorchScript file."""
        network = getattr(self._model_network, "predictor", self._model_network)
        return self._inferer(data, network, *args, **kwargs)


class ResultOperator(DICOMSegmentationWriterOperator):
    """Writes what belongs to one source into a folder of its own: whole, or not at all.

    ``segmentation.dcm`` by MONAI Deploy's writer and ``measurements_sr.dcm`` for DICOM sources, ``mask.png`` for
    photographs, and for all ``measurements.json``, pictures, and ``report.html``.

    Named inputs:
        pred: MONAI Deploy's Image of 0 and 1 + class id, or an error.
        job: the :class:`Job`.
    """

    def __init__(
        self,
        fragment: Application,
        *args: Any,
        settings: Settings,
        output_folder: Path,
        outcome: Outcome,
        names: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.settings = settings
        self.names = dict(names or {})  # of the folders of photographs without a UID, by their path
        self.outcome = outcome
        super().__init__(
            fragment,
            *args,
            segment_descriptions=[SidedSegmentDescription(segment, settings) for segment in settings.segments],
            output_folder=output_folder,
            model_info=ModelInfo(
                creator="MedSA",
                name=settings.name,
                version=settings.version,
                uid=generate_uid(entropy_srcs=[settings.name, settings.version]),
            ),
            custom_tags={"SeriesDescription": settings.name},
            **kwargs,
        )

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the inputs."""
        spec.input("pred")
        spec.input("job")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write the results of one source."""
        job, pred = op_input.receive("job"), op_input.receive("pred")
        try:
            if isinstance(pred, Exception):
                raise pred
            folder = self.write(job, pred.asnumpy())
        except Exception as error:
            self.outcome.fail(job.source, error)
        else:
            self.outcome.folders.append(folder)
            logger.info("%s: written to %s", job.source.name, folder)

    def write(self, job: Job, pred: np.ndarray) -> Path:
        """Write results into a new folder.

        Args:
            job: what was segmented.
            pred: (Z, Y, X) or (W, H) of 0 and 1 + class id, as MONAI Deploy hands it on.

        Raises:
            OutputError: when the folder can't be written.
        """
        mask = pred.transpose(2, 1, 0) if job.source.volume else pred
        measured = measure(mask, job.image, job.source, self.settings)
        warnings = doubts(mask, job, self.settings)
        for text in warnings:
            logger.warning("%s: %s", job.source.name, text)
        if not mask.any():
            logger.warning("%s: nothing was found; the segmentation is empty.", job.source.name)
        try:
            part = Path(tempfile.mkdtemp(prefix=".part-", dir=self.output_folder))
            part.chmod(0o755)  # portable: nothing is to be done on Windows
        except OSError as error:
            raise OutputError(
                f"{self.output_folder}: it can't be written ({error.strerror}). Name another (-o)."
            ) from error
        try:
            self._fill(part, job, mask, measured, warnings)
            return self._publish(part, job.source)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"{self.output_folder}: the results can't be written ({error.strerror or error}). Make room, or name "
                "another folder (-o)."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _fill(self, folder: Path, job: Job, mask: np.ndarray, measured: list[Measurement], warnings: list[str]) -> None:
        source = job.source
        if source.headers:
            self._write_objects(folder, source, mask, measured)
        if not source.volume:
            picture = Picture.fromarray((mask.T > 0).astype(np.uint8) * 255)
            save_png(picture, folder / "mask.png", frame=job.image.meta["frame"])
        pictures = key_images(mask, job.image, source, self.settings)
        write_report(folder, source, self.settings, measured, pictures, warnings)

    def _write_objects(self, folder: Path, source: Source, mask: np.ndarray, measured: list[Measurement]) -> None:
        datasets = source.datasets()
        if not source.volume and "SliceThickness" not in datasets[0] and "PixelSpacing" in datasets[0]:
            del datasets[0].PixelSpacing  # highdicom can't read back a segmentation with the one and not the other
        series = DICOMSeries(datasets[0].SeriesInstanceUID)
        for dataset in datasets:
            series.add_sop_instance(dataset)
        frames = mask.transpose(2, 1, 0) if source.volume else mask.T[None]
        if source.frames:  # of one object, in the order that it holds them
            frames = frames[np.argsort(source.frames)]
        self.create_dicom_seg(frames.astype(np.uint8), series, folder)
        if source.made:
            source.write_copies(folder / "source")
        written = next(folder.glob("*.dcm"))
        path = written.replace(folder / "segmentation.dcm")
        segmentation = hd.seg.segread(path)
        if not source.volume and "PatientOrientation" not in segmentation:
            # required where no position is given, empty where it is not known; MONAI Deploy's writer leaves it out
            segmentation.PatientOrientation = datasets[0].get("PatientOrientation", "")
            segmentation.save_as(path)
        if not any(m.voxels for m in measured) or measured[0].unit == "pixels":
            return
        try:
            report = measurement_report(segmentation, datasets, self.settings, measured, source.volume)
            report.save_as(folder / "measurements_sr.dcm")
        except (
            AttributeError,
            TypeError,
            ValueError,
        ) as error:  # highdicom: the source lacks what a report has to hold
            logger.warning("%s: no structured report (%s); measurements.json has its content.", source.name, error)

    def _publish(self, part: Path, source: Source) -> Path:
        """Give the folder its name; an earlier run's folder of that name stays."""
        first = source.headers[0] if source.headers else None
        if first is None:
            name = self.names.get(str(source.files[0])) or output_name(source.files[0])
        else:
            name = str(first.SeriesInstanceUID if source.volume else first.SOPInstanceUID)
        for number in range(1, 10**6):
            target = self.output_folder / (name if number == 1 else f"{name}_{number}")
            if not target.exists():
                part.replace(target)
                return target
        raise OutputError(f"{self.output_folder / name}: too many results of that name. Name another folder (-o).")


def doubts(mask: np.ndarray, job: Job, settings: Settings) -> list[str]:
    """What a reader of the results has to know: identifiers that were made, and organs that contradict the geometry."""
    found = []
    if job.source.made:
        found.append(
            f"The source lacks {', '.join(job.source.made)}; they were made, and the segmentation refers to the copies "
            "in the folder 'source'."
        )
    if job.source.volume:
        labels = [segment.label for segment in settings.segments]
        found += check_anatomy(mask, np.asarray(job.image.affine), labels)
    return found


class MedSAApplication(Application):
    """Segments sources with a bundle.

    Args:
        model: folder of a bundle with ``models/model.pt``, or a TorchScript file.
        settings: of the bundle.
        sources: what is segmented.
        output: folder of the results; it exists.
    """

    def __init__(self, model: Path, settings: Settings, sources: list[Source], output: Path) -> None:
        self.model = model
        self.settings = settings
        self.sources = sources
        self.output = output
        self.outcome = Outcome()
        super().__init__([])

    def compose(self) -> None:
        """Connect the operators."""
        folder = self.model.is_dir()
        context = AppContext({"model": str(self.model), "output": str(self.output)})
        if folder:
            context.models = None  # MONAI Deploy would take the folder for one of several models
        source = SourceOperator(self, sources=self.sources, outcome=self.outcome, name="source")
        inference = InferenceOperator(
            self,
            app_context=context,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            bundle_path=self.model,
            name="inference",
        )
        result = ResultOperator(
            self,
            settings=self.settings,
            output_folder=self.output,
            outcome=self.outcome,
            names=unique_names(source.files[0] for source in self.sources if not source.headers),
            name="result",
        )
        self.add_flow(source, inference, {("image", "image")})
        self.add_flow(source, result, {("job", "job")})
        self.add_flow(inference, result, {("pred", "pred")})
