"""Clicks of an annotation tool (MONAI Label's requests) as prompts."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import Transform

from medsa_nets.prompts import UserPrompt, with_prompts, with_user_prompts
from medsa_nets.transforms.prompts import prompts_of_user

logger = logging.getLogger(__name__)


class ReadClicksd(Transform):
    """Turn a request's clicks into prompts, in the grid of the image's file.

    A request names, at the top level of the data dictionary, lists of voxel indices of the file's own grid:

    - one list per class (``"spleen": [[14, 10, 16]]``, the form of DeepEdit and of the Slicer and OHIF plugins), names
      compared without regard to case;
    - ``foreground``, which belongs to the class that ``label`` names (the form of DeepGrow) or to the only class there
      is;
    - ``background``: negative clicks on the class that ``label`` names, where that one is clicked, else on all clicked
      ones.

    Lists that can't be used (unknown names, places outside the image, something other than indices) are left out; what
    was left out, and why, stands in ``result["messages"]``, which MONAI Label puts into its reply. Without a usable
    click nothing is added: the image is segmented automatically. Place it after the image is loaded, before any spatial
    transform.

    Args:
        classes: names of the classes, in the order of their ids.
        image_key: key of the image (C, spatial…).
        result_key: key of the reply.
    """

    def __init__(self, classes: Sequence[str], image_key: str = "image", result_key: str = "result") -> None:
        self.classes = [name.lower() for name in classes]
        self.image_key = image_key
        self.result_key = result_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the points of the clicked classes to the image, and what could not be used to the reply."""
        out = dict(data)
        shape = tuple(int(n) for n in out[self.image_key].shape[1:])
        messages: list[str] = []
        lists: dict[str, list[list[float]]] = {}
        for key, value in data.items():
            if isinstance(key, str) and (key.lower() in (*self.classes, "foreground", "background") or _is_list(value)):
                inside = self._check(key, value, shape, messages)
                if inside:
                    lists[key.lower()] = lists.get(key.lower(), []) + inside
        focus = self._focus(data, bool(lists), messages)
        negative = lists.pop("background", [])
        unnamed = lists.pop("foreground", [])
        positive = {self.classes.index(name): clicks for name, clicks in lists.items()}
        if unnamed or (negative and not positive):
            if focus is None:
                messages.append(f"label: expected the class that is clicked on, one of {', '.join(self.classes)}.")
            else:
                positive[focus] = positive.get(focus, []) + unnamed
        if positive:
            prompts = self._prompts(positive, negative, focus)
            network = prompts_of_user(prompts, len(shape))
            out[self.image_key] = with_user_prompts(with_prompts(out[self.image_key], network), prompts)
        if messages:
            for message in messages:
                logger.warning(message)
            reply = dict(out.get(self.result_key) or {})
            out[self.result_key] = {**reply, "messages": [*reply.get("messages", []), *messages]}
        return out

    def _focus(self, data: Mapping[Hashable, Any], clicked: bool, messages: list[str]) -> int | None:
        """The class that the request is about."""
        name = data.get("label")
        if isinstance(name, str) and name and name.lower() != "background":
            if name.lower() in self.classes:
                return self.classes.index(name.lower())
            if clicked:
                messages.append(f"label: {name!r} is unknown; expected one of {', '.join(self.classes)}.")
        return 0 if len(self.classes) == 1 else None

    def _check(self, key: str, value: Any, shape: tuple[int, ...], messages: list[str]) -> list[list[float]]:
        """Clicks of a list that lie in the image."""
        if not value:
            return []
        if key.lower() not in (*self.classes, "foreground", "background"):
            messages.append(f"{key}: unknown label; expected one of {', '.join(self.classes)}, or background.")
            return []
        inside = []
        for click in value if isinstance(value, (list, tuple)) else [value]:
            if not _is_position(click) or len(click) < len(shape):
                messages.append(f"{key}: {click!r} is no click; expected {len(shape)} voxel indices.")
            elif any(not 0 <= c <= n - 1 for c, n in zip(click, shape)) or any(click[len(shape) :]):
                size = " x ".join(str(n) for n in shape)
                messages.append(f"{key}: the click {list(click)} lies outside the image, which is {size}.")
            else:
                inside.append([float(c) for c in click[: len(shape)]])
        return inside

    @staticmethod
    def _prompts(
        positive: Mapping[int, list[list[float]]], negative: list[list[float]], focus: int | None
    ) -> list[UserPrompt]:
        out = []
        for index in sorted(positive):
            against = negative if focus not in positive or index == focus else []
            for clicks, label in ((positive[index], 1), (against, 0)):
                out += [UserPrompt("point", index, 0, 0.0, np.array([click]), label=label) for click in clicks]
        return out


def _is_position(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(c, (int, float)) and not isinstance(c, bool) and c == c for c in value
    )


def _is_list(value: Any) -> bool:
    """Whether a value looks like a list of clicks."""
    return isinstance(value, list) and bool(value) and all(_is_position(v) and 2 <= len(v) <= 3 for v in value)
