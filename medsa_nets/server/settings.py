"""Settings of the session server."""

from __future__ import annotations

from dataclasses import dataclass, field

from medsa_nets.machine import usable_memory


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows.

    Args:
        max_sessions: clients at once.
        idle: seconds without an action of the user after which a session ends.
        liveness: seconds without any request, heartbeats among them, after which it ends.
        api_key: what clients must send (``Authorization: Bearer``), or empty.
        hosts: names under which clients may call it; empty for any.
        orientation: where the axes of images point to that say nothing of it: three letters, as ``RAS`` or ``SPL``.
        max_voxels: of an image, and of a drawn mask.
        max_body: most bytes of a request.
        memory: most bytes for embeddings, and for requests that are being read.
        patience: seconds that a whole answer may take; after them, and while an image is still being encoded, the
            answer comes from the clicked slab, or from the clicks alone where there is a mask, and the rest later.
        upload: seconds in which a request must have come in.
        sessions: folder in which sessions are kept (:class:`~medsa_nets.server.logs.SessionLogs`), or empty.
    """

    max_sessions: int = 4
    idle: float = 600.0
    liveness: float = 60.0
    api_key: str = field(default="", repr=False)
    hosts: tuple[str, ...] = ()
    orientation: str = "RAS"
    max_voxels: int = 512 * 512 * 512
    max_body: int = 2**30
    memory: int = field(default_factory=lambda: min(4 * 2**30, usable_memory() // 4))
    patience: float = 0.1
    upload: float = 600.0
    sessions: str = ""
