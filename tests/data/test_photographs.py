from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
import torch
from monai.transforms import LoadImage, SaveImage
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, VLPhotographicImageStorage, generate_uid

from medsa_nets.data import AtomicPILWriter, PhotographReader, read_dicom_photograph, save_png
from medsa_nets.data.photographs import read_photograph
from medsa_nets.errors import DataError

HEIGHT, WIDTH = 6, 9


@pytest.fixture
def rgb() -> np.ndarray:
    """A photograph (rows, columns, 3) whose pixels all differ."""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def read(path: Path, mode: str = "RGB") -> np.ndarray:
    image = read_photograph(path, mode)
    assert image.mode == mode
    return np.asarray(image)


def write_dicom(path: Path, pixels: np.ndarray | None, **fields) -> Path:
    """A DICOM file as a camera or a viewer writes it, uncompressed."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = fields.pop("SOPClassUID", VLPhotographicImageStorage)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PatientName, dataset.PatientID = "XC", "Test^Photograph", "1"
    if pixels is not None:
        bits = pixels.dtype.itemsize * 8
        dataset.Rows, dataset.Columns = HEIGHT, WIDTH
        dataset.SamplesPerPixel = 3 if pixels.size % (3 * HEIGHT * WIDTH) == 0 and pixels.ndim >= 3 else 1
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = (
            bits,
            bits,
            bits - 1,
            0,
        )
        if dataset.SamplesPerPixel == 3:
            dataset.PlanarConfiguration = 0
        dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
        dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    for name, value in fields.items():
        setattr(dataset, name, value)
    # pydicom 2 takes write_like_original, pydicom 3 enforce_file_format
    if int(pydicom.__version__.split(".")[0]) < 3:
        dataset.is_little_endian, dataset.is_implicit_VR = True, False
        dataset.save_as(path, write_like_original=False)
    else:
        dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_an_rgb_photograph_comes_as_it_is(tmp_path, rgb, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rgb).save(path)
    np.testing.assert_array_equal(read(path), rgb)


def test_grey_becomes_three_equal_channels(tmp_path, rgb):
    Image.fromarray(rgb[..., 0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.repeat(rgb[..., :1], 3, axis=2))


def test_the_alpha_channel_is_dropped(tmp_path, rgb):
    alpha = np.full((HEIGHT, WIDTH, 1), 7, dtype=np.uint8)
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), rgb)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_contrast(tmp_path, suffix):
    grey = np.linspace(0, 4095, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)  # 12 bits in 16
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    expected = grey.astype(np.float64) / 4095 * 255
    found = read(tmp_path / f"a.{suffix}").astype(np.float64)
    np.testing.assert_allclose(found, np.repeat(expected[..., None], 3, axis=2), atol=1.0)


def test_big_endian_16_bit_grey_keeps_its_contrast(tmp_path):
    grey = np.linspace(0, 65535, HEIGHT * WIDTH).astype(">u2").reshape(HEIGHT, WIDTH)
    Image.frombytes("I;16B", (WIDTH, HEIGHT), grey.tobytes()).save(tmp_path / "a.tif")
    found = read(tmp_path / "a.tif")[..., 0].astype(np.float64)
    np.testing.assert_allclose(found, grey.astype(np.float64) / 65535 * 255, atol=1.0)


def test_palette_colours_are_looked_up(tmp_path):
    palette = [(250, 10, 20), (0, 200, 100), (5, 6, 7)]
    index = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
    image = Image.fromarray(index).convert("P")
    image.putpalette([value for colour in palette for value in colour])
    image.putdata(index.flatten().tolist())
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.array(palette, dtype=np.uint8)[index])


def test_cmyk_becomes_rgb(tmp_path):
    # Cyan, magenta, yellow, black as a printer's JPEG has them; large patches, so that JPEG keeps the colours.
    cmyk = np.zeros((16, 32, 4), dtype=np.uint8)
    cmyk[:, :16, 0], cmyk[:, 16:, 1] = 255, 255
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "a.jpg", quality=95)
    found = read(tmp_path / "a.jpg").astype(int)
    assert np.abs(found[8, 8] - (0, 255, 255)).max() <= 8
    assert np.abs(found[8, 24] - (255, 0, 255)).max() <= 8


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1"])
def test_masks_come_with_one_channel(tmp_path, mode):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[2:4, 3:7] = 255
    Image.fromarray(mask).convert(mode).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read(tmp_path / "mask.png", "L"), mask)


def test_load_image_gives_width_before_height(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    image = LoadImage(reader=PhotographReader(), ensure_channel_first=True, image_only=True)(str(tmp_path / "a.png"))
    assert image.shape == (3, WIDTH, HEIGHT)
    np.testing.assert_array_equal(image.numpy().transpose(2, 1, 0), rgb)


@pytest.fixture(params=["read_photograph", "LoadImage"])
def load(request) -> Callable[[Path], object]:
    """What reads a photograph: the function, and MONAI's loader, which would try its other readers on an error."""
    return read_photograph if request.param == "read_photograph" else LoadImage(reader=PhotographReader())


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "missing"])
def test_what_is_no_picture_is_an_error_that_names_the_file(tmp_path, rgb, load, kind):
    path = tmp_path / "lesion.jpg"
    if kind == "truncated":
        Image.fromarray(np.tile(rgb, (20, 20, 1))).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no picture")
    with pytest.raises(DataError, match=r"lesion\.jpg"):
        load(path)


@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
def test_a_tiff_that_lists_data_for_a_part_of_its_pixels_is_refused(tmp_path, compression):
    path = tmp_path / "lesion.tif"
    array = np.random.default_rng(0).integers(0, 256, (90, 40), dtype=np.uint8)
    Image.fromarray(array).save(path, compression=compression, tiffinfo={278: 30})  # rows of a strip
    np.testing.assert_array_equal(read(path, "L"), array)
    tall = struct.pack("<HHII", 257, 4, 1, 900_000)  # the tag of the height, a LONG
    changed, count = re.subn(rb"\x01\x01[\x03\x04]\0\x01\0\0\0\x5a\0\0\0", tall, path.read_bytes())
    assert count == 1
    path.write_bytes(changed)
    with pytest.raises(DataError, match=r"lesion\.tif"):
        read(path, "L")


def test_a_dicom_photograph_in_rgb_comes_as_it_is(tmp_path, rgb):
    path = write_dicom(tmp_path / "IM0001", rgb, PhotometricInterpretation="RGB")
    np.testing.assert_array_equal(read(path), rgb)


def test_a_dicom_photograph_with_planes_of_colour_comes_as_it_is(tmp_path, rgb):
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1))
    path = write_dicom(tmp_path / "a.dcm", planes, PhotometricInterpretation="RGB", PlanarConfiguration=1)
    np.testing.assert_array_equal(read(path), rgb)


def test_a_dicom_photograph_in_ybr_full_becomes_rgb(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 90), (40, 40, 40)])
    rgb = colours[np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 5]
    # DICOM PS3.3 C.7.6.3.1.2
    matrix = np.array([[0.2990, 0.5870, 0.1140], [-0.1687, -0.3313, 0.5000], [0.5000, -0.4187, -0.0813]])
    ybr = np.clip(np.rint(rgb @ matrix.T + (0, 128, 128)), 0, 255).astype(np.uint8)
    path = write_dicom(tmp_path / "a.dcm", ybr, PhotometricInterpretation="YBR_FULL")
    assert np.abs(read(path).astype(int) - rgb).max() <= 3


@pytest.mark.parametrize(("interpretation", "inverted"), [("MONOCHROME2", False), ("MONOCHROME1", True)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_secondary_capture_is_scaled_to_its_range(tmp_path, interpretation, inverted, dtype):
    grey = np.linspace(3, 203, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(dtype) * (20 if dtype == np.uint16 else 1)
    path = write_dicom(
        tmp_path / "a.dcm", grey, SOPClassUID=SecondaryCaptureImageStorage, PhotometricInterpretation=interpretation
    )
    expected = (grey.astype(np.float64) - grey.min()) / (int(grey.max()) - int(grey.min())) * 255
    found = read(path).astype(np.float64)
    np.testing.assert_allclose(found[..., 0], 255 - expected if inverted else expected, atol=1.0)
    np.testing.assert_array_equal(found[..., 0], found[..., 2])


def test_a_dicom_object_without_pixels_is_an_error_that_names_the_file(tmp_path, load):
    path = write_dicom(tmp_path / "report.dcm", None)
    with pytest.raises(DataError, match=r"report\.dcm.*pixels can't be read"):
        load(path)


@pytest.mark.parametrize("colour", [True, False])
def test_a_dicom_object_of_several_frames_is_an_error_that_names_the_file(tmp_path, rgb, load, colour):
    frames = np.stack([rgb, rgb]) if colour else np.stack([rgb[..., 0], rgb[..., 1]])
    path = write_dicom(
        tmp_path / "film.dcm",
        frames,
        PhotometricInterpretation="RGB" if colour else "MONOCHROME2",
        NumberOfFrames=2,
        SamplesPerPixel=3 if colour else 1,
    )
    with pytest.raises(DataError, match=r"film\.dcm.*expected one photograph"):
        load(path)


def test_a_damaged_dicom_file_is_an_error_that_names_the_file(tmp_path, rgb):
    path = write_dicom(tmp_path / "cut.dcm", rgb, PhotometricInterpretation="RGB")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cut\.dcm"):
        read_dicom_photograph(path)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_png_makes_folders_and_overwrites_whole(tmp_path, rgb):
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(Image.new("RGB", (50, 50), (1, 2, 3)), path)
    assert save_png(Image.fromarray(rgb), path) == path
    np.testing.assert_array_equal(np.asarray(Image.open(path)), rgb)
    assert files_in(path.parent) == ["a.png"]


class BrokenImage:
    """A picture whose saving stops half-way, as on a full disk."""

    def save(self, path, format=None):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")


@pytest.mark.parametrize("before", [b"old picture", None])
def test_save_png_leaves_what_was_there_when_it_fails(tmp_path, before):
    path = tmp_path / "a.png"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(OSError, match="No space left"):
        save_png(BrokenImage(), path)
    assert files_in(tmp_path) == ([] if before is None else ["a.png"])
    assert before is None or path.read_bytes() == before


def make_writer(mask: np.ndarray) -> AtomicPILWriter:
    writer = AtomicPILWriter(output_dtype=np.uint8)
    writer.set_data_array(torch.from_numpy(mask[None]), channel_dim=0)
    return writer


def test_the_writer_overwrites_whole(tmp_path):
    path = tmp_path / "mask.png"
    mask = np.zeros((WIDTH, HEIGHT), dtype=np.uint8)
    make_writer(mask).write(path)
    mask[7, 2] = 1
    make_writer(mask).write(path)
    found = np.asarray(Image.open(path))
    assert found.shape == (HEIGHT, WIDTH)
    assert [tuple(place) for place in np.argwhere(found == 255)] == [(2, 7)]  # PIL: row, column
    assert files_in(tmp_path) == ["mask.png"]


def test_the_writer_leaves_what_was_there_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "mask.png"
    path.write_bytes(b"old picture")
    monkeypatch.setattr(Image.Image, "save", lambda self, name, *args, **kwargs: BrokenImage().save(name))
    with pytest.raises(OSError, match="No space left"):
        make_writer(np.zeros((WIDTH, HEIGHT), dtype=np.uint8)).write(path)
    assert files_in(tmp_path) == ["mask.png"]
    assert path.read_bytes() == b"old picture"


def test_the_writer_serves_save_image(tmp_path):
    mask = torch.zeros(1, WIDTH, HEIGHT)
    mask[0, 7, 2] = 255
    save = SaveImage(
        output_dir=tmp_path,
        output_postfix="",
        output_ext=".png",
        writer=AtomicPILWriter,
        separate_folder=False,
        print_log=False,
        resample=False,
        output_dtype=np.uint8,
    )
    save(mask, meta_data={"filename_or_obj": "lesion.jpg"})
    assert files_in(tmp_path) == ["lesion.png"]
    found = np.asarray(Image.open(tmp_path / "lesion.png"))
    assert [tuple(place) for place in np.argwhere(found > 0)] == [(2, 7)]  # PIL: row, column


# ---------------------------------------------------------------- one frame, upright


def marked(height: int = 24, width: int = 40) -> np.ndarray:
    """A picture in which each corner has a colour of its own, in patches that JPEG keeps."""
    picture = np.full((height, width, 3), 120, dtype=np.uint8)
    picture[:8, :16], picture[:8, -8:] = (250, 20, 20), (20, 250, 20)
    picture[-8:, :16], picture[-8:, -16:] = (20, 20, 250), (250, 250, 20)
    return picture


def write_turned(path: Path, picture: np.ndarray, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(picture).save(path, exif=exif, **options)
    return path


# What a viewer does to the stored rows and columns, EXIF 2.32, 4.6.4 A, tag Orientation.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".tiff"])
@pytest.mark.parametrize("orientation", list(UPRIGHT))
def test_a_photograph_comes_upright_whatever_its_stored_orientation(tmp_path, caplog, orientation, suffix):
    path = write_turned(tmp_path / f"photo{suffix}", marked(), orientation)
    found = read(path).astype(int)
    expected = UPRIGHT[orientation](marked()).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (40 if suffix == ".jpg" else 0)
    said = f"{path.name}: turned upright, as its EXIF orientation {orientation} says" in caplog.text
    assert said == (orientation != 1)
    _, meta = PhotographReader().get_data(path)
    assert meta["orientation"] == orientation
    assert meta["frame"].startswith("upright")


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_there_is_not_turns_nothing(tmp_path, orientation):
    path = write_turned(tmp_path / "photo.png", marked(), orientation)
    np.testing.assert_array_equal(read(path), marked())


def test_damaged_exif_data_are_told_and_turn_nothing(tmp_path, caplog):
    Image.fromarray(marked()).save(tmp_path / "photo.png", exif=b"Exif\0\0nothing of the kind")
    np.testing.assert_array_equal(read(tmp_path / "photo.png"), marked())
    assert "EXIF data can't be read" in caplog.text


def test_a_mask_in_stored_orientation_is_turned_with_its_own_exif_data(tmp_path):
    mask = (marked()[..., 0] > 200).astype(np.uint8) * 255
    write_turned(tmp_path / "mask.png", mask, 6)
    found, _ = PhotographReader(mode="L").get_data(tmp_path / "mask.png")
    np.testing.assert_array_equal(found.T, UPRIGHT[6](mask))


def test_a_written_mask_says_its_frame(tmp_path):
    path = write_turned(tmp_path / "photo.png", marked(), 6)
    image = LoadImage(reader=PhotographReader(), image_only=True, ensure_channel_first=True)(str(path))
    save = SaveImage(output_dir=tmp_path, output_ext=".png", writer=AtomicPILWriter, separate_folder=False,
                     resample=False, scale=255, print_log=False)  # fmt: skip
    save(image[:1] / 255)
    written = Image.open(next(tmp_path.glob("photo_*.png")))
    assert written.size == (24, 40)
    assert written.text["Frame"] == "upright (EXIF orientation 6 of the image is applied)"
    save_png(Image.fromarray(marked()), tmp_path / "a.png", frame="upright (as stored)")
    assert Image.open(tmp_path / "a.png").text["Frame"] == "upright (as stored)"


# ---------------------------------------------------------------- depths and colours


@pytest.mark.parametrize(
    ("grey", "low", "high"),
    [
        (np.linspace(0, 1, 54).astype(np.float32), 0, 1),
        (np.linspace(0, 0.3, 54).astype(np.float32), 0, 1),  # a dark picture stays dark
        (np.linspace(0, 255, 54).astype(np.float32), 0, 255),
        (np.linspace(0, 4000, 54).astype(np.float32), 0, 4000),
        (np.linspace(-500, 300, 54).astype(np.float32), -500, 300),
        (np.linspace(-5000, 70000, 54).astype(np.int32), -5000, 70000),
    ],
)
def test_grey_of_any_type_keeps_its_brightness_and_never_wraps(tmp_path, grey, low, high):
    grey = grey.reshape(HEIGHT, WIDTH)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    expected = (grey.astype(np.float64) - low) / (high - low) * 255
    np.testing.assert_allclose(read(tmp_path / "a.tif")[..., 1], expected, atol=1.0)


def test_pixels_that_are_not_finite_are_refused(tmp_path):
    Image.fromarray(np.full((4, 5), np.nan, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: 20 pixels are not finite"):
        read(tmp_path / "a.tif")


def test_pictures_that_are_left_out_are_counted(tmp_path, rgb, caplog):
    Image.fromarray(rgb).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(rgb[::-1])] * 2)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), rgb)
    assert "a.tif: took the first of 3 pictures" in caplog.text


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_colours_of_every_depth_keep_their_brightness(tmp_path, rgb, bits):
    deep = np.rint(rgb / 255 * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    path = write_dicom(tmp_path / "a.dcm", deep, PhotometricInterpretation="RGB", BitsStored=bits, HighBit=bits - 1)
    np.testing.assert_allclose(read(path), rgb, atol=1)


def test_colours_that_do_not_fit_their_bits_are_refused(tmp_path, rgb):
    deep = rgb.astype(np.uint16) * 257
    path = write_dicom(tmp_path / "a.dcm", deep, PhotometricInterpretation="RGB", BitsStored=8, HighBit=7)
    try:
        found = read(path)
    except DataError as error:
        assert "8 bits" in str(error)  # noqa: PT017 - pydicom's versions differ in whether they cut the other bits off
    else:
        np.testing.assert_array_equal(found, rgb)  # the low 8 bits


def with_palette(path: Path, index: np.ndarray, colours: np.ndarray, bits: int, **fields) -> Path:
    tables = {}
    for number, name in enumerate(("Red", "Green", "Blue")):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [len(colours) % 65536, 0, bits]
        entries = colours[:, number].astype(np.uint8 if bits == 8 else np.uint16)
        tables[f"{name}PaletteColorLookupTableData"] = entries.tobytes() + b"\0" * (entries.nbytes % 2)
    return write_dicom(path, index, PhotometricInterpretation="PALETTE COLOR", **tables, **fields)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_dicom_palette_is_looked_up(tmp_path, bits, dtype):
    colours = np.random.default_rng(1).integers(0, 256, (54, 3))
    colours[0] = 255
    index = np.arange(HEIGHT * WIDTH, dtype=dtype).reshape(HEIGHT, WIDTH)
    path = with_palette(tmp_path / "a.dcm", index, colours * (1 if bits == 8 else 257), bits)
    np.testing.assert_array_equal(read(path), colours[index])


@pytest.mark.parametrize("interpretation", ["HSV", "CMYK", "YBR_PARTIAL_420", "", "UNHEARD OF"])
def test_colours_that_are_not_known_are_one_error(tmp_path, rgb, interpretation):
    path = write_dicom(tmp_path / "a.dcm", rgb, PhotometricInterpretation=interpretation)
    with pytest.raises(DataError, match=r"a\.dcm"):
        read(path)


@pytest.mark.parametrize("interpretation", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("dtype", [np.int16, np.int8, np.uint32])
def test_grey_of_every_type_is_scaled_without_wrapping(tmp_path, interpretation, dtype):
    info = np.iinfo(dtype)
    grey = np.linspace(info.min, info.max, HEIGHT * WIDTH).astype(dtype).reshape(HEIGHT, WIDTH)
    signed = {"PixelRepresentation": int(info.min < 0)}
    path = write_dicom(tmp_path / "a.dcm", grey, PhotometricInterpretation=interpretation, **signed)
    expected = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    expected = 255 - expected if interpretation == "MONOCHROME1" else expected
    np.testing.assert_allclose(read(path)[..., 0], expected, atol=1.5)


PYDICOMS = ["JPEG2000", "SC_rgb_jpeg_dcmtk", "SC_rgb_rle_2frame", "examples_palette", "examples_rgb_color"]
PYDICOMS += ["examples_ybr_color", "SC_rgb_16bit", "SC_rgb_32bit", "color-pl", "SC_jpeg_no_color_transform"]


@pytest.mark.parametrize("name", [f"{name}.dcm" for name in PYDICOMS])
def test_pydicoms_own_files_give_pydicoms_colours_or_one_error(name):
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom has no {name} here")
    try:
        found = read(Path(path))
    except DataError as error:
        assert name in str(error)  # noqa: PT017 - either is right, as long as it is one of them
        return
    data = pydicom.dcmread(path)
    array = data.pixel_array
    if data.PhotometricInterpretation == "PALETTE COLOR":
        array = pydicom.pixels.apply_color_lut(array, data) / 257
    elif array.ndim == 3:
        array = array / (2**data.BitsStored - 1) * 255
    else:
        array = (array.astype(float) - array.min()) / (float(array.max()) - array.min()) * 255
        array = np.repeat(array[..., None], 3, axis=2)
    np.testing.assert_allclose(found, array, atol=1.0)
