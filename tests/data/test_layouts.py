"""Layouts of data sets: which files are the images and labels of a case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medsa_nets.data.layouts import list_images, read_layout
from medsa_nets.errors import DataError


def make(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def anything(path: Path) -> bool:
    return path.suffix != ".db"


def pairs(root: Path, layout: Any, split: str = "training") -> list[tuple[Any, Any]]:
    def name(value: Any) -> Any:
        return (
            [Path(v).relative_to(root).as_posix() for v in value]
            if isinstance(value, list)
            else (Path(value).relative_to(root).as_posix())
        )

    return [(name(item["image"]), name(item["label"])) for item in read_layout(root, layout, anything)[split]]


def test_a_case_is_what_image_and_label_have_in_common(tmp_path: Path) -> None:
    make(
        tmp_path, "images/a.1.jpg", "images/b.png", "images/Thumbs.db", "images/._b.png", "masks/a.1.png", "masks/b.png"
    )
    layout = {"training": {"image": "images/{case}.*", "label": "masks/{case}.*"}}
    assert pairs(tmp_path, layout) == [("images/a.1.jpg", "masks/a.1.png"), ("images/b.png", "masks/b.png")]


def test_names_with_brackets_are_no_patterns(tmp_path: Path) -> None:
    make(tmp_path, "images/a[1].png", "images/a1.png", "masks/a[1].png", "masks/a1.png")
    layout = {"training": {"image": "images/{case}.*", "label": "masks/{case}.*"}}
    assert pairs(tmp_path, layout) == [("images/a1.png", "masks/a1.png"), ("images/a[1].png", "masks/a[1].png")]


def test_the_first_alternative_that_is_there_is_taken(tmp_path: Path) -> None:
    make(tmp_path, "i/a.ppm", "i/a.ppm.gz", "i/b.ppm.gz", "m/a.ah.ppm", "m/b.ah.ppm.gz")
    layout = {
        "training": {"image": ["i/{case}.ppm", "i/{case}.ppm.gz"], "label": ["m/{case}.ah.ppm", "m/{case}.ah.ppm.gz"]}
    }
    assert pairs(tmp_path, layout) == [("i/a.ppm", "m/a.ah.ppm"), ("i/b.ppm.gz", "m/b.ah.ppm.gz")]


def test_a_case_that_names_folder_and_file_is_one(tmp_path: Path) -> None:
    make(tmp_path, "d/p1/p1_t1.nii", "d/p1/p2_t1.nii", "d/p1/p1_t2.nii", "d/p1/p1_seg.nii")
    image = {"t1": "d/{case}/{case}_t1.nii", "t2": "d/{case}/{case}_t2.nii"}
    layout = {"training": {"image": image, "label": "d/{case}/{case}_seg.nii"}}
    assert pairs(tmp_path, layout) == [(["d/p1/p1_t1.nii", "d/p1/p1_t2.nii"], "d/p1/p1_seg.nii")]
    assert list_images(tmp_path, layout, anything) == [
        {"image": [str(tmp_path / "d/p1/p1_t1.nii"), str(tmp_path / "d/p1/p1_t2.nii")]}
    ]
    (tmp_path / "d/p1/p1_t2.nii").unlink()
    with pytest.raises(DataError, match=r"p1_t1\.nii: the case has no d/p1/p1_t2\.nii beside it"):
        pairs(tmp_path, layout)


def test_groups_are_not_parted_between_splits(tmp_path: Path) -> None:
    make(tmp_path, *(f"{kind}/p{i}/{n}.png" for i in range(10) for n in range(5) for kind in ("i", "m")))
    layout = {
        "training": {"image": "i/{group}/{case}.png", "label": "m/{group}/{case}.png"},
        "testing_fraction": 0.2,
    }
    found = {
        split: {Path(image).parts[1] for image, _ in pairs(tmp_path, layout, split)}
        for split in ("training", "testing")
    }
    assert {split: len(groups) for split, groups in found.items()} == {"training": 8, "testing": 2}
    assert not found["training"] & found["testing"]
    assert len(pairs(tmp_path, layout, "testing")) == 10


def test_images_without_label_are_an_error_unless_the_data_set_has_such(tmp_path: Path) -> None:
    make(tmp_path, "i/a.png", "i/b.png", "m/a.png")
    layout: dict[str, Any] = {"training": {"image": "i/{case}.png", "label": "m/{case}.png"}}
    with pytest.raises(DataError, match=r"b\.png: no label \(looked in .* for m/b\.png\); 1 of 2 images have none"):
        read_layout(tmp_path, layout, anything)
    assert len(pairs(tmp_path, {**layout, "labelled_only": True})) == 1
    make(tmp_path, "m/b.png", "m/b.png.txt")
    layout["training"]["label"] = "m/{case}.*"
    with pytest.raises(DataError, match=r"both fit m/b\.\*"):
        read_layout(tmp_path, layout, anything)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("images", "expected training, validation or testing"),
        ({"training": {"image": "i/{case}"}}, "expected training, validation or testing, each with patterns"),
        (
            {"training": {"image": "i/*", "label": "m/{case}"}},
            r"image of training is 'i/\*'; expected a path with {case}",
        ),
        ({"train": {}, "testing": {"image": "i/{case}", "label": "m/{case}"}}, "layout: train is"),
        ({"testing": {"image": "i/{case}", "label": "m/{case}"}, "testing_fraction": 2}, "expected a share from 0"),
    ],
)
def test_a_layout_of_another_form_is_refused(tmp_path: Path, layout: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_layout(tmp_path, layout, anything)
