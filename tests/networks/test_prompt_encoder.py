from __future__ import annotations

import pytest
import torch

from medsa_nets.networks import PromptEncoder

HEIGHT, WIDTH = 224, 320  # not square: an exchange of the axes would show
GRID = (HEIGHT // 16, WIDTH // 16)
COUNT = 3
KINDS = ["points", "boxes", "points+boxes", "masks", "points+masks", "boxes+masks", "points+boxes+masks", "none"]


@pytest.fixture
def encoders(segment_anything, randomise):
    reference = segment_anything.modeling.PromptEncoder(
        embed_dim=256, image_embedding_size=GRID, input_image_size=(HEIGHT, WIDTH), mask_in_chans=16
    )
    randomise(reference)
    ours = PromptEncoder().eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def make_prompts(kinds, count=COUNT):
    """Points (x, y) with labels, boxes and masks of the kinds asked for; the others are none."""
    size = torch.tensor([float(WIDTH), float(HEIGHT)])
    points = torch.rand(count, 4, 2) * size
    labels = torch.tensor([[1, 0, 1, -1], [0, 0, 1, 1], [1, -1, -1, -1]])[:count]
    boxes = torch.rand(count, 4) * torch.cat([size, size])
    masks = torch.randn(count, 1, 4 * GRID[0], 4 * GRID[1])
    return (
        points if "points" in kinds else None,
        labels if "points" in kinds else None,
        boxes if "boxes" in kinds else None,
        masks if "masks" in kinds else None,
    )


@pytest.mark.parametrize("kinds", KINDS)
def test_embeddings_equal_segment_anything(encoders, kinds):
    ours, reference = encoders
    points, labels, boxes, masks = make_prompts(kinds)
    count = 1 if kinds == "none" else COUNT
    with torch.no_grad():
        sparse, dense = ours(points, labels, boxes, masks, count, (HEIGHT, WIDTH), GRID)
        expected = reference(points=None if points is None else (points, labels), boxes=boxes, masks=masks)
    torch.testing.assert_close(sparse, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense, expected[1], atol=1e-5, rtol=1e-5)


def test_positional_encoding_of_the_grid_equals_segment_anything(encoders):
    ours, reference = encoders
    torch.testing.assert_close(ours.dense_pe(*GRID), reference.get_dense_pe(), atol=1e-5, rtol=1e-5)


def test_no_prompt_gives_the_asked_for_number_of_empty_sets(encoders):
    sparse, dense = encoders[0](None, None, None, None, 5, (HEIGHT, WIDTH), GRID)
    assert sparse.shape == (5, 0, 256)
    assert dense.shape == (5, 256, *GRID)


def test_padding_points_say_nothing_wherever_they_lie(encoders):
    ours, _ = encoders
    points, labels, _, _ = make_prompts("points")
    elsewhere = torch.where((labels == -1).unsqueeze(-1), points + 100.0, points)
    assert not torch.equal(points, elsewhere)
    sparse = [ours(p, labels, None, None, COUNT, (HEIGHT, WIDTH), GRID)[0] for p in (points, elsewhere)]
    assert torch.equal(*sparse)


@pytest.mark.parametrize("kinds", ["points", "boxes"])
def test_autocast_does_not_coarsen_coordinates(encoders, kinds):
    ours, _ = encoders
    prompts = make_prompts(kinds)
    with torch.no_grad():
        expected, _ = ours(*prompts, COUNT, (HEIGHT, WIDTH), GRID)
        with torch.autocast("cpu", torch.bfloat16):
            actual, _ = ours(*prompts, COUNT, (HEIGHT, WIDTH), GRID)
    torch.testing.assert_close(actual.float(), expected, atol=1e-5, rtol=1e-5)
