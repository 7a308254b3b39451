from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medsa_nets.metrics import HausdorffDistanceMM, SurfaceDiceMM, VoxelsElsewhere


def volumes(spacing: tuple[float, float, float]) -> tuple[list[MetaTensor], list[MetaTensor]]:
    """Background and a cube; the prediction's cube is moved by 2 voxels along the last axis."""
    affine = np.diag([*spacing, 1.0])
    out = []
    for start in (4, 6):
        cube = torch.zeros(1, 16, 16, 16)
        cube[:, 4:10, 4:10, start : start + 6] = 1
        out.append([MetaTensor(torch.cat([1 - cube, cube]), affine=affine)])
    return out[1], out[0]


@pytest.mark.parametrize("thickness", [1.0, 2.5])
def test_distances_are_in_millimetres(thickness):
    metric = HausdorffDistanceMM(include_background=False, percentile=95)
    metric(*volumes((1.0, 1.0, thickness)))
    assert metric.aggregate().item() == pytest.approx(2 * thickness)


def test_surface_dice_has_a_tolerance_in_millimetres():
    values = {}
    for thickness in (1.0, 2.5):
        metric = SurfaceDiceMM([2.0], include_background=False)
        metric(*volumes((1.0, 1.0, thickness)))
        values[thickness] = metric.aggregate().item()
    assert values[1.0] == pytest.approx(1.0)
    assert values[2.5] < 0.95


def test_volumes_of_one_batch_have_spacings_of_their_own():
    metric = HausdorffDistanceMM(include_background=False, percentile=95)
    near, far = volumes((1.0, 1.0, 1.0)), volumes((1.0, 1.0, 3.0))
    values = metric(near[0] + far[0], near[1] + far[1])
    assert values.flatten().tolist() == pytest.approx([2.0, 6.0])


def test_a_class_that_the_label_does_not_hold_counts_in_no_surface_dice():
    predicted, labels = volumes((1.0, 1.0, 1.0))
    empty = MetaTensor(torch.zeros(1, 16, 16, 16))
    metric = SurfaceDiceMM([2.0, 2.0], include_background=False)
    stacked = []
    for (volume,), last in ((predicted, predicted[0][1:]), (labels, empty)):
        stacked.append([MetaTensor(torch.cat([volume.as_tensor(), last.as_tensor()]), affine=volume.affine)])
    values = metric(*stacked)
    assert values[0, 0].item() == pytest.approx(1.0)
    assert torch.isnan(values[0, 1])
    assert metric.aggregate().item() == pytest.approx(1.0)


def test_voxels_in_slices_without_their_class_are_counted_over_all_volumes():
    label = torch.zeros(3, 8, 8, 6)  # background, a class in slices 2 and 3, one that is not annotated
    label[1, 2:6, 2:6, 2:4] = 1
    label[0] = 1 - label[1]
    found = torch.zeros_like(label)
    found[1, 2:6, 2:6, 1:4] = 1  # 16 of 48 voxels in a slice without the class
    found[2, :, :, 0] = 1
    metric = VoxelsElsewhere()
    metric([found, label], [label, label])
    assert metric.aggregate().item() == pytest.approx(16 / (48 + 32))
    metric.reset()
    metric([torch.zeros_like(label)], [label])
    assert torch.isnan(metric.aggregate())
