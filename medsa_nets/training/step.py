"""One training step: encode once, answer several prompts, learn from all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from monai.engines import IterationEvents, SupervisedTrainer
from monai.utils import CommonKeys as Keys
from torch import Tensor, nn
from torch.nn import functional

from medsa_nets.data.dataset import stable_seed
from medsa_nets.networks import MedSA
from medsa_nets.precision import Amp, Precision, agree, choose_amp, read_amp
from medsa_nets.prompts import Prompts, PromptSampler, add_correction
from medsa_nets.prompts.earlier import as_earlier
from medsa_nets.runtime import plain
from medsa_nets.training.schedule import trainable_parameters

LEAST_SCALE = 2.0**-16  # of gradients: 32 times half of what a scaler begins with, each after an overflow


class Answering(nn.Module):
    """Lets any function of a network run as its forward pass, as ``DistributedDataParallel`` needs it.

    ``DistributedDataParallel`` synchronises gradients of what went through its own forward pass; a training step of
    several decoder calls on one embedding has to be that pass.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network, or the :class:`Pass` that comes first, makes of the arguments."""
        if args and isinstance(args[0], Pass):
            return args[0].function(self.module, *args[1:])
        return self.module(*args, **kwargs)


@dataclass(frozen=True)
class Pass:
    """A function of a network that :class:`Answering` runs as the forward pass."""

    function: Callable[..., Any]


def call_through(network: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(medsa, *args)`` as the forward pass of ``network``, so that a wrapper's hooks see it.

    Args:
        network: a :class:`~medsa_nets.networks.MedSA`, or a wrapper with it as ``module``, where an
            :class:`Answering` comes between them.
        function: takes the unwrapped network first.
        args: the rest of its arguments.
    """
    inside = getattr(network, "module", None)
    if not isinstance(inside, nn.Module):
        return function(network, *args)
    if not isinstance(inside, Answering):
        network.module = Answering(inside)
    return network(Pass(function), *args)


def beside_another(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Show each image of a batch beside the next one, both at half their extent on one axis, chosen at random.

    Where images hold one object each, a network can learn to find it and to ignore the prompt. In such a pair only the
    prompt tells which of the two is meant.

    Args:
        image: (B, C, H, W), B of 2 or more.
        label: (B, classes, H, W), foreground above 0.5.
        generator: source of randomness, on the CPU.

    Returns:
        The pairs (B, C, H, W), the label of each image's own object, and the label of both objects
        (B, classes, H, W).
    """
    size = list(image.shape[2:])
    axis, first = torch.randint(0, 2, (2,), generator=generator).tolist()
    half = list(size)
    half[axis] = size[axis] // 2
    rest = list(size)
    rest[axis] = size[axis] - half[axis]

    def halves(tensor: Tensor, extent: list[int], mode: str) -> Tensor:
        antialias = mode == "bilinear"
        return functional.interpolate(tensor, extent, mode=mode, antialias=antialias)

    def join(own: Tensor, other: Tensor) -> Tensor:
        return torch.cat([own, other] if first else [other, own], dim=axis + 2)

    own, other = halves(image, half, "bilinear"), halves(image.roll(1, 0), rest, "bilinear")
    own_label, other_label = halves(label, half, "nearest"), halves(label.roll(1, 0), rest, "nearest")
    return (
        join(own, other),
        join(own_label, torch.zeros_like(other_label)),
        join(own_label, other_label),
    )


def answer_prompts(
    network: MedSA,
    image: Tensor,
    label: Tensor,
    automatic_label: Tensor,
    sampler: PromptSampler,
    draws: int,
    kinds: torch.Generator,
    places: torch.Generator | Sequence[torch.Generator],
    max_classes: int = 4,
) -> list[tuple[Tensor, Tensor]]:
    """Encode a batch once and decode several draws of prompts, some followed by a correcting click.

    Of several classes, all are asked for without prompt, in one pass of the decoder where the network has it so; with
    prompts, some classes, those in the images first, and prompts say which one is meant.

    Args:
        network: the network.
        image: (B, 3, H, W) in [0, 1].
        label: (B, classes, H, W), foreground above 0.5: what prompts ask for. Classes may overlap.
        automatic_label: (B, classes, H, W), what is expected without prompt.
        sampler: draws the prompts.
        draws: number of draws.
        kinds: decides what kinds of prompts are drawn; the same in every process of a distributed run, so that all
            processes use the same parameters.
        places: decides where they are; one for each image makes an image's prompts independent of its batch.
        max_classes: most classes that are prompted for at once.

    Returns:
        Mask logits (B, K, H, W) with their target, one for each draw and one for each correction.
    """
    embedding = network.encode_image(image)
    answers = []
    for mode in sampler.modes(draws, kinds):
        own, classes = label, None
        if label.shape[1] > 1:
            classes = torch.arange(label.shape[1])
            if mode != "none":
                classes = choose_classes(label, max_classes, places)
            classes = classes.to(label.device)
            own = label[:, classes]
        prompts = sampler.draw(own, mode, places, sampler.count(kinds) if mode == "points" else 0)
        target = own if any(prompts) else automatic_label
        if classes is not None:
            prompts = [replace(one, classes=classes) for one in prompts]
        logits = network.decode(embedding, **Prompts.batched(prompts))
        answers.append((logits, target))
        clicks = sampler.corrections(kinds)
        if clicks:
            feedback = network.click_feedback is not None
            corrected = correct(network, embedding, prompts, logits, target, clicks, places, feedback)
            answers.append((corrected, target))
    return answers


def choose_classes(label: Tensor, most: int, places: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Classes to prompt for, by their ids: some of those in the images; any one where there are none.

    Args:
        label: masks of all classes (B, classes, H, W), foreground above 0.5.
        most: most classes.
        places: source of randomness, or one for each image, of which the first draws.
    """
    generator = places if isinstance(places, torch.Generator) else places[0]
    present = (label > 0.5).flatten(2).any(-1).any(0).cpu()
    order = torch.rand(len(present), generator=generator) + (~present).float()
    return order.argsort()[: max(1, min(most, int(present.sum())))].sort().values


def correct(
    network: MedSA,
    embedding: Tensor,
    prompts: Sequence[Prompts],
    logits: Tensor,
    target: Tensor,
    clicks: int,
    places: torch.Generator | Sequence[torch.Generator],
    feedback: bool = False,
) -> Tensor:
    """Correct masks by clicks on their errors, one after the other: the logits after the last, which alone train.

    Args:
        network: the network.
        embedding: of the images.
        prompts: what the masks of each image were asked for by.
        logits: the masks (B, K, spatial…).
        target: (B, K, spatial…), foreground above 0.5.
        clicks: number of clicks for each mask, 1 or more.
        places: source of randomness, or one for each image.
        feedback: whether each answer is made from the mask before it, as
            :class:`~medsa_nets.interaction.session.InteractiveSession` makes it.
    """
    for click in range(clicks):
        prompts = add_correction(prompts, logits.detach() > 0, target, places)
        if feedback:
            prompts = [replace(one, masks=own) for one, own in zip(prompts, as_earlier(logits, embedding.shape[2:4]))]
        with torch.set_grad_enabled(torch.is_grad_enabled() and click == clicks - 1):
            logits = network.decode(embedding, **Prompts.batched(prompts))
    return logits


class PromptedIteration:
    """A training step for ``monai.engines.SupervisedTrainer`` (``iteration_update``).

    The loss is the mean over all answers of :func:`answer_prompts`. Prompts depend on the seed, the iteration and the
    image's place among those of all processes, so that a resumed run repeats them, and so does another number of
    processes that share out the same images (:class:`~medsa_nets.data.EpochSampler`).

    Args:
        sampler: draws the prompts.
        draws: prompts a step, all on one encoding of the batch.
        pairs: share of steps that show two images beside each other (:func:`beside_another`): prompts ask for one of
            them, the automatic mode for both. Batches of one image are never paired.
        seed: seed of the prompts.
        amp: precision, ``auto``, true or false (:func:`~medsa_nets.precision.choose_amp`). Where gradients need a
            scaler, it is the engine's ``scaler``, as in MONAI's own step; a step whose gradients overflow is left out.
        clip_grad_norm: largest norm of the gradient; 0 leaves it as it is.
        max_classes: most classes that are prompted for at once, where labels hold a mask for each of several.

    Raises:
        ValueError: when ``max_classes`` is below 1.
    """

    def __init__(
        self,
        *,
        sampler: PromptSampler,
        draws: int = 2,
        pairs: float = 0.0,
        seed: int = 0,
        amp: Amp = "auto",
        clip_grad_norm: float = 1.0,
        max_classes: int = 4,
    ) -> None:
        if max_classes < 1:
            raise ValueError(f"max_classes must be 1 or more, got {max_classes}.")
        self.max_classes = max_classes
        self.sampler = sampler
        self.draws = draws
        self.pairs = pairs
        self.seed = seed
        self.amp = read_amp(amp)
        self.clip_grad_norm = clip_grad_norm
        self._precision: Precision | None = None

    def precision(self, device: torch.device) -> Precision:
        """What steps compute in on a device, chosen at the first one; all processes of a run share it."""
        if self._precision is None:
            self._precision = agree(choose_amp(self.amp, device))
        return self._precision

    @staticmethod
    def prepare(engine: SupervisedTrainer, batchdata: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Image and label of a batch, on the engine's device and without MONAI's metadata."""
        image, label = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)[:2]
        return plain(image), plain(label)

    def answer(
        self,
        engine: SupervisedTrainer,
        batchdata: Mapping[str, Any],
        kinds: torch.Generator,
        places: Sequence[torch.Generator],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Answer the batch's prompts: the image, and for each draw logits and what the loss function compares."""
        image, label = self.prepare(engine, batchdata)
        automatic_label = label
        if float(torch.rand(1, generator=kinds)) < self.pairs and len(image) > 1:
            image, label, automatic_label = beside_another(image, label, kinds)
        with self.precision(image.device).autocast(image.device):
            answers = call_through(
                engine.network, answer_prompts, image, label, automatic_label, self.sampler, self.draws, kinds, places,
                self.max_classes,
            )  # fmt: skip
        return image, answers

    def __call__(self, engine: SupervisedTrainer, batchdata: Mapping[str, Any]) -> dict[str, Any]:
        """Take one step; the engine's output has image, label, the first answer's logits, and the loss."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        kinds = torch.Generator().manual_seed(stable_seed(self.seed, engine.state.iteration))
        places = [  # of each image; the processes take images in turn
            torch.Generator().manual_seed(stable_seed(self.seed, engine.state.iteration, rank + i * processes))
            for i in range(len(batchdata[Keys.IMAGE]))
        ]
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        image, answers = self.answer(engine, batchdata, kinds, places)
        loss = torch.stack([engine.loss_function(logits.float(), *target) for logits, *target in answers]).mean()
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(
                f"The loss is {loss.item()} at iteration {engine.state.iteration}. Lower the learning rate "
                "(--learning_rate) or switch mixed precision off (--amp false)."
            )
        engine.state.output = {
            Keys.IMAGE: image,
            Keys.LABEL: answers[0][1],
            Keys.PRED: answers[0][0].detach(),
            Keys.LOSS: loss.detach(),
        }
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        scaler = self._scaler(engine)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(engine.optimizer)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if self.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(trainable_parameters(engine.network), self.clip_grad_norm)
        if scaler is None:
            engine.optimizer.step()
        else:
            self._step(engine, scaler)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _scaler(self, engine: SupervisedTrainer) -> torch.amp.GradScaler | None:
        """The engine's scaler of gradients, a new one where a resumed run has brought none; none where none is due."""
        if not self.precision(engine.state.device).scale:
            return None
        if engine.scaler is None:
            engine.scaler = torch.amp.GradScaler(engine.state.device.type)
        return engine.scaler

    @staticmethod
    def _step(engine: SupervisedTrainer, scaler: torch.amp.GradScaler) -> None:
        """Step unless gradients overflowed; the scale then halves."""
        scaler.step(engine.optimizer)
        scaler.update()
        if scaler.get_scale() < LEAST_SCALE:
            raise RuntimeError(
                f"The gradients are not finite, however small their scale, at iteration {engine.state.iteration}. "
                "Lower the learning rate (--learning_rate) or switch mixed precision off (--amp false)."
            )
