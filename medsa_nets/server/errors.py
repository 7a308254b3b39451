"""Errors that clients of the server get."""

from __future__ import annotations

from medsa_nets.errors import MedSAError


class RequestError(MedSAError, ValueError):
    """A request that can't be answered; ``status`` is that of the HTTP answer, the text its ``detail``."""

    def __init__(self, detail: str, status: int = 400) -> None:
        super().__init__(detail)
        self.status = status


class LeaseOverError(RequestError):
    """The lease ended, or never was."""

    def __init__(self) -> None:
        super().__init__("The session is over: it was idle for too long, or the server restarted. Open it again.", 410)


class CapacityError(RequestError):
    """There is no room for more at the moment."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, 503)
