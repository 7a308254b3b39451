from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from medsa_nets.data import image_id, list_photographs, load_datalist
from medsa_nets.data.slices import is_dicom
from medsa_nets.errors import DataError

ISIC_2016 = {
    "training": ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"),
    "testing": ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"),
}
ISIC_2017 = {
    "training": ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
    "validation": ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
    "testing": ("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
}


def write_picture(path: Path, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 3)).save(path)
    return path


def write_isic(root: Path, folders: tuple[str, str], names: list[str]) -> None:
    for name in names:
        write_picture(root / folders[0] / f"{name}.jpg", "RGB")
        write_picture(root / folders[1] / f"{name}_Segmentation.png")


def names_of(items: list[dict[str, str]]) -> list[str]:
    return [image_id(item) for item in items]


@pytest.fixture
def isic_2016(tmp_path: Path) -> Path:
    """40 training and 10 test images in the layout of ISIC 2016, no CSV."""
    write_isic(tmp_path, ISIC_2016["training"], [f"ISIC_{i:07d}" for i in range(40)])
    write_isic(tmp_path, ISIC_2016["testing"], [f"ISIC_{i:07d}" for i in range(100, 110)])
    return tmp_path


@pytest.fixture
def isic_2017(tmp_path: Path) -> Path:
    """6 training, 3 validation and 2 test images in the layout of ISIC 2017, with superpixels beside them."""
    for split, first, count in (("training", 0, 6), ("validation", 100, 3), ("testing", 200, 2)):
        names = [f"ISIC_{i:07d}" for i in range(first, first + count)]
        write_isic(tmp_path, ISIC_2017[split], names)
        for name in names:
            write_picture(tmp_path / ISIC_2017[split][0] / f"{name}_superpixels.png", "RGB")
    return tmp_path


@pytest.fixture
def kvasir(tmp_path: Path) -> Path:
    for i in range(30):
        write_picture(tmp_path / "images" / f"polyp{i:02d}.jpg", "RGB")
        write_picture(tmp_path / "masks" / f"polyp{i:02d}.jpg")
    return tmp_path


def test_isic_2016_pairs_each_image_with_its_mask(isic_2016):
    items = load_datalist("testing", isic_2016)
    assert names_of(items) == [f"ISIC_{i:07d}" for i in range(100, 110)]
    for item in items:
        assert Path(item["image"]).is_absolute()
        assert Path(item["image"]).parent.name == ISIC_2016["testing"][0]
        assert item["label"] == str(isic_2016 / ISIC_2016["testing"][1] / f"{image_id(item)}_Segmentation.png")


def test_isic_2017_has_its_own_validation_split_and_ignores_superpixels(isic_2017):
    assert names_of(load_datalist("training", isic_2017)) == [f"ISIC_{i:07d}" for i in range(6)]
    assert names_of(load_datalist("validation", isic_2017)) == [f"ISIC_{i:07d}" for i in range(100, 103)]
    assert names_of(load_datalist("testing", isic_2017)) == ["ISIC_0000200", "ISIC_0000201"]


@pytest.mark.parametrize("beside", [True, False], ids=["beside the folders", "in the mask folder"])
def test_the_csv_of_isic_2016_decides_which_files_are_paired(isic_2016, beside):
    images, masks = ISIC_2016["training"]
    place = isic_2016 if beside else isic_2016 / masks
    with open(place / f"{masks}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["", "img", "seg"])
        # crossed on purpose, once with and once without the folder: names alone would pair them otherwise
        table.writerow([0, f"{images}/ISIC_0000003.jpg", f"{masks}/ISIC_0000004_Segmentation.png"])
        table.writerow([1, "ISIC_0000005.jpg", "ISIC_0000006_Segmentation.png"])
    items = load_datalist("training", isic_2016, validation_fraction=0.0)
    assert [(Path(i["image"]).name, Path(i["label"]).name) for i in items] == [
        ("ISIC_0000003.jpg", "ISIC_0000004_Segmentation.png"),
        ("ISIC_0000005.jpg", "ISIC_0000006_Segmentation.png"),
    ]


def test_a_csv_with_diagnoses_instead_of_files_is_no_list(isic_2016):
    (isic_2016 / f"{ISIC_2016['training'][1]}.csv").write_text("ISIC_0000000,benign\nISIC_0000001,malignant\n")
    assert len(load_datalist("training", isic_2016, validation_fraction=0.0)) == 40


@pytest.mark.parametrize("column", ["img", "seg"])
def test_a_csv_that_names_a_missing_file_is_an_error_with_both_names(isic_2016, column):
    images, masks = ISIC_2016["training"]
    row = {"img": f"{images}/ISIC_0000001.jpg", "seg": f"{masks}/ISIC_0000001_Segmentation.png"}
    row[column] = "gone.png"
    table = isic_2016 / f"{masks}.csv"
    table.write_text(f"img,seg\n{row['img']},{row['seg']}\n")
    with pytest.raises(DataError, match=r"gone\.png") as caught:
        load_datalist("training", isic_2016)
    assert str(table) in str(caught.value)


def test_kvasir_is_split_in_80_10_10_without_overlap(kvasir):
    splits = {name: set(names_of(load_datalist(name, kvasir))) for name in ("training", "validation", "testing")}
    assert {name: len(found) for name, found in splits.items()} == {"training": 24, "validation": 3, "testing": 3}
    assert set.union(*splits.values()) == {f"polyp{i:02d}" for i in range(30)}


def test_the_split_of_kvasir_does_not_depend_on_the_seed(kvasir):
    for split in ("training", "validation", "testing"):
        assert load_datalist(split, kvasir, seed=5) == load_datalist(split, kvasir, seed=0)


def test_the_validation_split_is_a_share_of_the_training_images_and_holds_no_test_image(isic_2016):
    training = names_of(load_datalist("training", isic_2016, validation_fraction=0.25))
    validation = names_of(load_datalist("validation", isic_2016, validation_fraction=0.25))
    assert (len(training), len(validation)) == (30, 10)
    assert set(training) | set(validation) == {f"ISIC_{i:07d}" for i in range(40)}


def test_the_validation_split_is_the_same_on_every_machine_and_changes_with_the_seed(isic_2016, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    # written in reverse order, in another folder
    write_isic(elsewhere, ISIC_2016["training"], [f"ISIC_{i:07d}" for i in reversed(range(40))])
    here = names_of(load_datalist("validation", isic_2016, seed=3))
    assert names_of(load_datalist("validation", elsewhere, seed=3)) == here
    assert names_of(load_datalist("validation", isic_2016, seed=4)) != here


def test_the_validation_split_does_not_depend_on_the_order_of_a_json(tmp_path):
    names = [f"case{i}" for i in range(20)]
    for name in names:
        write_picture(tmp_path / f"{name}.png", "RGB")
    entries = [{"image": f"{name}.png", "label": f"{name}.png"} for name in names]
    found = []
    for order in (entries, entries[::-1]):
        (tmp_path / "list.json").write_text(json.dumps({"training": order}))
        found.append(load_datalist("validation", tmp_path, tmp_path / "list.json", validation_fraction=0.3))
    assert found[0] == found[1]
    assert len(found[0]) == 6


@pytest.mark.parametrize("limit", [1, 7])
def test_limit_keeps_a_stable_choice_of_the_split(isic_2016, limit):
    everything = load_datalist("training", isic_2016)
    some = load_datalist("training", isic_2016, limit=limit)
    assert len(some) == limit
    assert [item for item in everything if item in some] == some
    assert [item for item in some if item not in load_datalist("training", isic_2016, limit=limit + 3)] == []


def test_a_limit_above_the_size_of_the_split_changes_nothing(isic_2016):
    assert load_datalist("testing", isic_2016, limit=99) == load_datalist("testing", isic_2016)


def test_an_image_without_mask_is_named(isic_2016):
    images, masks = ISIC_2016["training"]
    (isic_2016 / masks / "ISIC_0000007_Segmentation.png").unlink()
    with pytest.raises(DataError, match="ISIC_0000007_segmentation") as caught:
        load_datalist("training", isic_2016)
    assert str(isic_2016 / masks) in str(caught.value)
    assert str(isic_2016 / images / "ISIC_0000007.jpg") in str(caught.value)
    assert "1 of 40" in str(caught.value)


@pytest.mark.parametrize(("content", "told"), [(("pictures",), "pictures/"), ((), "nothing")])
def test_an_unknown_layout_says_what_was_looked_for_and_what_was_found(tmp_path, content, told):
    for name in content:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError) as caught:
        load_datalist("training", tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    for wanted in ("ISBI2016_ISIC_Part1_Training_Data/", "ISIC-2017_Training_Data/", "images/ with masks/", told):
        assert wanted in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder") as caught:
        load_datalist("training", tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value)


def test_an_unknown_split_is_refused(isic_2016):
    with pytest.raises(DataError, match=r"training, validation, testing.*'train'"):
        load_datalist("train", isic_2016)


def test_an_empty_split_says_how_many_the_others_have(isic_2017):
    for path in sorted(isic_2017.glob("ISIC-2017_Test_v2_*/*")):
        path.unlink()
    with pytest.raises(DataError, match=r"'testing' is empty.*training 6, validation 3, testing 0"):
        load_datalist("testing", isic_2017)


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_picture(tmp_path / "pictures" / f"{name}.png", "RGB")
        write_picture(tmp_path / "truth" / f"{name}.png")
    entries = [{"image": f"pictures/{name}.png", "label": f"truth/{name}.png"} for name in ("a", "b", "c")]
    content = {"training": entries[:1], "validation": entries[1:2], "testing": entries[2:]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    return tmp_path / "list.json"


@pytest.mark.parametrize(("split", "name"), [("training", "a"), ("validation", "b"), ("testing", "c")])
def test_a_decathlon_json_names_files_relative_to_the_data_set(decathlon, split, name):
    root = decathlon.parent
    items = load_datalist(split, root, decathlon)
    assert [(item["image"], item["label"]) for item in items] == [
        (str(root / "pictures" / f"{name}.png"), str(root / "truth" / f"{name}.png"))
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{not json", "not JSON"),
        ("[]", "training, validation, testing|training.*validation.*testing"),
        ("{}", "training.*validation.*testing"),
        ('{"training": [{"image": "pictures/a.png"}]}', r"training\[0\].*label"),
        ('{"training": [{"label": "truth/a.png"}]}', r"training\[0\].*image"),
        ('{"training": ["pictures/a.png"]}', r"training\[0\]"),
        ('{"training": [{"image": "pictures/a.png", "label": "truth/z.png"}]}', r"1 files are not there.*z\.png"),
    ],
)
def test_a_json_that_cannot_be_used_says_why(decathlon, content, told):
    decathlon.write_text(content)
    with pytest.raises(DataError, match=told) as caught:
        load_datalist("training", decathlon.parent, decathlon)
    assert str(decathlon) in str(caught.value)


def test_a_json_that_is_not_there_is_named(decathlon):
    with pytest.raises(DataError, match=r"absent\.json"):
        load_datalist("training", decathlon.parent, decathlon.parent / "absent.json")


def test_skip_unreadable_leaves_damaged_images_and_masks_out_and_logs_their_names(isic_2016, caplog):
    images, masks = ISIC_2016["training"]
    (isic_2016 / images / "ISIC_0000002.jpg").write_bytes(b"")
    (isic_2016 / masks / "ISIC_0000005_Segmentation.png").write_text("no picture")
    with caplog.at_level(logging.WARNING):
        items = load_datalist("training", isic_2016, validation_fraction=0.0, skip_unreadable=True)
    assert names_of(items) == [f"ISIC_{i:07d}" for i in range(40) if i not in (2, 5)]
    assert "ISIC_0000002.jpg" in caplog.text
    assert "ISIC_0000005_Segmentation.png" in caplog.text
    assert "2 of 40" in caplog.text


def test_skip_unreadable_is_an_error_where_nothing_can_be_read(isic_2016):
    for path in (isic_2016 / ISIC_2016["testing"][0]).iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"None of the 10 entries.*ISIC_0000100\.jpg"):
        load_datalist("testing", isic_2016, skip_unreadable=True)


def test_a_folder_of_photographs_is_listed_by_name(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.tiff"):
        write_picture(tmp_path / name, "RGB")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "IM0001").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 8)  # DICOM files often have no suffix
    (tmp_path / "folder.jpg").mkdir()
    assert [Path(item["image"]).name for item in list_photographs(tmp_path)] == ["IM0001", "a.PNG", "b.jpg", "c.tiff"]


def test_one_photograph_is_a_list_of_one(tmp_path):
    path = write_picture(tmp_path / "a.png", "RGB")
    assert list_photographs(path) == [{"image": str(path)}]


@pytest.mark.parametrize(("files", "told"), [(("notes.txt",), r"notes\.txt"), ((), "nothing")])
def test_a_folder_without_photographs_says_what_was_found(tmp_path, files, told):
    for name in files:
        (tmp_path / name).write_text("no picture")
    with pytest.raises(DataError, match=told):
        list_photographs(tmp_path)


def test_a_missing_folder_of_photographs_is_named(tmp_path):
    with pytest.raises(DataError, match="absent: no such folder"):
        list_photographs(tmp_path / "absent")


def test_listing_photographs_can_skip_unreadable_ones(tmp_path, caplog):
    good = write_picture(tmp_path / "good.png", "RGB")
    (tmp_path / "bad.png").write_bytes(b"")
    assert len(list_photographs(tmp_path)) == 2
    with caplog.at_level(logging.WARNING):
        assert list_photographs(tmp_path, skip_unreadable=True) == [{"image": str(good)}]
    assert "bad.png" in caplog.text


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\0" * 128 + b"DICM", True), (b"\0" * 128 + b"DICN", False), (b"DICM", False), (b"", False)],
)
def test_dicom_files_are_known_by_their_mark(tmp_path, content, expected):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert is_dicom(path) is expected


def test_the_real_challenge_data_are_found_and_split(shared_data):
    training = load_datalist("training", shared_data / "isic2017")
    validation = load_datalist("validation", shared_data / "isic2017")
    assert len(training) + len(validation) == 2000
    assert len(validation) == 200
    assert not set(names_of(training)) & set(names_of(validation))
    assert all(Path(item["label"]).name == f"{image_id(item)}_segmentation.png" for item in training + validation)


@pytest.mark.parametrize(("count", "training"), [(1, 1), (2, 1), (4, 3), (30, 27)])
def test_few_images_keep_one_for_validation_and_one_image_trains_without(tmp_path, caplog, count, training):
    write_isic(tmp_path, ISIC_2016["training"], [f"ISIC_{i:07d}" for i in range(count)])
    assert len(load_datalist("training", tmp_path)) == training
    if count > 1:
        assert len(load_datalist("validation", tmp_path)) == count - training
        return
    assert load_datalist("validation", tmp_path, required=False) == []
    assert "The training goes on without it" in caplog.text
    with pytest.raises(DataError, match=r"'validation' is empty \(found: training 1.*Raise --validation_fraction"):
        load_datalist("validation", tmp_path)
    with pytest.raises(DataError, match=r"'testing' is empty.*under 'testing'"):
        load_datalist("testing", tmp_path)


def test_no_validation_is_kept_where_none_is_asked_for(tmp_path):
    write_isic(tmp_path, ISIC_2016["training"], [f"ISIC_{i:07d}" for i in range(4)])
    assert len(load_datalist("training", tmp_path, validation_fraction=0.0)) == 4
    assert load_datalist("validation", tmp_path, validation_fraction=0.0, required=False) == []
