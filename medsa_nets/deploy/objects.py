"""DICOM objects about a segmentation, beside MONAI Deploy's writer: how segments are coded, and a structured report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import highdicom as hd
from highdicom.sr import (
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    MeasurementReport,
    ObservationContext,
    ObserverContext,
    PlanarROIMeasurementsAndQualitativeEvaluations,
    ReferencedSegment,
    ReferencedSegmentationFrame,
    SourceImageForSegmentation,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from highdicom.sr import Measurement as CodedMeasurement
from monai.deploy.operators.dicom_seg_writer_operator import SegmentDescription
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from medsa_nets.deploy.report import Measurement
from medsa_nets.deploy.settings import SCHEME, Segment, Settings

UNITS = {"mL": Code("mL", "UCUM", "milliliter"), "mm2": Code("mm2", "UCUM", "square millimeter")}


def coded(pair: tuple[str, str]) -> Code:
    """A SNOMED CT code of (value, meaning)."""
    return Code(pair[0], SCHEME, pair[1])


class SidedSegmentDescription(SegmentDescription):
    """MONAI Deploy's description of a segment, with the side of a paired organ as a modifier of its code."""

    def __init__(self, segment: Segment, settings: Settings) -> None:
        super().__init__(
            segment_label=segment.label,
            segmented_property_category=coded(segment.category),
            segmented_property_type=coded(segment.code),
            algorithm_name=settings.name,
            algorithm_version=settings.version,
            anatomic_regions=[coded(segment.region)] if segment.region else None,
        )
        self.side = segment.side

    def to_segment_description(self, segment_number: int) -> hd.seg.SegmentDescription:
        """As highdicom writes it."""
        described = super().to_segment_description(segment_number)
        if self.side is not None:
            kind = described.SegmentedPropertyTypeCodeSequence[0]
            kind.SegmentedPropertyTypeModifierCodeSequence = [hd.sr.CodedConcept(self.side[0], SCHEME, self.side[1])]
        return described


def measurement_report(
    segmentation: Any,
    datasets: Sequence[Dataset],
    settings: Settings,
    measurements: Sequence[Measurement],
    volume: bool,
) -> Comprehensive3DSR:
    """Measurements as a DICOM structured report (TID 1500), each with a reference to its segment.

    Args:
        segmentation: the DICOM segmentation (highdicom).
        datasets: the source's DICOM objects.
        settings: of the bundle.
        measurements: at least one with voxels and a unit of mL or mm².
        volume: whether segments are volumes; else they are planar.
    """
    device = hd.UID()
    observer = ObserverContext(codes.DCM.Device, DeviceObserverIdentifyingAttributes(uid=device, name=settings.name))
    groups = []
    for number, (segment, measured) in enumerate(zip(settings.segments, measurements), start=1):
        if not measured.voxels:
            continue
        name = codes.SCT.Volume if volume else codes.SCT.Area
        unit = UNITS[measured.unit]
        shared: dict[str, Any] = {
            "tracking_identifier": TrackingIdentifier(uid=hd.UID(), identifier=segment.label),
            "finding_type": hd.sr.CodedConcept(*coded(segment.code)[:3]),
            "measurements": [CodedMeasurement(name=name, value=measured.value, unit=unit)],
        }
        if volume:
            reference = ReferencedSegment.from_segmentation(segmentation, segment_number=number)
            groups.append(VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=reference, **shared))
        else:
            # highdicom's from_segmentation looks for the frame's segment where such objects do not have it
            image = SourceImageForSegmentation(datasets[0].SOPClassUID, datasets[0].SOPInstanceUID)
            frame = ReferencedSegmentationFrame(
                segmentation.SOPClassUID, segmentation.SOPInstanceUID, len(groups) + 1, number, source_image=image
            )
            del frame[0].ReferencedSOPSequence[0].ReferencedSegmentNumber  # a frame has one; DICOM wants either
            groups.append(PlanarROIMeasurementsAndQualitativeEvaluations(referenced_segment=frame, **shared))
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=groups,
    )
    return Comprehensive3DSR(
        evidence=[*datasets, segmentation],
        content=content,
        series_instance_uid=hd.UID(),
        series_number=9001,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="MedSA",
        series_description=f"{settings.name}: measurements"[:64],
        is_complete=False,
        is_verified=False,
    )
