"""Prompts that travel with an image: whatever happens to it on the way, the inferer finds them."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor, decollate_batch, list_data_collate
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, Lambdad, Orientationd, ScaleIntensityd, Spacingd

from medsa_nets.inferers import PromptInferer
from medsa_nets.prompts import Prompts, prompts_of, prompts_of_batch, with_prompts


def click(row: float) -> Prompts:
    return Prompts(points=torch.tensor([[[row, 3.0]]]), labels=torch.ones(1, 1), classes=torch.tensor([0]))


def photograph(row: float, name: str = "a") -> MetaTensor:
    return with_prompts(MetaTensor(torch.zeros(3, 8, 8), meta={"filename_or_obj": f"{name}.jpg"}), click(row))


def test_an_image_gets_prompts_on_its_own_memory_and_the_one_before_stays():
    image = MetaTensor(torch.zeros(3, 8, 8), affine=torch.diag(torch.tensor([2.0, 3, 1, 1])))
    image.applied_operations = [{"class": "Flip"}]
    carrying = with_prompts(image, click(1.0))
    assert prompts_of(image) == Prompts()
    assert prompts_of(carrying) == click(1.0)
    assert prompts_of(with_prompts(carrying, click(2.0))) == click(2.0)
    assert carrying.data_ptr() == image.data_ptr()
    assert torch.equal(carrying.affine, image.affine)
    assert carrying.applied_operations == image.applied_operations
    assert prompts_of(torch.zeros(3, 8, 8)) == Prompts()


@pytest.mark.parametrize(
    "change",
    [
        copy.copy, copy.deepcopy, lambda image: pickle.loads(pickle.dumps(image)), lambda image: image.clone(),
        lambda image: image.to(torch.float64) * 2, lambda image: image[None][0],
        lambda image: Compose([ScaleIntensityd("image")])({"image": image})["image"],
    ],
    ids=["copy", "deepcopy", "pickle", "clone", "arithmetic", "batch axis", "transform"],
)  # fmt: skip
def test_copies_and_computations_keep_an_images_prompts(change):
    assert prompts_of(change(photograph(5.0))) == click(5.0)


def test_spatial_transforms_leave_prompts_where_they_were():
    volume = MetaTensor(torch.zeros(1, 6, 6, 4), affine=torch.diag(torch.tensor([-2.0, 2, 3, 1])))
    transforms = Compose([Orientationd("image", "RAS", labels=None), Spacingd("image", (1.0, 1.0, 1.0))])
    box = Prompts(boxes=torch.tensor([[0.0, 1, 2, 3, 4, 5]]))
    assert prompts_of(transforms({"image": with_prompts(volume, box)})["image"]) == box


@pytest.mark.parametrize("rows", [[1.0], [1.0, 2.0, 3.0]])
def test_a_batch_holds_the_prompts_of_each_image_and_gives_them_back(rows):
    batch = list_data_collate([{"image": photograph(row)} for row in rows])
    assert prompts_of_batch(batch["image"]) == [click(row) for row in rows]
    assert prompts_of_batch(batch["image"].to("cpu")) == [click(row) for row in rows]
    assert [prompts_of(item["image"]) for item in decollate_batch(batch)] == [click(row) for row in rows]


def test_an_image_that_gets_a_batch_axis_is_a_batch_of_one():
    assert prompts_of_batch(photograph(4.0)[None]) == [click(4.0)]
    assert prompts_of_batch(torch.zeros(2, 3, 8, 8)) == [Prompts()] * 2


def test_prompts_that_are_given_stand_in_place_of_those_that_travel():
    batch = photograph(4.0)[None]
    assert prompts_of_batch(batch, click(6.0)) == [click(6.0)]
    assert prompts_of_batch(batch, Prompts()) == [Prompts()]
    assert prompts_of_batch(torch.zeros(2, 3, 8, 8), [click(1.0), click(2.0)]) == [click(1.0), click(2.0)]
    with pytest.raises(ValueError, match="each of 2 images, got them for 1"):
        prompts_of_batch(torch.zeros(2, 3, 8, 8), click(1.0))


def test_metadata_with_prompts_can_be_written_as_text():
    text = json.loads(json.dumps({"prompts": photograph(4.0).meta["prompts"]}))["prompts"]
    assert text == "Prompts(points=[[[4.0, 3.0]]], labels=[[1.0]], classes=[0])"


class Row(torch.nn.Module):
    """Stands for a network: foreground in the row of the click."""

    def forward(self, image, point_coords, point_labels, classes):
        logits = -torch.ones(len(image), 1, 8, 8)
        for index, row in enumerate(point_coords[:, 0, 0, 0].long()):
            logits[index, :, row] = 1
        return logits


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluator_answers_each_image_by_its_own_prompts(workers):
    """Cached, sent by a worker, collated, answered and decollated as in the evaluation of a bundle."""
    items = [{"image": photograph(row, str(row)), "label": torch.zeros(1, 8, 8)} for row in (1.0, 6.0, 3.0)]
    found = []

    def keep(data):
        found.append((prompts_of(data["image"]), int(data["pred"][0, :, 0].argmax())))
        return data

    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(
            CacheDataset(items, Lambdad("image", lambda image: image + 1), progress=False),
            batch_size=2,
            num_workers=workers,
        ),
        network=Row(),
        inferer=PromptInferer(),
        postprocessing=keep,
    ).run()
    assert found == [(click(row), int(row)) for row in (1.0, 6.0, 3.0)]
