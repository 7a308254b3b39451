"""Start a session server: what ``python -m medsa_nets serve`` runs."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsa_nets.commands import command
from medsa_nets.data.atomic import make_writable
from medsa_nets.embeddings import read_embeddings
from medsa_nets.errors import DataError, SettingError
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.server.settings import ServerSettings
from medsa_nets.server.studies import affine_of

LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]")
KEY_VARIABLE = "NN_INTERACTIVE_API_KEY"  # the client's own


def serve(
    bundle: str,
    overlay: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 1527,
    checkpoint: str = "",
    device: str = "",
    amp: str = "",
    precomputed: str = "",
    embeddings: str = "",
    embeddings_gib: float = 20.0,
    sessions: str = "",
    api_key: str = "",
    ssl_certfile: str = "",
    ssl_keyfile: str = "",
    max_sessions: int = 4,
    idle_timeout_seconds: float = 600.0,
    liveness_timeout_seconds: float = 60.0,
    orientation: str = "RAS",
    patience: float = 0.1,
    log_level: str = "info",
) -> None:
    """Serve a bundle to clients of nnInteractive (3D Slicer, napari, Python).

    Args:
        bundle: folder of the bundle.
        overlay: file of its configs to lay over, as hippocampus.yaml; may be given more than once.
        host: address to listen on; others than this machine's own need a key.
        port: of that address.
        checkpoint: the adapter; by default that of the bundle.
        device: cpu, cuda, …; by default the bundle's choice.
        amp: precision, auto, true or false; by default the bundle's choice.
        precomputed: folder of embeddings that python -m medsa_nets precompute has kept; it is only read.
        embeddings: folder in which embeddings are kept, so that an image that was open before, also in a server that
            was killed, is not encoded again. They are made of the images, and need the same care. Where memory does
            not hold those of all open images, they are read from there.
        embeddings_gib: most GiB of that folder; the embeddings that were used least recently are removed.
        sessions: folder in which sessions are kept: what was said and the masks of finished objects, no images. A
            client that comes back with the same image goes on where it was, also after the server was killed.
        api_key: what clients must send; by default the environment variable NN_INTERACTIVE_API_KEY. Where there is
            none and the host is not this machine alone, one is made and printed.
        ssl_certfile: certificate (PEM), for https.
        ssl_keyfile: its key.
        max_sessions: clients at once.
        idle_timeout_seconds: without an action of the user, after which a session ends.
        liveness_timeout_seconds: without any sign of the client, after which it ends.
        orientation: where the axes of images point to that say nothing of it: RAS for NIfTI files turned to RAS, SPL
            for arrays of 3D Slicer and SimpleITK.
        patience: seconds that a whole answer may take; after them it comes from the clicked slab alone, and the rest
            with the next one.
        log_level: of the log.
    """
    try:
        import uvicorn

        from medsa_nets.server.application import Server, make_application
    except ImportError as error:
        raise SettingError(f"The server needs more packages ({error}). Run: pip install 'medsa[server]'.") from error
    affine_of(orientation, np.ones(3))
    if bool(ssl_certfile) != bool(ssl_keyfile):
        raise SettingError("TLS needs both --ssl_certfile and --ssl_keyfile.")
    for path in filter(None, (ssl_certfile, ssl_keyfile)):
        if not Path(path).is_file():
            raise DataError(f"{path}: there is no such file. Expected a certificate and its key (PEM).")
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    key = str(api_key or os.environ.get(KEY_VARIABLE, ""))
    if not key and host not in LOCAL:
        key = secrets.token_urlsafe(24)
        print(f"API key, made for this run, which clients must send: {key}", file=sys.stderr)
    overlays = [name for one in ([overlay] if isinstance(overlay, str) else overlay) for name in one.split(",")]
    chosen: dict[str, Any] = {"device": device, "checkpoint": checkpoint, "amp": amp}
    config = {name: value for name, value in chosen.items() if value != ""}
    segmenter = NetworkSegmenter.from_bundle(bundle, [name for name in overlays if name], config)
    if precomputed and not Path(precomputed).is_dir():
        raise DataError(f"{precomputed}: there is no such folder. Make it by python -m medsa_nets precompute.")
    if embeddings:
        if precomputed:
            raise SettingError("--embeddings reads what is in its folder too: give it, or --precomputed, not both.")
        if not float(embeddings_gib) > 0:
            raise SettingError(f"--embeddings_gib: expected more than 0, got {embeddings_gib}.")
        make_writable(embeddings, "--embeddings")
    limit = int(float(embeddings_gib) * 2**30) if embeddings else None
    read_embeddings(segmenter.network, embeddings or precomputed, bool(embeddings), limit)
    settings = ServerSettings(
        max_sessions=max_sessions,
        idle=float(idle_timeout_seconds),
        liveness=float(liveness_timeout_seconds),
        api_key=key,
        hosts=LOCAL if host in LOCAL else (),
        orientation=orientation,
        patience=float(patience),
        sessions=str(sessions),
    )
    server = Server(segmenter, settings, name=Path(bundle).resolve().name)
    server.computing.submit(server.warm_up)
    uvicorn.run(
        make_application(server),
        host=host,
        port=port,
        log_level=log_level,
        access_log=False,
        server_header=False,
        ssl_certfile=ssl_certfile or None,
        ssl_keyfile=ssl_keyfile or None,
        timeout_graceful_shutdown=5,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return command(serve, arguments, name="python -m medsa_nets serve")
