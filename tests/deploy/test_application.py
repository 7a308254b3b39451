"""DICOM in, DICOM segmentation out, through MONAI Deploy's own runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import yaml
from PIL import Image
from pydicom.uid import MRImageStorage

from .conftest import BUNDLES, CT, Command, Run
from .series import write_ct, write_enhanced, write_photograph

pytestmark = pytest.mark.deploy
ISIC = BUNDLES / "medsa_isic"


def results(output: Path) -> dict[str, Path]:
    """Folders of results by the UID that names them."""
    return {folder.name: folder for folder in sorted(output.iterdir())}


def headers(folder: Path) -> list[pydicom.Dataset]:
    """Headers of a series in the order of the positions."""
    read = [pydicom.dcmread(file, stop_before_pixels=True) for file in folder.iterdir()]
    normal = np.cross(read[0].ImageOrientationPatient[:3], read[0].ImageOrientationPatient[3:])
    return sorted(read, key=lambda header: float(np.dot(header.ImagePositionPatient, normal)))


def label_map(segmentation: Path, source: list[pydicom.Dataset]) -> np.ndarray:
    """What a DICOM segmentation holds for each source image: (X, Y, Z) of 0 and segment numbers."""
    opened = hd.seg.segread(segmentation)
    uids = [header.SOPInstanceUID for header in source]
    frames = opened.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    return frames.transpose(2, 1, 0)


def validate(file: Path) -> None:
    """Fail where ``dciodvfy`` reports an error."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (Debian: dicom3tools)")
    done = subprocess.run(["dciodvfy", file], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert not [line for line in said.splitlines() if line.startswith(("Error", "Abort"))], said


@pytest.fixture(scope="module")
def studies(real_ct: Path, oblique_ct: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies that can be segmented, and what can't, in one folder."""
    root = tmp_path_factory.mktemp("studies")
    shutil.copytree(real_ct, root / "a")
    shutil.copytree(oblique_ct, root / "b")
    noise = np.random.default_rng(0).integers(-900, 900, (32, 32, 8)).astype(np.int16)
    gap = write_ct(root / "gap", noise, np.eye(4))
    next(iter(sorted(gap.iterdir(), key=lambda file: int(file.stem.split("_")[1]))[3:])).unlink()
    write_ct(root / "mr", noise, np.eye(4), Modality="MR")
    (root / "README").write_text("two studies")
    return root


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay for single precision, in which two ways to compute a mask give the same voxels on every processor."""
    overlay = tmp_path_factory.mktemp("overlays") / "single.yaml"
    overlay.write_text("amp: false\n")
    return overlay


@pytest.fixture(scope="module")
def eager(deploy: Command, studies: Path, single: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    output = tmp_path_factory.mktemp("eager") / "out"
    return deploy("-i", studies, "-o", output, "-m", CT, "--overlay", single), output


@pytest.fixture(scope="module")
def torchscript(deploy: Command, single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as one file, under another name than it was exported with."""
    folder = tmp_path_factory.mktemp("torchscript")
    done = deploy("export", "-m", CT, "--overlay", single, "-o", folder / "ct.ts")
    assert done.status == 0, done.err
    return (folder / "ct.ts").rename(folder / "renamed.ts")


@pytest.fixture(scope="module")
def masks(deploy: Command, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of ``monai.bundle run`` on the same series, by the same packages and number of threads."""
    output = tmp_path_factory.mktemp("masks")
    for name in ("a", "b"):
        done = deploy.module(
            *("monai.bundle", "run", "inferring", "--config_file", "configs/inference.yaml", "--amp", "false"),
            *("--dataset_dir", studies / name, "--output_dir", output), cwd=CT,
        )  # fmt: skip
        assert done.status == 0, done.err
    return output


def test_every_matching_series_is_segmented_and_all_else_is_named(eager: tuple[Run, Path], studies: Path) -> None:
    run, output = eager
    assert run.status == 2, run.err  # a damaged series among them
    series = {headers(studies / name)[0].SeriesInstanceUID for name in ("a", "b")}
    assert set(results(output)) == series
    assert "modality MR; the bundle takes CT" in run.err
    assert "A slice is missing" in run.err
    assert "no DICOM file (README)" in run.err
    assert "2 segmented, 0 failed, 1 damaged, 2 left out" in run.err
    assert sorted(Path(line).name for line in run.out.split()) == sorted(series)


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_segmentation_is_the_mask_of_the_bundle(
    eager: tuple[Run, Path], studies: Path, masks: Path, name: str
) -> None:
    source = headers(studies / name)
    segmentation = results(eager[1])[source[0].SeriesInstanceUID] / "segmentation.dcm"
    expected = np.asarray(nib.load(masks / f"{name}_segmentation.nii.gz").dataobj)
    assert (expected == 6).sum() > 500  # there is liver
    np.testing.assert_array_equal(label_map(segmentation, source), expected)
    opened = hd.seg.segread(segmentation)
    assert opened.StudyInstanceUID == source[0].StudyInstanceUID
    assert opened.FrameOfReferenceUID == source[0].FrameOfReferenceUID
    assert opened.SeriesInstanceUID != source[0].SeriesInstanceUID
    kidney = opened.get_segment_description(3)
    assert (kidney.segment_label, kidney.segmented_property_type.value) == ("left kidney", "64033007")
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (side.CodeValue, side.CodeMeaning) == ("7771000", "Left")
    assert kidney.algorithm_identification.version == "0.1.0"


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("kind", ["segmentation", "measurements_sr"])
def test_objects_are_valid_dicom(eager: tuple[Run, Path], studies: Path, name: str, kind: str) -> None:
    validate(results(eager[1])[headers(studies / name)[0].SeriesInstanceUID] / f"{kind}.dcm")


def test_measurements_are_those_of_the_mask(eager: tuple[Run, Path], studies: Path, masks: Path) -> None:
    folder = results(eager[1])[headers(studies / "b")[0].SeriesInstanceUID]
    told = {m["label"]: m for m in json.loads((folder / "measurements.json").read_text())["measurements"]}
    mask = nib.load(masks / "b_segmentation.nii.gz")
    voxels = int((np.asarray(mask.dataobj) == 6).sum())
    assert told["liver"]["voxels"] == voxels
    assert told["liver"]["value"] == pytest.approx(voxels * abs(np.linalg.det(mask.affine)) / 1000, abs=1e-3)
    report = hd.sr.srread(folder / "measurements_sr.dcm")
    groups = report.content.get_volumetric_roi_measurement_groups()
    values = {g.tracking_identifier: g.get_measurements()[0].value for g in groups}
    assert values["liver"] == pytest.approx(told["liver"]["value"])
    assert set(values) == {label for label, m in told.items() if m["voxels"]}
    page = (folder / "report.html").read_text()
    assert f"{told['liver']['value']:,.1f} mL" in page
    pictures = sorted(folder.glob("slice_*.png"))
    assert pictures
    # pixels of 1.5 x 3 mm: the picture is as high as the body
    assert Image.open(pictures[0]).size == (mask.shape[0], 2 * mask.shape[1])


def test_a_segmentation_of_an_enhanced_object_is_that_of_its_slices(
    deploy: Command, eager: tuple[Run, Path], studies: Path, single: Path, tmp_path: Path
) -> None:
    source = headers(studies / "b")
    expected = label_map(results(eager[1])[source[0].SeriesInstanceUID] / "segmentation.dcm", source)
    write_enhanced(studies / "b", tmp_path / "in" / "frames.dcm", PhotometricInterpretation="MONOCHROME1")
    run = deploy("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", CT, "--overlay", single)
    assert run.status == 0, run.err
    (folder,) = results(tmp_path / "out").values()
    opened = hd.seg.segread(folder / "segmentation.dcm")
    data = pydicom.dcmread(tmp_path / "in" / "frames.dcm", stop_before_pixels=True)
    numbers = list(range(1, data.NumberOfFrames + 1))
    frames = opened.get_pixels_by_source_frame(
        data.SOPInstanceUID, numbers, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(frames[::-1].transpose(2, 1, 0), expected)  # stored from the last to the first
    assert (folder / "measurements_sr.dcm").is_file()


def test_torchscript_gives_the_same_whatever_the_file_is_called(
    deploy: Command, torchscript: Path, eager: tuple[Run, Path], studies: Path, tmp_path: Path
) -> None:
    done = deploy(HOLOSCAN_INPUT_PATH=str(studies / "b"), HOLOSCAN_OUTPUT_PATH=str(tmp_path / "out"),
                  HOLOSCAN_MODEL_PATH=str(torchscript))  # fmt: skip
    assert done.status == 0, done.err
    source = headers(studies / "b")
    (folder,) = results(tmp_path / "out").values()
    expected = label_map(results(eager[1])[folder.name] / "segmentation.dcm", source)
    assert (expected > 0).sum() > 500
    np.testing.assert_array_equal(label_map(folder / "segmentation.dcm", source), expected)


def test_a_second_run_leaves_the_first_and_makes_a_new_series(deploy: Command, tmp_path: Path) -> None:
    """With a bundle that finds nothing: an empty segmentation is a valid one."""
    bundle = shutil.copytree(CT, tmp_path / "bundle")
    config = yaml.safe_load((bundle / "configs" / "inference.yaml").read_text())
    config["nothing"] = {"_target_": "Lambdad", "keys": "pred", "func": "$lambda logits: logits * 0 - 1"}
    chain = config["postprocessing"]["transforms"]
    assert "(@keep_place," in chain
    config["postprocessing"]["transforms"] = chain.replace("(@keep_place,", "(@keep_place, @nothing,")
    (bundle / "configs" / "inference.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    source = write_ct(tmp_path / "in" / "air", np.full((32, 32, 6), -1000, np.int16), np.diag([3.0, 3, 3, 1]))
    for _ in range(2):
        done = deploy("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", bundle)
        assert done.status == 0, done.err
        assert "nothing was found; the segmentation is empty" in done.err
    first, second = results(tmp_path / "out").values()
    uid = headers(source)[0].SeriesInstanceUID
    assert (first.name, second.name) == (uid, f"{uid}_2")
    opened = [hd.seg.segread(folder / "segmentation.dcm") for folder in (first, second)]
    assert opened[0].SeriesInstanceUID != opened[1].SeriesInstanceUID
    assert opened[0].SOPInstanceUID != opened[1].SOPInstanceUID
    assert len(opened[0].segment_numbers) == 13
    assert not opened[0].pixel_array.any()
    validate(first / "segmentation.dcm")
    assert "not found" in (first / "report.html").read_text()


def test_another_modality_is_an_overlay(deploy: Command, shared_data: Path, tmp_path: Path) -> None:
    volumes = shared_data / "msd_hippocampus"
    image, label = (nib.load(sorted((volumes / name).iterdir())[0]) for name in ("images", "labels"))
    values = np.asarray(image.dataobj, dtype=np.float32)
    values = (values / values.max() * 2000).astype(np.int16)
    source = write_ct(tmp_path / "in" / "mr", values, image.affine, Modality="MR", SOPClassUID=MRImageStorage)
    done = deploy("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", CT, "--overlay", "hippocampus.yaml")
    assert done.status == 0, done.err
    (folder,) = results(tmp_path / "out").values()
    found = label_map(folder / "segmentation.dcm", headers(source)) > 0
    truth = np.asarray(label.dataobj) > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.75


def test_photographs_of_all_kinds(deploy: Command, single: Path, shared_data: Path, tmp_path: Path) -> None:
    photograph = sorted((shared_data / "isic2017" / "full_resolution" / "images").iterdir())[0]
    pixels = np.asarray(Image.open(photograph).convert("RGB").resize((640, 480)))
    write_photograph(tmp_path / "in" / "known.dcm", pixels, PixelSpacing=[0.05, 0.05])
    write_photograph(tmp_path / "in" / "unknown.dcm", pixels)
    Image.fromarray(pixels).save(tmp_path / "in" / "lesion.png")
    (tmp_path / "in" / "cut.jpg").write_bytes(photograph.read_bytes()[:5000])
    done = deploy("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", ISIC, "--overlay", single)
    assert done.status == 2, done.err
    assert "cut.jpg: not readable as an image" in done.err
    found = results(tmp_path / "out")
    assert len(found) == 3
    mask = np.asarray(Image.open(found["lesion"] / "mask.png"))
    assert mask.shape == (480, 640)
    assert set(np.unique(mask)) == {0, 255}
    assert not (found["lesion"] / "segmentation.dcm").exists()
    for name in ("known", "unknown"):
        header = pydicom.dcmread(tmp_path / "in" / f"{name}.dcm", stop_before_pixels=True)
        folder = found[header.SOPInstanceUID]
        validate(folder / "segmentation.dcm")
        np.testing.assert_array_equal(label_map(folder / "segmentation.dcm", [header])[..., 0].T > 0, mask > 0)
        (lesion,) = json.loads((folder / "measurements.json").read_text())["measurements"]
        area = int((mask > 0).sum())
        assert lesion["voxels"] == area
        assert (folder / "overlay.png").is_file()
        if name == "known":
            assert lesion["value"] == pytest.approx(area * 0.0025, abs=1e-3)
            assert lesion["unit"] == "mm2"
            validate(folder / "measurements_sr.dcm")
        else:
            assert (lesion["value"], lesion["unit"]) == (area, "pixels")
    assert deploy("export", "-m", ISIC, "--overlay", single, "-o", tmp_path / "lesion.ts").status == 0
    done = deploy("-i", tmp_path / "in" / "lesion.png", "-o", tmp_path / "scripted", "-m", tmp_path / "lesion.ts")
    assert done.status == 0, done.err
    assert (mask > 0).sum() > 500
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "scripted" / "lesion" / "mask.png")), mask)


def test_a_series_that_fails_leaves_no_trace_and_the_next_one_its_turn(
    deploy: Command, torchscript: Path, studies: Path, tmp_path: Path
) -> None:
    cut = write_ct(tmp_path / "in" / "a_cut", np.zeros((32, 32, 6), np.int16), np.diag([3.0, 3, 3, 1]))
    file = sorted(cut.iterdir())[2]
    file.write_bytes(file.read_bytes()[:-100])
    shutil.copytree(studies / "b", tmp_path / "in" / "b")
    done = deploy("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", torchscript)
    assert done.status == 2, done.err
    assert f"{file}: " in done.err
    assert "truncated" in done.err
    assert list(results(tmp_path / "out")) == [headers(studies / "b")[0].SeriesInstanceUID]


def one_line(run: Run) -> str:
    """The error that a command ends with, in one line."""
    assert run.status == 1
    assert "Traceback" not in run.err
    return run.err.strip().splitlines()[-1]


def test_nothing_to_segment_is_one_clear_error(deploy: Command, tmp_path: Path, studies: Path) -> None:
    arguments = ("-o", tmp_path / "out", "-m", CT)
    (tmp_path / "in").mkdir()
    assert "nothing to segment: no whole series of modality CT" in one_line(deploy("-i", tmp_path / "in", *arguments))
    assert "1 left out, 0 damaged" in one_line(deploy("-i", studies / "mr", *arguments))
    assert "no such folder" in one_line(deploy("-i", tmp_path / "absent", *arguments))
    assert not (tmp_path / "out").exists()


def test_a_wrong_model_or_output_is_one_clear_error(deploy: Command, tmp_path: Path, studies: Path) -> None:
    given = ("-i", studies / "b", "-o", tmp_path / "out")
    untrained = shutil.copytree(CT, tmp_path / "untrained", ignore=shutil.ignore_patterns("model.pt"))
    assert "it has no trained adapter" in one_line(deploy(*given, "-m", untrained))
    assert "hippocampus.pt" in one_line(deploy(*given, "-m", untrained))
    assert "there is no such file; expected one of" in one_line(deploy(*given, "-m", CT, "--overlay", "none.yaml"))
    (tmp_path / "text.ts").write_text("no archive")
    assert "it is no TorchScript file" in one_line(deploy(*given, "-m", tmp_path / "text.ts"))
    (tmp_path / "file").write_text("")
    target = ("-i", studies / "b", "-o", tmp_path / "file", "-m", CT)
    assert "it can't be written" in one_line(deploy(*target))


def test_the_build_context_is_complete_and_its_application_runs(
    deploy: Command, torchscript: Path, studies: Path, tmp_path: Path
) -> None:
    done = deploy("package", "-m", torchscript, "-o", tmp_path / "context", "--tag", "medsa-ct:1")
    assert done.status == 0, done.err
    assert "docker build -t medsa-ct:1" in done.out
    context = tmp_path / "context"
    assert deploy("check", context).status == 0
    app = yaml.safe_load((context / "app" / "app.yaml").read_text())
    assert app["application"]["pip-packages"] == (context / "app" / "requirements.txt").read_text().split()
    assert {"input-formats", "output-formats"} <= set(app["application"])
    assert one_line(deploy("package", "-m", torchscript, "-o", context)).endswith("Name a new folder (-o).")
    # as the container's entry point, with the package beside it and no other
    ran = subprocess.run(
        [deploy.python, "-P", context / "app" / "app.py"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(context / "app"), "HOLOSCAN_INPUT_PATH": str(studies / "b"),
             "HOLOSCAN_OUTPUT_PATH": str(tmp_path / "out"), "HOLOSCAN_MODEL_PATH": str(context / "model")},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(results(tmp_path / "out")) == 1
    (context / "app" / "requirements.txt").write_text("torch\n")
    assert "differs from pip-packages" in one_line(deploy("check", context))
    (context / "model" / "model.ts").write_bytes((context / "model" / "model.ts").read_bytes()[:5000])
    (context / "app" / "requirements.txt").write_text("\n".join(app["application"]["pip-packages"]) + "\n")
    assert "it is no TorchScript file" in one_line(deploy("check", context))
