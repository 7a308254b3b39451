from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pydicom.fileset
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medsa_nets.data.photographs import read_photograph
from medsa_nets.data.slices import is_dicom
from medsa_nets.data.volumes import list_volumes, read_volume
from medsa_nets.errors import DataError

from .volume_files import AFFINE, SAVE, values, write_nifti, write_series


def by_position(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda file: pydicom.dcmread(file).ImagePositionPatient[2])


def rewrite(file: Path, **fields: object) -> None:
    data = pydicom.dcmread(file)
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(file)


# ---------------------------------------------------------------- grey values


STORED = [(8, 8, 0), (7, 8, 1), (10, 16, 1), (12, 16, 0), (12, 16, 1), (16, 16, 0), (16, 16, 1), (20, 32, 1)]


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("bits", "allocated", "signed"), STORED)
@pytest.mark.parametrize("overlay", [False, True])
def test_how_values_are_shown_and_stored_does_not_change_them(
    tmp_path, interpretation, bits, allocated, signed, overlay
):
    folder = write_series(tmp_path / "ct", PhotometricInterpretation=interpretation)
    low = -(1 << bits - 1) if signed else 0
    stored = np.random.default_rng(0).integers(low, low + (1 << bits), (4, 5, 6))
    for z, file in enumerate(by_position(folder)):
        bitmap = stored[z] & ((1 << bits) - 1)
        if overlay and bits < allocated:
            bitmap |= 1 << (allocated - 1)  # bits that are not stored, as overlays of old scanners use them
        rewrite(
            file, BitsAllocated=allocated, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=signed,
            RescaleSlope=0.5 * (1 + z), RescaleIntercept=-1024,
            PixelData=bitmap.astype({8: "u1", 16: "<u2", 32: "<u4"}[allocated]).tobytes(),
        )  # fmt: skip
    expected = stored * 0.5 * np.arange(1, 5)[:, None, None] - 1024
    np.testing.assert_array_equal(read_volume(folder)[0].numpy(), expected.transpose(2, 1, 0))


def compress(file: Path, syntax: UID, frames: list[np.ndarray]) -> None:
    data = pydicom.dcmread(file)
    if syntax == RLELossless:
        data.compress(RLELossless, generate_instance_uid=False)
    else:
        coded = []
        for frame in frames:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, format="JPEG2000", no_jp2=True, irreversible=False)
            coded.append(buffer.getvalue())
        data.PixelData = encapsulate(coded)
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
        data.file_meta.TransferSyntaxUID = syntax
    data.save_as(file)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_compressed_slices_are_not_inverted_either(tmp_path, syntax, interpretation):
    fields = {"PixelRepresentation": 0, "PhotometricInterpretation": interpretation, "RescaleIntercept": -1024}
    folder = write_series(tmp_path / "ct", SOPClassUID=MRImageStorage, **fields)
    stored = (values() + 1000).astype(np.uint16)
    for z, file in enumerate(by_position(folder)):
        rewrite(file, PixelData=stored[:, :, z].T.tobytes(), RescaleSlope=2)
        compress(file, syntax, [stored[:, :, z].T])
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume[0].numpy(), stored * 2.0 - 1024)
    np.testing.assert_allclose(np.asarray(volume.affine), AFFINE, atol=1e-5)


def test_simpleitk_places_a_series_where_it_is_placed_here(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turned *= np.sign(np.linalg.det(turned))
    folder = write_series(
        tmp_path / "ct", positions=[tuple(np.array([-30.0, -40, -70]) + 3.0 * z * turned[:, 2]) for z in range(4)],
        ImageOrientationPatient=[*turned[:, 0], *turned[:, 1]],
    )  # fmt: skip
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume[0].numpy(), sitk.GetArrayFromImage(image).T)
    for index in ((0, 0, 0), (5, 4, 3), (2, 0, 1)):
        place = np.asarray(volume.affine) @ [*index, 1]
        np.testing.assert_allclose(
            place[:3] * [-1, -1, 1], image.TransformIndexToPhysicalPoint(index), atol=1e-3, err_msg=str(index)
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "a colour image of 3 samples per pixel"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
        ({"PixelData": b""}, "no pixels"),
        ({"PixelData": b"\0" * 40}, "pixels can't be read.*truncated"),
    ],
)
def test_pixels_that_are_no_grey_values_are_refused(tmp_path, fields, message):
    folder = write_series(tmp_path / "ct", **fields)
    with pytest.raises(DataError, match=message) as caught:
        read_volume(folder)
    assert "slice_" in str(caught.value)


def test_a_plugin_that_panics_is_an_error_like_any_other(tmp_path, monkeypatch):
    class PanicException(BaseException):  # as extensions in Rust raise it
        pass

    def panic(self: pydicom.Dataset) -> np.ndarray:
        raise PanicException("index out of bounds")

    file = next(write_series(tmp_path / "ct").iterdir())
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(panic))
    with pytest.raises(DataError, match=r"pixels can't be read.*PanicException: index out of bounds"):
        read_volume(file)
    with pytest.raises(DataError, match=r"pixels can't be read.*PanicException: index out of bounds"):
        read_photograph(file)


# ---------------------------------------------------------------- files


def encode(file: Path, path: Path, syntax: UID, preamble: bool) -> None:
    """Write the object of a file in another encoding, with or without preamble and file meta information."""
    data = pydicom.dcmread(file)
    out = pydicom.FileDataset("", {}, preamble=b"\0" * 128) if preamble else Dataset()
    for element in data:
        out.add(element)
    if syntax == ExplicitVRBigEndian:
        out.PixelData = data.pixel_array.byteswap().tobytes()
    if preamble:
        out.file_meta = data.file_meta
        out.file_meta.TransferSyntaxUID = syntax
    if "enforce_file_format" in SAVE:
        encoding = {} if preamble else {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
        pydicom.dcmwrite(path, out, **encoding)
    else:
        out.is_implicit_VR, out.is_little_endian = syntax.is_implicit_VR, syntax.is_little_endian
        out.save_as(path, write_like_original=True)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_files_without_preamble_and_ima_files_are_read(tmp_path, syntax):
    folder = write_series(tmp_path / "ct")
    expected = read_volume(folder)
    for file in list(folder.iterdir()):
        encode(file, file.with_suffix(".IMA"), syntax, preamble=False)
        file.unlink()
    assert all(file.read_bytes()[128:132] != b"DICM" for file in folder.iterdir())
    assert all(is_dicom(file) for file in folder.iterdir())
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.numpy(), expected.numpy())
    np.testing.assert_allclose(np.asarray(volume.affine), np.asarray(expected.affine))
    assert list_volumes(folder) == [{"image": str(folder)}]


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_transfer_syntaxes_are_read(tmp_path, syntax):
    folder = write_series(tmp_path / "ct")
    expected = read_volume(folder)
    for file in folder.iterdir():
        encode(file, file, syntax, preamble=True)
    np.testing.assert_array_equal(read_volume(folder).numpy(), expected.numpy())


def test_a_photograph_without_preamble_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    data.Rows, data.Columns, data.SamplesPerPixel, data.PlanarConfiguration = 4, 5, 3, 0
    data.PhotometricInterpretation, data.BitsAllocated, data.BitsStored, data.HighBit = "RGB", 8, 8, 7
    data.PixelRepresentation, data.PixelData = 0, pixels.tobytes()
    if "enforce_file_format" in SAVE:
        data.save_as(tmp_path / "photograph", implicit_vr=True, little_endian=True)
    else:
        data.is_implicit_VR, data.is_little_endian = True, True
        data.save_as(tmp_path / "photograph")
    np.testing.assert_array_equal(np.asarray(read_photograph(tmp_path / "photograph")), pixels)


def test_text_that_begins_like_an_object_is_none(tmp_path):
    for name, content in {"a": b"\x08\0\x05\0" + b"x" * 200, "b": b"\x02\0" * 300, "c": b"\x08\0"}.items():
        (tmp_path / name).write_bytes(content)
        assert not is_dicom(tmp_path / name)


# ---------------------------------------------------------------- twins


def test_slices_that_were_exported_twice_are_taken_once(tmp_path, caplog):
    folder = write_series(tmp_path / "ct")
    expected = read_volume(folder)
    for file in list(folder.iterdir()):
        shutil.copy(file, folder / f"copy_of_{file.name}")
    second = next(folder.glob("copy_of*"))
    rewrite(second, SOPInstanceUID=generate_uid())  # sent twice, as another instance
    with caplog.at_level(logging.WARNING):
        volume = read_volume(folder)
    np.testing.assert_array_equal(volume.numpy(), expected.numpy())
    assert "left out 4 slices that are there twice" in caplog.text


def test_different_images_at_one_place_or_of_one_identifier_are_refused(tmp_path):
    folder = write_series(tmp_path / "ct")
    file = next(folder.iterdir())
    shutil.copy(file, folder / "copy.dcm")
    rewrite(folder / "copy.dcm", PixelData=bytes(60))
    with pytest.raises(DataError, match="has the SOPInstanceUID of"):
        read_volume(folder)
    rewrite(folder / "copy.dcm", SOPInstanceUID=generate_uid())
    with pytest.raises(DataError, match=r"lie at one position|unevenly"):
        read_volume(folder)


# ---------------------------------------------------------------- multi-frame objects


def write_frames(
    path: Path, *, modality: str = "CT", order: tuple[int, ...] = (2, 0, 3, 1), shared: bool = False, **fields: object
) -> Path:
    """An enhanced object of the volume of :func:`write_series`, its frames in an order that is not that of places."""
    sop_class = EnhancedCTImageStorage if modality == "CT" else EnhancedMRImageStorage
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = pydicom.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.3", generate_uid(), "1.2.4"
    data.Modality, data.PatientID, data.ImageType = modality, "phantom", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.Rows, data.Columns, data.NumberOfFrames = 5, 6, len(order)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    measures, orientation, common = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [1.5, 2.0], 3.0
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    groups = {"PixelMeasuresSequence": measures, "PlaneOrientationSequence": orientation}
    frames = []
    for z in order:
        position, transformation, frame = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [-30.0, -40.0, -70.0 + 3.0 * z]
        transformation.RescaleSlope, transformation.RescaleIntercept = 1, -1000 - 10 * z
        frame.PlanePositionSequence = Sequence([position])
        frame.PixelValueTransformationSequence = Sequence([transformation])
        for name, item in () if shared else groups.items():
            setattr(frame, name, Sequence([item]))
        frames.append(frame)
    for name, item in groups.items() if shared else ():
        setattr(common, name, Sequence([item]))
    data.SharedFunctionalGroupsSequence = Sequence([common])
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.PixelData = np.stack([stored_frame(z) for z in order]).tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, **SAVE)
    return path


def stored_frame(z: int) -> np.ndarray:
    return (values()[:, :, z].T.astype(np.int32) + 1000 + 10 * z).astype(np.uint16)


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless])
def test_frames_of_an_enhanced_object_are_a_volume(tmp_path, modality, shared, interpretation, syntax):
    file = write_frames(
        tmp_path / "in" / "frames.dcm", modality=modality, shared=shared, PhotometricInterpretation=interpretation
    )
    if syntax:
        compress(file, syntax, [stored_frame(z) for z in (2, 0, 3, 1)])
    for path in (file, file.parent):
        volume = read_volume(path)
        np.testing.assert_array_equal(volume[0].numpy(), values())
        np.testing.assert_allclose(np.asarray(volume.affine), AFFINE, atol=1e-5)
        assert list_volumes(path) == [{"image": str(path)}]


def test_several_enhanced_objects_in_a_folder_are_volumes_of_their_own(tmp_path):
    files = [write_frames(tmp_path / name) for name in ("a.dcm", "b")]
    assert [Path(entry["image"]) for entry in list_volumes(tmp_path)] == files
    # parts of one series make one volume
    uid = generate_uid()
    for name, order in {"a.dcm": (0, 1), "b": (3, 2)}.items():
        write_frames(tmp_path / name, order=order, SeriesInstanceUID=uid)
    assert list_volumes(tmp_path) == [{"image": str(tmp_path)}]
    np.testing.assert_array_equal(read_volume(tmp_path)[0].numpy(), values())
    shutil.copy(tmp_path / "b", tmp_path / "c")
    np.testing.assert_array_equal(read_volume(tmp_path)[0].numpy(), values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": (0, 1, 3)}, r"unevenly spaced slices.*frames.dcm \(frame 2\).*missing"),
        ({"order": (0, 1, 1, 2)}, "lie at one position|unevenly"),
        ({"PerFrameFunctionalGroupsSequence": Sequence([])}, "holds 4 frames, and the place of 0.*enhanced"),
        ({"NumberOfFrames": 3}, "holds 3 frames, and the place of 4"),
        ({"PixelData": bytes(100)}, "pixels can't be read.*truncated"),
    ],
)
def test_frames_that_make_no_volume_are_refused(tmp_path, change, message):
    file = write_frames(tmp_path / "frames.dcm", **change)
    with pytest.raises(DataError, match=message):
        read_volume(file)


# ---------------------------------------------------------------- media


def test_a_medium_with_a_dicomdir_gives_its_series(tmp_path):
    write_series(tmp_path / "cd" / "DICOM" / "S1", name="IM")
    write_series(tmp_path / "cd" / "DICOM" / "S2", name="IM")
    (tmp_path / "cd" / "VIEWER").mkdir()
    (tmp_path / "cd" / "VIEWER" / "readme.txt").write_text("run me")
    files = pydicom.fileset.FileSet()
    for file in sorted((tmp_path / "cd" / "DICOM").rglob("*.dcm")):
        data = pydicom.dcmread(file)
        data.StudyDate, data.StudyTime, data.StudyID, data.PatientName = "20240101", "101500", "1", "A^B"
        data.SeriesNumber, data.InstanceNumber, data.AccessionNumber, data.StudyDescription = 1, 1, "", ""
        files.add(data)
    files.write(tmp_path / "standard")  # pydicom's own layout and DICOMDIR
    shutil.copy(tmp_path / "standard" / "DICOMDIR", tmp_path / "cd" / "DICOMDIR")
    assert is_dicom(tmp_path / "cd" / "DICOMDIR")
    for place in (tmp_path / "cd", tmp_path / "cd" / "DICOMDIR"):
        found = [Path(entry["image"]) for entry in list_volumes(place)]
        assert found == [tmp_path / "cd" / "DICOM" / name for name in ("S1", "S2")]
    found = list_volumes(tmp_path / "standard")
    assert len(found) == 2
    for entry in found:
        np.testing.assert_array_equal(read_volume(entry["image"])[0].numpy(), values())


def test_a_dicomdir_beside_slices_is_no_slice(tmp_path):
    folder = write_series(tmp_path / "ct")
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.3.10", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = pydicom.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.FileSetID = "CD"
    data.save_as(folder / "DICOMDIR", **SAVE)
    assert list_volumes(folder) == [{"image": str(folder)}]
    np.testing.assert_array_equal(read_volume(folder)[0].numpy(), values())


def test_a_stray_dicom_file_in_a_folder_of_nifti_is_named_or_refused(tmp_path, caplog):
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name)
    shutil.copy(next(write_series(tmp_path / "series").iterdir()), tmp_path / "IM0001")
    (tmp_path / "old").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert [Path(e["image"]).name for e in list_volumes(tmp_path)] == ["a.nii.gz", "b.nii.gz", "series"]
    assert "left out 3 that are no volumes: IM0001, notes.txt, old/." in caplog.text
    for file in (tmp_path / "series").iterdir():
        shutil.copy(file, tmp_path)
    with pytest.raises(DataError, match=r"holds 5 DICOM files.*beside 3 volumes.*folder of its own"):
        list_volumes(tmp_path)


def test_what_a_series_folder_holds_besides_is_counted(tmp_path, caplog):
    folder = write_series(tmp_path / "ct")
    (folder / "report.pdf").write_text("x")
    write_series(folder / "later")
    with caplog.at_level(logging.WARNING):
        assert list_volumes(folder) == [{"image": str(folder)}]
        assert "left out 1 that are no volumes: later/" in caplog.text
        read_volume(folder)
    assert "left out 2 that are no DICOM images: later/, report.pdf" in caplog.text
    deeper = tmp_path / "outer" / "inner"
    shutil.copytree(folder, deeper / "ct")
    with pytest.raises(DataError, match=rf"no volumes.*found inner\. Volumes lie deeper: pass {deeper}"):
        list_volumes(tmp_path / "outer")


@pytest.mark.parametrize("field", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
@pytest.mark.parametrize("count", [1, 4])
def test_dicom_without_geometry_is_refused(tmp_path, field, count):
    folder = write_series(tmp_path / "ct", count=count, **{field: None})
    for path in (folder, next(folder.iterdir())):
        with pytest.raises(DataError, match=rf"the DICOM field {field} is missing"):
            read_volume(path)


def test_class_of_the_object_does_not_matter(tmp_path):
    folder = write_series(tmp_path / "ct", SOPClassUID=MRImageStorage, RescaleSlope=2.5, RescaleIntercept=-7)
    np.testing.assert_array_equal(read_volume(folder)[0].numpy(), values() * 2.5 - 7)
    folder = write_series(tmp_path / "other", SOPClassUID=CTImageStorage)
    np.testing.assert_array_equal(read_volume(folder)[0].numpy(), values())
