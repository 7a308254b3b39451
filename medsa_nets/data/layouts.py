"""Folders as data sets are published: which files are images and labels of a case, by patterns of their paths."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medsa_nets.data.pickles import unpack_pickles
from medsa_nets.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation", "testing")
_PLACE = re.compile(r"\{(case|group)\}|(\*)")
_OPTIONS = {
    "testing_fraction": (int, float),
    "labelled_only": (bool,),
    "pickles": (str,),
    "list": (str, list),
    "label_ids": (list,),
}


def hash_of(text: str, seed: int) -> str:
    """What chooses images for a split: the same on every machine, of their names alone."""
    return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()


def check_layout(layout: Any) -> None:
    """Check the form of a layout, see :func:`read_layout`.

    Raises:
        DataError: when it has another; the message names the part.
    """
    form = "expected training, validation or testing, each with patterns of 'image' and 'label'"
    if not isinstance(layout, Mapping) or not any(name in layout for name in (*SPLITS, "list")):
        raise DataError(f"layout: {layout!r}; {form}.")
    for name, value in layout.items():
        if name in _OPTIONS:
            known = isinstance(value, _OPTIONS[name])
            if isinstance(value, (int, float)) and name == "testing_fraction":
                known = 0 <= value < 1
            if not known:
                raise DataError(f"layout: {name} is {value!r}; expected {_describe(name)}.")
        elif name not in SPLITS or not isinstance(value, Mapping) or set(value) != {"image", "label"}:
            raise DataError(f"layout: {name} is {value!r}; {form}, or {', '.join(_OPTIONS)}.")
        else:
            for key in ("image", "label"):
                for pattern in (p for patterns in _files(value[key]).values() for p in patterns):
                    if not isinstance(pattern, str) or "{case}" not in pattern:
                        raise DataError(f"layout: {key} of {name} is {pattern!r}; expected a path with {{case}} in it.")


def _describe(option: str) -> str:
    return {
        "testing_fraction": "a share from 0 to below 1",
        "labelled_only": "true or false",
        "pickles": "a pattern of files' names",
        "list": "the path of a data list, or several",
        "label_ids": "a list of the new id of each old one",
    }[option]


def _files(patterns: Any) -> dict[str, list[str]]:
    """Patterns of each file of an image or label, by its name: of one file, or of several (channels, raters)."""
    if isinstance(patterns, Mapping):
        return {str(name): own for name, value in patterns.items() for own in _files(value).values()}
    return {"": [patterns] if isinstance(patterns, str) else list(patterns)}


def find_list(root: Path, layout: Any) -> Path | None:
    """The data list (Decathlon JSON) that a data set is published with, where its layout names one.

    Args:
        root: folder of the data set.
        layout: ``list`` is its path, relative to ``root``, or several of which the first that is there is taken; the
            paths in it are relative to its own folder. Further: as of :func:`read_layout`.

    Raises:
        DataError: when the layout has another form, or names lists of which none is there.
    """
    check_layout(layout)
    named = layout.get("list", [])
    paths = [root / name for name in ([named] if isinstance(named, str) else named)]
    found = next((path for path in paths if path.is_file()), None)
    if paths and found is None:
        expected = " or ".join(path.relative_to(root).as_posix() for path in paths)
        raise DataError(f"dataset_dir {root}: no data set of this task. Expected {expected}. {found_in(root)}")
    return found


def read_layout(root: Path, layout: Any, is_image: Callable[[Path], bool]) -> dict[str, list[dict[str, Any]]]:
    """List the cases of a data set.

    Args:
        root: folder of the data set.
        layout: for each split, a pattern of the paths of its images and one of its labels, relative to ``root``.
            ``{case}`` is the name that an image shares with its label, ``{group}`` what images have in common that may
            not be parted between splits (a patient); ``*`` is any text. Neither holds a slash. A list of patterns
            names alternatives. A dictionary of patterns names several files, as channels of an image or raters of a
            label, in their order. Further: ``testing_fraction``, the share of the training groups that is for testing
            where there is no such split; ``labelled_only``, whether images without label are left out; ``pickles``, a
            pattern of files that are unpacked first (:func:`~medsa_nets.data.pickles.unpack_pickles`).
        is_image: whether a file is one that the bundle reads.

    Returns:
        Entries of each split: ``image`` and ``label`` (paths, or lists of paths), and ``group``.

    Raises:
        DataError: when no image is found, or one has no label; the message says what was looked for and found.
    """
    check_layout(layout)
    given, root = root, unpack_pickles(root, layout["pickles"]) if layout.get("pickles") else root
    labelled_only = bool(layout.get("labelled_only", False))
    splits: dict[str, list[dict[str, Any]]] = {}
    for name in SPLITS:
        if name in layout and (items := _list_split(root, layout[name], is_image, labelled_only)):
            splits[name] = items
    if not splits:
        raise DataError(f"dataset_dir {given}: no images of this task. {expected_layout(layout)} {found_in(given)}")
    share = layout.get("testing_fraction", 0)
    if share and "testing" not in splits and "training" in splits:
        splits["testing"], splits["training"] = split_groups(splits["training"], share, 0)
    return splits


def expected_layout(layout: Mapping[str, Any]) -> str:
    """What a layout looks for, as a sentence of an error."""
    parts = []
    for name in SPLITS:
        if name in layout:
            image, label = (
                [" or ".join(own) for own in _files(layout[name][key]).values()] for key in ("image", "label")
            )
            parts.append(f"{', '.join(image)} with {', '.join(label)} ({name})")
    packed = f"{layout['pickles']} of crops, which are unpacked once, or " if layout.get("pickles") else ""
    return f"Expected {packed}{'; '.join(parts)}."


def found_in(root: Path) -> str:
    """What a folder holds, as a sentence of an error."""
    found = sorted(p.name + ("/" if p.is_dir() else "") for p in root.iterdir()) if root.is_dir() else []
    return (
        f"Found {', '.join(found[:10]) or 'nothing'}{' …' if len(found) > 10 else ''}. Pass the folder that holds "
        "these (--dataset_dir), another task (--task), or a Decathlon JSON (--datalist)."
    )


def split_groups(
    items: Sequence[dict[str, Any]], share: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries of a share of the groups, chosen by a hash of their names, and the others; no group is parted.

    The share is one group or more, where there are two or more and it is not 0.
    """
    groups = sorted({str(item["group"]) for item in items}, key=lambda group: hash_of(group, seed))
    count = round(share * len(groups)) if len(groups) > 1 else 0
    if share > 0 and len(groups) > 1:
        count = min(max(count, 1), len(groups) - 1)
    chosen = set(groups[:count])
    inside = [item for item in items if str(item["group"]) in chosen]
    return inside, [item for item in items if str(item["group"]) not in chosen]


def list_images(root: Path, layout: Any, is_image: Callable[[Path], bool]) -> list[dict[str, Any]]:
    """Images of all splits of a layout, whether or not they have labels, as entries with ``image``, sorted.

    Raises:
        DataError: when the layout has another form, or a case lacks one of its channels.
    """
    check_layout(layout)
    found = {
        str(entry): entry
        for name in SPLITS
        if name in layout
        for _, entry in _find_images(root, _files(layout[name]["image"]), is_image)
    }
    return [{"image": _one_or_several(found[key])} for key in sorted(found)]


def _list_split(
    root: Path, patterns: Mapping[str, Any], is_image: Callable[[Path], bool], labelled_only: bool
) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    without: list[str] = []
    labels = _files(patterns["label"])
    first_missing = ""
    cases = _find_images(root, _files(patterns["image"]), is_image)
    for places, images in cases:
        found = [_find(root, alternatives, places) for alternatives in labels.values()]
        missing = [alternatives for alternatives, path in zip(labels.values(), found) if path is None]
        if missing:
            first_missing = first_missing or " or ".join(_fill(p, places) for p in missing[0])
            without.append(images[0])
            continue
        group = places.get("group") or Path(images[0]).relative_to(root).as_posix()
        paths = [str(path) for path in found]
        items.append({"image": _one_or_several(images), "label": _one_or_several(paths), "group": group})
    if without and not (labelled_only and items):
        raise DataError(
            f"{without[0]}: no label (looked in {root} for {first_missing}); {len(without)} of {len(cases)} images "
            "have none. Add them, or leave these images out."
        )
    if without:
        logger.info("%s: left out %d of %d images, which have no label.", root, len(without), len(cases))
    return items


def _one_or_several(paths: list[str]) -> str | list[str]:
    return paths[0] if len(paths) == 1 else paths


def _find_images(
    root: Path, files: Mapping[str, Sequence[str]], is_image: Callable[[Path], bool]
) -> list[tuple[dict[str, str], list[str]]]:
    """Cases by what their placeholders stand for, each with the paths of its files."""
    first, *others = files.values()
    found: dict[tuple[tuple[str, str], ...], tuple[dict[str, str], list[str]]] = {}
    for pattern in first:
        expression = re.compile(_expression(pattern))
        for path in sorted(root.glob(_PLACE.sub("*", pattern))):
            relative = path.relative_to(root).as_posix()
            match = expression.fullmatch(relative)
            if match is None or path.name.startswith(".") or not is_image(path):
                continue
            places = match.groupdict()
            key = tuple(sorted(places.items()))
            if key in found:
                continue  # an earlier alternative
            paths = [path, *(_find(root, alternatives, places) for alternatives in others)]
            if None in paths:
                wanted = " or ".join(_fill(p, places) for p in others[paths.index(None) - 1])
                raise DataError(f"{path}: the case has no {wanted} beside it (looked in {root}). Add the file.")
            found[key] = (places, [str(p) for p in paths])
    return list(found.values())


def _expression(pattern: str) -> str:
    """A regular expression of a pattern; a placeholder that occurs again stands for the same text."""
    out, seen, end = [], set(), 0
    for match in _PLACE.finditer(pattern):
        out.append(re.escape(pattern[end : match.start()]))
        name = match.group(1)
        if name is None:
            out.append(r"[^/]*")
        elif name in seen:
            out.append(f"(?P={name})")
        else:
            seen.add(name)
            out.append(f"(?P<{name}>[^/]+)")
        end = match.end()
    return "".join([*out, re.escape(pattern[end:])])


def _fill(pattern: str, places: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda match: places.get(match.group(1), match.group(0)) if match.group(1) else "*", pattern)


def _find(root: Path, alternatives: Iterable[str], places: Mapping[str, str]) -> Path | None:
    """The file of the first alternative that is there.

    Raises:
        DataError: when a pattern fits several files.
    """
    for pattern in alternatives:
        filled = _PLACE.sub(
            lambda match: "*" if match.group(1) is None else _escape(places.get(match.group(1), match.group(0))),
            pattern,
        )
        found = [path for path in sorted(root.glob(filled)) if not path.name.startswith(".")]
        if len(found) > 1:
            raise DataError(
                f"{found[0]} and {found[1].name}: both fit {_fill(pattern, places)}, where one file is "
                "expected. Keep one."
            )
        if found:
            return found[0]
    return None


def _escape(text: str) -> str:
    """Text that a pattern of files takes as it is."""
    return re.sub(r"([*?[])", r"[\1]", text)
