"""Image embeddings kept on disk, so that a frozen encoder computes each once: for training a decoder, for servers."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from medsa_nets.checksums import state_sha256, tensor_sha256
from medsa_nets.data.atomic import make_folder, temporary_name
from medsa_nets.layers.fast import Kept
from medsa_nets.networks import MedSA
from medsa_nets.runtime import plain

logger = logging.getLogger(__name__)


def encoder_parameters(network: MedSA) -> dict[str, nn.Parameter]:
    """What embeddings depend on: the encoder with its adapters, and a projection of channels before it."""
    own = dict(network.image_encoder.named_parameters())
    if network.channel_projection is not None:
        own.update({f"channel_projection.{name}": p for name, p in network.channel_projection.named_parameters()})
    return own


def freeze_encoder(network: MedSA) -> None:
    """Let nothing train that embeddings depend on."""
    for parameter in encoder_parameters(network).values():
        parameter.requires_grad_(False)


class StoredEmbeddings:
    """Embeddings of a network's images: each is computed once, and read from disk from then on.

    An embedding is known by what makes it: the values of the preprocessed image, the encoder's weights, and the
    precision that it computes in. Another window, spacing, augmentation, base or adapter has embeddings of its own.
    Several processes may share the folder.

    Args:
        network: the network; its encoder must not train.
        folder: where embeddings are kept; it is made where it is missing. Nothing in it is ever removed.

    Raises:
        ValueError: when a parameter of the encoder trains.
    """

    def __init__(self, network: MedSA, folder: str | Path) -> None:
        trained = [name for name, p in encoder_parameters(network).items() if p.requires_grad]
        if trained:
            raise ValueError(f"Embeddings are kept for frozen encoders only, but {trained[0]} trains.")
        self.network = network
        self.folder = Path(folder)
        self.computed = 0
        self.read = 0
        self._encoder = Kept[str]()

    def __call__(self, image: Tensor) -> Tensor:
        """Encode images (B, …), as :meth:`~medsa_nets.networks.MedSA.encode_image` does."""
        if torch.jit.is_tracing() or self._samples():
            return self.network.compute_embedding(image)
        image = plain(image)
        device = image.device.type
        dtype = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
        files = [self.folder / f"{tensor_sha256(one)}_{self._fingerprint()[:16]}{dtype}.pt" for one in image]
        found = [self._load(file) for file in files]
        missing = [i for i, embedding in enumerate(found) if embedding is None]
        if missing:
            with torch.no_grad():
                new = self.network.compute_embedding(image[missing])
            for i, embedding in zip(missing, new.cpu().unbind(0), strict=True):
                self._save(files[i], embedding)
                found[i] = embedding
        self.computed += len(missing)
        self.read += len(files) - len(missing)
        return torch.stack([embedding for embedding in found if embedding is not None]).to(image.device)

    def _samples(self) -> bool:
        """Whether the encoder draws at random (dropout)."""
        return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in self.network.image_encoder.modules())

    def _fingerprint(self) -> str:
        tensors = {**encoder_parameters(self.network), "mean": self.network.pixel_mean,
                   "std": self.network.pixel_std}  # fmt: skip
        return self._encoder.get(tensors.values(), lambda: state_sha256(tensors))

    def _load(self, file: Path) -> Tensor | None:
        if not file.is_file():
            return None
        try:
            embedding = torch.load(file, weights_only=True)
        except Exception as error:  # torch.load raises what the file's damage brings about
            logger.warning("%s: damaged (%s); computed anew", file, type(error).__name__)
            return None
        return embedding if isinstance(embedding, Tensor) else None

    def _save(self, file: Path, embedding: Tensor) -> None:
        make_folder(self.folder)
        with temporary_name(file) as part:
            torch.save(embedding.clone(), part)  # a view would take its batch along


def train_decoder_alone(network: MedSA, folder: str | Path) -> MedSA:
    """Freeze the encoder with its adapters and keep its embeddings on disk, see :class:`StoredEmbeddings`.

    The adapter file of such a training has the usual form; the encoder's adapters in it are those that it began with.

    Args:
        network: the network; it is changed in place.
        folder: where embeddings are kept.

    Returns:
        ``network``.
    """
    freeze_encoder(network)
    network.kept_embeddings = StoredEmbeddings(network, folder)
    return network


class PrecomputedEmbeddings(StoredEmbeddings):
    """Embeddings on disk whose values are checked by their SHA-256 as they are read; damaged ones are computed anew.

    Args:
        network: the network; nothing of its encoder trains any more.
        folder: where embeddings are kept.
        writes: whether what is computed is kept there; else the folder is only read.
        max_bytes: most bytes of what is kept; those that were used least recently are removed. None removes nothing.
    """

    def __init__(self, network: MedSA, folder: str | Path, writes: bool = False, max_bytes: int | None = None) -> None:
        freeze_encoder(network)
        super().__init__(network, folder)
        self.writes = writes
        self.max_bytes = max_bytes
        self._bytes = 0 if max_bytes is None else self._make_room()

    def _load(self, file: Path) -> Tensor | None:
        path = file.with_suffix(".safetensors")
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as opened:
                embedding: Tensor = opened.get_tensor("embedding")
                expected = (opened.metadata() or {}).get("sha256")
            if self.max_bytes is not None:
                os.utime(path)
        except (SafetensorError, OSError) as error:
            logger.warning("%s: damaged (%s); computed anew", path, type(error).__name__)
            return None
        if tensor_sha256(embedding) != expected:
            logger.warning("%s: damaged (its SHA-256 is another one); computed anew", path)
            return None
        return embedding

    def _save(self, file: Path, embedding: Tensor) -> None:
        if not self.writes:
            return
        make_folder(self.folder)
        embedding = embedding.contiguous()
        content = save({"embedding": embedding}, {"sha256": tensor_sha256(embedding)})
        try:
            with temporary_name(file.with_suffix(".safetensors")) as part:
                part.write_bytes(content)
        except OSError as error:
            if self.max_bytes is None:
                raise
            logger.warning("an embedding can't be kept: %s", error)  # a full disk is no reason to stop answering
            return
        if self.max_bytes is None:
            return
        self._bytes += len(content)
        if self._bytes > self.max_bytes:
            self._bytes = self._make_room()

    def _make_room(self) -> int:
        """Remove those used least recently until a tenth is free; other processes may do the same. Bytes that stay."""
        assert self.max_bytes is not None
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):
                known = path.stat()
                found.append((known.st_mtime, known.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self.max_bytes:
            return total
        for _, size, path in sorted(found):
            with suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size
            if total <= 0.9 * self.max_bytes:
                break
        return total


def read_embeddings(
    network: MedSA, folder: str | Path | None, writes: bool = False, max_bytes: int | None = None
) -> MedSA:
    """Let a network take embeddings from a folder where they are there; see :class:`PrecomputedEmbeddings`.

    Args:
        network: the network; it is changed in place.
        folder: where embeddings are kept; none leaves the network as it is.
        writes: whether others are kept there too.
        max_bytes: most bytes of these, or none.

    Returns:
        ``network``.
    """
    if folder:
        network.kept_embeddings = PrecomputedEmbeddings(network, folder, writes, max_bytes)
    return network
