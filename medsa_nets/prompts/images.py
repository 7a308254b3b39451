"""Prompts that travel with their image, from the transform that reads them to the inferer that answers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.data import MetaTensor
from torch import Tensor

from medsa_nets.prompts.user import UserPrompt
from medsa_nets.prompts.value import Prompts

PROMPTS_META = "prompts"
USER_PROMPTS_META = "user_prompts"


class _Carried(str):
    """Prompts, of the network or of a user, as an entry of an image's metadata.

    Of an entry, MONAI and torch make lists for a batch, take these apart again, copy, print and write it. Texts alone
    go through all of that unchanged in every version that is supported: other types are refused
    (``NotImplementedError: Unable to de-collate``), and dictionaries come out as dictionaries of cut tensors.
    """

    prompts: Any

    def __new__(cls, prompts: Any) -> _Carried:
        self = super().__new__(cls, repr(prompts))
        self.prompts = prompts
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are made from the prompts, not from their text
        return _Carried, (self.prompts,)


def with_prompts(image: MetaTensor, prompts: Prompts) -> MetaTensor:
    """The image, on the same memory, with these prompts in place of those that it had.

    Spatial transforms of the image leave its prompts where they were; place
    :class:`~medsa_nets.transforms.PromptsToNetworkd` after them.
    """
    out = image.view(image.shape)
    out.meta = {**image.meta, PROMPTS_META: _Carried(prompts)}
    return out


def prompts_of(image: Tensor) -> Prompts:
    """The prompts that travel with an image (C, spatial…); empty ones where there are none."""
    carried = getattr(image, "meta", {}).get(PROMPTS_META)
    return carried.prompts if isinstance(carried, _Carried) else Prompts()


def prompts_of_batch(images: Tensor, prompts: Prompts | Sequence[Prompts] | None = None) -> list[Prompts]:
    """The prompts of each image of a batch, on its device.

    Args:
        images: (B, C, spatial…).
        prompts: what is asked for in place of what travels with the images: of each image, or of the only one.

    Raises:
        ValueError: when there are prompts for another number of images.
    """
    if prompts is None:
        carried = getattr(images, "meta", {}).get(PROMPTS_META)
        if carried is None:
            return [Prompts()] * len(images)
        prompts = [one.prompts for one in carried] if isinstance(carried, list) else carried.prompts
    given = [prompts] if isinstance(prompts, Prompts) else list(prompts)
    if len(given) != len(images):
        raise ValueError(f"expected prompts for each of {len(images)} images, got them for {len(given)}.")
    return [one.to(images.device) for one in given]


def with_user_prompts(image: MetaTensor, prompts: Sequence[UserPrompt]) -> MetaTensor:
    """The image, on the same memory, with what a user says of it, oldest first, in place of what it had.

    They stay in the grid of the image's file, whatever transforms follow.
    """
    out = image.view(image.shape)
    out.meta = {**image.meta, USER_PROMPTS_META: _Carried(tuple(prompts))}
    return out


def user_prompts_of(image: Tensor) -> tuple[UserPrompt, ...]:
    """What a user says of an image (C, spatial…); nothing where nothing travels with it."""
    carried = getattr(image, "meta", {}).get(USER_PROMPTS_META)
    return carried.prompts if isinstance(carried, _Carried) else ()


def user_prompts_of_batch(images: Tensor) -> list[tuple[UserPrompt, ...]]:
    """What a user says of each image of a batch (B, C, spatial…)."""
    carried = getattr(images, "meta", {}).get(USER_PROMPTS_META)
    if carried is None:
        return [()] * len(images)
    return [one.prompts for one in carried] if isinstance(carried, list) else [carried.prompts]
