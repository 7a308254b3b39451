"""DICOM series and photographs, written from arrays with the attributes that hospitals' objects have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    VLPhotographicImageStorage,
    generate_uid,
)


def new_object(sop_class: str, modality: str, uids: dict[str, str] | None = None) -> FileDataset:
    """A DICOM object of a patient, without image."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    for name in ("StudyInstanceUID", "SeriesInstanceUID"):
        setattr(data, name, (uids or {}).get(name) or generate_uid())
    data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "Phantom^A", "phantom", "", "O"
    data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20240102", "101500", "1", ""
    data.ReferringPhysicianName, data.Manufacturer, data.Modality = "", "MedSA tests", modality
    data.SeriesNumber = data.InstanceNumber = 1
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    return data


def save(data: FileDataset, path: Path) -> Path:
    """Write an object as a DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def write_ct(folder: Path, values: np.ndarray, affine: np.ndarray, **fields: Any) -> Path:
    """A CT series of a volume (X, Y, Z) in HU on a grid (RAS, mm); ``fields`` are set in every slice."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / spacing
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    frame = generate_uid()
    for z in range(values.shape[2]):
        data = new_object(CTImageStorage, "CT", uids)
        data.FrameOfReferenceUID, data.PositionReferenceIndicator = frame, ""
        data.InstanceNumber = z + 1
        data.Rows, data.Columns = values.shape[1], values.shape[0]
        data.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        data.SliceThickness = float(spacing[2])
        data.ImageOrientationPatient = [round(float(v), 8) for v in (*directions[:, 0], *directions[:, 1])]
        data.ImagePositionPatient = [round(float(v), 6) for v in (lps @ [0, 0, z, 1])[:3]]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept, data.KVP, data.AcquisitionNumber = 1, 0, None, None
        data.WindowCenter, data.WindowWidth = 40, 400
        data.PixelData = np.ascontiguousarray(values[:, :, z].T.astype(np.int16)).tobytes()
        for name, value in fields.items():
            setattr(data, name, value)
        save(data, folder / f"{(z * 7) % values.shape[2]:03d}_{z}.dcm")
    return folder


def write_photograph(path: Path, pixels: np.ndarray, **fields: Any) -> Path:
    """A VL photograph of (rows, columns, 3)."""
    data = new_object(VLPhotographicImageStorage, "XC")
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.LossyImageCompression = 7, 0, "00"
    data.PixelData = np.ascontiguousarray(pixels, dtype=np.uint8).tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    return save(data, path)


def with_identifiers(source: Path, target: Path) -> Path:
    """Copy a series that lost its identifiers when it was made anonymous, with new ones; pixels as they are."""
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        data = pydicom.dcmread(file)
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID = study, series
        data.FrameOfReferenceUID = data.get("FrameOfReferenceUID") or frame
        data.PatientID, data.PatientName = "anonymous", "anonymous^"
        data.save_as(target / file.name)
    return target


def write_enhanced(folder: Path, path: Path, **fields: Any) -> Path:
    """A CT series as one enhanced multi-frame object, its frames from the last to the first; ``fields`` are set."""
    slices = sorted((pydicom.dcmread(file) for file in folder.iterdir()), key=lambda data: -data.InstanceNumber)
    data = new_object(EnhancedCTImageStorage, "CT")
    for name in ("PatientID", "PatientName", "FrameOfReferenceUID", "PositionReferenceIndicator", "Rows", "Columns",
                 "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
                 "PixelRepresentation"):  # fmt: skip
        setattr(data, name, slices[0][name].value)
    data.NumberOfFrames, data.ImageType = len(slices), ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.PixelPresentation = "MONOCHROME"
    shared, frames = Dataset(), []
    for group, names in {
        "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
        "PlaneOrientationSequence": ("ImageOrientationPatient",),
        "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    }.items():
        item = Dataset()
        for name in names:
            setattr(item, name, slices[0][name].value)
        setattr(shared, group, [item])
    for number, one in enumerate(slices, start=1):
        frame, place, content = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = one.ImagePositionPatient
        content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", number, [number]
        frame.PlanePositionSequence, frame.FrameContentSequence = [place], [content]
        frames.append(frame)
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], frames
    data.PixelData = b"".join(one.PixelData for one in slices)
    for name, value in fields.items():
        setattr(data, name, value)
    return save(data, path)
