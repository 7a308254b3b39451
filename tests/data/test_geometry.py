"""Units, transforms and kinds of numbers of NIfTI, NRRD and MetaImage files, in and out; against nibabel and ITK."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd, Orientationd, SaveImage, Spacingd

from medsa_nets.data import NamedOutputs, volume_writer
from medsa_nets.data.volumes import read_volume
from medsa_nets.errors import DataError
from medsa_nets.transforms import CheckLabelsd, LoadImageVolumed, RenumberLabelsd

from .volume_files import AFFINE, values, write_nifti


def save(volume: MetaTensor, folder: Path, extension: str) -> Path:
    writer = SaveImage(
        folder_layout=NamedOutputs(folder, "segmentation", extension),
        output_ext=extension,
        resample=False,
        output_dtype=np.uint8,
        writer=volume_writer(extension),
    )
    writer(volume)
    return next(folder.glob(f"*_segmentation{extension}"))


def as_inferred(path: Path) -> MetaTensor:
    """A mask of all voxels above 0, as an inference makes it: on another grid, collated, and back."""
    forward = Compose(
        [
            LoadImageVolumed(keys="image"),
            Orientationd(keys="image", axcodes="RAS", labels=None),
            Spacingd(keys="image", pixdim=(2.0, 1.5, 3.0)),
        ]
    )
    back = Invertd(keys="pred", orig_keys="image", transform=forward, nearest_interp=True, to_tensor=True)
    batch = next(iter(DataLoader(Dataset([{"image": str(path)}], forward), batch_size=1)))
    batch["pred"] = (batch["image"] > 0).float()
    out: MetaTensor = back(decollate_batch(batch)[0])["pred"]
    return out


# ---------------------------------------------------------------- units


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1000.0), ("mm", 1.0), ("micron", 0.001), ("unknown", 1.0)])
def test_nifti_units_are_scaled_to_mm_and_kept(tmp_path, unit, scale):
    stored = np.diag([1 / scale, 1 / scale, 1 / scale, 1.0]) @ AFFINE
    image = nib.Nifti1Image(values(), stored)
    image.header.set_xyzt_units(xyz=unit, t="sec")
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(np.asarray(volume.affine), AFFINE, rtol=1e-5)
    written = nib.load(save(as_inferred(tmp_path / "a.nii.gz"), tmp_path / "out", ".nii.gz"))
    assert written.header.get_xyzt_units()[0] == unit
    np.testing.assert_allclose(written.affine, stored, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(written.dataobj), values() > 0)
    # in a format without units, it counts in mm
    itk_image = itk.imread(str(save(as_inferred(tmp_path / "a.nii.gz"), tmp_path / "mha", ".mha")))
    np.testing.assert_allclose(itk_image.GetSpacing(), [2.0, 1.5, 3.0], rtol=1e-5)


def test_units_that_can_not_be_true_are_refused(tmp_path):
    image = nib.Nifti1Image(values(), AFFINE)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"voxels are 2000 x 1500 x 3000 mm by the unit.*correct the unit"):
        read_volume(tmp_path / "a.nii")
    image.header["xyzt_units"] = 5
    nib.save(image, tmp_path / "b.nii")
    with pytest.raises(DataError, match="xyzt_units is 5; expected metres, mm or micrometres"):
        read_volume(tmp_path / "b.nii")


NRRD = """NRRD0005
type: int16
dimension: 3
space: {space}
sizes: 6 5 4
space directions: ({x},0,0) (0,{y},0) (0,0,{z})
space units: {units}
kinds: domain domain domain
endian: little
encoding: raw
space origin: ({ox},{oy},{oz})

"""


def write_nrrd(path: Path, units: str, scale: float, space: str = "left-posterior-superior") -> Path:
    numbers = dict(zip(("x", "y", "z", "ox", "oy", "oz"), np.array([2.0, 1.5, 3.0, -30.0, -40.0, -70.0]) / scale))
    header = NRRD.format(units=units, space=space, **numbers)
    path.write_bytes(header.encode() + values().T.tobytes())
    return path


@pytest.mark.parametrize(
    ("units", "scale"),
    [('"mm" "mm" "mm"', 1.0), ('"m" "m" "m"', 1000.0), ('"um" "um" "um"', 1e-3), ('"µm" "µm" "µm"', 1e-3),
     ('"microns" "microns" "microns"', 1e-3), ('"cm" "cm" "cm"', 10.0), ('"" "" ""', 1.0)],
)  # fmt: skip
def test_nrrd_space_units_are_scaled_to_mm_and_kept(tmp_path, units, scale):
    file = write_nrrd(tmp_path / "a.nrrd", units, scale)
    volume = read_volume(file)
    np.testing.assert_allclose(np.asarray(volume.affine), AFFINE, rtol=1e-5)
    np.testing.assert_array_equal(volume[0].numpy(), values())
    written = save(as_inferred(file), tmp_path / "out", ".nrrd")
    np.testing.assert_array_equal(itk.array_from_image(itk.imread(str(written))).T, values() > 0)
    header = written.read_bytes().split(b"\n\n")[0].decode()
    assert ("space units" in header) == (scale != 1.0)
    again = read_volume(written)  # its unit read as that of any file
    np.testing.assert_allclose(np.asarray(again.affine), AFFINE, rtol=1e-5)
    # what a reader that knows no units sees is as large as in the source
    np.testing.assert_allclose(itk.imread(str(written)).GetSpacing(), itk.imread(str(file)).GetSpacing(), rtol=1e-5)
    if scale != 1.0:
        np.testing.assert_allclose(
            nib.load(save(as_inferred(file), tmp_path / "nii", ".nii")).affine, AFFINE, rtol=1e-5
        )


@pytest.mark.parametrize("units", ['"pixel" "pixel" "pixel"', '"mm" "mm" "m"', '"furlong" "furlong" "furlong"'])
def test_other_space_units_are_refused(tmp_path, units):
    with pytest.raises(DataError, match=r"space units are .*; expected mm, m, cm or um"):
        read_volume(write_nrrd(tmp_path / "a.nrrd", units, 1.0))


# ---------------------------------------------------------------- qform and sform


def test_a_mask_carries_qform_sform_and_codes_of_its_image(tmp_path, caplog):
    other = AFFINE.copy()
    other[:3, 3] += [5.0, -3.0, 2.0]
    other[:3, :3] = AFFINE[:3, :3] @ np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
    image = nib.Nifti1Image(values(), None)
    image.set_sform(AFFINE, code=4)
    image.set_qform(other, code=1)
    nib.save(image, tmp_path / "a.nii.gz")
    with caplog.at_level(logging.WARNING):
        mask = as_inferred(tmp_path / "a.nii.gz")
    assert "qform and sform disagree by" in caplog.text
    for extension in (".nii.gz", ".nii"):
        source = nib.load(tmp_path / "a.nii.gz")
        written = nib.load(save(mask, tmp_path / "out", extension))
        for form in ("get_qform", "get_sform"):
            ours, code = getattr(written, form)(coded=True)
            theirs, expected = getattr(source, form)(coded=True)
            assert code == expected
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(written.dataobj), values() > 0)
        np.testing.assert_allclose(written.header.get_zooms(), source.header.get_zooms())


@pytest.mark.parametrize(("qform", "sform"), [(1, 0), (0, 2), (3, 1)])
def test_codes_that_are_alone_stay_alone(tmp_path, qform, sform):
    image = nib.Nifti1Image(values(), None)
    image.set_qform(AFFINE if qform else None, code=qform)
    image.set_sform(AFFINE if sform else None, code=sform)
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(np.asarray(read_volume(tmp_path / "a.nii").affine), AFFINE, atol=1e-5)
    written = nib.load(save(as_inferred(tmp_path / "a.nii"), tmp_path / "out", ".nii.gz"))
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (qform, sform)
    np.testing.assert_allclose(written.affine, AFFINE, atol=1e-5)


def test_a_damaged_qform_beside_a_sform_is_named(tmp_path, caplog):
    image = nib.Nifti1Image(values(), AFFINE)
    nib.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[252:254] = (1).to_bytes(2, "little")  # qform_code
    content[256:260] = np.float32(3.0).tobytes()  # quatern_b
    (tmp_path / "a.nii").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(np.asarray(read_volume(tmp_path / "a.nii").affine), AFFINE, atol=1e-5)
    assert "qform" in caplog.text


# ---------------------------------------------------------------- what states no geometry, or is no grey value


@pytest.mark.parametrize("kind", [np.complex64, np.complex128])
def test_complex_nifti_is_refused(tmp_path, kind):
    with pytest.raises(DataError, match=r"complex numbers \(complex.*magnitude"):
        read_volume(write_nifti(tmp_path / "a.nii.gz", values().astype(kind)))


def test_colours_and_vectors_are_refused(tmp_path):
    colours = np.zeros((6, 5, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(DataError, match="its voxels are colours"):
        read_volume(write_nifti(tmp_path / "a.nii.gz", colours))
    vectors = itk.image_from_array(np.zeros((4, 5, 6, 3), np.float32), is_vector=True)
    for suffix in (".nrrd", ".mha"):
        itk.imwrite(vectors, str(tmp_path / f"a{suffix}"))
        with pytest.raises(DataError, match="voxels have 3 components"):
            read_volume(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("lacking", ["space: ", "space directions: ", "both"])
def test_nrrd_without_geometry_is_refused(tmp_path, lacking):
    file = write_nrrd(tmp_path / "a.nrrd", '"mm" "mm" "mm"', 1.0)
    header, _, data = file.read_bytes().partition(b"\n\n")
    out = [
        line
        for line in header.decode().split("\n")
        if not line.startswith(("space", "units") if lacking == "both" else lacking)
    ]
    file.write_bytes("\n".join(out).encode() + b"\n\n" + data)
    with pytest.raises(DataError, match="the file states no geometry"):
        read_volume(file)


@pytest.mark.parametrize("lacking", ["TransformMatrix", "ElementSpacing"])
def test_metaimage_without_geometry_is_refused(tmp_path, lacking):
    itk.imwrite(itk.image_from_array(np.ascontiguousarray(values().T)), str(tmp_path / "a.mhd"))
    lines = (tmp_path / "a.mhd").read_text().splitlines(keepends=True)
    (tmp_path / "a.mhd").write_text("".join(line for line in lines if not line.startswith(lacking)))
    with pytest.raises(DataError, match=f"states no geometry.*{lacking} is missing"):
        read_volume(tmp_path / "a.mhd")


# ---------------------------------------------------------------- kinds of numbers

KINDS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
_NRRD_TYPES = {"i1": "int8", "u1": "uint8", "i2": "int16", "u2": "uint16", "i4": "int32", "u4": "uint32",
               "i8": "int64", "u8": "uint64", "f4": "float", "f8": "double"}  # fmt: skip
_MET_TYPES = {"i1": "CHAR", "u1": "UCHAR", "i2": "SHORT", "u2": "USHORT", "i4": "INT", "u4": "UINT",
              "i8": "LONG_LONG", "u8": "ULONG_LONG", "f4": "FLOAT", "f8": "DOUBLE"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_kind_of_number_is_read(tmp_path, kind, order):
    low = 0 if kind[0] == "u" else -100
    array = np.random.default_rng(0).integers(low, 100, (6, 5, 4)).astype(order + kind)
    data = array.T.tobytes()
    endian = "little" if order == "<" else "big"
    header = write_nrrd(tmp_path / "raw.nrrd", '"mm" "mm" "mm"', 1.0).read_bytes().split(b"\n\n")[0].decode() + "\n\n"
    header = header.replace("int16", _NRRD_TYPES[kind]).replace("endian: little", f"endian: {endian}")
    (tmp_path / "raw.nrrd").write_bytes(header.encode() + data)
    (tmp_path / "packed.nrrd").write_bytes(header.replace("raw", "gzip").encode() + gzip.compress(data))
    meta = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = {msb}\nCompressedData = False\n"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = -30 -40 -70\nElementSpacing = 2 1.5 3\nDimSize = 6 5 4\n"
        "ElementType = MET_{type}\nElementDataFile = {file}\n"
    )
    fields = {"msb": order == ">", "type": _MET_TYPES[kind]}
    (tmp_path / "a.mha").write_bytes(meta.format(**fields, file="LOCAL").encode() + data)
    (tmp_path / "b.mhd").write_text(meta.format(**fields, file="b.raw"))
    (tmp_path / "b.raw").write_bytes(data)
    image = nib.Nifti1Image(array, AFFINE, dtype=array.dtype)
    nib.save(image, tmp_path / "c.nii.gz")
    for name in ("raw.nrrd", "packed.nrrd", "a.mha", "b.mhd", "c.nii.gz"):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume[0].numpy(), array.astype(np.float32), err_msg=name)
        np.testing.assert_allclose(np.asarray(volume.affine), AFFINE, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("renumber", [False, True])
def test_labels_that_are_stored_with_a_scale_are_whole_numbers(tmp_path, renumber):
    label = np.random.default_rng(0).integers(0, 3, (6, 5, 4))
    image = nib.Nifti1Image(label.astype(np.int16), AFFINE)
    nib.save(image, tmp_path / "whole.nii")
    content = bytearray((tmp_path / "whole.nii").read_bytes())
    scale = 7e-05
    stored = np.rint(label / scale).astype("<i2")  # as nibabel stores float labels as int16
    content[112:116] = np.float32(scale).tobytes()
    content[352:] = stored.T.tobytes()
    (tmp_path / "scaled.nii").write_bytes(content)
    assert not (nib.load(tmp_path / "scaled.nii").get_fdata() == label).all()
    data = LoadImageVolumed(keys=("image", "label"))(
        {"image": tmp_path / "whole.nii", "label": tmp_path / "scaled.nii", "label_ids": np.array([0, 2, 1])}
    )
    if renumber:
        data = RenumberLabelsd(keys="label")(data)
        label = np.array([0, 2, 1])[label]
    checked = CheckLabelsd(keys="label", classes=["a", "b"])(data)["label"]
    np.testing.assert_array_equal(checked[0].numpy(), label)
    half = data["label"] * 0 + 0.5
    with pytest.raises(DataError, match=r"the label holds 0\.5"):
        CheckLabelsd(keys="label", classes=["a", "b"])({**data, "label": half})


def test_a_fresh_mask_without_source_has_the_affine_that_it_is_given(tmp_path):
    meta = {"filename_or_obj": "/data/a.dcm", "original_affine": AFFINE}
    volume = MetaTensor(torch.from_numpy(values() > 0)[None].float(), affine=torch.from_numpy(AFFINE), meta=meta)
    written = nib.load(save(volume, tmp_path, ".nii.gz"))
    np.testing.assert_allclose(written.affine, AFFINE, atol=1e-5)
    assert int(written.header["sform_code"]) > 0


# ---------------------------------------------------------------- sizes that a file can not have


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "b.nrrd", "a.mha", "a.mhd"])
def test_a_header_that_states_more_than_its_file_holds_takes_no_memory(tmp_path, name):
    resource = pytest.importorskip("resource", reason="Windows does not tell the peak of memory")
    if name.startswith("a.nii"):
        write_nifti(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        content = bytearray(gzip.decompress(content) if name.endswith("gz") else content)
        content[42:48] = np.array([2000, 2000, 2000], "<i2").tobytes()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else bytes(content))
    elif name.endswith("nrrd"):
        content = write_nrrd(tmp_path / name, '"mm" "mm" "mm"', 1.0).read_bytes()
        header, _, data = content.replace(b"6 5 4", b"2000 2000 2000").partition(b"\n\n")
        if name == "b.nrrd":
            header, data = header.replace(b"raw", b"gzip"), gzip.compress(data)
        (tmp_path / name).write_bytes(header + b"\n\n" + data)
    else:
        itk.imwrite(itk.image_from_array(np.ascontiguousarray(values().T)), str(tmp_path / name))
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content.replace(b"DimSize = 6 5 4", b"DimSize = 2000 2000 2000"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"not readable as a volume \(its header states 16000000000 bytes of voxels"):
        read_volume(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB
