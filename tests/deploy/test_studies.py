from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.sr.codedict import codes
from pydicom.uid import BasicTextSRStorage, MRImageStorage, generate_uid

from medsa_nets.deploy.studies import Found, Rules, Source, find_sources
from medsa_nets.errors import DataError

from .series import new_object, save, write_ct, write_enhanced, write_photograph

CT = Rules(("CT",), (3, 40))
PHOTOGRAPHS = Rules(("XC", "SC"), volumes=False)
AFFINE = np.diag([2.0, 1.5, 3.0, 1.0])


def volume(depth: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(-900, 900, (6, 5, depth)).astype(np.int16)


def change(file: Path, **fields: object) -> None:
    data = pydicom.dcmread(file)
    for name, value in fields.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(file)


def slices(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda file: int(file.stem.split("_")[1]))


def only(found: Found, kind: str) -> str:
    """The single line of a kind, when nothing can be segmented."""
    assert not found.sources
    lines = getattr(found, kind)
    assert len(lines) == 1
    return lines[0]


def test_series_of_several_studies_are_found_at_any_depth_in_the_order_of_their_positions(tmp_path):
    for name in ("a", "b/deeper"):
        write_ct(tmp_path / name, volume(), AFFINE)
    found = find_sources(tmp_path, CT)
    assert len(found.sources) == 2
    assert not found.skipped
    assert not found.damaged
    for source in found.sources:
        assert [header.InstanceNumber for header in source.headers] == [1, 2, 3, 4, 5]
        image = source.read()
        np.testing.assert_array_equal(image[0].numpy(), volume())
        np.testing.assert_allclose(np.asarray(image.affine)[:3, :3], AFFINE[:3, :3] @ np.diag([1, 1, 1]), atol=1e-6)


def test_mixed_files_in_one_folder_are_told_apart_and_named(tmp_path):
    write_ct(tmp_path, volume(), AFFINE)
    scout = write_ct(tmp_path / "scout", volume(4), AFFINE, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_ct(tmp_path / "mr", volume(4), AFFINE, Modality="MR", SOPClassUID=MRImageStorage)
    write_ct(tmp_path / "thin", volume(2), AFFINE, SeriesDescription="two slices")
    write_ct(tmp_path / "thick", volume(41), AFFINE)
    colour = write_ct(tmp_path / "colour", volume(4), AFFINE)
    for file in slices(colour):
        change(file, SamplesPerPixel=3)
    save(new_object(BasicTextSRStorage, "CT"), tmp_path / "text.dcm")
    (tmp_path / "notes.txt").write_text("not an image")
    found = find_sources(tmp_path, CT)
    assert len(found.sources) == 1
    assert not found.damaged
    text = "\n".join(found.skipped)
    reasons = ("a localizer", "modality MR; the bundle takes CT", "(two slices): 2 slices; the bundle takes 3 to 40",
               "41 slices; the bundle takes 3 to 40", "a colour image of 3 samples",
               "no image of a patient: Basic Text", "no DICOM file (notes.txt)")  # fmt: skip
    for reason in reasons:
        assert reason in text, reason
    assert pydicom.dcmread(slices(scout)[0]).SeriesInstanceUID in text
    assert len(found.skipped) == 7


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: files[2].unlink(), "unevenly spaced.*A slice is missing"),
        (lambda files: change(files[2], FrameOfReferenceUID=generate_uid()), "its frame of reference differs"),
        (lambda files: change(files[2], ImagePositionPatient=[0, 0, 6.9]), "unevenly spaced"),
        (lambda files: change(files[2], ImagePositionPatient=None), "ImagePositionPatient is missing"),
        (lambda files: change(files[2], ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), "orientation differs"),
        (lambda files: change(files[2], PixelSpacing=[0, 0]), "PixelSpacing is"),
        (lambda files: change(files[2], SOPInstanceUID=None), "SOPInstanceUID is missing"),
        (lambda files: change(files[2], ImagePositionPatient=[0, 0, 3]), "several slices|unevenly spaced"),
        (lambda files: [change(file, Rows=60000, Columns=60000) for file in files], "more than fit in memory"),
    ],
)
def test_a_series_that_is_no_whole_grid_is_damaged_and_named(tmp_path, damage, message):
    files = slices(write_ct(tmp_path / "ct", volume(), AFFINE))
    damage(files)
    line = only(find_sources(tmp_path, CT), "damaged")
    with pytest.raises(DataError, match=message):
        raise DataError(line)
    assert str(tmp_path) in line or pydicom.dcmread(files[0]).SeriesInstanceUID in line


def test_a_file_whose_header_is_cut_is_named_and_its_series_lacks_a_slice(tmp_path):
    files = slices(write_ct(tmp_path / "ct", volume(), AFFINE))
    files[2].write_bytes(files[2].read_bytes()[:200])
    found = find_sources(tmp_path, CT)
    assert not found.sources
    assert any(str(files[2]) in line for line in found.damaged)


def test_an_instance_that_comes_twice_counts_once(tmp_path):
    files = slices(write_ct(tmp_path / "ct", volume(), AFFINE))
    (tmp_path / "ct" / "copy_9.dcm").write_bytes(files[1].read_bytes())
    found = find_sources(tmp_path, CT)
    assert len(found.sources[0].files) == 5
    assert "the same image as" in found.skipped[0]


def test_twins_by_place_count_once_and_others_of_one_identifier_are_damaged(tmp_path):
    files = slices(write_ct(tmp_path / "ct", volume(), AFFINE))
    (tmp_path / "ct" / "copy_9.dcm").write_bytes(files[1].read_bytes())
    change(tmp_path / "ct" / "copy_9.dcm", SOPInstanceUID=generate_uid())
    found = find_sources(tmp_path, CT)
    np.testing.assert_array_equal(found.sources[0].read()[0].numpy(), volume())
    assert "the same image as" in found.skipped[0]
    change(tmp_path / "ct" / "copy_9.dcm", SOPInstanceUID=pydicom.dcmread(files[1]).SOPInstanceUID, PixelData=bytes(60))
    assert "is another image" in only(find_sources(tmp_path, CT), "damaged")


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_grey_values_are_what_is_stored_however_they_are_shown(tmp_path, interpretation):
    write_ct(tmp_path / "ct", volume(), AFFINE, PhotometricInterpretation=interpretation)
    np.testing.assert_array_equal(find_sources(tmp_path, CT).sources[0].read()[0].numpy(), volume())


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_an_enhanced_object_is_one_volume(tmp_path, interpretation):
    write_ct(tmp_path / "ct", volume(), AFFINE)
    for name in ("a", "b"):
        write_enhanced(tmp_path / "ct", tmp_path / "in" / name, PhotometricInterpretation=interpretation)
    found = find_sources(tmp_path / "in", CT)
    assert not found.skipped
    assert not found.damaged
    assert [source.files for source in found.sources] == [(tmp_path / "in" / name,) for name in ("a", "b")]
    for source in found.sources:
        assert source.frames == (4, 3, 2, 1, 0)
        assert source.name.endswith("5 slices")
        image = source.read()
        np.testing.assert_array_equal(image[0].numpy(), volume())
        np.testing.assert_allclose(np.asarray(image.affine), AFFINE, atol=1e-5)
        assert source.datasets()[0].NumberOfFrames == 5
    change(tmp_path / "in" / "a", PixelData=bytes(100))
    with pytest.raises(DataError, match=r"a: 100 bytes of pixels, expected 300"):
        find_sources(tmp_path / "in", CT).sources[0].read()
    change(tmp_path / "in" / "a", PerFrameFunctionalGroupsSequence=[], SeriesInstanceUID=generate_uid())
    assert "the place of 0" in find_sources(tmp_path / "in", CT).damaged[0]


def test_files_without_preamble_are_taken(tmp_path):
    files = slices(write_ct(tmp_path / "ct", volume(), AFFINE))
    for file in files:
        bare = pydicom.Dataset()
        for element in pydicom.dcmread(file):
            bare.add(element)
        file.unlink()
        pydicom.dcmwrite(file.with_suffix(".IMA"), bare, implicit_vr=True, little_endian=True)
    found = find_sources(tmp_path, CT)
    assert not found.damaged
    np.testing.assert_array_equal(found.sources[0].read()[0].numpy(), volume())
    assert [data.InstanceNumber for data in found.sources[0].datasets()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("keep", [-40, -1])
def test_a_file_whose_pixels_are_cut_is_refused_by_name(tmp_path, keep):
    files = slices(write_ct(tmp_path / "ct", volume(), AFFINE))
    files[3].write_bytes(files[3].read_bytes()[:keep])
    found = find_sources(tmp_path, CT)
    with pytest.raises(DataError, match=files[3].name):
        found.sources[0].read()


def test_a_real_compressed_file_that_is_cut_is_refused(tmp_path, shared_data):
    from .series import with_identifiers

    folder = with_identifiers(shared_data / "ct" / "ct_b_dicom", tmp_path / "ct")
    assert find_sources(folder, CT).sources[0].read().shape == (1, 512, 512, 20)
    file = sorted(folder.iterdir())[4]
    file.write_bytes(file.read_bytes()[:-2000])
    found = find_sources(folder, CT)
    with pytest.raises(DataError, match=r"pixels"):
        found.sources[0].read()


LOST = {"StudyInstanceUID": "", "SeriesInstanceUID": "", "SOPInstanceUID": "", "SOPClassUID": "",
        "FrameOfReferenceUID": ""}  # fmt: skip


def test_a_series_that_lost_its_identifiers_is_told_how_to_get_some(tmp_path):
    write_ct(tmp_path, volume(), AFFINE)
    for file in slices(tmp_path):
        change(file, **LOST)
    found = find_sources(tmp_path, CT)
    assert not found.sources
    assert len(found.damaged) == 5
    assert all("is missing" in line and "--make_uids" in line for line in found.damaged)


@pytest.mark.parametrize("bare", [False, True], ids=["with a preamble's UIDs", "without any"])
def test_identifiers_are_made_the_same_in_every_run_and_written_with_the_images(tmp_path, bare):
    write_ct(tmp_path / "in", volume(), AFFINE)
    write_ct(tmp_path / "in" / "whole", volume(), AFFINE)
    for file in tmp_path.glob("in/*.dcm"):
        data = pydicom.dcmread(file)
        for name, value in LOST.items():
            setattr(data, name, value)
        if bare:
            del data.file_meta.MediaStorageSOPInstanceUID, data.file_meta.MediaStorageSOPClassUID
        pydicom.dcmwrite(file, data, enforce_file_format=False)
    first, second = (find_sources(tmp_path / "in", CT, make_uids=True) for _ in range(2))
    assert not first.damaged
    made, whole = sorted(first.sources, key=lambda source: not source.made)
    assert whole.made == ()
    assert set(made.made) == set(LOST)
    for name in LOST:
        values = [str(header[name].value) for header in made.headers]
        assert all(values)
        assert len(set(values)) == (5 if name == "SOPInstanceUID" else 1)
        again = sorted(second.sources, key=lambda source: not source.made)[0]
        assert [str(header[name].value) for header in again.headers] == values
    np.testing.assert_array_equal(made.read()[0].numpy(), volume())
    made.write_copies(tmp_path / "source")
    copies = [pydicom.dcmread(file) for file in sorted((tmp_path / "source").iterdir())]
    assert [str(c.SOPInstanceUID) for c in copies] == [str(h.SOPInstanceUID) for h in made.headers]
    assert all(c.file_meta.MediaStorageSOPInstanceUID == c.SOPInstanceUID for c in copies)
    (found,) = find_sources(tmp_path / "source", CT).sources  # whole without anything made
    np.testing.assert_array_equal(found.read()[0].numpy(), volume())


def test_a_real_anonymous_study_is_taken_with_identifiers_that_were_made(tmp_path, shared_data):
    folder = shared_data / "ct" / "ct_b_dicom"
    assert not find_sources(folder, CT).sources
    (source,) = find_sources(folder, CT, make_uids=True).sources
    assert len(source.files) == 20
    assert source.made


def test_photographs_are_taken_one_by_one_from_dicom_jpeg_and_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (7, 9, 3)).astype(np.uint8)
    write_photograph(tmp_path / "a.dcm", pixels)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    write_photograph(tmp_path / "c.dcm", pixels, Modality="US")
    found = find_sources(tmp_path, PHOTOGRAPHS)
    assert [source.files[0].name for source in found.sources] == ["a.dcm", "b.png"]
    assert "modality US" in found.skipped[0]
    for source in found.sources:
        np.testing.assert_array_equal(source.read().numpy(), pixels.transpose(2, 1, 0))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        find_sources(tmp_path / "absent", CT)
    assert find_sources(tmp_path, CT) == Found()


def damaged_copy(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with bytes changed, removed, repeated or cut; most of the changes fall into the header."""
    out = bytearray(content)
    header = len(content) // 2
    for _ in range(int(rng.integers(1, 6))):
        kind, place = rng.integers(5), int(rng.integers(128, header if rng.random() < 0.7 else len(out) - 1))
        place = min(place, len(out) - 1)
        if kind == 0:
            out[place] = int(rng.integers(256))
        elif kind == 1:
            del out[place : place + int(rng.integers(1, 40))]
        elif kind == 2:
            out[place:place] = bytes(rng.integers(0, 256, int(rng.integers(1, 40))).astype(np.uint8))
        elif kind == 3:
            out[place : place + 4] = b"\xff" * 4
        else:
            del out[max(place, 132) :]
        if len(out) < 140:
            break
    return bytes(out)


@pytest.mark.filterwarnings("ignore:.*VR U")
@pytest.mark.parametrize("block", range(10))
def test_damaged_bytes_never_crash_hang_or_give_an_image_without_its_pixels(tmp_path, block):
    """500 cases in ten blocks: each is segmentable as it stands, left out, or named as damaged."""
    folder = write_ct(tmp_path / "ct", volume(), AFFINE)
    whole = {file: file.read_bytes() for file in slices(folder)}
    read = 0
    for case in range(50):
        rng = np.random.default_rng(1000 * block + case)
        for file, content in whole.items():
            file.write_bytes(damaged_copy(content, rng) if rng.random() < 0.2 else content)
        found = find_sources(folder, CT)
        told = len(found.skipped) + len(found.damaged)
        assert len(found.sources) <= 1
        assert found.sources or told
        assert all("\n" not in line and len(line) < 2000 for line in (*found.skipped, *found.damaged))
        for source in found.sources:
            read += readable(source)
    assert 0 < read < 50


def readable(source: Source) -> bool:
    """Whether a source reads as a volume of all of its pixels; else it says why."""
    try:
        image = source.read()
    except DataError:  # any other error fails the test
        return False
    assert image.shape[3] == len(source.files)
    assert np.isfinite(image.numpy()).all()
    return True


@pytest.mark.parametrize(
    ("characters", "name"),
    [
        ("", "Smith^John"),
        ("ISO_IR 6", "Smith^John"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce"),
        (["ISO 2022 IR 6", "ISO 2022 IR 100"], "M\u00fcller^J\u00f6rg"),
        ("ISO 2022 IR 100", "M\u00fcller^J\u00f6rg"),
        ("ISO_IR 100", "M\u00fcller^J\u00f6rg"),
        ("ISO_IR 192", "\u5c71\u7530^\u592a\u90ce"),
    ],
)
def test_every_character_set_is_one_that_a_segmentation_can_repeat(tmp_path, characters, name):
    hd = pytest.importorskip("highdicom")
    path = write_photograph(tmp_path / "a.dcm", np.zeros((7, 9, 3)), SpecificCharacterSet=characters, PatientName=name)
    found = find_sources(tmp_path, PHOTOGRAPHS)
    (data,) = found.sources[0].datasets()
    algorithm = hd.AlgorithmIdentificationSequence("a", codes.DCM.ArtificialIntelligence, "1")
    described = hd.seg.SegmentDescription(
        1, "lesion", codes.SCT.Organ, codes.SCT.Skin, hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, algorithm
    )
    segmentation = hd.seg.Segmentation(
        [data], np.ones((1, 7, 9), np.uint8), "BINARY", [described], generate_uid(), 1, generate_uid(), 1, "m", "n",
        "1", "s",
    )  # fmt: skip
    segmentation.save_as(tmp_path / "segmentation.dcm")
    assert str(pydicom.dcmread(tmp_path / "segmentation.dcm").PatientName) == name
    assert str(pydicom.dcmread(path).PatientName) == name


def test_a_character_set_that_there_is_not_is_refused_before_inference(tmp_path):
    path = write_photograph(tmp_path / "a.dcm", np.zeros((7, 9, 3)), PatientName="Smith^John")
    data = pydicom.dcmread(path)
    data.add_new("SpecificCharacterSet", "CS", "NO_SET 7")
    data.save_as(path)
    assert "a.dcm: the DICOM field SpecificCharacterSet is 'NO_SET 7'" in only(
        find_sources(tmp_path, PHOTOGRAPHS), "damaged"
    )
