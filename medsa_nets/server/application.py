"""The server's HTTP: who may ask what, how requests are read, and how answers are written."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medsa_nets import __version__
from medsa_nets.backends import backend_of
from medsa_nets.errors import MedSAError, find_cause
from medsa_nets.inferers.queues import DeviceQueue
from medsa_nets.interaction.answers import AnswerSettings
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.machine import limit_threads
from medsa_nets.server import page
from medsa_nets.server.arrays import pack_array, read_header, unpack_array
from medsa_nets.server.errors import CapacityError, LeaseOverError, RequestError
from medsa_nets.server.leases import Lease, Leases
from medsa_nets.server.logs import SessionLog, SessionLogs, hash_image
from medsa_nets.server.settings import ServerSettings
from medsa_nets.server.store import Embeddings
from medsa_nets.server.studies import (
    FOREGROUND,
    Properties,
    StoppedError,
    Study,
    read_class,
    read_properties,
)
from medsa_nets.server.work import Answer, Work

logger = logging.getLogger(__name__)
META, LEASE, CODEC = "x-meta", "x-lease-token", "x-array-codec"
MAX_JSON = 2**16  # bytes
MAX_WAITING = 16  # requests of one lease that wait for each other
WARM_UP = 128  # voxels along the rows of the volume that is segmented first
PROTOCOL = "2.6.0"  # of the client that this server was written for
Result = TypeVar("Result")


class FailuresAnswered:
    """Answers what fails inside, and keeps the connection: a handler of ``Exception`` would answer and raise it again.

    Args:
        app: what may fail.
        answer: makes the answer of a request and an error.
    """

    def __init__(self, app: ASGIApp, answer: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self.app = app
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and answer what fails before an answer has begun."""
        begun = False

        async def note(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, note)
        except Exception as error:
            if scope["type"] != "http" or begun:
                raise
            response = await self.answer(Request(scope), error)
            await response(scope, receive, send)


class KeyRequired:
    """Lets through requests that carry the server's key.

    Args:
        app: what is guarded.
        key: that clients must send.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 to others."""
        if scope["type"] == "http" and not (scope["method"] == "GET" and _of_page(scope["path"])):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                denied = JSONResponse({"detail": "The server's API key is missing, or another one."}, 401)
                await denied(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _of_page(path: str) -> bool:
    """Whether a path is that of the page, which holds nothing of anybody, and asks for the key itself."""
    return path == "/" or (path.startswith("/page/") and path.count("/") == 2)


class Server:
    """What all clients share: the network, its device, embeddings, and leases.

    Args:
        segmenter: the bundle's.
        settings: what is allowed.
        answers: how answers are made; none takes the usual way.
        name: of the bundle, for clients.
    """

    def __init__(
        self,
        segmenter: NetworkSegmenter,
        settings: ServerSettings | None = None,
        answers: AnswerSettings | None = None,
        name: str = "",
    ) -> None:
        self.segmenter = segmenter
        self.settings = settings or ServerSettings()
        self.answers = answers
        self.name = name
        self.queue = DeviceQueue()
        if backend_of(segmenter.network) == "eager":
            self.queue.watch(segmenter.network.image_encoder)
        self.store = Embeddings(self.settings.memory)
        self.computing = ThreadPoolExecutor(2 * self.settings.max_sessions + 2, "computing")
        self.requests = ThreadPoolExecutor(self.settings.max_sessions + 2, "requests")
        share = self.settings.memory // self.settings.max_sessions
        self.leases: Leases[Work] = Leases(
            lambda: Work(self.open_study, self.computing, self.answers, self.settings.patience, share),
            Work.close,
            self.settings.max_sessions,
            self.settings.idle,
            self.settings.liveness,
        )
        self.logs = SessionLogs(self.settings.sessions) if self.settings.sessions else None
        self._numbers = itertools.count(1)
        self._reserved = 0  # bytes that requests take
        self._lock = threading.Lock()

    def open_study(self, array: np.ndarray, properties: Properties) -> Study:
        """Read an image, and begin to encode it."""
        study = Study(self.segmenter, self.queue, self.store, next(self._numbers), array, properties)
        study.encode_ahead()
        return study

    def open_log(self, array: np.ndarray, properties: Properties) -> SessionLog | None:
        """The log of a session on an image, where sessions are kept."""
        if self.logs is None:
            return None
        key = hash_image(array, properties.affine, self.segmenter.identity(), properties.class_name)
        return self.logs.open(key, properties.session)

    def warm_up(self) -> None:
        """Segment an image of shades: precision, fast paths and kernels are chosen before the first image comes."""
        if not self.segmenter.volumes:
            study = self._shades((3, 64, 64, 1))
        else:
            study = self._shades((1, WARM_UP, WARM_UP, 48))  # mm
            widest = max(study.image.shape[1:3])
            if widest > WARM_UP:  # a fine grid: everybody would wait for so many voxels
                study.close(forget=True)
                narrow = max(1, WARM_UP * WARM_UP // widest)
                study = self._shades((1, narrow, narrow, 48))
        try:
            study.automatic_logits(np.array(study.grids.file_shape) / 2.0)
        finally:
            study.close(forget=True)

    def _shades(self, shape: tuple[int, ...]) -> Study:
        values = np.arange(int(np.prod(shape))).reshape(shape) % 251
        array = values.astype(np.int16 if self.segmenter.volumes else np.uint8)
        return Study(self.segmenter, self.queue, self.store, next(self._numbers), array, Properties(np.eye(4)))

    def capabilities(self) -> dict[str, Any]:
        """What clients may do, in the protocol's terms and beyond."""
        return {
            "supported_interactions": {"points": True, "bbox2d": True, "bbox3d": True, "scribble": True, "lasso": True},
            "channel_mapping": {"prev_seg": 0, "bbox2d": [1, 2], "bbox3d": [1, 2], "lasso": [1, 2], "points": [3, 4],
                                "scribble": [5, 6]},
            "num_interaction_channels": 7,
            "supports_initial_label": True,
            "supports_zero_shot_label_refinement": False,
            "supports_undo": True,
            "preferred_scribble_thickness": [2, 2, 2],
            "interaction_decay": 1.0,
            "inference_session_version": 2,
            "do_autozoom": False,  # accepted; answers come from whole slices, with or without it
            "license": "Apache-2.0",
            "server": f"MedSA {__version__}",
            "bundle": self.name,
            "spatial_dims": 3 if self.segmenter.volumes else 2,
            "classes": [*self.segmenter.classes, FOREGROUND],
            "orientation": self.settings.orientation,
            "network": self.segmenter.identity(),
        }  # fmt: skip

    @contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Hold bytes of the memory that is there for all requests together.

        Raises:
            CapacityError: when so much is not left.
        """
        with self._lock:
            if self._reserved + count > self.settings.memory + MAX_JSON:
                raise CapacityError("Other requests take the memory that this one needs. Try again in a while.")
            self._reserved += count
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= count

    async def read_body(self, request: Request, most: int) -> bytes:
        """The body of a request, no more than ``most`` bytes of it.

        Raises:
            RequestError: when it is larger (413), has no length (411), was cut, or did not come in time (408).
            CapacityError: when all requests that are being read take too much memory together.
        """
        if "transfer-encoding" in request.headers:
            raise RequestError("The request does not say how long it is (Content-Length).", 411)
        text = request.headers.get("content-length", "0")
        length = int(text) if text.isdecimal() and len(text) < 20 else most + 1
        if length > most:
            raise RequestError(f"The request is larger than {most} bytes.", 413)

        async def read() -> bytes:
            out = bytearray()
            async for part in request.stream():
                out += part
                if len(out) > length:
                    raise RequestError("The request is longer than it says.")
            return bytes(out)

        try:
            with self.reserved(length):
                return await asyncio.wait_for(read(), self.settings.upload)
        except asyncio.TimeoutError as error:
            raise RequestError("The request did not come in time.", 408) from error
        except ClientDisconnect as error:
            raise RequestError("The request was cut.") from error

    async def act(self, request: Request, work: Callable[[Work], Result]) -> Result:
        """Have something done for a lease, after what it asked for before."""
        lease = self.leases.get(request.headers.get(LEASE), acts=True)
        if lease.busy >= MAX_WAITING:
            raise RequestError("Too many requests wait for their answers.", 429)
        self.leases.begin(lease)
        try:
            async with lease.turn:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self.requests, work, lease.held)
        finally:
            self.leases.finish(lease)

    async def read_json(self, request: Request) -> Mapping[str, Any]:
        """A JSON object.

        Raises:
            RequestError: when the body is something else.
        """
        return _object(await self.read_body(request, MAX_JSON), "body")

    async def read_array(self, request: Request) -> tuple[Mapping[str, Any], bytes, int]:
        """X-Meta and body of a request that carries an array, and the bytes that the array takes; its size was checked.

        Raises:
            RequestError: when it has another form, or is too large.
        """
        self.leases.get(request.headers.get(LEASE), acts=True)  # before anything is read
        meta = _object(request.headers.get(META, "").encode("latin-1"), "X-Meta")
        body = await self.read_body(request, self.settings.max_body)
        dtype, shape, _ = read_header(body)
        count = math.prod(shape)
        if count > self.settings.max_voxels:
            raise RequestError(f"array: it has {count} values, this server takes {self.settings.max_voxels}.", 413)
        return meta, body, count * dtype.itemsize

    def unpack(self, body: bytes, size: int) -> np.ndarray:
        """The array of a request, of ``size`` bytes."""
        if size > self.settings.memory:
            raise RequestError(f"array: it takes {size} bytes, this server takes {self.settings.memory}.", 413)
        with self.reserved(2 * size):
            return unpack_array(body, size)

    def close(self) -> None:
        """Stop everything."""
        self.leases.clear()
        self.queue.stop()
        self.computing.shutdown(wait=False, cancel_futures=True)
        self.requests.shutdown(wait=False, cancel_futures=True)


def _object(text: bytes, what: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text or b"{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what}: expected JSON.") from error
    if not isinstance(found, dict):
        raise RequestError(f"{what}: expected a JSON object.")
    return found


def _flag(entries: Mapping[str, Any], name: str, usual: bool) -> bool:
    found = entries.get(name, usual)
    if not isinstance(found, bool):
        raise RequestError(f"{name}: expected true or false.")
    return found


def _write(request: Request, answer: Answer) -> Response:
    """An answer as the protocol has it: the box that changed in X-Meta, the mask there in the body."""
    raw = request.headers.get(CODEC) == "raw"
    place = None if answer.place is None else [[int(s.start), int(s.stop)] for s in answer.place]
    meta = {"ran_prediction": answer.ran, "bbox": place, "complete": answer.complete, "class": answer.class_name}
    body = b"" if answer.values is None else pack_array(answer.values, raw)
    return Response(body, media_type="application/octet-stream", headers={META: json.dumps(meta)})


def make_application(server: Server) -> FastAPI:
    """The HTTP application of a server."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        limit_threads()
        reaping = asyncio.create_task(_reap(server))
        yield
        reaping.cancel()
        server.close()

    application = FastAPI(
        title="MedSA", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    if server.settings.hosts:
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=list(server.settings.hosts))
    if server.settings.api_key:
        application.add_middleware(KeyRequired, key=server.settings.api_key)
    _handle_errors(application)
    _add_page(application)
    _add_leases(application, server)
    _add_work(application, server)
    return application


async def _reap(server: Server) -> None:
    while True:
        await asyncio.sleep(min(5.0, server.settings.liveness / 4.0))
        server.leases.reap()


def _handle_errors(application: FastAPI) -> None:
    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse({"detail": str(error)}, error.status)

    async def stopped(request: Request, error: Exception) -> Response:
        return await refuse(request, LeaseOverError())

    async def plain(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"detail": str(error.detail)}, error.status_code)

    async def unexpected(request: Request, error: Exception) -> Response:
        cause = find_cause(error)
        if isinstance(cause, RequestError):
            return await refuse(request, cause)
        logger.error("%s could not be answered", request.url.path, exc_info=error)
        status = 503 if isinstance(error, MemoryError) else 500
        return JSONResponse({"detail": "The request could not be answered; the server's log says why."}, status)

    application.add_exception_handler(RequestError, refuse)
    application.add_exception_handler(StoppedError, stopped)
    application.add_exception_handler(HTTPException, plain)
    application.add_exception_handler(MedSAError, unexpected)
    application.add_middleware(FailuresAnswered, answer=unexpected)


def _add_page(application: FastAPI) -> None:
    headers = {"Content-Security-Policy": page.POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    def answer(name: str) -> Response:
        content = page.read_file(name)
        if content is None:
            raise HTTPException(404, "There is no such file.")
        return Response(content, media_type=page.TYPES[name], headers=headers)

    @application.get("/")
    def index() -> Response:
        if page.read_file(page.NIIVUE_FILE) is None:
            text = "The page is not complete. Run once: python -m medsa_nets.server.page (needs npm)."
            return Response(text, 503, media_type="text/plain", headers=headers)
        return answer("index.html")

    @application.get("/page/{name}")
    def file(name: str) -> Response:
        return answer(name)


def _add_leases(application: FastAPI, server: Server) -> None:
    leases = server.leases

    @application.get("/healthz")
    async def healthz() -> dict[str, bool]:
        return {"ok": True}

    @application.get("/capabilities")
    async def capabilities(request: Request) -> dict[str, Any]:
        if request.headers.get(LEASE) is not None:
            leases.get(request.headers.get(LEASE))
        return server.capabilities()

    @application.post("/claim")
    async def claim() -> dict[str, Any]:
        lease = leases.claim()
        return {
            "lease_token": lease.token,
            "idle_timeout_seconds": leases.idle,
            "liveness_timeout_seconds": leases.liveness,
        }

    def status(lease: Lease[Work]) -> dict[str, float]:
        return {"remaining_seconds": leases.remaining(lease), "idle_timeout_seconds": leases.idle}

    @application.get("/lease_status")
    async def lease_status(request: Request) -> dict[str, float]:
        return status(leases.peek(request.headers.get(LEASE)))

    @application.post("/heartbeat")
    async def heartbeat(request: Request) -> dict[str, float]:
        return status(leases.get(request.headers.get(LEASE)))

    @application.post("/release")
    async def release(request: Request) -> dict[str, bool]:
        with suppress(LeaseOverError):
            leases.peek(request.headers.get(LEASE)).held.finish()
        leases.release(request.headers.get(LEASE))
        return {"ok": True}


def _add_work(application: FastAPI, server: Server) -> None:
    @application.post("/set_image")
    async def set_image(request: Request) -> dict[str, Any]:
        meta, body, size = await server.read_array(request)
        properties = read_properties(
            meta.get("image_properties") or {}, server.segmenter.classes, server.settings.orientation
        )

        def work(held: Work) -> tuple[int, ...]:
            array = server.unpack(body, size)
            if array.ndim != 4:
                raise RequestError("image: expected four dimensions, (C, X, Y, Z).")
            held.close()  # the log of this image may be its own
            return held.set_image(array, properties, properties.class_name, server.open_log(array, properties))

        return {"original_image_shape": list(await server.act(request, work))}

    @application.post("/set_target_buffer")
    async def set_target_buffer(request: Request) -> dict[str, bool]:
        body = await server.read_json(request)
        shape = body.get("shape")
        if not isinstance(shape, list) or not all(type(n) is int for n in shape):
            raise RequestError("shape: expected a list of whole numbers.")
        class_name = read_class(body["class"], server.segmenter.classes) if "class" in body else None
        await server.act(request, lambda held: held.set_target_buffer(shape, class_name))
        return {"ok": True}

    @application.post("/set_do_autozoom")
    async def set_do_autozoom(request: Request) -> dict[str, bool]:
        _flag(await server.read_json(request), "do_autozoom", True)
        await server.act(request, lambda held: None)  # it changes no answer (capabilities)
        return {"ok": True}

    @application.post("/reset_interactions")
    async def reset_interactions(request: Request) -> dict[str, bool]:
        await server.read_body(request, MAX_JSON)
        await server.act(request, Work.reset)
        return {"ok": True}

    @application.post("/undo")
    async def undo(request: Request) -> Response:
        await server.read_body(request, MAX_JSON)
        return _write(request, await server.act(request, Work.undo))

    @application.post("/predict")
    async def predict(request: Request) -> Response:
        await server.read_body(request, MAX_JSON)
        return _write(request, await server.act(request, Work.predict))

    async def add(request: Request, kind: str, entries: Mapping[str, Any], **said: Any) -> Response:
        runs = _flag(entries, "run_prediction", True)
        said["label"] = int(_flag(entries, "include_interaction", True))
        return _write(request, await server.act(request, lambda held: held.add(kind, runs, **said)))

    @application.post("/add_point_interaction")
    async def add_point(request: Request) -> Response:
        body = await server.read_json(request)
        return await add(request, "point", body, position=body.get("coordinates"))

    @application.post("/add_bbox_interaction")
    async def add_bbox(request: Request) -> Response:
        body = await server.read_json(request)
        return await add(request, "box", body, box=body.get("bbox_coords"))

    async def add_drawing(request: Request, kind: str) -> Response:
        meta, body, size = await server.read_array(request)
        runs = _flag(meta, "run_prediction", kind != "mask")
        label = int(_flag(meta, "include_interaction", True))

        def work(held: Work) -> Answer:
            mask = server.unpack(body, size)
            if kind == "mask":
                return held.add(kind, runs, mask=mask)
            return held.add(kind, runs, mask=mask, box=meta.get("interaction_bbox"), label=label)

        return _write(request, await server.act(request, work))

    @application.post("/add_scribble_interaction")
    async def add_scribble(request: Request) -> Response:
        return await add_drawing(request, "scribble")

    @application.post("/add_lasso_interaction")
    async def add_lasso(request: Request) -> Response:
        return await add_drawing(request, "lasso")

    @application.post("/add_initial_seg_interaction")
    async def add_initial_seg(request: Request) -> Response:
        return await add_drawing(request, "mask")
