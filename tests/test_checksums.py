from __future__ import annotations

import hashlib

import torch

from medsa_nets.checksums import file_sha256, state_sha256


def test_fingerprint_depends_on_names_shapes_types_and_values_only():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
    reference = state_sha256(state)
    assert len(reference) == 64
    assert state_sha256({"b": state["b"], "a": state["a"].t().contiguous().t()}) == reference
    changed = [
        {**state, "a": state["a"] + torch.eye(2, 3) * 1e-6},
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "a": state["a"].double()},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"]},
        {**state, "d": torch.zeros(0)},
    ]
    prints = {state_sha256(other) for other in changed}
    assert len(prints) == len(changed)
    assert reference not in prints


def test_file_sha256_is_the_standard_s(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # FIPS 180-2, example 1
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    content = bytes(range(256)) * 10000
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()
