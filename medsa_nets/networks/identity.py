"""What an adapter file holds and belongs to: what trains, the base, the adaptation, and the task it was made for."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medsa_nets.errors import SettingError, WeightsError
from medsa_nets.layers import (
    Adapter,
    ChannelProjection,
    ClickFeedback,
    DepthBranch,
    DistantPrompt,
    HyperPromptingAdapter,
    LowRank,
)

logger = logging.getLogger(__name__)

TRAINED_MODULES = (
    Adapter,
    HyperPromptingAdapter,
    DepthBranch,
    DistantPrompt,
    ClickFeedback,
    ChannelProjection,
    LowRank,
)
# One size for every identity and every task, so that tools that compare shapes let them through to our check.
IDENTITY_BYTES = 512
TASK_BYTES = 8192
# What decides a mask's meaning, beside the weights, and where a bundle sets it.
TASK_FACTS = {
    "image_size": "image_size",
    "grid": "pixdim or grid_transform",
    "intensity": "intensity_transform",
    "classes": "classes",
    "overlap": "overlap",
}


def _encode(facts: Mapping[str, Any], length: int, name: str) -> Tensor:
    text = json.dumps(facts, sort_keys=True).encode()
    if len(text) > length:
        raise SettingError(f"The {name} takes {len(text)} bytes; {length} is the most. Shorten the names in it.")
    return torch.tensor(list(text.ljust(length)), dtype=torch.uint8)


def encode_identity(identity: Mapping[str, Any]) -> Tensor:
    """Write an identity as JSON into a ``uint8`` tensor of fixed length, which every checkpoint tool can carry."""
    return _encode(identity, IDENTITY_BYTES, "identity")


def decode_identity(tensor: Tensor) -> dict[str, Any]:
    """Read an identity tensor back.

    Raises:
        WeightsError: when the tensor holds no identity.
    """
    try:
        identity = json.loads(bytes(tensor.cpu().tolist()).decode())
        return {"base": identity["base"], "sha256": identity["sha256"], "adapter": dict(identity["adapter"])}
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError("The checkpoint's entry 'identity' is damaged: it names no base model.") from error


def encode_task(task: Mapping[str, Any]) -> Tensor:
    """Write a task's known facts as JSON into a ``uint8`` tensor of fixed length.

    Args:
        task: facts out of :data:`TASK_FACTS`, of numbers, texts, lists and dictionaries; none stands for unknown.

    Raises:
        SettingError: when there is another fact, or the text is too long.
    """
    if other := set(task) - set(TASK_FACTS):
        raise SettingError(f"A task has no {', '.join(sorted(other))}; expected {', '.join(TASK_FACTS)}.")
    return _encode({name: fact for name, fact in task.items() if fact is not None}, TASK_BYTES, "task")


def decode_task(tensor: Tensor) -> dict[str, Any]:
    """Read a task tensor back.

    Raises:
        WeightsError: when the tensor holds no task.
    """
    try:
        return dict(json.loads(bytes(tensor.cpu().tolist()).decode()))
    except (ValueError, TypeError) as error:
        raise WeightsError("The checkpoint's entry 'task' is damaged: it names no facts.") from error


def compare_tasks(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """Facts that two tasks know and differ in, each as a text with both values.

    Facts that one of them does not know are no difference; nor are parts of a fact.
    """
    return {
        name: f"{name} {', '.join(parts)}"
        for name in TASK_FACTS
        if name in theirs and name in ours and (parts := list(_differences(theirs[name], ours[name])))
    }


def _differences(theirs: Any, ours: Any) -> Iterator[str]:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name in theirs:
            if name in ours and theirs[name] != ours[name]:
                yield f"{name} {json.dumps(theirs[name])} (here {json.dumps(ours[name])})"
    elif theirs != ours:
        yield f"{json.dumps(theirs)} (here {json.dumps(ours)})"


class Adapted(nn.Module):
    """A frozen base and what trains in it, with the rules of its adapter files.

    Its ``state_dict`` holds what is trained, the identity of the base and the task, nothing else;
    :meth:`full_state_dict` holds everything. Loading an adapter onto another base, onto adapters of another form, or
    for another task raises :class:`WeightsError`; entries of the base that an adapter file lacks stay as they are.
    """

    __jit_unused_properties__: tuple[str, ...] = ("trained_names",)  # TorchScript has no frozenset

    if TYPE_CHECKING:  # TorchScript cannot read a class's postponed annotations
        identity: Tensor
        task: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("identity", encode_identity({"base": "", "sha256": "", "adapter": {}}))
        self.register_buffer("task", encode_task({}))
        self.same_task = True
        self._trained_names = frozenset[str]()

    def freeze(self, train_norms: bool = False, train_decoder: bool = False) -> None:
        """Leave gradients to the adapters and the class embeddings alone.

        Args:
            train_norms: whether the layer norms train too.
            train_decoder: whether the whole mask decoder trains too.
        """
        self._trained_names = self._find_trained_names(train_norms, train_decoder)
        for prefix, module in self.named_modules():
            if getattr(module, "own_statistics", False):
                self._trained_names |= {f"{prefix}.bn.running_mean", f"{prefix}.bn.running_var"}
            if getattr(module, "own_weights", False):
                self._trained_names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._trained_names)

    def set_identity(self, identity: Mapping[str, Any]) -> None:
        """Say which base this is: ``base`` (name), ``sha256`` (of its weights), ``adapter`` (the settings)."""
        self.identity.copy_(encode_identity(identity))

    def set_task(self, task: Mapping[str, Any]) -> None:
        """Say what decides the meaning of the network's masks.

        Args:
            task: the facts that are known: ``image_size`` (height and width in pixels), ``grid`` and ``intensity``
                (:func:`medsa_nets.transforms.describe_transform`), ``classes`` (names, in the order of their ids).
        """
        self.task.copy_(encode_task(task))

    @contextmanager
    def any_task(self) -> Iterator[None]:
        """Take adapters that were made for another task as long as the block runs; the log says what differs."""
        before, self.same_task = self.same_task, False
        try:
            yield
        finally:
            self.same_task = before

    def _find_trained_names(self, train_norms: bool, train_decoder: bool = False) -> frozenset[str]:
        names = {"class_embeddings"}
        if train_decoder:
            names.update(name for name, _ in self.named_parameters() if name.startswith("mask_decoder."))
        for prefix, module in self.named_modules():
            if isinstance(module, TRAINED_MODULES) or (train_norms and isinstance(module, nn.LayerNorm)):
                names.update(f"{prefix}.{name}" for name, _ in module.named_parameters())
        return frozenset(names)

    @property
    def trained_names(self) -> frozenset[str]:
        """Names of the parameters that train, and that ``state_dict`` holds beside identity and task.

        Statistics of batch normalisation are among them where they are the adapter's own.
        """
        return self._trained_names

    def base_state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of the base, under segment-anything's names."""
        own = self._find_trained_names(train_norms=False) | {"identity", "task"}
        return {name: tensor for name, tensor in self.full_state_dict().items() if name not in own}

    def full_state_dict(self) -> dict[str, Tensor]:
        """Base, adapters, identity and task: everything, for those who want one file."""
        return super().state_dict()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What trains, identity and task (arguments as in ``torch.nn.Module.state_dict``)."""
        destination = kwargs.pop("destination", None)
        prefix, keep_vars = kwargs.get("prefix", ""), kwargs.get("keep_vars", False)
        if args:  # torch's older positional form: destination, prefix, keep_vars
            destination, prefix, keep_vars = (*args, *(destination, prefix, keep_vars)[len(args) :])
        out = OrderedDict() if destination is None else destination
        kept = self._trained_names | {"identity", "task"}
        for name, tensor in super().state_dict(prefix=prefix, keep_vars=keep_vars).items():
            if name[len(prefix) :] in kept:
                out[name] = tensor
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Check identity and task, then let the network's own parameters stand for those that the file lacks."""
        without_feedback = self._check_identity(state_dict, f"{prefix}identity")
        self._check_task(state_dict, f"{prefix}task")
        for name, tensor in self.full_state_dict().items():
            if name not in self._trained_names or (without_feedback and name.startswith("click_feedback.")):
                state_dict.setdefault(f"{prefix}{name}", tensor)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_identity(self, state_dict: dict[str, Any], key: str) -> bool:
        """Refuse another base and adapters of another form; returns whether the file lacks a click feedback."""
        if key not in state_dict:
            raise WeightsError(
                "This checkpoint is no MedSA adapter: it has no entry 'identity'. Expected a file that MedSA saved "
                "(models/model.pt). To load a base model, pass its path as sam_checkpoint."
            )
        theirs, ours = decode_identity(state_dict[key]), decode_identity(self.identity)
        if (theirs["base"], theirs["sha256"]) != (ours["base"], ours["sha256"]):
            raise WeightsError(
                f"This adapter belongs to the base {theirs['base']!r} (weights sha256 {theirs['sha256'][:12]}…), but "
                f"the network is built on {ours['base']!r} ({ours['sha256'][:12]}…). Build the network on that base "
                "(base, sam_checkpoint), or train an adapter for this one."
            )
        there, here = ({"adaptation": "adapters", **side["adapter"]} for side in (theirs, ours))
        for side, other, known in ((here, there, self._channels()), (there, here, "")):
            if "in_channels" in other:
                side.setdefault("in_channels", known or ("1 or 3" if side.get("spatial_dims") == 3 else 3))
        without_feedback = "click_feedback" in here and "click_feedback" not in there
        if without_feedback:  # the branch stays as it is
            there = {**there, "click_feedback": here["click_feedback"]}
            state_dict[key] = self.identity
        if there != here:
            different = [k for k in {**here, **there} if there.get(k) != here.get(k)]
            listed = ", ".join(f"{k}={there.get(k)!r} (here {here.get(k)!r})" for k in different)
            raise WeightsError(f"This adapter was made with other settings: {listed}. Build the network with those.")
        return without_feedback

    def _channels(self) -> Any:
        """Channels of an image, where the network was told; for errors."""
        return getattr(self, "in_channels", 0)

    def _check_task(self, state_dict: dict[str, Any], key: str) -> None:
        """Refuse what was made for another task; the network then knows what it knew, and the rest from the file."""
        theirs = decode_task(state_dict[key]) if key in state_dict else {}  # files of before say nothing
        ours = decode_task(self.task)
        different = compare_tasks(theirs, ours)
        if different and self.same_task:
            settings = ", ".join(TASK_FACTS[name] for name in different)
            raise WeightsError(
                f"This adapter was made for another task: {'; '.join(different.values())}. Its masks would mean "
                f"something else here. Set what it was made with ({settings}), train an adapter for this task (that "
                "may go on from this one: --start_from), or take it all the same with --same_task false."
            )
        if different:
            logger.warning(
                "The adapter was made for another task, and is taken all the same: %s.", "; ".join(different.values())
            )
        state_dict[key] = encode_task({**theirs, **ours})
