from __future__ import annotations

import csv
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage
from PIL import Image

from medsa_nets.data import (
    AtomicPILWriter,
    NamedOutputs,
    image_id,
    output_name,
    prepare_folders,
    prepare_outputs,
    result_endings,
    unique_names,
    volume_writer,
)
from medsa_nets.errors import DataError, OutputError, find_cause
from medsa_nets.training import MetricsSaver, SampleOverlays
from medsa_nets.transforms import SaveOverlayd, SaveVolumeOverlayd


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ct/1.2.840.1", "1.2.840.1"),
        ("ct/1.2.840.2", "1.2.840.2"),
        ("IMG_0001", "IMG_0001"),
        ("a.v2.jpg", "a.v2"),
        ("A.JPG", "A"),
        ("ct.nii.gz", "ct"),
        ("ct.1.nii", "ct.1"),
        ("IM.0004", "IM.0004"),
        ("a.dcm", "a"),
        (".png", ".png"),
    ],
)
def test_only_the_suffix_of_a_format_is_taken_off_a_name(path, name):
    assert output_name(path) == name
    assert image_id({"image": path}) == name


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["p1/IMG_1.jpg", "p2/IMG_1.jpg", "p2/IMG_2.jpg"], ["p1_IMG_1", "p2_IMG_1", "IMG_2"]),
        (["x/a.jpg", "x/a.png"], ["a.jpg", "a.png"]),
        (["x/a.jpg", "x/a.png", "y/a.jpg"], ["x_a.jpg", "x_a.png", "y_a.jpg"]),
        (["1/t1/ct.nii", "2/t1/ct.nii"], ["1_t1_ct", "2_t1_ct"]),
        (["x/a.jpg", "x/A.jpg"], None),
        (["p1/a.jpg", "p2/a.jpg", "p1_a.jpg"], None),
        (["1.2.3.1", "1.2.3.2"], ["1.2.3.1", "1.2.3.2"]),
    ],
)
def test_every_image_has_a_name_of_its_own(paths, names):
    found = unique_names(paths)
    assert len({name.casefold() for name in found.values()}) == len(paths)
    assert not any(os.sep in name for name in found.values())
    for order in itertools.permutations(paths):
        assert unique_names(order) == found  # whatever the order
    if names:
        assert [found[path] for path in paths] == names


@pytest.mark.parametrize("writer", ["png", ".nii.gz", ".mha"])
def test_masks_of_folders_that_are_named_by_uids_do_not_replace_each_other(tmp_path, writer):
    photograph = writer == "png"
    extension = ".png" if photograph else writer
    save = SaveImage(
        folder_layout=NamedOutputs(tmp_path / "out", "segmentation", extension),
        output_ext=extension,
        resample=False,
        output_dtype=np.uint8,
        writer=AtomicPILWriter if photograph else volume_writer(extension),
    )
    for number in (1, 2):
        mask = torch.full((1, 5, 4) if photograph else (1, 5, 4, 3), float(number))
        meta = {"filename_or_obj": f"/data/1.2.3.{number}", "original_affine": np.eye(4)}
        save(MetaTensor(mask, affine=torch.eye(4), meta=meta))
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"1.2.3.{number}_segmentation{extension}" for number in (1, 2)]


def test_runs_whose_results_would_be_lost_are_refused_before_they_start(tmp_path):
    def entries(*names: str) -> list[dict[str, str]]:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return [{"image": str(tmp_path / name)} for name in names]

    for names in (("a.jpg", "a.png"), ("p1/b.jpg", "p2/b.jpg"), ("c.dcm", "C.jpg"), ("ct.nii.gz", "ct.nrrd")):
        with pytest.raises(DataError, match="their results would have one name") as caught:
            prepare_outputs(entries(*names), tmp_path / "out", "_segmentation.png")
        assert all(str(tmp_path / name) in str(caught.value) for name in names)
        assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="would replace this image"):
        prepare_outputs(entries("d.jpg", "d_segmentation.png"), tmp_path, "_segmentation.png")
    prepare_outputs(entries("e.jpg", "f.jpg", "1.2.3.1", "1.2.3.2"), tmp_path / "out", "_segmentation.png")
    assert not (tmp_path / "out").exists()  # until there is a result


@pytest.mark.parametrize("place", ["a file", "below a file", "a system's folder", "a link to nowhere"])
def test_a_folder_that_can_not_be_written_is_refused_before_the_first_image(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file" / "none")
    folder = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "x" / "out",
        "a system's folder": Path("/proc/medsa"),
        "a link to nowhere": tmp_path / "link",
    }[place]
    if place == "a system's folder" and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(OutputError, match="it can't be written") as caught:
        prepare_folders(output_dir=folder)
    assert str(caught.value).startswith(f"output {folder}: ")
    assert "--output_dir" in str(caught.value)


@pytest.fixture
def small_disk():
    """No file may grow beyond 64 KiB."""
    resource = pytest.importorskip("resource", reason="Windows has no limit for the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("extension", [".png", ".nii.gz", ".nii", ".nrrd", ".mha"])
def test_each_writer_names_its_file_where_the_disk_is_full(tmp_path, small_disk, extension):
    photograph = extension == ".png"
    save = SaveImage(
        folder_layout=NamedOutputs(tmp_path, "segmentation", extension),
        output_ext=extension,
        resample=False,
        output_dtype=np.uint8,
        writer=AtomicPILWriter if photograph else volume_writer(extension),
    )
    noise = torch.randint(0, 255, (1, 400, 400) if photograph else (1, 80, 80, 40)).float()
    meta = {"filename_or_obj": "/data/ct.nii.gz", "original_affine": np.eye(4)}
    with pytest.raises(RuntimeError) as caught:
        save(MetaTensor(noise, affine=torch.eye(4), meta=meta))
    cause = find_cause(caught.value)
    assert isinstance(cause, OutputError)
    assert str(cause).startswith(f"{tmp_path}/ct_segmentation{extension}: it can't be written (")
    assert "\n" not in str(cause)
    assert list(tmp_path.iterdir()) == []


def test_tables_of_metrics_are_whole_and_quote_names_with_commas(tmp_path):
    from ignite.engine import Engine

    saver = MetricsSaver(
        str(tmp_path / "out"), ["dice"], ["dice"], lambda batch: [{"filename_or_obj": name} for name in batch], "*"
    )
    engine = Engine(lambda engine, batch: None)
    saver.attach(engine)

    @engine.on("EPOCH_STARTED")
    def give(engine: Engine) -> None:
        engine.state.metrics["dice"] = 0.5
        engine.state.metric_details = {"dice": torch.tensor([[0.25], [0.75]])}

    engine.run([["/a/x, y.jpg", "/b/z.jpg"]])
    rows = list(csv.reader((tmp_path / "out" / "dice_raw.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["filename", "/a/x, y.jpg", "/b/z.jpg"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dice_raw.csv", "dice_summary.csv", "metrics.csv"]
    (tmp_path / "file").touch()
    saver.save_dir = str(tmp_path / "file")
    with pytest.raises(OutputError, match="file: the folder can't be made"):
        saver(engine)


def test_overlays_of_patients_with_images_of_one_name_are_their_own(tmp_path):
    entries = []
    for patient in ("patient1", "patient2"):
        (tmp_path / patient).mkdir()
        path = tmp_path / patient / "IMG_1.png"
        Image.new("RGB", (8, 6), (90, 80, 70)).save(path)
        entries.append({"image": str(path), "label": str(path)})
    overlay = SaveOverlayd("pred", str(tmp_path / "out"), data=entries)
    for entry in entries:
        image = MetaTensor(torch.zeros(3, 8, 6), affine=torch.eye(4), meta={"filename_or_obj": entry["image"]})
        overlay({"image": image, "pred": torch.ones(1, 8, 6)})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "patient1_IMG_1_overlay.png",
        "patient2_IMG_1_overlay.png",
    ]
    volumes = SaveVolumeOverlayd("pred", str(tmp_path), data=[{"image": f"/{p}/ct.nii.gz"} for p in ("a", "b")])
    assert [volumes.name(f"/{p}/ct.nii.gz") for p in ("a", "b")] == ["a_ct", "b_ct"]

    class Items(list):
        data = entries

    samples = SampleOverlays(output_dir=str(tmp_path), network=torch.nn.Identity(), dataset=Items(), inferer=None)
    assert set(samples.names.values()) == {"patient1_IMG_1", "patient2_IMG_1"}


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 1)])
def test_masks_of_the_smallest_pictures_keep_their_size(tmp_path, size):
    save = SaveImage(
        folder_layout=NamedOutputs(tmp_path, "segmentation", ".png"),
        output_ext=".png",
        resample=False,
        scale=255,
        writer=AtomicPILWriter,
    )
    save(MetaTensor(torch.ones(1, *size), affine=torch.eye(4), meta={"filename_or_obj": "/data/a.png"}))
    with Image.open(tmp_path / "a_segmentation.png") as mask:
        assert mask.size == size
        assert (np.asarray(mask) == 255).all()


def test_classes_that_overlap_have_files_of_their_own():
    assert result_endings(["lesion"], True) == ["_segmentation.png", "_probability.png", "_overlay.png"]
    assert result_endings(["disc", "optic cup"], False)[0] == "_segmentation.png"
    assert result_endings(["disc", "optic cup"], True)[:2] == ["_disc_segmentation.png", "_optic-cup_segmentation.png"]
    with pytest.raises(DataError, match="a b, a/b: two of them would share a file"):
        result_endings(["a b", "a/b"], True)
