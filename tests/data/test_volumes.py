from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from medsa_nets.data.volumes import is_volume, list_volumes, load_volume_datalist, read_volume, volume_id
from medsa_nets.errors import DataError

from .volume_files import AFFINE, values, write_nifti, write_series


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_every_format_gives_the_same_volume_in_the_same_place(tmp_path, suffix):
    path = tmp_path / f"case{suffix}"
    if suffix.startswith(".nii"):
        write_nifti(path)
    else:
        image = itk.image_from_array(np.ascontiguousarray(values().T))
        image.SetSpacing([2.0, 1.5, 3.0])
        image.SetOrigin([-30.0, -40.0, -70.0])  # ITK counts in LPS
        itk.imwrite(image, str(path))
    volume = read_volume(path)
    assert volume.shape == (1, 6, 5, 4)
    assert volume.dtype == torch.float32
    np.testing.assert_array_equal(volume[0].numpy(), values())
    np.testing.assert_allclose(np.asarray(volume.affine), AFFINE, atol=1e-5)
    assert volume.meta["filename_or_obj"] == str(path)


def test_a_dicom_series_is_ordered_by_position(tmp_path):
    volume = read_volume(write_series(tmp_path / "ct"))
    np.testing.assert_array_equal(volume[0].numpy(), values((6, 5, 4)))
    np.testing.assert_allclose(np.asarray(volume.affine), AFFINE, atol=1e-5)


def test_a_real_dicom_series_lies_where_its_labels_lie(shared_data):
    volume = read_volume(shared_data / "ct" / "ct_b_dicom")
    label = read_volume(shared_data / "ct" / "ct_b_totalsegmentator.nii.gz")
    assert volume.shape == label.shape == (1, 512, 512, 20)
    flip = np.diag([1.0, -1.0, 1.0, 1.0])
    flip[1, 3] = 511
    np.testing.assert_allclose(np.asarray(volume.affine), np.asarray(label.affine) @ flip, atol=1e-2)


def test_the_largest_of_several_series_is_taken_and_the_others_are_named(tmp_path, caplog):
    folder = write_series(tmp_path / "ct", count=4, uid="1.2.840.1")
    write_series(folder, count=2, uid="1.2.840.2", name="scout")
    (folder / "report.txt").write_text("no image")
    with caplog.at_level(logging.WARNING):
        assert read_volume(folder).shape == (1, 6, 5, 4)
    assert "took the series 1.2.840.1 (4 files); left out 1.2.840.2 (2 files)" in caplog.text


Z = [-70.0, -67.0, -64.0, -61.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": [(-30, -40, z) for z in (-70.0, -67.0, -61.0, -58.0)]}, "unevenly spaced.*6.000 mm.*missing"),
        ({"positions": [(-30, -40 + i, z) for i, z in enumerate(Z)]}, "tilted gantry.*1.000 mm"),
        ({"positions": [(-30, -40, -70.0)] * 4}, "several slices lie at one position"),
        ({"PixelSpacing": None}, "PixelSpacing|size or pixel spacing|not readable"),
    ],
)
def test_slices_that_make_no_straight_grid_are_refused(tmp_path, change, message):
    folder = write_series(tmp_path / "ct", **change)
    with pytest.raises(DataError, match=message) as caught:
        read_volume(folder)
    assert str(tmp_path) in str(caught.value)


def test_a_slice_without_position_or_of_another_size_is_named(tmp_path):
    folder = write_series(tmp_path / "ct")
    file = folder / "slice_7.dcm"
    data = pydicom.dcmread(file)
    data.Rows, data.PixelData = 4, bytes(2 * 4 * 6)
    data.save_as(file)
    with pytest.raises(DataError, match=r"slice_.\.dcm: its size or pixel spacing differs"):
        read_volume(folder)
    del data.ImagePositionPatient
    data.save_as(file)
    with pytest.raises(DataError, match=r"slice_7\.dcm: the DICOM field ImagePositionPatient is missing"):
        read_volume(folder)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_files_are_refused_by_name(tmp_path, suffix, damage):
    path = tmp_path / f"case{suffix}"
    if suffix.startswith(".nii"):
        write_nifti(path)
    else:
        itk.imwrite(itk.image_from_array(values()), str(path))
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no volume\n" * 60}[damage])
    with pytest.raises(DataError, match="not readable as a volume") as caught:
        read_volume(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_truncated_dicom_file_is_refused(tmp_path):
    folder = write_series(tmp_path / "ct")
    file = folder / "slice_4.dcm"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=str(folder)):
        read_volume(folder)


def test_time_series_and_channels_are_refused_and_trailing_axes_of_one_are_not(tmp_path):
    with pytest.raises(DataError, match=r"shape is \(6, 5, 4, 3\); expected one volume"):
        read_volume(write_nifti(tmp_path / "time.nii.gz", values((6, 5, 4, 3))))
    assert read_volume(write_nifti(tmp_path / "one.nii.gz", values((6, 5, 4, 1)))).shape == (1, 6, 5, 4)


def test_a_single_slice_is_a_volume_of_one_slice(tmp_path):
    assert read_volume(write_nifti(tmp_path / "flat.nii.gz", values((6, 5)))).shape == (1, 6, 5, 1)
    assert read_volume(write_nifti(tmp_path / "thin.nii.gz", values((6, 5, 1)))).shape == (1, 6, 5, 1)
    assert read_volume(write_series(tmp_path / "ct", count=1)).shape == (1, 6, 5, 1)


def test_a_missing_or_singular_affine_is_refused(tmp_path):
    image = nib.Nifti1Image(values(), None)
    nib.save(image, tmp_path / "none.nii")
    with pytest.raises(DataError, match="no affine"):
        read_volume(tmp_path / "none.nii")
    singular = AFFINE.copy()
    singular[2, 2] = 0
    image = nib.Nifti1Image(values(), None)
    image.header["sform_code"] = 1
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = singular[row]
    image.header["qform_code"] = 0
    (tmp_path / "singular.nii").write_bytes(image.header.binaryblock + b"\0" * 4 + values().T.tobytes())
    with pytest.raises(DataError, match="singular"):
        read_volume(tmp_path / "singular.nii")


def test_values_that_are_not_finite_are_counted(tmp_path):
    array = values().astype(np.float32)
    array[0, 0, :2] = np.nan
    array[1, 1, 1] = np.inf
    with pytest.raises(DataError, match="3 voxels are not finite"):
        read_volume(write_nifti(tmp_path / "case.nii.gz", array))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no such volume"):
        read_volume(tmp_path / "absent.nii.gz")


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("name", "expected"), [("a.nii.gz", "a"), ("a.b.NII.GZ", "a.b"), ("x/c.mha", "c"), ("x/series.1", "series.1")]
)
def test_names_of_volumes(name, expected):
    assert volume_id(name) == expected


def test_a_folder_lists_its_files_and_series(tmp_path):
    write_nifti(tmp_path / "b.nii.gz")
    write_series(tmp_path / "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("x")
    assert [Path(item["image"]).name for item in list_volumes(tmp_path)] == ["a", "b.nii.gz"]
    assert list_volumes(tmp_path / "a") == [{"image": str(tmp_path / "a")}]
    assert list_volumes(tmp_path / "b.nii.gz") == [{"image": str(tmp_path / "b.nii.gz")}]
    assert not is_volume(tmp_path / "notes")
    with pytest.raises(DataError, match=r"no volumes.*found x\.txt"):
        list_volumes(tmp_path / "notes")
    with pytest.raises(DataError, match="no such folder or file"):
        list_volumes(tmp_path / "absent")


def btcv(root: Path, count: int = 10) -> Path:
    for i in range(count):
        write_nifti(root / "imagesTr" / f"img{i:04}.nii.gz")
        write_nifti(root / "labelsTr" / f"label{i:04}.nii.gz", (values() > 0).astype(np.uint8))
    return root


def entries(numbers) -> list[dict[str, str]]:
    return [{"image": f"imagesTr/img{i:04}.nii.gz", "label": f"labelsTr/label{i:04}.nii.gz"} for i in numbers]


def test_the_btcv_layout_is_read_with_and_without_its_json(tmp_path):
    root = btcv(tmp_path)
    found = {split: load_volume_datalist(split, root) for split in ("training", "validation")}
    assert [len(found[split]) for split in found] == [8, 2]
    for item in [*found["training"], *found["validation"]]:
        assert Path(item["image"]).name.replace("img", "label") == Path(item["label"]).name
    assert load_volume_datalist("validation", root) == found["validation"]
    (root / "dataset_0.json").write_text(json.dumps({"training": entries(range(7)), "validation": entries([8])}))
    assert len(load_volume_datalist("training", root)) == 7
    assert [volume_id(i["image"]) for i in load_volume_datalist("validation", root)] == ["img0008"]
    (root / "other.json").write_text(json.dumps({"training": entries([1, 2])}))
    assert len(load_volume_datalist("training", root, root / "other.json", validation_fraction=0.5)) == 1
    assert len(load_volume_datalist("training", root, limit=3)) == 3


def test_annotated_classes_are_translated_and_checked(tmp_path):
    root = btcv(tmp_path, 3)
    listed = entries(range(3))
    listed[1]["annotated"] = ["liver"]
    (root / "dataset_0.json").write_text(json.dumps({"training": listed}))
    items = load_volume_datalist("training", root, classes=["spleen", "liver"], validation_fraction=0.0)
    assert [item["annotated"].tolist() for item in items] == [[True, True], [False, True], [True, True]]
    listed[1]["annotated"] = ["lever"]
    (root / "dataset_0.json").write_text(json.dumps({"training": listed}))
    with pytest.raises(DataError, match=r"'annotated' of .*img0001.*lever.*out of spleen, liver"):
        load_volume_datalist("training", root, classes=["spleen", "liver"], validation_fraction=0.0)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        load_volume_datalist("training", tmp_path / "absent")
    with pytest.raises(DataError, match=r"Looked for dataset_0\.json.*Found nothing"):
        load_volume_datalist("training", tmp_path)
    root = btcv(tmp_path / "data", 2)
    (root / "labelsTr" / "label0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"img0001\.nii\.gz: no label of that name"):
        load_volume_datalist("training", root)
    (root / "dataset.json").write_text(json.dumps({"training": entries([0, 1])}))
    with pytest.raises(DataError, match=r"1 files are not there.*label0001"):
        load_volume_datalist("training", root)
    with pytest.raises(DataError, match="split must be one of"):
        load_volume_datalist("train", root)


def test_real_volumes_are_listed(shared_data):
    root = shared_data / "msd_hippocampus"
    training, validation = (load_volume_datalist(s, root, validation_fraction=0.3) for s in ("training", "validation"))
    assert (len(training), len(validation)) == (140, 60)
    assert not {i["image"] for i in training} & {i["image"] for i in validation}
    volume, label = read_volume(training[0]["image"]), read_volume(training[0]["label"])
    assert volume.shape == label.shape
    assert set(np.unique(label.numpy())) <= {0, 1, 2}


def test_dicom_folders_can_stand_in_a_list(tmp_path):
    write_series(tmp_path / "ct")
    write_nifti(tmp_path / "label.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [{"image": "ct", "label": "label.nii.gz"}]}))
    items = load_volume_datalist("training", tmp_path)
    assert items == [{"image": str(tmp_path / "ct"), "label": str(tmp_path / "label.nii.gz")}]
    shutil.rmtree(tmp_path / "ct")
    with pytest.raises(DataError, match="files are not there"):
        load_volume_datalist("training", tmp_path)


def test_one_dicom_file_is_a_volume_of_one_slice(tmp_path):
    import pydicom

    write_series(tmp_path / "a")
    file = sorted((tmp_path / "a").iterdir())[0]
    assert list_volumes(file) == [{"image": str(file)}]
    volume = read_volume(file)
    assert volume.shape[-1] == 1
    data = pydicom.dcmread(file)
    expected = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
    np.testing.assert_allclose(volume[0, :, :, 0].numpy().T, expected)
    position = np.asarray(data.ImagePositionPatient, dtype=float) * [-1, -1, 1]
    np.testing.assert_allclose(np.asarray(volume.affine)[:3, 3], position, atol=1e-4)
