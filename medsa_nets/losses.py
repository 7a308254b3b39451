"""Losses of masks: of one class, of several, and of volumes in which not every class is annotated."""

from __future__ import annotations

import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor, nn


def mask_loss(num_classes: int) -> nn.Module:
    """Dice and binary cross-entropy of masks (B, K, spatial…), logits first.

    Args:
        num_classes: of one, MONAI's loss; of several, Dice is over those in an image. Classes may overlap.
    """
    return DiceCELoss(sigmoid=True) if num_classes == 1 else AnnotatedDiceCELoss()


class AnnotatedDiceCELoss(nn.Module):
    """Dice over the classes in a volume and binary cross-entropy over the annotated ones.

    Real data sets are labelled in part. A class that a volume's annotation leaves out gives no loss there; a class
    that is annotated and absent gives cross-entropy (it must not be found), and no Dice, which is not defined.

    Args:
        dice_weight: weight of the Dice loss.
        ce_weight: weight of the cross-entropy.
        batch: whether Dice takes a class's voxels in all volumes of a batch together: for single slices, few of which
            show a small organ, and where a mask on a slice without the organ is to cost as much as it will.
    """

    def __init__(self, dice_weight: float = 1.0, ce_weight: float = 1.0, batch: bool = False) -> None:
        super().__init__()
        self.batch = batch
        self.dice = DiceLoss(reduction="none", batch=batch)
        self.dice_weight = dice_weight
        self.ce_weight = ce_weight

    def forward(self, logits: Tensor, target: Tensor, annotated: Tensor | None = None) -> Tensor:
        """Compare masks.

        Args:
            logits: (B, K, spatial…).
            target: (B, K, spatial…), boolean or 0 and 1.
            annotated: (B, K), whether the class is annotated in the volume; none takes all for annotated.

        Returns:
            Scalar; zero, with a gradient of zero, where nothing is annotated.

        Raises:
            ValueError: when shapes differ.
        """
        if logits.shape != target.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must have one shape.")
        target = target.to(logits.dtype)
        weight = logits.new_ones(logits.shape[:2]) if annotated is None else annotated.to(logits)
        if weight.shape != logits.shape[:2]:
            raise ValueError(f"annotated must have shape {tuple(logits.shape[:2])}, got {tuple(weight.shape)}.")
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(2).mean(-1)
        present = weight * (target.flatten(2).amax(-1) > 0)
        known = weight.reshape(*weight.shape, *[1] * (logits.dim() - 2))
        dice = self.dice(logits.sigmoid() * known, target * known)
        if self.batch:
            present = present.amax(0)
        dice = dice.reshape(present.shape)
        entropy = (entropy * weight).sum() / weight.sum().clamp_min(1.0)
        return self.ce_weight * entropy + self.dice_weight * (dice * present).sum() / present.sum().clamp_min(1.0)


class NearClickLoss(nn.Module):
    """A loss of masks, and cross-entropy near the newest click, where a user looks.

    Args:
        loss: of logits, target, and what else the training step knows, but not the nearness.
        weight: weight of the cross-entropy near the click.
    """

    def __init__(self, loss: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        self.loss = loss
        self.weight = weight

    def forward(self, logits: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
        """Compare masks.

        Args:
            logits: (B, K, spatial…).
            target: (B, K, spatial…), boolean or 0 and 1.
            rest: further arguments of ``loss``, and last the nearness to the newest click (B, K, spatial…), in [0, 1].

        Returns:
            Scalar.
        """
        *others, near = rest
        loss = self.loss(logits, target.to(logits.dtype), *others)
        entropy = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        return loss + self.weight * (entropy * near).sum() / near.sum().clamp_min(1.0)
