from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medsa_nets.data import load_datalist, load_volume_datalist
from medsa_nets.data.labels import match_labels, read_labels, same_name
from medsa_nets.errors import DataError
from medsa_nets.transforms import CheckLabelsd, LoadImageVolumed, RenumberLabelsd

CLASSES = ["spleen", "right kidney", "liver"]
DECATHLON = {"0": "background", "1": "liver", "2": "Right_Kidney", "3": "spleen"}
NNUNET = {"background": 0, "spleen": 3, "liver": 1, "kidney_right": 2}


def volumes(root: Path, content: Any, *, channel: str = "", cases: int = 2) -> Path:
    """A data set of labels 0 to 3, in nnU-Net's folders."""
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(cases):
        label = rng.integers(0, 4, (6, 5, 4)).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, np.eye(4)), root / "labelsTr" / f"case_{i}.nii.gz")
        image = nib.Nifti1Image(label.astype(np.int16), np.eye(4))
        nib.save(image, root / "imagesTr" / f"case_{i}{channel}.nii.gz")
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def listed(**labels: Any) -> dict[str, Any]:
    cases = [{"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"} for i in range(2)]
    return {**labels, "training": cases, "test": ["./imagesTs/case_9.nii.gz"]}


@pytest.mark.parametrize(
    ("content", "channel"),
    [
        (listed(labels=DECATHLON), ""),
        (listed(labels=DECATHLON), "_0000"),  # nnU-Net 1 leaves the channel out of its list
        ({"labels": NNUNET, "channel_names": {"0": "CT"}, "numTraining": 2, "file_ending": ".nii.gz"}, "_0000"),
        ({"labels": NNUNET, "numTraining": 2}, ""),
    ],
    ids=["Decathlon", "nnU-Net 1", "nnU-Net 2", "labels alone"],
)
def test_labels_are_renumbered_by_the_names_of_the_data_set(tmp_path, content, channel):
    root = volumes(tmp_path, content, channel=channel)
    items = load_volume_datalist("training", root, classes=CLASSES, validation_fraction=0.0)
    assert len(items) == 2
    for item in items:
        assert item["annotated"].all()
        truth = np.asanyarray(nib.load(item["label"]).dataobj)  # ids of the data set
        data = LoadImageVolumed(["image", "label"])(item)
        data = CheckLabelsd("label", CLASSES)(RenumberLabelsd("label")(data))
        found = data["label"].as_tensor()[0].numpy()
        for old, new in ((0, 0), (1, 3), (2, 2), (3, 1)):
            np.testing.assert_array_equal(found == new, truth == old)
        assert "label_ids" not in data


def test_labels_of_the_bundle_s_own_ids_stay_as_they_are(tmp_path):
    own = {"0": "background", "1": "Spleen", "2": "kidney, right", "3": "liver"}
    for number, content in enumerate([listed(labels=own), listed(), listed(labels={"0": "0", "1": "1", "2": "2"})]):
        root = volumes(tmp_path / str(number), content)
        items = load_volume_datalist("training", root, classes=CLASSES, validation_fraction=0.0)
        assert all("label_ids" not in item and item["annotated"].all() for item in items)


def test_classes_without_a_label_are_not_annotated_and_other_labels_become_background(tmp_path, caplog):
    root = volumes(tmp_path / "few", listed(labels={"0": "background", "1": "liver", "2": "spleen", "3": "liver"}))
    with pytest.raises(DataError, match=r"two labels, 1 and 3, mean the class 'liver'"):
        load_volume_datalist("training", root, classes=CLASSES)
    root = volumes(tmp_path / "part", listed(labels={"0": "background", "1": "liver", "2": "spleen"}))
    items = load_volume_datalist("training", root, classes=CLASSES, validation_fraction=0.0)
    assert [item["annotated"].tolist() for item in items] == [[True, False, True]] * 2
    assert "no labels for right kidney" in caplog.text
    with pytest.raises(DataError, match=r"case_0\.nii\.gz: the label holds 3; the data list names the ids 0 to 2"):
        RenumberLabelsd("label")(LoadImageVolumed(["image", "label"])(items[0]))
    root = volumes(tmp_path / "more", listed(labels=DECATHLON))
    items = load_volume_datalist("training", root, classes=["liver"], validation_fraction=0.0)
    assert "become background: Right_Kidney (2), spleen (3)" in caplog.text
    data = RenumberLabelsd("label")(LoadImageVolumed(["image", "label"])(items[0]))
    truth = np.asanyarray(nib.load(items[0]["label"]).dataobj)
    np.testing.assert_array_equal(data["label"].numpy()[0], truth == 1)


def test_labels_that_may_mean_a_class_by_another_name_are_refused_with_both_lists(tmp_path):
    root = volumes(tmp_path, listed(labels={"0": "background", "1": "hepar", "2": "right kidney", "3": "spleen"}))
    with pytest.raises(DataError, match=r"dataset\.json: its labels hepar \(1\) are no classes.* liver have no label"):
        load_volume_datalist("training", root, classes=CLASSES)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["background", "liver"], "'labels' is"),
        ({"background": 0, "organ": [1, 2]}, "stands for the ids [1, 2]. Regions"),
        ({"background": 0, "liver": 1, "ignore": 2}, "left out, which is not supported"),
        ({"liver": 0}, "calls the id 0 'liver'"),
        ({"liver": 1, "spleen": 1}, "gives the id 1 to 'liver' and to 'spleen'"),
        ({"liver": "one"}, "'labels' has 'liver': 'one'"),
        ({"1": ["liver"]}, "Regions"),
        ({"liver": 1.5}, "'labels' has"),
    ],
)
def test_labels_that_can_not_be_followed_are_refused(labels, told):
    with pytest.raises(DataError) as caught:
        read_labels({"labels": labels}, "dataset.json")
    assert told in str(caught.value)


def test_names_of_public_data_sets_mean_the_flagship_s_classes():
    from medsa_nets.bundles import read_task

    classes = read_task("btcv", Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv")["classes"]
    tutorial = [
        "spleen",
        "rkid",
        "lkid",
        "gall",
        "eso",
        "liver",
        "sto",
        "aorta",
        "IVC",
        "veins",
        "pancreas",
        "rad",
        "lad",
    ]
    own = match_labels(dict(enumerate(tutorial, start=1)), classes, "dataset_0.json")
    assert own is not None
    assert not own.needed
    total = ["spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach", "aorta",
             "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas", "adrenal_gland_right",
             "adrenal_gland_left"]  # fmt: skip
    assert [same_name(name) for name in total] == [same_name(name) for name in classes]
    assert same_name("right kidney") != same_name("left kidney")


def test_a_case_of_several_channels_and_lists_of_files_are_refused(tmp_path):
    root = volumes(tmp_path / "channels", listed(labels=DECATHLON), channel="_0000")
    volumes(tmp_path / "channels", listed(labels=DECATHLON), channel="_0001")
    with pytest.raises(DataError, match=r"case_0 has several channels"):
        load_volume_datalist("training", root, classes=CLASSES)
    for key in ("image", "label"):
        content = listed()
        content["training"][1][key] = ["a.nii.gz", "b.nii.gz"]
        root = volumes(tmp_path / key, content)
        for load in (load_datalist, load_volume_datalist):
            with pytest.raises(DataError, match=rf"training\[1\] has 2 files as its {key} \(a\.nii\.gz, b"):
                load("training", root, root / "dataset.json")
        content["training"][1][key] = 7
        root = volumes(tmp_path / key, content)
        with pytest.raises(DataError, match=rf"has 7 as its {key}; expected the path"):
            load_volume_datalist("training", root)


def test_photographs_of_nnu_net_are_paired_with_and_without_their_json(tmp_path):
    for folder, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
        (tmp_path / folder).mkdir()
        for i in range(3):
            Image.new("RGB" if ending else "L", (4, 4)).save(tmp_path / folder / f"skin_{i}{ending}.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "lesion": 1}, "numTraining": 3}))
    for datalist in (None, tmp_path / "dataset.json"):
        items = load_datalist("training", tmp_path, datalist, validation_fraction=0.0)
        assert [(Path(i["image"]).name, Path(i["label"]).name) for i in items] == [
            (f"skin_{i}_0000.png", f"skin_{i}.png") for i in range(3)
        ]
    Image.new("L", (4, 4)).save(tmp_path / "imagesTr" / "skin_0_0001.png")
    with pytest.raises(DataError, match=r"skin_0_0001\.png: the channel of a case"):
        load_datalist("training", tmp_path)
