"""What an Ignite engine does in one step: encode once, answer several prompts, learn from all of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.engines import IterationEvents, SupervisedTrainer
from monai.utils import CommonKeys as Keys
from torch import Tensor, nn
from torch.nn import functional

from medsa_nets.data.dataset import stable_seed
from medsa_nets.layers import DepthBranch, DistantPrompt
from medsa_nets.networks import MedSA
from medsa_nets.precision import Amp, Precision, agree, choose_amp, read_amp
from medsa_nets.prompts import Prompts, PromptSampler, add_correction, class_masks

LIMIT = 12.0  # logits of an earlier answer are held within it: beyond, they say the same
LEAST_SCALE = 2.0**-16  # of gradients: 32 times half of what a scaler begins with, each after an overflow


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory that it frees for what it allocates next, where the C library is glibc.

    Training on a CPU allocates and frees the same large blocks in each step; glibc gives each back to the system and
    asks for it anew, and the system clears it every time. ``tests/benchmarks/allocator.py`` measures what that costs.

    Args:
        keep: whether to keep it; else glibc's own thresholds (128 KiB) are set, without their growth with use.

    Returns:
        Whether the C library took the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    value = 2**31 - 1 if keep else 128 * 1024
    taken = bool(mallopt(mmap_threshold, value)) and bool(mallopt(trim_threshold, value))
    if not (taken and keep):
        _resident_after_release[0] = None
    elif _resident_after_release[0] is None:
        _resident_after_release[0] = _resident_bytes()
    return taken


_resident_after_release: list[int | None] = [None]  # none: freed memory is not kept


def _resident_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError, IndexError):  # no Linux
        return None


def release_freed_memory(growth: int = 2 * 2**30) -> bool:
    """Give freed memory that :func:`keep_freed_memory` kept back to the system, once the process has grown.

    Volumes of many sizes leave holes between them that the next one does not fit into; without this, a process that
    segments one after the other grows with their number.

    Args:
        growth: bytes by which the process has to have grown since it last gave memory back, or began to keep it.

    Returns:
        Whether memory was given back.
    """
    before, now = _resident_after_release[0], _resident_bytes()
    if before is None or now is None or now - before < growth:
        return False
    ctypes.CDLL(None).malloc_trim(0)  # portable: where mallopt took the setting, malloc_trim is there
    _resident_after_release[0] = _resident_bytes()
    return True


def join_processes() -> None:
    """Join the other processes that ``torchrun`` started: NCCL where there are GPUs, else gloo.

    As ``torch.distributed.init_process_group``, but for ``torchrun --max-restarts``: workers that start again share
    the store of those before them, whose addresses they would find there and wait for. Each start has keys of its own.
    """
    store, rank, size = next(iter(torch.distributed.rendezvous("env://")))
    store = torch.distributed.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer gets: adapters, class embeddings, and norms where they train."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def train_slices(network: MedSA) -> MedSA:
    """Let slices train one by one: what joins them (the depth branches, prompts of other slices) rests.

    The adapter of such a training has the form of any other; what rested in it is as it was at the start, so that a
    training on slabs may go on from it.

    Args:
        network: the network; it is changed in place.

    Returns:
        ``network``.
    """
    for module in network.modules():
        if isinstance(module, (DepthBranch, DistantPrompt)):
            module.requires_grad_(False)
        if isinstance(module, DepthBranch):
            module.idle = True
    return network


def plain(tensor: Tensor) -> Tensor:
    """Without MONAI's metadata, which every operation of a network would carry along."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def call_through(network: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(medsa, *args)`` as the forward pass of ``network``, so that a wrapper's hooks see it.

    ``DistributedDataParallel`` synchronises gradients of what went through its own forward pass; a training step of
    several decoder calls on one embedding has to be that pass.

    Args:
        network: a :class:`~medsa_nets.networks.MedSA`, or a wrapper with it as ``module``.
        function: takes the unwrapped network first.
        args: the rest of its arguments.
    """
    module = getattr(network, "module", network)
    original = module.forward
    module.forward = lambda *inputs: function(module, *inputs)
    try:
        return network(*args)
    finally:
        module.forward = original


def beside_another(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Show each image of a batch beside the next one, both at half their extent on one axis, chosen at random.

    Where images hold one object each, a network can learn to find it and to ignore the prompt. In such a pair only the
    prompt tells which of the two is meant.

    Args:
        image: (B, C, H, W), B of 2 or more.
        label: (B, 1, H, W), foreground above 0.5.
        generator: source of randomness, on the CPU.

    Returns:
        The pairs (B, C, H, W), the label of each image's own object, and the label of both objects (B, 1, H, W).
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


def as_earlier(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits of an answer as the network takes those of an earlier mask.

    Args:
        logits: (B, K, H, W[, D]).
        size: rows h and columns w of the embedding.

    Returns:
        Logits (B, K, 4 h, 4 w[, D]), within :data:`LIMIT` of 0.
    """
    logits = logits.detach().float().clamp(-LIMIT, LIMIT)
    size = [4 * size[0], 4 * size[1], *logits.shape[4:]]
    if list(logits.shape[2:]) != size:
        mode = "bilinear" if logits.dim() == 4 else "trilinear"
        logits = functional.interpolate(logits, size, mode=mode, align_corners=False)
    return logits


def answer_prompts(
    network: MedSA,
    image: Tensor,
    label: Tensor,
    automatic_label: Tensor,
    sampler: PromptSampler,
    draws: int,
    kinds: torch.Generator,
    places: torch.Generator | Sequence[torch.Generator],
) -> list[tuple[Tensor, Tensor]]:
    """Encode a batch once and decode several draws of prompts, some followed by a correcting click.

    Args:
        network: the network.
        image: (B, 3, H, W) in [0, 1].
        label: (B, 1, H, W), foreground above 0.5: what prompts ask for.
        automatic_label: (B, 1, H, W), what is expected without prompt.
        sampler: draws the prompts.
        draws: number of draws.
        kinds: decides what kinds of prompts are drawn; the same in every process of a distributed run, so that all
            processes use the same parameters.
        places: decides where they are; one for each image makes an image's prompts independent of its batch.

    Returns:
        Mask logits (B, 1, H, W) with their target, one for each draw and one for each correction.
    """
    embedding = network.encode_image(image)
    answers = []
    for mode in sampler.modes(draws, kinds):
        prompts = sampler.draw(label, mode, places, sampler.count(kinds) if mode == "points" else 0)
        target = label if any(prompts) else automatic_label
        logits = network.decode(embedding, **Prompts.batched(prompts))
        answers.append((logits, target))
        clicks = sampler.corrections(kinds)
        if clicks:
            feedback = network.click_feedback is not None
            corrected = correct(network, embedding, prompts, logits, target, clicks, places, feedback)
            answers.append((corrected, target))
    return answers


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
    ) -> None:
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
                engine.network, answer_prompts, image, label, automatic_label, self.sampler, self.draws, kinds, places
            )
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


class VolumeIteration(PromptedIteration):
    """A training step on labelled volumes, for ``monai.engines.SupervisedTrainer`` (``iteration_update``).

    Without prompt, every class is asked for; with prompts, some classes, those in the volumes first. The loss function
    is called with logits, masks and which classes are annotated, see :class:`~medsa_nets.losses.AnnotatedDiceCELoss`.

    Args:
        num_classes: number of classes; labels hold 0 (background) and 1 + class id.
        max_classes: most classes that are prompted for at once.
        unnamed: share of prompted draws that do not say which class is meant, so that a click alone works too.
        annotated_key: key of the batch with the annotated classes of each volume, (B, num_classes); where a batch has
            none, all classes are annotated.
        slab_depth: slices that are encoded in a step, around the middle of what is given; 0 takes all. With fewer,
            prompts lie on slices that are not encoded too, as in the inference of a volume in slabs.
        fixed_slabs: whether these slices are one of the slabs that tile the volume, so that embeddings can be kept
            (:class:`~medsa_nets.embeddings.StoredEmbeddings`).
        settings: see :class:`PromptedIteration`.

    Raises:
        ValueError: when ``max_classes`` is below 1 or ``slab_depth`` below 0.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        max_classes: int = 3,
        unnamed: float = 0.25,
        annotated_key: str = "annotated",
        slab_depth: int = 0,
        fixed_slabs: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if max_classes < 1:
            raise ValueError(f"max_classes must be 1 or more, got {max_classes}.")
        if slab_depth < 0:
            raise ValueError(f"slab_depth must be 0 (all slices) or more, got {slab_depth}.")
        self.slab_depth = slab_depth
        self.fixed_slabs = fixed_slabs
        self.num_classes = num_classes
        self.max_classes = max_classes
        self.unnamed = unnamed
        self.annotated_key = annotated_key

    def answer(
        self,
        engine: SupervisedTrainer,
        batchdata: Mapping[str, Any],
        kinds: torch.Generator,
        places: Sequence[torch.Generator],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Answer the batch's prompts: the image, and for each draw logits, masks and annotated classes (B, K)."""
        image, label = self.prepare(engine, batchdata)
        annotated = torch.ones(len(image), self.num_classes, dtype=torch.bool, device=image.device)
        if self.annotated_key in batchdata:
            annotated = plain(batchdata[self.annotated_key]).to(image.device).bool()
        with self.precision(image.device).autocast(image.device):
            answers = call_through(engine.network, self.answer_slab, image, label, annotated, kinds, places)
        return image, answers

    def choose_classes(self, label: Tensor, annotated: Tensor, places: torch.Generator) -> Tensor:
        """Up to ``max_classes`` class ids to prompt for: first those in the volumes, then other annotated ones."""
        present = torch.zeros(self.num_classes, dtype=torch.bool)
        values = torch.unique(label).long().cpu() - 1
        present[values[(values >= 0) & (values < self.num_classes)]] = True
        usable = annotated.any(0).cpu()
        order = torch.rand(self.num_classes, generator=places) + (~present).float() + 2.0 * (~usable).float()
        count = max(1, min(self.max_classes, int((present & usable).sum())))
        return order.argsort()[:count].sort().values

    def choose_slab(self, depth: int, kinds: torch.Generator) -> slice:
        """Slices to encode: some that hold the middle one, around which crops are cut, or one of fixed slabs."""
        if not 0 < self.slab_depth < depth:
            return slice(0, depth)
        if self.fixed_slabs:  # the last one ends with the volume
            count = -(-depth // self.slab_depth)
            start = min(int(torch.randint(count, (1,), generator=kinds)) * self.slab_depth, depth - self.slab_depth)
            return slice(start, start + self.slab_depth)
        middle = depth // 2
        first, last = max(0, middle - self.slab_depth + 1), min(middle, depth - self.slab_depth)
        start = int(torch.randint(first, last + 1, (1,), generator=kinds))
        return slice(start, start + self.slab_depth)

    def answer_slab(
        self,
        network: MedSA,
        image: Tensor,
        label: Tensor,
        annotated: Tensor,
        kinds: torch.Generator,
        places: torch.Generator | Sequence[torch.Generator],
    ) -> list[tuple[Tensor, ...]]:
        """Answers of a network, before anything is learned from them.

        Args:
            network: the network, not wrapped.
            image: slabs (B, C, H, W, D).
            label: their labels (B, 1, H, W, D).
            annotated: which classes are annotated (B, classes).
            kinds: draws which prompts there are, and the slices that are encoded.
            places: draws where prompts lie, one for all slabs or one for each.

        Returns:
            For each answer logits (B, K, H, W, D), masks of that shape, and which of them are annotated (B, K).
        """
        slab = self.choose_slab(image.shape[-1], kinds)
        embedding = network.encode_image(image[..., slab])
        answers: list[tuple[Tensor, ...]] = []
        for mode in self.sampler.modes(self.draws, kinds):
            if mode == "none":
                classes = torch.arange(self.num_classes)
            else:
                classes = self.choose_classes(label, annotated, _first(places))
            masks, known = class_masks(label, classes), annotated[:, classes.to(annotated.device)]
            prompts = [one.shift(slab.start) for one in self.sampler.draw(masks.float(), mode, places)]
            masks = masks[..., slab]
            if not any(prompts) or float(torch.rand(1, generator=kinds)) >= self.unnamed:
                asked = classes.to(image.device)
                prompts = [replace(one, classes=asked) for one in prompts]
            logits = network.decode(embedding, **Prompts.batched(prompts))
            answers.append((logits, masks, known))
            clicks = self.sampler.corrections(kinds)
            if clicks:
                feedback = network.click_feedback is not None
                logits = correct(network, embedding, prompts, logits, masks.float(), clicks, places, feedback)
                answers.append((logits, masks, known))
        return answers


def _first(places: torch.Generator | Sequence[torch.Generator]) -> torch.Generator:
    return places if isinstance(places, torch.Generator) else places[0]
