from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss

from medsa_nets.losses import AnnotatedDiceCELoss, NearClickLoss


def logits_and_target():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    return logits, torch.rand(2, 3, 4, 5, 6, generator=generator) > 0.5


def test_with_everything_present_and_annotated_it_is_dice_plus_cross_entropy():
    logits, target = logits_and_target()
    expected = DiceLoss(sigmoid=True)(logits, target.float()) + torch.nn.functional.binary_cross_entropy_with_logits(
        logits, target.float()
    )
    torch.testing.assert_close(AnnotatedDiceCELoss()(logits, target), expected)
    torch.testing.assert_close(AnnotatedDiceCELoss()(logits, target, torch.ones(2, 3)), expected)


def test_what_is_not_annotated_gives_no_loss_and_no_gradient():
    logits, target = logits_and_target()
    annotated = torch.tensor([[True, False, True], [False, True, True]])
    logits.requires_grad_()
    loss = AnnotatedDiceCELoss()(logits, target, annotated)
    loss.backward()
    assert ((logits.grad.flatten(2).abs().amax(-1) > 0) == annotated).all()
    other = torch.where(annotated[..., None, None, None], logits.detach(), torch.randn_like(logits))
    torch.testing.assert_close(AnnotatedDiceCELoss()(other, target, annotated), loss.detach())


def test_an_absent_class_gives_cross_entropy_alone():
    logits, target = logits_and_target()
    target[:, 1] = False
    both, entropy = AnnotatedDiceCELoss(), AnnotatedDiceCELoss(dice_weight=0.0)
    only = torch.tensor([[False, True, False]]).expand(2, -1)
    torch.testing.assert_close(both(logits, target, only), entropy(logits, target, only))
    assert float(both(logits, target, only)) > 0


def test_dice_over_the_batch_takes_a_class_s_voxels_of_all_annotated_volumes_together():
    logits, target = logits_and_target()
    target[0, 1] = False  # in one volume the class is absent: what is found there costs
    expected = DiceLoss(sigmoid=True, batch=True)(logits, target.float())
    torch.testing.assert_close(AnnotatedDiceCELoss(ce_weight=0.0, batch=True)(logits, target), expected)
    first = torch.tensor([[True, True, True], [False, False, False]])
    expected = DiceLoss(sigmoid=True, batch=True)(logits[:1, ::2], target[:1, ::2].float())  # class 1 is in neither
    torch.testing.assert_close(AnnotatedDiceCELoss(ce_weight=0.0, batch=True)(logits, target, first), expected)


def test_nothing_annotated_is_zero_and_can_be_differentiated():
    logits, target = logits_and_target()
    logits.requires_grad_()
    loss = AnnotatedDiceCELoss()(logits, target, torch.zeros(2, 3))
    loss.backward()
    assert float(loss) == 0
    assert (logits.grad == 0).all()


def test_wrong_shapes_are_named():
    logits, target = logits_and_target()
    with pytest.raises(ValueError, match="one shape"):
        AnnotatedDiceCELoss()(logits, target[:, :2])
    with pytest.raises(ValueError, match="annotated must have shape"):
        AnnotatedDiceCELoss()(logits, target, torch.ones(2, 2))


def test_an_error_near_the_newest_click_costs_more():
    target = torch.zeros(1, 1, 8, 8)
    near = torch.zeros(1, 1, 8, 8)
    near[..., :2, :2] = 1
    beside, away = torch.full((1, 1, 8, 8), -2.0), torch.full((1, 1, 8, 8), -2.0)
    beside[..., 0, 0] = away[..., 7, 7] = 2.0
    loss = NearClickLoss(DiceCELoss(sigmoid=True))
    assert loss(beside, target, near) > loss(away, target, near) + 0.4
    torch.testing.assert_close(loss(away, target, 0 * near), DiceCELoss(sigmoid=True)(away, target))
