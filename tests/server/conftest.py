"""Servers in threads of this process, and the published client."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

# A skip that is raised while this file is imported would end the collection of all tests.
MISSING = [name for name in ("blosc2", "fastapi", "uvicorn", "nnInteractive") if importlib.util.find_spec(name) is None]
if not MISSING:
    import uvicorn
    from nnInteractive.inference import remote

    from medsa_nets.interaction.segmenters import NetworkSegmenter
    from medsa_nets.server.application import Server, make_application
    from medsa_nets.server.settings import ServerSettings


class SkippedModule(pytest.Module):
    """A module of tests whose packages are absent."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"not installed: {', '.join(MISSING)} (pip install -e '.[test]')", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip the modules beside this file, with a reason, where what they import is absent."""
    return SkippedModule.from_parent(parent, path=module_path) if MISSING else None


BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SETTINGS = {"max_sessions": 3, "patience": 60.0, "memory": 2**28}


@contextmanager
def running(server: Server) -> Iterator[str]:
    """A server's address while it runs."""
    config = uvicorn.Config(make_application(server), port=0, log_level="warning", timeout_graceful_shutdown=2)
    service = uvicorn.Server(config)
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    while not service.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{service.servers[0].sockets[0].getsockname()[1]}"
    service.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def make_segmenter(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., NetworkSegmenter]:
    """Makes a bundle's segmenter with a network of random weights."""

    def make(kind: str, **config: Any) -> NetworkSegmenter:
        root, overlays = BUNDLES / kind, ["hippocampus.yaml"] if kind == "medsa_btcv" else []
        path = tmp_path_factory.mktemp("adapter") / "adapter.pt"
        chosen = {"base": small_base, "checkpoint": str(path), "amp": False, **config}
        parser = ConfigParser()
        parser.read_config([str(root / "configs" / name) for name in ("inference.yaml", *overlays)])
        parser.update({**chosen, "bundle_root": str(root)})
        network = parser.get_parsed_content("network")
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            network.class_embeddings.copy_(torch.randn(network.class_embeddings.shape, generator=generator))
        torch.save(network.state_dict(), path)
        return NetworkSegmenter.from_bundle(root, overlays, chosen)

    return make


@pytest.fixture(scope="module")
def volumes(make_segmenter: Callable[..., NetworkSegmenter]) -> NetworkSegmenter:
    """Two classes in volumes, in several slabs."""
    return make_segmenter("medsa_btcv", slab_depth=6, mirror_axes=[])


@pytest.fixture(scope="module")
def photographs(make_segmenter: Callable[..., NetworkSegmenter]) -> NetworkSegmenter:
    return make_segmenter("medsa_isic", image_size=64)


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, Server]]]:
    """Starts servers: the address, and the server."""
    open_ones: list[Any] = []

    def start(segmenter: NetworkSegmenter, **settings: Any) -> tuple[str, Server]:
        server = Server(segmenter, ServerSettings(**{**SETTINGS, **settings}), name="test")
        context = running(server)
        open_ones.append(context)
        return context.__enter__(), server

    yield start
    for context in open_ones:
        context.__exit__(None, None, None)


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    """Makes clients, which are closed at the end."""
    clients: list[Any] = []

    def make(address: str, **options: Any) -> Any:
        client = remote.nnInteractiveRemoteInferenceSession(address, **options)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()
