from __future__ import annotations

import dataclasses
import http.server
import threading
from functools import partial

import pytest

from medsa_nets.weights import BASES


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder of weights."""
    path = tmp_path / "weights"
    monkeypatch.setenv("MEDSA_WEIGHTS_DIR", str(path))
    return path


@pytest.fixture
def publish(monkeypatch):
    """Changes what a base's published file is said to be."""

    def publish(name, **changes):
        base = dataclasses.replace(BASES[name], **changes)
        monkeypatch.setitem(BASES, name, base)
        return base

    return publish


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine: its folder and its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = tmp_path / "served"
    served.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(served))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield served, f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()
