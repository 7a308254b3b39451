from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medsa_nets.anatomy import check_anatomy
from medsa_nets.bundles import read_task
from medsa_nets.prompts import Prompts, with_prompts
from medsa_nets.transforms import CheckAnatomyd, SaveImageWarningsd

CLASSES = read_task("btcv", Path(__file__).resolve().parents[1] / "bundles" / "medsa_btcv")["classes"]
TOTALSEGMENTATOR = {1: 1, 2: 2, 3: 3, 4: 4, 15: 5, 5: 6, 6: 7, 52: 8, 63: 9, 64: 10, 7: 11, 8: 12, 9: 13}
SIZE = (80, 64, 60)  # voxels of 5 mm
AFFINE = np.diag([5.0, 5.0, 5.0, 1.0])
AFFINE[:3, 3] = [-200.0, -160.0, 900.0]
# centre and radii in mm from the scan's middle: to the right, to the front, to the head
BODY = {
    "spleen": ((-110, -40, 60), (30, 40, 50)),
    "right kidney": ((60, -50, -20), (28, 28, 55)),
    "left kidney": ((-60, -50, -10), (28, 28, 55)),
    "liver": ((80, 10, 60), (80, 65, 60)),
    "stomach": ((-60, 40, 60), (40, 35, 45)),
    "aorta": ((-10, -20, 0), (12, 12, 130)),
}
WRONG = {0: "mirrored left to right", 1: "mirrored front to back", 2: "upside down"}


def body(names: tuple[str, ...] = tuple(BODY)) -> np.ndarray:
    """A label map of ellipsoids where organs lie."""
    label = np.zeros(SIZE, np.uint8)
    places = np.stack(np.meshgrid(*[5.0 * (np.arange(n) - n / 2) for n in SIZE], indexing="ij"), axis=-1)
    for name in names:
        centre, radii = BODY[name]
        label[(((places - centre) / radii) ** 2).sum(-1) < 1] = 1 + CLASSES.index(name)
    return label


def test_a_body_as_it_is_brings_no_warning_in_any_orientation_of_its_file():
    label = body()
    assert check_anatomy(label, AFFINE, CLASSES) == []
    for axis in range(3):  # stored the other way round, and the affine says so
        turned = AFFINE @ np.diag([-1.0 if a == axis else 1.0 for a in range(3)] + [1.0])
        turned[:3, 3] = (AFFINE @ [*[SIZE[a] - 1 if a == axis else 0 for a in range(3)], 1])[:3]
        assert check_anatomy(np.flip(label, axis), turned, CLASSES) == []
    assert check_anatomy(label.transpose(2, 0, 1), AFFINE[:, [2, 0, 1, 3]], CLASSES) == []
    assert check_anatomy(np.zeros(SIZE, np.uint8), AFFINE, CLASSES) == []
    assert check_anatomy(np.rot90(label), AFFINE, ["anterior", "posterior"]) == []  # no organs of the trunk


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_file_that_states_the_wrong_directions_is_doubted(axis):
    (text,) = check_anatomy(np.flip(body(), axis), AFFINE, CLASSES)
    assert WRONG[axis] in text
    assert " mm " in text
    if axis == 0:
        assert "the liver lies 190 mm to the left of the spleen" in text


def test_two_organs_are_enough_and_one_is_not():
    pair = body(("liver", "spleen"))
    assert check_anatomy(pair, AFFINE, CLASSES) == []
    (text,) = check_anatomy(np.flip(pair, 0), AFFINE, CLASSES)
    assert "to the left of the spleen" in text
    assert check_anatomy(np.flip(body(("liver",)), 0), AFFINE, CLASSES) == []


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        ((3, 3, 3), "the liver has"),
        ((0.2, 0.2, 0.2), "the right kidney has"),
        ((1, 1, 4), "the right kidney is"),
        ((10, 10, 10), "mL (a body's has"),
    ],
)
def test_a_spacing_that_is_far_off_is_doubted(scale, told):
    found = check_anatomy(body(), AFFINE @ np.diag([*scale, 1.0]), CLASSES)
    assert any(told in text and "The spacing that the file states may be wrong" in text for text in found)


@pytest.mark.parametrize("name", ["ct_a", "ct_b"])
def test_masks_of_real_scans_are_believed_and_doubted_when_they_are_turned(shared_data, name):
    file = nib.load(shared_data / "ct" / f"{name}_totalsegmentator.nii.gz")
    table = np.zeros(256, np.uint8)
    for old, new in TOTALSEGMENTATOR.items():
        table[old] = new
    label = table[np.asarray(file.dataobj).astype(int)]
    assert check_anatomy(label, file.affine, CLASSES) == []
    axes = nib.aff2axcodes(file.affine)
    for axis in range(3):
        along = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}[axes[axis]]
        if name == "ct_b" and along == 2:
            continue  # 20 slices: organs that lie above each other are cut
        found = check_anatomy(np.flip(label, axis), file.affine, CLASSES)
        assert any(WRONG[along] in text for text in found), axes[axis]


def image_of(path: str) -> MetaTensor:
    return MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.eye(4), meta={"filename_or_obj": path})


def test_warnings_reach_log_file_and_a_server_s_reply_but_not_a_user_s_masks(tmp_path, caplog):
    mirrored = MetaTensor(torch.from_numpy(np.flip(body(), 0).copy())[None], affine=torch.from_numpy(AFFINE))
    data = {"image": image_of("/scans/1.2.3.4"), "pred": mirrored, "result": {"label": "liver"}}
    out = CheckAnatomyd("pred", CLASSES, reply=True)(data)
    assert len(out["anatomy_warnings"]) == 1
    assert out["result"] == {"label": "liver", "warnings": out["anatomy_warnings"]}
    assert "/scans/1.2.3.4: The organs contradict" in caplog.text
    assert torch.equal(out["pred"], mirrored)
    SaveImageWarningsd("image", str(tmp_path / "out"))(out)
    written = tmp_path / "out" / "1.2.3.4_warnings.json"
    assert out["anatomy_warnings"][0] in written.read_text()
    right = MetaTensor(torch.from_numpy(body())[None].float(), affine=torch.from_numpy(AFFINE))
    again = CheckAnatomyd("pred", CLASSES)({**data, "pred": right})
    assert again["anatomy_warnings"] == []
    SaveImageWarningsd("image", str(tmp_path / "out"))(again)
    assert not written.exists()  # of an earlier run
    click = Prompts(points=torch.ones(1, 1, 3), labels=torch.ones(1, 1), classes=torch.tensor([0]))
    said = CheckAnatomyd("pred", CLASSES, reply=True)({**data, "image": with_prompts(data["image"], click)})
    assert said["anatomy_warnings"] == []
    assert said["result"] == data["result"]


def test_the_report_of_an_application_shows_warnings(tmp_path):
    import json

    from medsa_nets.deploy.report import Measurement, write_report
    from medsa_nets.deploy.settings import Segment, Settings
    from medsa_nets.deploy.studies import Rules, Source

    settings = Settings("MedSA", "1", Rules(("CT",)), (Segment("liver", ("10200004", "Liver")),))
    source = Source("series", (Path("a.dcm"),))
    measured = [Measurement("liver", 10, 1.0, "mL")]
    write_report(tmp_path, source, settings, measured, {}, ["The liver lies left of <spleen>."])
    assert json.loads((tmp_path / "measurements.json").read_text())["warnings"] == ["The liver lies left of <spleen>."]
    assert "The liver lies left of &lt;spleen&gt;." in (tmp_path / "report.html").read_text()
    write_report(tmp_path, source, settings, measured, {})
    assert json.loads((tmp_path / "measurements.json").read_text())["warnings"] == []
    assert "class=warning" not in (tmp_path / "report.html").read_text()
