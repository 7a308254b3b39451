"""Checkpoints of the published Medical SAM Adapter code: the logits here are those of that code.

Two references: that code itself, where ``$MEDSA_PUBLISHED_CODE`` names a checkout, and a plain computation in this
module, by tensors under that code's names, which always runs.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from torch import nn

from medsa_nets import WeightsError, build_medsa
from medsa_nets.adaptations import PUBLISHED, merge_adapter
from medsa_nets.errors import SettingError
from medsa_nets.exchange import from_pretrained, read_published, write_peft
from medsa_nets.networks import TinyViTEncoder
from medsa_nets.networks.identity import decode_identity, decode_task
from medsa_nets.weights import BASES
from medsa_nets.weights.__main__ import main

from .. import published_code
from ..narrow_bases import narrow
from ..networks.test_efficient_sam import as_published

TOLERANCE = 1e-4  # of logits around 10
HEADS, GLOBAL = 2, (1,)  # of the ViT of these tests (tests/conftest.py)
STAGES = ((8, 1, 7), (16, 2, 7), (16, 2, 14), (320, 10, 7))  # width, heads, window of its TinyViT
RANK = 3


# --- checkpoints under that code's names and of its shapes ----------------------------------------------------------
def _noise(*shape, scale=1.0, generator):
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    return scale * torch.randn(*shape, generator=generator) * (fan_in**-0.5 if len(shape) > 1 else 0.2)


def _adapters(state, block, width, noise):
    for name in ("MLP_Adapter", "Space_Adapter", "Depth_Adapter"):
        hidden = int(0.25 * width)
        state[f"{block}.{name}.D_fc1.weight"], state[f"{block}.{name}.D_fc1.bias"] = noise(hidden, width), noise(hidden)
        state[f"{block}.{name}.D_fc2.weight"], state[f"{block}.{name}.D_fc2.bias"] = noise(width, hidden), noise(width)


def _lora(state, block, width, mlp, noise):
    """Of queries and values of one fused layer (two products in a tensor), and of both layers of the MLP."""
    state[f"{block}.attn.qkv.lora_A"] = noise(2 * RANK, width)
    state[f"{block}.attn.qkv.lora_B"] = noise(2 * width, RANK)
    for name, shape in ((mlp[0], (4 * width, width)), (mlp[1], (width, 4 * width))):
        state[f"{block}.mlp.{name}.lora_A"] = noise(RANK, shape[1])
        state[f"{block}.mlp.{name}.lora_B"] = noise(shape[0], RANK)


def _adalora(state, block, width, mlp, noise, projection):
    """Of the whole fused layer, of both layers of the MLP, and of a TinyViT's projection."""
    layers = {"attn.qkv": (3 * width, width), f"mlp.{mlp[0]}": (4 * width, width), f"mlp.{mlp[1]}": (width, 4 * width)}
    if projection:
        layers["attn.proj"] = (width, width)
    for name, shape in layers.items():
        state[f"{block}.{name}.lora_A"], state[f"{block}.{name}.lora_B"] = noise(RANK, shape[1]), noise(shape[0], RANK)
        state[f"{block}.{name}.lora_E"] = noise(RANK, 1)
        state[f"{block}.{name}.ranknum"] = torch.tensor([float(RANK)])


def _adapt_block(state, kind, block, width, mlp, noise):
    if kind.endswith("adapters"):
        _adapters(state, block, width, noise)
    elif kind.endswith("adalora"):
        _adalora(state, block, width, mlp, noise, "mobile" in kind)
    else:
        _lora(state, block, width, mlp, noise)


def checkpoint(base, kind, size, seed=0):
    """What that code saves after a training on ``base``, a state dictionary as its file holds it."""
    noise = partial(_noise, generator=torch.Generator().manual_seed(seed))
    mobile, lora, efficient = "mobile" in kind, kind.endswith("lora"), "efficient" in kind
    state = {}
    for name, tensor in base.items():
        if name.startswith("mask_decoder."):
            tensor = noise(*tensor.shape, scale=3.0 if "hypernetworks" in name else 1.0)
            if not mobile:  # -net sam has a decoder with other names there
                name = name.replace(".mlp.lin1.", ".mlp.layers.0.0.").replace(".mlp.lin2.", ".mlp.fc.")
        elif efficient and ".mlp.fc" in name:  # that code does not find them, and leaves its own as they began
            name, tensor = name.replace(".mlp.fc", ".mlp.lin"), noise(*tensor.shape)
        elif name.endswith(("running_mean", "running_var")):
            tensor = 1.1 * tensor
        elif name.endswith((".rel_pos_h", ".rel_pos_w")):
            continue
        state[name] = tensor.clone()
    if mobile:
        state["image_encoder.norm_head.weight"] = torch.ones(STAGES[-1][0])
        for stage in (1, 2, 3):
            block, width = f"image_encoder.layers.{stage}.blocks.0", STAGES[stage][0]
            _adapt_block(state, kind, block, width, ("fc1", "fc2"), noise)
    else:
        for i in range(2):
            block = f"image_encoder.blocks.{i}"
            side = 14 if i not in GLOBAL and not efficient else 64 if lora else size // 16
            for table in ("rel_h", "rel_w"):
                state[f"{block}.attn.{table}"] = torch.zeros(2 * side - 1, 16)
            _adapt_block(state, kind, block, 32, ("lin1", "lin2"), noise)
    return {"epoch": 3, "model": "mobile_sam" if mobile else "sam", "state_dict": state, "best_tol": 0.0,
            "optimizer": {"state": {}, "param_groups": []}, "path_helper": {"prefix": "logs/run"}}  # fmt: skip


# --- that code's computation, by hand -------------------------------------------------------------------------------
def _linear(s, name, x):
    y = F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))
    if f"{name}.lora_A" not in s:
        return y
    a, b = s[f"{name}.lora_A"], s[f"{name}.lora_B"]
    rank = b.shape[1]
    if f"{name}.lora_E" in s:
        return y + x @ (a * s[f"{name}.lora_E"]).T @ b.T / (s[f"{name}.ranknum"] + 1e-5)
    if a.shape[0] == rank:
        return y + (x @ a.T @ b.T) / rank
    third = b.shape[0] // 2
    first, last = x @ a[:rank].T @ b[:third].T, x @ a[rank:].T @ b[third:].T
    return y + torch.cat([first, torch.zeros_like(first), last], dim=-1) / rank


def _norm(s, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def _norm_map(s, name, x):
    return _norm(s, name, x.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)


def _adapt(s, name, x):
    return _linear(s, f"{name}.D_fc2", F.gelu(_linear(s, f"{name}.D_fc1", x)))


def _conv(s, name, x, stride=1, groups=1):
    weight = s[f"{name}.c.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=groups)
    statistics = (s[f"{name}.bn.running_mean"], s[f"{name}.bn.running_var"])
    return F.batch_norm(x, *statistics, s[f"{name}.bn.weight"], s[f"{name}.bn.bias"])


def _windows(x, side, function):
    """Apply a function of tokens (1, side, side, C) to each window of a map (1, H, W, C), padded with zeros."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    rows = []
    for top in range(0, x.shape[1], side):
        cells = [function(x[:, top : top + side, left : left + side]) for left in range(0, x.shape[2], side)]
        rows.append(torch.cat(cells, dim=2))
    return torch.cat(rows, dim=1)[:, :height, :width]


def _softmax(q, k, v, bias=0.0):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias, dim=-1) @ v


def _neck(s, x):
    x = F.conv2d(x, s["image_encoder.neck.0.weight"])
    x = F.conv2d(_norm_map(s, "image_encoder.neck.1", x), s["image_encoder.neck.2.weight"], padding=1)
    return _norm_map(s, "image_encoder.neck.3", x)


def plain_vit(s, x):
    x = F.conv2d(x, s["image_encoder.patch_embed.proj.weight"], s["image_encoder.patch_embed.proj.bias"], stride=16)
    places = s["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    x = (x + F.interpolate(places, size=x.shape[2:], mode="bicubic", align_corners=False)).permute(0, 2, 3, 1)
    for i in range(2):
        name = f"image_encoder.blocks.{i}"
        adapters = f"{name}.Space_Adapter.D_fc1.weight" in s

        def attend(tokens, name=name, adapters=adapters):
            if adapters:  # the norm comes behind the padding
                tokens = _norm(s, f"{name}.norm1", tokens, 1e-6)
            qkv = _linear(s, f"{name}.attn.qkv", tokens).flatten(1, 2).unflatten(2, (3, HEADS, -1))
            attended = _softmax(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(tokens.shape)
            attended = _linear(s, f"{name}.attn.proj", attended)
            return attended + _adapt(s, f"{name}.Space_Adapter", attended) if adapters else attended

        tokens = x if adapters else _norm(s, f"{name}.norm1", x, 1e-6)
        x = x + (attend(tokens) if i in GLOBAL else _windows(tokens, 14, attend))
        normed = _norm(s, f"{name}.norm2", x, 1e-6)
        x = x + _linear(s, f"{name}.mlp.lin2", F.gelu(_linear(s, f"{name}.mlp.lin1", normed)))
        x = x + 0.5 * _adapt(s, f"{name}.MLP_Adapter", normed) if adapters else x
    return _neck(s, x.permute(0, 3, 1, 2))


def plain_efficient_vit(s, x):
    x = F.conv2d(x, s["image_encoder.patch_embed.proj.weight"], s["image_encoder.patch_embed.proj.bias"], stride=16)
    table = s["image_encoder.pos_embed"][:, 1:]  # without that of the class token
    table = table.transpose(1, 2).unflatten(2, (math.isqrt(table.shape[1]), -1))
    x = (x + F.interpolate(table, size=x.shape[2:], mode="bicubic", align_corners=False)).permute(0, 2, 3, 1)
    for i in range(2):
        name = f"image_encoder.blocks.{i}"
        qkv = _linear(s, f"{name}.attn.qkv", _norm(s, f"{name}.norm1", x)).flatten(1, 2).unflatten(2, (3, HEADS, -1))
        attended = _softmax(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(x.shape)
        attended = _linear(s, f"{name}.attn.proj", attended)
        adapters = f"{name}.Space_Adapter.D_fc1.weight" in s
        x = x + attended + (_adapt(s, f"{name}.Space_Adapter", attended) if adapters else 0.0)
        normed = _norm(s, f"{name}.norm2", x)
        x = x + _linear(s, f"{name}.mlp.lin2", F.gelu(_linear(s, f"{name}.mlp.lin1", normed)))
        x = x + 0.5 * _adapt(s, f"{name}.MLP_Adapter", normed) if adapters else x
    return _neck(s, x.permute(0, 3, 1, 2))


def plain_tiny_vit(s, x):
    name = "image_encoder.patch_embed.seq"
    x = _conv(s, f"{name}.2", F.gelu(_conv(s, f"{name}.0", x, 2)), 2)
    name = "image_encoder.layers.0.blocks.0"
    y = F.gelu(_conv(s, f"{name}.conv2", F.gelu(_conv(s, f"{name}.conv1", x)), groups=32))
    x = F.gelu(x + _conv(s, f"{name}.conv3", y))
    for stage, (_, heads, side) in enumerate(STAGES):
        if stage:
            x = _tiny_block(s, f"image_encoder.layers.{stage}.blocks.0", x, heads, side)
        if stage < 3:
            name, stride, wide = f"image_encoder.layers.{stage}.downsample", (2, 2, 1)[stage], STAGES[stage + 1][0]
            x = F.gelu(_conv(s, f"{name}.conv1", x))
            x = _conv(s, f"{name}.conv3", F.gelu(_conv(s, f"{name}.conv2", x, stride, groups=wide)))
    return _neck(s, x)


def _tiny_block(s, name, x, heads, side):
    adapters = f"{name}.Space_Adapter.D_fc1.weight" in s and x.shape[2] != side  # a map of one window has no adapter
    offsets, number = {}, torch.zeros(side**2, side**2, dtype=torch.long)
    for i in range(side**2):
        for j in range(side**2):
            offset = (abs(i // side - j // side), abs(i % side - j % side))
            number[i, j] = offsets.setdefault(offset, len(offsets))
    bias = s[f"{name}.attn.attention_biases"][:, number]

    def attend(tokens):
        normed = _norm(s, f"{name}.attn.norm", tokens)
        qkv = _linear(s, f"{name}.attn.qkv", normed).flatten(1, 2).unflatten(2, (heads, 3, -1))  # side by side by head
        attended = _softmax(*qkv.permute(3, 0, 2, 1, 4), bias).transpose(1, 2).reshape(tokens.shape)
        attended = _linear(s, f"{name}.attn.proj", attended)
        return attended + _adapt(s, f"{name}.Space_Adapter", attended) if adapters else attended

    x = x + _windows(x.permute(0, 2, 3, 1), side, attend).permute(0, 3, 1, 2)
    x = _conv(s, f"{name}.local_conv", x, groups=x.shape[1]).permute(0, 2, 3, 1)
    y = F.gelu(_linear(s, f"{name}.mlp.fc1", _norm(s, f"{name}.mlp.norm", x)))
    y = x + _linear(s, f"{name}.mlp.fc2", y)
    if f"{name}.MLP_Adapter.D_fc1.weight" in s:
        y = y + 0.5 * _adapt(s, f"{name}.MLP_Adapter", x)  # before the norm
    return y.permute(0, 3, 1, 2)


def _cross(s, name, q, k, v):
    q, k, v = (_linear(s, f"{name}.{x}_proj", y).unflatten(2, (8, -1)).transpose(1, 2)
               for x, y in (("q", q), ("k", k), ("v", v)))  # fmt: skip
    return _linear(s, f"{name}.out_proj", _softmax(q, k, v).transpose(1, 2).flatten(2))


def plain_decoder(s, embedding, coords, labels, size):
    """Mask logits of clicks (1, P, 2), (x, y)."""
    matrix = s["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]

    def place(xy):
        angles = 2 * math.pi * ((2 * xy - 1) @ matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    side, efficient = embedding.shape[2], "prompt_encoder.invalid_points.weight" in s
    act = F.gelu if efficient else F.relu
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    image_pe = place(torch.stack([x, y], dim=-1)).flatten(0, 1).unsqueeze(0)
    if efficient:  # points as at 1024 x 1024, and six places
        points = place((1024 / size * coords + 0.5) / size)
        points = points + (labels == 1).unsqueeze(-1) * s["prompt_encoder.point_embeddings.weight"]
        nowhere = place(torch.full((1, 6 - coords.shape[1], 2), -0.5 / size))
        points = torch.cat([points, nowhere + s["prompt_encoder.invalid_points.weight"]], dim=1)
    else:
        kinds = torch.stack([s[f"prompt_encoder.point_embeddings.{label}.weight"][0] for label in labels[0].tolist()])
        points = torch.cat(
            [place((coords + 0.5) / size) + kinds, s["prompt_encoder.not_a_point_embed.weight"][None]], dim=1
        )
    prompt = torch.cat([s["mask_decoder.iou_token.weight"], s["mask_decoder.mask_tokens.weight"], points[0]])[None]
    no_mask = 0.0 if efficient else s["prompt_encoder.no_mask_embed.weight"][0].reshape(1, -1, 1, 1)
    keys = (embedding + no_mask).flatten(2).transpose(1, 2)
    queries, of_sam = prompt, "mask_decoder.transformer.layers.0.mlp.fc.weight" in s
    for i in range(2):
        name = f"mask_decoder.transformer.layers.{i}"
        if of_sam:  # embeddings are values too, and every block has a residual
            queries = queries + prompt if i else queries
            queries = queries + _cross(s, f"{name}.self_attn", queries, queries, queries)
        elif i == 0:
            queries = _cross(s, f"{name}.self_attn", queries, queries, queries)
        else:
            queries = queries + _cross(s, f"{name}.self_attn", queries + prompt, queries + prompt, queries)
        queries = _norm(s, f"{name}.norm1", queries)
        attended = _cross(s, f"{name}.cross_attn_token_to_image", queries + prompt, keys + image_pe, keys)
        queries = _norm(s, f"{name}.norm2", queries + attended)
        first, second = ("layers.0.0", "fc") if of_sam else ("lin1", "lin2")
        hidden = act(_linear(s, f"{name}.mlp.{first}", queries))
        queries = _norm(s, f"{name}.norm3", queries + _linear(s, f"{name}.mlp.{second}", hidden))
        attended = _cross(s, f"{name}.cross_attn_image_to_token", keys + image_pe, queries + prompt, queries)
        keys = _norm(s, f"{name}.norm4", keys + attended)
    name = "mask_decoder.transformer"
    attended = _cross(s, f"{name}.final_attn_token_to_image", queries + prompt, keys + image_pe, keys)
    queries = _norm(s, f"{name}.norm_final_attn", queries + attended)
    up = keys.transpose(1, 2).reshape(1, -1, side, side)
    name = "mask_decoder.output_upscaling"
    layers, norm, last = (f"{name}.0", f"{name}.3"), f"{name}.1", ("layers.0", "layers.1", "layers.2")
    if efficient:
        name = "mask_decoder.final_output_upscaling_layers"
        layers, norm, last = (f"{name}.0.0", f"{name}.1.0"), f"{name}.0.1", ("layers.0.0", "layers.1.0", "fc")
    for i, layer in enumerate(layers):
        up = F.conv_transpose2d(up, s[f"{layer}.weight"], s[f"{layer}.bias"], stride=2)
        if i == 0:  # EfficientSAM's norm is over the whole map
            own = (s[f"{norm}.weight"], s[f"{norm}.bias"])
            up = F.group_norm(up, 1, *own) if efficient else _norm_map(s, norm, up)
        up = F.gelu(up)
    weights = queries[:, 1]
    for i, layer in enumerate(last):
        weights = _linear(s, f"mask_decoder.output_hypernetworks_mlps.0.{layer}", weights)
        weights = act(weights) if i < 2 else weights
    logits = torch.einsum("bc,bchw->bhw", weights, up).unsqueeze(1)
    return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)


def plain(state, photograph, coords, labels):
    """Logits of a photograph in [0, 1] (1, 3, H, W), which that code's data sets multiply by 255."""
    pixels, encode = published_code.SAM_PIXELS, plain_vit if "image_encoder.pos_embed" in state else plain_tiny_vit
    if "prompt_encoder.invalid_points.weight" in state:  # whose statistics are those of [0, 1]
        pixels, encode = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), plain_efficient_vit
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in pixels)
    embedding = encode(state, (255 * photograph - mean) / std)
    return plain_decoder(state, embedding, coords, labels, photograph.shape[2])


# --- tests ----------------------------------------------------------------------------------------------------------
COORDS, LABELS = torch.tensor([[[40.0, 21.0], [3.0, 7.0]]]), torch.tensor([[1, 0]])  # (x, y)
CLICKS = {"point_coords": COORDS.flip(-1)[None], "point_labels": LABELS[None]}


def photograph(size):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3))


def seen(network, size):
    """The photograph as the adapter's task says that the network sees it."""
    return decode_task(network.task)["intensity"]["b_max"] * photograph(size)


@pytest.fixture
def bases(monkeypatch, tiny_base, make_sam, randomise, tmp_path):
    """A small base of either kind by name: its settings, and its weights under segment-anything's names."""
    encoder = partial(
        _tiny_vit, features=[width for width, *_ in STAGES], depths=(1, 1, 1, 1), num_heads=[h for _, h, _ in STAGES]
    )
    mobile = dataclasses.replace(BASES["mobile_sam"], name="mobile", encoder=encoder, sha256=None)
    monkeypatch.setitem(BASES, "mobile", mobile)
    weights = {"tiny": make_sam(1024).state_dict()}
    weights["mobile"] = randomise(build_medsa("mobile", pretrained=False, adaptation="none")).base_state_dict()
    found = {}
    plain = dataclasses.replace(narrow(BASES["efficient_sam_vitt"]), name="plain")
    monkeypatch.setitem(BASES, "plain", plain)
    weights["plain"] = as_published(
        randomise(build_medsa("plain", pretrained=False, img_size=224, adaptation="none"), seed=1)
    )
    for name, state in weights.items():
        state = {key: tensor.clone() for key, tensor in state.items() if not key.startswith("pixel_")}
        torch.save(state, tmp_path / f"{name}.pth")
        found[name] = {"base": name, "sam_checkpoint": str(tmp_path / f"{name}.pth")}, state
    return found


def _tiny_vit(*, img_size, **settings):
    return TinyViTEncoder(patch_stride=4, **settings)


def _of(bases, kind):
    return bases["mobile" if "mobile" in kind else "plain" if "efficient" in kind else "tiny"]


# of bases with windows: no padding (and, of a TinyViT, a map of one window), padding
@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, size) for kind in PUBLISHED for size in (224, 64, 256) if "efficient" not in kind or size == 64],
)
def test_logits_are_those_of_a_computation_by_hand(bases, kind, size, tmp_path):
    settings, base = _of(bases, kind)
    saved = checkpoint(base, kind, size)
    torch.save(saved, tmp_path / "best_dice_checkpoint.pth")
    network, _ = read_published(tmp_path / "best_dice_checkpoint.pth", **settings, image_size=size)
    assert decode_identity(network.identity)["adapter"]["adaptation"] == kind
    with torch.no_grad():
        expected = plain(saved["state_dict"], photograph(size), COORDS, LABELS)
        assert expected.abs().max() > 1.0
        found = network.eval()(seen(network, size), **CLICKS)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def _leave_out(network, name):
    for layer in network.modules():
        if hasattr(layer, name):
            usual = {"relative": True, "norm_mlp_adapter": True, "activation": nn.ReLU(), "enlarged": 1.0, "eps": 1e-3}
            setattr(layer, name, usual.get(name, False))


@pytest.mark.parametrize(
    ("kind", "difference"),
    [
        *(("published_adapters", one) for one in ("relative", "norm_padding", "embed_values", "activation")),
        *(("published_lora", one) for one in ("relative", "embed_values")),
        *(("published_mobile_adapters", one) for one in ("norm_mlp_adapter", "activation")),
        *(("published_efficient_adapters", one) for one in ("enlarged", "eps", "activation")),
    ],
)
def test_each_kept_difference_changes_logits(bases, kind, difference, tmp_path):
    settings, base = _of(bases, kind)
    saved = checkpoint(base, kind, 64)
    torch.save(saved, tmp_path / "found.pth")
    network = read_published(tmp_path / "found.pth", **settings, image_size=64)[0].eval()
    _leave_out(network, difference)
    with torch.no_grad():
        change = network(seen(network, 64), **CLICKS) - plain(saved["state_dict"], photograph(64), COORDS, LABELS)
    assert change.abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_published_code_gives_the_same_logits(bases, kind, tmp_path):
    code = published_code.folder()
    if code is None:
        pytest.skip(f"no checkout of the published code (set {published_code.VARIABLE} to its folder)")
    settings, base = _of(bases, kind)
    mobile = "mobile" in kind
    encoder = {"embed_dim": 32, "depth": 2, "num_heads": HEADS, "global_attn_indexes": GLOBAL}
    if mobile:
        encoder = {"embed_dims": [w for w, *_ in STAGES], "depths": [1] * 4, "num_heads": [h for _, h, _ in STAGES]}
    mod = {"adapters": "sam_adpt", "lora": "sam_lora", "adalora": "sam_adalora"}[kind.rpartition("_")[2]]
    net = "mobile_sam" if mobile else "efficient_sam" if "efficient" in kind else "sam"
    with torch.random.fork_rng():
        theirs = published_code.build(code, net, mod, 256, encoder, None if mod == "sam_adpt" else RANK)
    torch.save(published_code.as_trained(theirs, base), tmp_path / "best_dice_checkpoint.pth")
    network, _ = read_published(tmp_path / "best_dice_checkpoint.pth", **settings, image_size=256)
    expected = published_code.segment(theirs, photograph(256), COORDS, LABELS)
    assert expected.abs().max() > 1.0
    with torch.no_grad():
        found = network.eval()(seen(network, 256), **CLICKS)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", ["model.pt", "folder"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_command_writes_an_adapter_that_is_read_back(bases, kind, target, capsys, tmp_path):
    settings, base = _of(bases, kind)
    saved = checkpoint(base, kind, 64)
    torch.save(saved, tmp_path / "found.pth")
    options = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["import", str(tmp_path / "found.pth"), *options, "--image_size=64", str(tmp_path / target)]) == 0
    assert "kept: " in capsys.readouterr().out
    network = from_pretrained(tmp_path / target, sam_checkpoint=settings["sam_checkpoint"]).eval()
    with torch.no_grad():
        expected = plain(saved["state_dict"], photograph(64), COORDS, LABELS)
        torch.testing.assert_close(network(seen(network, 64), **CLICKS), expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(SettingError):
        merge_adapter(network)
    with pytest.raises(WeightsError):
        write_peft(network, tmp_path / "peft")


@pytest.mark.parametrize("config", ["train", "inference"])
def test_the_overlay_takes_an_imported_adapter(bases, config, tmp_path):
    settings, base = bases["tiny"]
    torch.save(checkpoint(base, "published_adapters", 64), tmp_path / "found.pth")
    imported, _ = read_published(tmp_path / "found.pth", **settings)
    bundle = Path(__file__).resolve().parents[2] / "bundles" / "medsa_isic"
    parser = ConfigParser(ConfigParser.load_config_files([bundle / "configs" / f"{config}.yaml",
                                                          bundle / "configs" / "published.yaml"]))  # fmt: skip
    parser.update({"bundle_root": str(bundle), "image_size": 64, **settings})
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(imported.state_dict())
    with torch.no_grad():
        assert torch.equal(network(photograph(64), **CLICKS), imported.eval()(photograph(64), **CLICKS))
    white = parser.get_parsed_content("intensity_transform")({"image": torch.tensor([0.0, 51.0, 255.0])})["image"]
    torch.testing.assert_close(torch.as_tensor(white), torch.tensor([0.0, 0.2, 1.0]))
    imported, _ = read_published(tmp_path / "found.pth", **settings, intensity_maximum=1.0)
    with pytest.raises(WeightsError, match="made for another task: intensity b_max"):
        network.load_state_dict(imported.state_dict())


def test_the_command_is_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "  import     Read a checkpoint of the published Medical SAM Adapter code" in capsys.readouterr().out


def test_the_size_is_read_where_the_file_says_it_and_white_as_it_was(bases, tmp_path):
    settings, base = bases["tiny"]
    torch.save(checkpoint(base, "published_adapters", 96), tmp_path / "found.pth")
    network, _ = read_published(tmp_path / "found.pth", **settings, intensity_maximum=1.0)
    task = decode_task(network.task)
    assert task["image_size"] == [96, 96]
    assert task["intensity"]["b_max"] == pytest.approx(1 / 255)


def _change(saved, what):
    state = saved["state_dict"]
    if what == "frozen":
        state["image_encoder.blocks.1.attn.qkv.weight"][0, 0] += 1
    elif what == "tables":
        state["image_encoder.blocks.0.attn.rel_h"] += 1
    elif what == "missing":
        del state["mask_decoder.iou_token.weight"]
    elif what == "alone":
        saved["state_dict"] = {name: t for name, t in state.items() if "_Adapter." in name}
    elif what == "base":
        saved["state_dict"] = {name: t for name, t in state.items() if "_Adapter." not in name}
    elif what == "efficientvit":
        saved["state_dict"] = {name.replace(".blocks.", ".backbone.stages."): t for name, t in state.items()}
    elif what == "object":
        saved["path_helper"] = {"log_path": Path("logs")}
    elif what == "volumes":
        names = [name for name in state if "gaussian_matrix" not in name]
        moved = {i: {} for i, name in enumerate(names) if "_Adapter." in name}
        saved["optimizer"] = {"state": moved, "param_groups": [{"params": list(range(len(names)))}]}
    return saved


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        (
            "frozen",
            {},
            r"another base than these weights of 'tiny': 1 of its frozen tensors differ \(first: .*qkv.weight",
        ),
        ("tables", {}, "blocks.0.attn.rel_h is not zero"),
        ("missing", {}, r"on the base 'tiny': 1 missing \(first: mask_decoder.iou_token.weight\)"),
        ("alone", {}, "holds what trained in the encoder alone"),
        ("base", {}, "no checkpoint with adapters or LoRA of the published"),
        ("object", {}, r"holds an object beside its tensors \(pathlib.*keep its tensors alone"),
        ("volumes", {}, r"was trained on volumes .*attends along the list of all windows"),
        ("efficientvit", {}, r"-encoder efficientvit_l2, which can't be imported: .*sees every image at 512 x 512"),
        ("", {"image_size": 32}, "was trained at --image_size 64, got 32"),
        ("", {"base": None}, "tokens of width 32, that of no base; pass --base"),
        ("", {"base": "nobody"}, "There is no base 'nobody'"),
        ("", {"intensity_maximum": 2.0}, "--intensity_maximum must be 255, or 1"),
    ],
)
def test_what_can_not_be_imported_is_one_clear_error(bases, what, options, message, tmp_path):
    settings, base = bases["tiny"]
    torch.save(_change(checkpoint(base, "published_adapters", 64), what), tmp_path / "found.pth")
    with pytest.raises(WeightsError, match=message):
        read_published(tmp_path / "found.pth", **{**settings, **options})


def test_a_checkpoint_that_does_not_say_its_size_asks_for_it(bases, tmp_path):
    settings, base = bases["tiny"]
    torch.save(checkpoint(base, "published_lora", 64), tmp_path / "found.pth")
    with pytest.raises(WeightsError, match=r"does not say the size of its images. Pass .* as --image_size"):
        read_published(tmp_path / "found.pth", **settings)


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", "cut"])
def test_a_missing_or_damaged_file_is_one_line_and_writes_nothing(bases, content, capsys, tmp_path):
    _, base = bases["tiny"]
    path = tmp_path / "found.pth"
    if content is not None:
        torch.save(checkpoint(base, "published_adapters", 64), path)
        path.write_bytes(path.read_bytes()[:50_000] if content == "cut" else content)
    assert main(["import", str(path), "--base=tiny", str(tmp_path / "model.pt")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "mobile", "adaptation": "published_adapters"}, "goes with a ViT base"),
        ({"base": "tiny", "adaptation": "published_mobile_lora"}, "goes with a TinyViT base"),
        ({"base": "tiny", "adaptation": "published_efficient_lora"}, "goes with an EfficientSAM base, not with 'tiny'"),
        ({"base": "medsam", "adaptation": "published_lora"}, "reads SAM's pixel statistics, not with 'medsam'"),
        ({"base": "tiny", "adaptation": "published_lora", "spatial_dims": 3}, "is for images"),
        ({"base": "tiny", "adaptation": "published_lora", "train_decoder": "frozen"}, "train_decoder must be whole"),
    ],
)
def test_what_a_published_adaptation_does_not_go_with_is_named(bases, settings, message):
    with pytest.raises(SettingError, match=message):
        build_medsa(**settings, pretrained=False)
