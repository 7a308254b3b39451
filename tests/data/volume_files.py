"""Volumes that tests write: NIfTI files and DICOM series of known values in a known place."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AFFINE = np.array([[-2.0, 0, 0, 30], [0, -1.5, 0, 40], [0, 0, 3.0, -70], [0, 0, 0, 1]])


def values(shape=(6, 5, 4)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def write_nifti(path: Path, array: np.ndarray | None = None, affine: np.ndarray | None = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values() if array is None else array, affine), path)
    return path


def write_series(
    folder: Path,
    *,
    count: int = 4,
    uid: str | None = None,
    positions: list[tuple[float, float, float]] | None = None,
    name: str = "slice",
    **fields: object,
) -> Path:
    """A CT series of 6 x 5 pixels; slices are named in an order that is not that of their positions."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    volume = values((6, 5, count))
    for z in range(count):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID = uid, "1.2.3"
        data.Modality, data.PatientID = "CT", "phantom"
        data.Rows, data.Columns = 5, 6
        data.PixelSpacing = [1.5, 2.0]
        data.SliceThickness = 3.0
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = list(positions[z] if positions else (-30.0, -40.0, -70.0 + 3.0 * z))
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = volume[:, :, z].T.tobytes()
        for field, value in fields.items():
            setattr(data, field, value)
        data.save_as(folder / f"{name}_{(z * 7) % 10}.dcm", **SAVE)
    return folder


SAVE = {"enforce_file_format": True} if int(pydicom.__version__.split(".")[0]) >= 3 else {"write_like_original": False}
