import json

import pytest
from monai.transforms import (
    Compose,
    Identityd,
    Resized,
    ScaleIntensityRange,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
)

from medsa_nets.transforms import SpacingBesidePathsd, describe_transform

WINDOW = {"a_min": -125.0, "a_max": 275.0, "b_min": 0.0, "b_max": 1.0, "clip": True}


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (ScaleIntensityRange(**WINDOW), {"transform": "ScaleIntensityRange", **WINDOW}),
        (ScaleIntensityRanged("image", **WINDOW), {"transform": "ScaleIntensityRange", **WINDOW}),
        (
            ScaleIntensityRangePercentilesd("image", lower=0.5, upper=99.5, b_min=0.0, b_max=1.0),
            {"transform": "ScaleIntensityRangePercentiles", "lower": 0.5, "upper": 99.5, "b_min": 0.0, "b_max": 1.0},
        ),
        (SpacingBesidePathsd("image", pixdim=[0.5, 0.5, 1.0]), {"transform": "Spacing", "pixdim": [0.5, 0.5, 1.0]}),
        (Resized("image", spatial_size=[64, 64, -1]), {"transform": "Resize", "spatial_size": [64, 64, -1]}),
        (Identityd("image"), {"transform": "Identity"}),
    ],
    ids=lambda value: value["transform"] if isinstance(value, dict) else "",
)
def test_a_transform_is_described_by_its_name_and_its_numbers(transform, expected):
    found = describe_transform(transform)
    assert {name: found[name] for name in expected} == expected
    assert json.loads(json.dumps(found)) == found  # no array, no type of numpy's, no nan


def test_several_transforms_are_described_one_after_the_other_and_none_as_none():
    found = describe_transform(Compose([Identityd("image"), ScaleIntensityRanged("image", **WINDOW)]))
    assert [one["transform"] for one in found] == ["Identity", "ScaleIntensityRange"]
    assert describe_transform(None) is None
    assert describe_transform(lambda image: image)["transform"] == "function"
