"""A folder of an adapter: what is saved comes back, damage is named, and a hub gives and takes it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
import yaml

from medsa_nets import WeightsError, build_medsa
from medsa_nets.exchange import from_pretrained, read_folder, save_pretrained
from medsa_nets.exchange.folders import CARD, CONFIG, WEIGHTS, convert
from medsa_nets.weights.__main__ import main

SIZE = 32


@pytest.fixture(params=["adapters", "lora", "adalora", "none"])
def network(request, small_base):
    network = build_medsa(small_base, adaptation=request.param, img_size=SIZE, num_classes=2, click_feedback=True,
                          train_decoder="whole" if request.param == "none" else None,
                          task={"classes": ["cup", "disc"]})  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def test_what_is_saved_comes_back(network, tmp_path):
    save_pretrained(network, tmp_path / "eyes", data="Forty eyes.", metrics={"mean Dice": 0.91234})
    again = from_pretrained(tmp_path / "eyes").eval()
    image = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(again(image), network(image))
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    card = (tmp_path / "eyes" / CARD).read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert (head["library_name"], head["license"]) == ("medsa", "apache-2.0")
    assert all(text in card for text in ("Forty eyes.", "| mean Dice | 0.9123 |", '["cup", "disc"]'))
    config = json.loads((tmp_path / "eyes" / CONFIG).read_text(encoding="utf-8"))
    assert config["task"]["classes"] == ["cup", "disc"]
    assert config["adapter"]["num_classes"] == 2


def test_a_file_becomes_a_folder_and_a_file_again(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.pt")
    before, after = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("model", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def damage_weights(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def strip(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config["base_model"]
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "sha256 is .*, adapter_config.json says .*Fetch the folder again"),
        (lambda folder: (folder / WEIGHTS).unlink(), "there is no such file. Fetch the whole folder"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not readable"),
        (lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA"}'), "It is PEFT's"),
        (strip, "lacks .*base_model"),
    ],
)
def test_a_damaged_folder_is_named(small_base, tmp_path, damage, message):
    save_pretrained(build_medsa(small_base), tmp_path)
    damage(tmp_path)
    with pytest.raises(WeightsError, match=message):
        read_folder(tmp_path)


def test_a_folder_of_another_base_is_refused(small_base, tiny_base, tiny_file, tmp_path):
    save_pretrained(build_medsa("tiny", pretrained=False), tmp_path)
    with pytest.raises(WeightsError, match="belongs to the base 'tiny'"):
        from_pretrained(tmp_path, sam_checkpoint=str(tiny_file))


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as one repository needs: what is sent in a commit can be fetched again, by name and revision."""

    files: ClassVar[dict[str, bytes]] = {}
    seen: ClassVar[list[str]] = []

    def log_message(self, *args):
        pass

    def answer(self, content, kind="application/json", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def file(self):
        content = self.files[self.path.split("?")[0].rsplit("/", 1)[1]]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, "application/octet-stream", ETag=etag, X_Repo_Commit="c" * 40)

    def do_HEAD(self):
        self.file()

    def do_GET(self):
        self.seen.append(self.path)
        if "/resolve/" in self.path:
            return self.file()
        if "/tree/" in self.path:
            return self.answer([{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                                for name, content in self.files.items()])  # fmt: skip
        names = [{"rfilename": name} for name in self.files]
        return self.answer({"id": "clinic/eyes", "sha": "c" * 40, "siblings": names, "private": True, "tags": [],
                            "downloads": 0, "likes": 0})  # fmt: skip

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"http://{self.headers['Host']}/clinic/eyes"
        if self.path.endswith("/repos/create"):
            return self.answer({"url": address})
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]}
            )
        assert "/commit/" in self.path, self.path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer({"commitUrl": f"{address}/commit/{'c' * 40}", "commitOid": "c" * 40, "success": True,
                            "hookOutput": ""})  # fmt: skip


@pytest.fixture
def hub():
    Hub.files, Hub.seen = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_takes_an_adapter_and_gives_it_back(small_base, hub, tmp_path, monkeypatch, capsys):
    pytest.importorskip("huggingface_hub")
    network = build_medsa(small_base, adaptation="lora", img_size=SIZE).eval()
    with torch.no_grad():
        network.class_embeddings.normal_()
    save_pretrained(network, tmp_path / "eyes")
    for name, value in {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_test", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["push", str(tmp_path / "eyes"), "clinic/eyes"]) == 0
    assert set(Hub.files) == {WEIGHTS, CONFIG, CARD}
    assert main(["pull", "clinic/eyes", "--folder", str(tmp_path / "got"), "--revision", "first"]) == 0
    assert any(path.startswith("/api/models/clinic/eyes/revision/first") for path in Hub.seen)
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_folder(tmp_path / "got").items())
    Hub.files[WEIGHTS] = Hub.files[WEIGHTS][:-1] + b"?"
    assert main(["pull", "clinic/eyes", "--folder", str(tmp_path / "damaged")]) == 1
    assert "Fetch the folder again" in capsys.readouterr().err


def test_the_commands_convert_merge_and_write_for_peft(small_base, tmp_path, capsys):
    network = build_medsa(small_base, adaptation="lora", img_size=SIZE, num_classes=2).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    names = {name: str(tmp_path / name) for name in ("model.pt", "folder", "merged", "peft", "again.pt")}
    assert main(["convert", names["model.pt"], names["folder"], "--data", "Forty eyes."]) == 0
    assert main(["merge", names["folder"], names["merged"]]) == 0
    assert main(["to_peft", names["model.pt"], names["peft"]]) == 0
    assert "not in PEFT's files: class_embeddings" in capsys.readouterr().out
    assert main(["from_peft", names["peft"], names["again.pt"], "--base", small_base]) == 0
    merged = from_pretrained(tmp_path / "merged" / "adapter", sam_checkpoint=f"{names['merged']}/base.safetensors")
    image = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = network(image)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(merged.eval()(image), expected, atol=1e-5 * scale, rtol=0)
        torch.testing.assert_close(
            from_pretrained(names["again.pt"]).encode_image(image), network.encode_image(image), atol=1e-4, rtol=1e-4
        )
    assert main(["merge", str(tmp_path / "nothing.pt"), names["merged"]]) == 1
    assert "there is no such adapter" in capsys.readouterr().err
