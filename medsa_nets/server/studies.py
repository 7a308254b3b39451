"""Images that are open: read from a client's array, and encoded slab by slab, first where a user clicks."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Spacingd
from nibabel.orientations import axcodes2ornt
from torch import Tensor

from medsa_nets.checksums import tensor_sha256
from medsa_nets.inferers import PromptInferer, Slabs, VolumeInferer, slab_inferer
from medsa_nets.inferers.near import QueuedSlabInferer, bytes_when_encoded, nearest_group
from medsa_nets.inferers.queues import AHEAD, DECODE, ENCODE, NEAREST, DeviceQueue
from medsa_nets.interaction.grids import Grids
from medsa_nets.interaction.segmenters import Asked, NetworkSegmenter
from medsa_nets.networks import MedSA, VolumeMedSA
from medsa_nets.precision import autocast
from medsa_nets.prompts import Prompts
from medsa_nets.server.errors import RequestError
from medsa_nets.server.store import Embeddings, Key

logger = logging.getLogger(__name__)
FOREGROUND = "foreground"  # name of what has no class


class StoppedError(Exception):
    """The work was stopped: nobody waits for its result any more."""


class _StudySlabs(Slabs):
    """Slabs of an open volume, whose embeddings are kept as long as it is open."""

    def __init__(self, study: Study, number: int, *args: Any) -> None:
        super().__init__(*args)
        self.study = study
        self.number = number

    def prepare(self, g: int, priority: int) -> None:
        """Wait until a group is encoded."""
        self.study.prepare((self.study.key, self.number, g), lambda: self.embeddings(g), priority)

    def embeddings(self, g: int) -> Tensor:
        """Embeddings of a group; called in the device's thread."""
        key = (self.study.key, self.number, g)
        found = self.study.store.get(key)
        if found is None:
            found = self._encode(self.groups[g])
            self.study.store.put(key, found)
        return found

    def encoded_groups(self) -> list[bool]:
        """Which groups are encoded."""
        return [self.study.store.get((self.study.key, self.number, g)) is not None for g in range(len(self.groups))]

    def finish(self) -> None:
        """Nothing: the study encodes the rest by itself."""


class _StudySlabInferer(QueuedSlabInferer):
    """The bundle's inferer on one open volume; each slab is a piece of work of its own in the device's queue."""

    study: Study

    @classmethod
    def on(cls, study: Study, inferer: VolumeInferer, near: bool = False) -> VolumeInferer:
        """A bundle's inferer with the same settings for an open volume; ``near`` as of :meth:`of`."""
        out = cls.of(inferer, study.queue, near=near)
        base = slab_inferer(out)
        assert isinstance(base, cls)
        base.study, base.cache = study, None
        return out

    def open(self, volume: Tensor, network: VolumeMedSA, key: str | None, axes: tuple[int, ...] = ()) -> list[Slabs]:
        """The slabs of the open volume, or of its mirror image."""
        slabs = self.study.slabs
        if axes not in slabs:
            slabs[axes] = _StudySlabs(self.study, len(slabs), self, volume, network, None, axes)
        return [slabs[axes]]

    def automatic_slabs(self, slabs: Slabs, g: int, index: int) -> Tensor:
        assert isinstance(slabs, _StudySlabs)
        key = (self.study.key, slabs.number, -1 - g - index * len(slabs.groups))  # beside those of embeddings
        found = self.study.store.get(key)
        if found is None:
            found = super().automatic_slabs(slabs, g, index)
            self.study.store.put(key, found)
        return found

    def prepare(self, slabs: Slabs, g: int) -> None:
        assert isinstance(slabs, _StudySlabs)
        self.study.check()
        slabs.prepare(g, self.priority)
        self.study.check()

    @property
    def urgency(self) -> int:
        """First answers go before whole ones on images that are not encoded yet: their clients are shown something."""
        return DECODE if self.priority == NEAREST or self.study.encoded else ENCODE


class _StudyPromptInferer(PromptInferer):
    """The bundle's inferer on one open image."""

    study: Study
    priority: int  # with which it is encoded

    @classmethod
    def of(cls, inferer: PromptInferer, study: Study, near: bool = False) -> _StudyPromptInferer:
        """The same settings for an open image.

        Args:
            inferer: the bundle's.
            study: the image.
            near: whether one position of the image is all that is seen, for an answer before the others are encoded.
        """
        out = cls.__new__(cls)
        out.__dict__.update(inferer.__dict__)
        out.study, out.cache, out.priority = study, None, NEAREST if near else ENCODE
        if near:
            out.turns = out.turns[:1]
        return out

    def decode(self, inputs: Tensor, network: MedSA, prompts: Sequence[Prompts]) -> Tensor:
        """Answer all prompts, as a piece of work in the device's queue."""
        self.study.check()
        self.prepare(inputs, network)
        self.study.check()
        return self.study.queue.run(lambda: super(_StudyPromptInferer, self).decode(inputs, network, prompts))

    def prepare(self, inputs: Tensor, network: MedSA, priority: int | None = None) -> None:
        """Wait until the image is encoded, in all positions that it is seen in."""
        chosen = self.priority if priority is None else priority

        def encode(view: Tensor, turn: int) -> None:
            with autocast(self.amp, inputs.device):
                self._embed(view, network, turn)

        for turn, view in self.views(inputs):
            self.study.prepare((self.study.key, 0, turn), partial(encode, view, turn), chosen)

    def encoded(self) -> bool:
        """Whether the image is encoded."""
        return all(self.study.store.get((self.study.key, 0, turn)) is not None for turn in self.turns)

    def _embed(self, inputs: Tensor, medsa: MedSA, turn: int) -> Tensor:
        key = (self.study.key, 0, turn)
        found = self.study.store.get(key)
        if found is None:
            found = medsa.encode_image(inputs)
            self.study.store.put(key, found)
        return found


class ObjectSegmenter:
    """What a session of one object needs: the network's answers for one class, or for none, on an open image.

    Args:
        study: the image.
        index: id of the class; none for a foreground without one.
        near: whether answers stay within the slab of the newest click; in photographs, see one position of the image.
    """

    exclusive = False  # one class has nothing to exclude; other objects are the server's concern

    def __init__(self, study: Study, index: int | None, near: bool = False) -> None:
        self.study = study
        self.index = index
        self.near = near
        self.segmenter = study.near_segmenter if near else study.segmenter
        self.classes: Sequence[str] = [FOREGROUND if index is None else study.segmenter.classes[index]]
        self.volumes = self.segmenter.volumes
        self.refinement = self.segmenter.refinement

    @property
    def feedback(self) -> bool:
        """Whether the network was trained with earlier masks."""
        return self.segmenter.feedback

    @property
    def prompted(self) -> bool:
        """Whether the network was trained with clicks or boxes."""
        return self.segmenter.prompted

    def open(self, source: Any) -> MetaTensor:
        """The study's image, whatever ``source`` is."""
        return self.study.image

    def automatic(self, image: MetaTensor) -> Tensor:
        """Objects start from nothing."""
        raise NotImplementedError

    def on_file(self, logits: Tensor, image: MetaTensor) -> np.ndarray:
        """Objects start from nothing."""
        raise NotImplementedError

    def decode(self, image: MetaTensor, index: int, asked: Asked, earlier: Tensor | None) -> Tensor:
        """Logits (spatial…) of the network's answer."""
        return self.segmenter.decode(image, -1 if self.index is None else self.index, asked, earlier)

    def identity(self) -> dict[str, str]:
        """What the answers depend on beside the image."""
        return self.segmenter.identity()


@dataclass(frozen=True)
class Properties:
    """What a client may say of an image in ``image_properties``; other entries are left alone.

    Attributes:
        affine: (4, 4), voxel indices to RAS in mm.
        class_name: class of what is segmented: a name, ``foreground`` for none, or empty to choose by the first click.
        session: a name by which a later client finds this session again, or empty.
    """

    affine: np.ndarray
    class_name: str = ""
    session: str = ""


def read_properties(properties: Any, classes: Sequence[str], orientation: str) -> Properties:
    """Read a client's ``image_properties``.

    Args:
        properties: ``spacing`` (mm along the three axes; 1 where absent), ``affine`` (voxel indices to RAS, in place of
            spacing and orientation), ``orientation`` (where the three axes point to, as ``RAS`` or ``SPL``), ``class``,
            ``session``.
        classes: that the network has.
        orientation: of images that say nothing of it.

    Raises:
        RequestError: when an entry has another form.
    """
    if not isinstance(properties, Mapping):
        raise RequestError("image_properties: expected an object.")
    name = read_class(properties.get("class", ""), classes)
    session = properties.get("session", "")
    if not isinstance(session, str) or len(session) > 200:
        raise RequestError("image_properties, session: expected a name of at most 200 characters.")
    if properties.get("affine") is not None:
        affine = _numbers(properties["affine"], (4, 4), "affine")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9 or not np.array_equal(affine[3], [0, 0, 0, 1]):
            raise RequestError("image_properties, affine: it is singular, or its last row is not 0, 0, 0, 1.")
        return Properties(affine, name, session)
    spacing = np.ones(3)
    if properties.get("spacing") is not None:
        spacing = _numbers(properties["spacing"], (3,), "spacing")
        if not ((spacing > 1e-3) & (spacing < 1e3)).all():
            raise RequestError("image_properties, spacing: expected three lengths in mm.")
    axes = properties.get("orientation") or orientation
    return Properties(affine_of(axes, spacing), name, session)


def read_class(name: Any, classes: Sequence[str]) -> str:
    """A class as a client names it, in lower case; empty where the first click chooses.

    Raises:
        RequestError: when it is unknown.
    """
    if name is None or name == "":
        return ""
    if isinstance(name, str) and name.lower() in [FOREGROUND, *(known.lower() for known in classes)]:
        return name.lower()
    raise RequestError(f"image_properties, class: expected {FOREGROUND} or one of {', '.join(classes)}.")


def affine_of(axes: Any, spacing: np.ndarray) -> np.ndarray:
    """Affine (4, 4), to RAS in mm, of an array whose axes point to ``axes``, as ``RAS``, or ``SPL`` for 3D Slicer's.

    Raises:
        RequestError: when ``axes`` are no three directions.
    """
    pairs = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    if not isinstance(axes, str) or len(axes) != 3 or sorted(pairs.get(a, 3) for a in axes.upper()) != [0, 1, 2]:
        raise RequestError("orientation: expected three letters as RAS or SPL, one of each R or L, A or P, S or I.")
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for axis, (target, sign) in enumerate(axcodes2ornt(tuple(axes.upper()))):
        affine[int(target), axis] = sign * spacing[axis]
    return affine


def _resampled_as_it_is(segmenter: NetworkSegmenter, array: np.ndarray) -> bool:
    """Whether whole numbers can stay as they are until they are resampled, which makes float32 of them.

    A copy of a large volume in float32 takes as long as its resampling. What is resampled in double precision is the
    same from either, as long as float32 holds it exactly.
    """
    assert segmenter.preprocessing is not None
    doubles = [
        t for t in segmenter.preprocessing.transforms if isinstance(t, Spacingd) and set(t.dtype) == {np.float64}
    ]
    return array.dtype in (np.uint8, np.int8, np.int16) and bool(doubles)


def _numbers(value: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != shape or not np.isfinite(found).all() or np.abs(found).max() > 1e6:
        raise RequestError(f"image_properties, {name}: expected {' x '.join(map(str, shape))} numbers.")
    return found


class Study:
    """An image that a client has open, on the network's grid, and its embeddings.

    Args:
        segmenter: the bundle's.
        queue: of the device.
        store: keeps embeddings.
        number: of the image, unique in the process.
        array: (C, X, Y, Z), as the client sent it.
        properties: of it.

    Raises:
        RequestError: when the array is no image that this network takes.
    """

    def __init__(
        self,
        segmenter: NetworkSegmenter,
        queue: DeviceQueue,
        store: Embeddings,
        number: int,
        array: np.ndarray,
        properties: Properties,
    ) -> None:
        self.queue, self.store, self.number = queue, store, number
        self.closed = False
        self.stopping = threading.local()
        self.client_shape = tuple(int(n) for n in array.shape[1:])
        self.slice_axis: int | None = None  # of length 1, for images
        self.image = self._read(segmenter, array, properties)
        self.key = tensor_sha256(self.image)
        store.open(self.key)
        self.grids = Grids(self.image)
        self.segmenter = copy.copy(segmenter)
        self.near_segmenter = self.segmenter
        self.slabs: dict[tuple[int, ...], _StudySlabs] = {}
        self._focus: float | None = None
        self._ahead: threading.Thread | None = None
        inferer, network = segmenter.inferer, segmenter.network
        if isinstance(inferer, VolumeInferer):
            assert isinstance(network, VolumeMedSA)
            own = _StudySlabInferer.on(self, inferer)
            own.open(segmenter._input(self.image), network, None)
            self.segmenter.inferer = own
            self.near_segmenter = copy.copy(segmenter)
            self.near_segmenter.inferer = _StudySlabInferer.on(self, inferer, near=True)
        else:
            self.segmenter.inferer = _StudyPromptInferer.of(inferer, self)
            self.near_segmenter = copy.copy(segmenter)
            self.near_segmenter.inferer = _StudyPromptInferer.of(inferer, self, near=True)

    def _read(self, segmenter: NetworkSegmenter, array: np.ndarray, properties: Properties) -> MetaTensor:
        """The array as the network sees it, through the bundle's transforms without its reader."""
        assert segmenter.preprocessing is not None
        kept = segmenter.volumes and _resampled_as_it_is(segmenter, array)
        values = np.asarray(array, dtype=None if kept else np.float32)
        if array.dtype.kind == "f" and not np.isfinite(values).all():
            raise RequestError("image: it holds values that are not finite. Replace them, for example by air.")
        if segmenter.volumes:
            if len(values) != 1:
                raise RequestError(f"image: expected one channel, (1, X, Y, Z), got {len(values)}.")
            image = MetaTensor(
                torch.from_numpy(np.ascontiguousarray(values)), affine=torch.from_numpy(properties.affine)
            )
            image.meta["original_affine"] = properties.affine
        else:
            flat = [axis for axis in (2, 0, 1) if values.shape[1 + axis] == 1]
            if not flat or len(values) not in (1, 3):
                raise RequestError("image: expected a photograph (1 or 3, X, Y, 1), or (1 or 3, 1, Y, X).")
            self.slice_axis = flat[0]
            plane = values.squeeze(1 + self.slice_axis)
            if self.slice_axis == 0:  # slices, rows, columns; a photograph's own order is (x, y)
                plane = plane.transpose(0, 2, 1)
            plane = np.repeat(plane, 3, axis=0) if len(plane) == 1 else plane
            image = MetaTensor(torch.from_numpy(np.ascontiguousarray(plane)))
        image.meta["filename_or_obj"] = "image"
        image.meta["spatial_shape"] = np.asarray(image.shape[1:])
        transforms = [t for t in segmenter.preprocessing.transforms if not type(t).__name__.startswith("LoadImage")]
        return Compose(transforms)({"image": image})["image"]

    def to_file(self, positions: np.ndarray) -> np.ndarray:
        """Positions (N, 3) of the client's array as those (N, dims) of the image."""
        if self.slice_axis is None:
            return positions
        plane = np.delete(positions, self.slice_axis, axis=1)
        return plane[:, ::-1] if self.slice_axis == 0 else plane

    def mask_to_file(self, mask: np.ndarray) -> np.ndarray:
        """A mask of the client's array (X, Y, Z) on the image's grid."""
        if self.slice_axis is None:
            return mask
        plane = mask.squeeze(self.slice_axis)
        return plane.T if self.slice_axis == 0 else plane

    def mask_to_client(self, mask: np.ndarray) -> np.ndarray:
        """A mask of the image's grid, or a box of it, on the client's (X, Y, Z)."""
        if self.slice_axis is None:
            return mask
        return np.expand_dims(mask.T if self.slice_axis == 0 else mask, self.slice_axis)

    def encode_ahead(self) -> None:
        """Encode the image in the background, from its middle, or from where a user clicked, outwards."""
        self._ahead = threading.Thread(target=self._encode_all, name="encode ahead", daemon=True)
        self._ahead.start()

    def look_at(self, position: np.ndarray) -> None:
        """Encode first what lies near a position (dims,) of the image's grid."""
        if self.slabs:
            self._focus = float(self.grids.positions(position[None])[0, 2])

    @property
    def encoded(self) -> bool:
        """Whether all is encoded."""
        if not self.slabs:
            assert isinstance(self.segmenter.inferer, _StudyPromptInferer)
            return self.segmenter.inferer.encoded()
        return all(all(slabs.encoded_groups()) for slabs in self.slabs.values())

    def close(self, forget: bool = False) -> None:
        """Stop encoding, and give the embeddings up; with ``forget``, nobody will come back for them."""
        if not self.closed:
            self.closed = True
            self.store.close(self.key, forget)

    def check(self) -> None:
        """Stop what is computed for nobody.

        Raises:
            StoppedError: when the image was closed, or what this thread computes is not wanted any more.
        """
        wanted: Callable[[], bool] = getattr(self.stopping, "wanted", lambda: True)
        if self.closed or not wanted():
            raise StoppedError

    def prepare(self, key: Key, encode: Callable[[], Any], priority: int) -> None:
        """Wait until an embedding is there (:meth:`Embeddings.prepare`)."""
        self.store.prepare(key, encode, self.queue, priority)

    def automatic_logits(self, position: np.ndarray) -> np.ndarray:
        """Logits (K,) of every class without prompts at a position (dims,) of the image's grid.

        In volumes, those of the slab around it alone.
        """
        voxel = self.grids.voxels(position[None])[0].tolist()
        network = self.segmenter.network
        inferer = self.segmenter.inferer
        if isinstance(inferer, VolumeInferer):
            slabs = self.slabs[()]
            points = torch.tensor([[voxel]], dtype=torch.float32)
            g = nearest_group(slabs, Prompts(points=points, labels=torch.ones(1, 1)))
            away = [abs(start + (slabs.depth - 1) / 2.0 - voxel[2]) for start in slabs.groups[g]]
            s, amp = int(np.argmin(away)), slab_inferer(inferer).amp
            z = voxel[2] - slabs.groups[g][s]

            def decode() -> Tensor:  # the decoder sees slices one by one
                with autocast(amp, slabs.place):
                    return network.decode(slabs.embeddings(g)[s : s + 1, ..., z : z + 1].to(slabs.place))

            slabs.prepare(g, NEAREST)
            return self.queue.run(decode)[0, :, voxel[0], voxel[1], 0].float().cpu().numpy()
        inferer = self.near_segmenter.inferer
        assert isinstance(inferer, _StudyPromptInferer)
        logits = inferer.decode(self.segmenter._input(self.image), network, [Prompts()])
        return logits[0, :, voxel[0], voxel[1]].cpu().numpy()

    def _encode_all(self) -> None:
        if not self.slabs:
            inferer = self.segmenter.inferer
            assert isinstance(inferer, _StudyPromptInferer)
            inputs = self.segmenter._input(self.image)
            self._attempt(lambda: inferer.prepare(inputs, self.segmenter.network, AHEAD))
            return
        if sum(map(bytes_when_encoded, self.slabs.values())) > self.store.max_bytes:
            logger.info(
                "image %d: its embeddings are too large to be kept; slabs are encoded as they are needed", self.number
            )
            return
        tried: set[tuple[int, int]] = set()  # what other images pushed out again is encoded when it is needed
        while not self.closed:
            left = [
                (abs(slabs.groups[g][0] + (slabs.depth - 1) / 2.0 - self._middle(slabs)), number, g)
                for number, slabs in enumerate(self.slabs.values())
                for g, done in enumerate(slabs.encoded_groups())
                if not done and (number, g) not in tried
            ]
            if not left:
                return
            _, number, g = min(left)
            tried.add((number, g))
            slabs = list(self.slabs.values())[number]
            if not self._attempt(partial(slabs.prepare, g, AHEAD)):
                return

    def _attempt(self, work: Callable[[], Any]) -> bool:
        try:
            work()
        except Exception:  # the answer that needs it meets the same, and says so
            if not self.closed:
                logger.exception("encoding ahead stopped")
            return False
        return True

    def _middle(self, slabs: Slabs) -> float:
        depth = slabs.volume.shape[4]
        focus = self._focus if self._focus is not None else (depth - 1) / 2.0
        return depth - 1 - focus if 2 in slabs.mirrored else focus
