"""Embeddings of a list of studies, computed ahead of time: ``python -m medsa_nets precompute BUNDLE STUDIES FOLDER``.

Any number of processes may read the folder, the session server (``--precomputed FOLDER``) and MONAI Label's among them:
a study that was precomputed is answered by the decoder alone.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor

from medsa_nets.commands import command
from medsa_nets.data import list_photographs, list_volumes
from medsa_nets.data.atomic import make_writable
from medsa_nets.embeddings import PrecomputedEmbeddings, read_embeddings
from medsa_nets.errors import DataError, find_cause
from medsa_nets.inferers import VolumeInferer, rebuilt, slab_inferer
from medsa_nets.networks import VolumeMedSA
from medsa_nets.precision import autocast

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_study(segmenter: Any, image: MetaTensor) -> None:
    """Encode all of an image, as sessions on it do.

    Args:
        segmenter: a :class:`~medsa_nets.interaction.segmenters.NetworkSegmenter`, whose network keeps embeddings.
        image: (C, spatial…), as :meth:`~medsa_nets.interaction.segmenters.NetworkSegmenter.open` gives it.
    """
    network, inputs = segmenter.network, segmenter._input(image)
    if not isinstance(segmenter.inferer, VolumeInferer):
        with autocast(segmenter.inferer.amp, inputs.device):
            for _, view in segmenter.inferer.views(inputs):
                network.encode_image(view)
        return
    assert isinstance(network, VolumeMedSA)
    inferer = rebuilt(segmenter.inferer, lambda own: own)
    slab_inferer(inferer).cache = None
    for slabs in inferer.open(inputs, network, None):
        for g in range(len(slabs.groups)):
            slabs.embeddings(g)


def precompute(
    bundle: str,
    studies: str,
    folder: str,
    overlay: Sequence[str] = (),
    *,
    checkpoint: str = "",
    device: str = "",
    amp: str = "",
) -> None:
    """Encode studies ahead of time, for servers that answer clicks on them at once.

    An embedding is known by the values that the network sees, the encoder's weights and the precision: a study that
    changed, another window, spacing or adapter is encoded by the server itself. What is there already is not computed
    again, so the command can be repeated when studies come. Nothing is ever removed from the folder.

    Args:
        bundle: folder of the bundle.
        studies: a study, or a folder of studies.
        folder: where the embeddings go; it is made where it is missing.
        overlay: file of the bundle's configs to lay over, as hippocampus.yaml; may be given more than once.
        checkpoint: the adapter; by default that of the bundle.
        device: cpu, cuda, …; by default the bundle's choice.
        amp: precision, auto, true or false; by default the bundle's choice. The server has to have the same.
    """
    from medsa_nets.interaction.segmenters import NetworkSegmenter

    overlays = [name for one in ([overlay] if isinstance(overlay, str) else overlay) for name in one.split(",")]
    chosen = {"device": device, "checkpoint": checkpoint, "amp": amp}
    config = {name: value for name, value in chosen.items() if value != ""}
    segmenter = NetworkSegmenter.from_bundle(bundle, [name for name in overlays if name], config)
    make_writable(folder, "FOLDER")
    store = read_embeddings(segmenter.network, folder, writes=True).kept_embeddings
    assert isinstance(store, PrecomputedEmbeddings)
    items = list_volumes(studies) if segmenter.volumes else list_photographs(studies)
    failed = []
    for number, item in enumerate(items, 1):
        start, before = time.perf_counter(), (store.computed, store.read)
        try:
            encode_study(segmenter, segmenter.open(item["image"]))
        except Exception as error:  # MONAI raises errors of its own around those of a transform
            cause = find_cause(error)
            if cause is None:
                raise
            failed.append(item["image"])
            print(f"{number} of {len(items)}: {cause}", file=sys.stderr, flush=True)
            continue
        new, known = store.computed - before[0], store.read - before[1]
        taken = time.perf_counter() - start
        print(f"{number} of {len(items)}: {item['image']}: {new} encoded, {known} known ({taken:.1f} s)", flush=True)
    if failed:
        raise DataError(f"{len(failed)} of {len(items)} studies can't be read: {', '.join(failed)}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return command(precompute, arguments, name="python -m medsa_nets precompute")
