from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from medsa_nets.build import build_medsa
from medsa_nets.errors import WeightsError
from medsa_nets.layers import HYPER_PROMPTING_FORMS
from medsa_nets.networks.identity import decode_identity, encode_identity
from medsa_nets.weights import BASES

SIZE = 256
SETS = 3
KINDS = ["points", "boxes", "points+boxes", "masks", "points+masks", "boxes+masks", "none"]


def make_prompts(kinds, batch=2, sets=SETS, points=3):
    """Prompts in (row, column) order, as keyword arguments of the network."""
    prompts = {}
    if "points" in kinds:
        prompts["point_coords"] = torch.rand(batch, sets, points, 2) * SIZE
        prompts["point_labels"] = torch.randint(-1, 2, (batch, sets, points))
        prompts["point_labels"][:, :, 0] = 1
    if "boxes" in kinds:
        corner = torch.rand(batch, sets, 2) * SIZE / 2
        prompts["boxes"] = torch.cat([corner, corner + 20 + torch.rand(batch, sets, 2) * 80], dim=-1)
    if "masks" in kinds:
        prompts["masks"] = torch.randn(batch, sets, SIZE // 4, SIZE // 4)
    return prompts


def to_xy(prompts):
    """The same points and boxes in (x, y) order."""
    points, boxes = prompts.get("point_coords"), prompts.get("boxes")
    return (
        None if points is None else torch.stack([points[..., 1], points[..., 0]], dim=-1),
        None if boxes is None else torch.stack([boxes[..., 1], boxes[..., 0], boxes[..., 3], boxes[..., 2]], dim=-1),
    )


@pytest.fixture
def build(tiny_base, tiny_file):
    """Builds MedSA on the tiny base; settings as of ``build_medsa``."""

    def build(**settings):
        return build_medsa("tiny", **{"sam_checkpoint": str(tiny_file), "adapter_dim": 8, **settings}).eval()

    return build


@pytest.fixture
def network(build):
    return build()


# ---------------------------------------------------------------- the frozen network against the references


@pytest.mark.parametrize("hyper_prompting", HYPER_PROMPTING_FORMS)
@pytest.mark.parametrize("kinds", KINDS)
def test_fresh_network_equals_segment_anything(build, tiny_sam, kinds, hyper_prompting):
    network = build(hyper_prompting=hyper_prompting)
    image = torch.rand(2, 3, SIZE, SIZE)
    prompts = make_prompts(kinds)
    points, boxes = to_xy(prompts)
    records = []
    for b in range(2):
        record = {"image": 255.0 * image[b], "original_size": (SIZE, SIZE)}
        if points is not None:
            record.update(point_coords=points[b], point_labels=prompts["point_labels"][b])
        if boxes is not None:
            record["boxes"] = boxes[b]
        if "masks" in prompts:
            record["mask_inputs"] = prompts["masks"][b].unsqueeze(1)
        records.append(record)
    with torch.no_grad():
        actual = network(image, **prompts)
        for b, output in enumerate(tiny_sam(records, multimask_output=False)):
            expected = tiny_sam.postprocess_masks(output["low_res_logits"], (SIZE, SIZE), (SIZE, SIZE))
            assert actual[b].shape == (1 if kinds == "none" else SETS, SIZE, SIZE)
            torch.testing.assert_close(actual[b], expected[:, 0], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def sam_model(randomise):
    transformers = pytest.importorskip("transformers")
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 32,
            "mlp_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "global_attn_indexes": [1],
            "image_size": SIZE,
        },
        prompt_encoder_config={"image_size": SIZE},
        mask_decoder_config={"layer_norm_eps": 1e-5},  # as the published network has; SamModel's default is 1e-6
    )
    model = randomise(transformers.SamModel(config))
    # One matrix under two names, as in the published models.
    model.prompt_encoder.shared_embedding.positional_embedding.data.copy_(
        model.shared_image_embedding.positional_embedding
    )
    return model


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def hugging_face_file(request, sam_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging_face")
    if request.param == "safetensors":
        sam_model.save_pretrained(folder)
        return folder / "model.safetensors"
    torch.save(sam_model.state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_hugging_face_names_are_ours(build, hugging_face_file):
    from medsa_nets.weights import read_base_file

    state, expected = read_base_file(hugging_face_file), build().base_state_dict()
    assert set(state) == set(expected)
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in expected.items()}


@pytest.mark.parametrize("kinds", ["points", "boxes", "points+boxes", "masks", "points+masks"])
def test_fresh_network_equals_hugging_face_sam_model(build, hugging_face_file, sam_model, kinds):
    network = build(sam_checkpoint=str(hugging_face_file))
    image = torch.rand(2, 3, SIZE, SIZE)
    prompts = make_prompts(kinds, sets=1 if "masks" in kinds else SETS)  # SamModel takes one mask an image
    points, boxes = to_xy(prompts)
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    with torch.no_grad():
        low = sam_model(
            pixel_values=(image - mean) / std,
            input_points=points,
            input_labels=prompts.get("point_labels"),
            input_boxes=boxes,
            input_masks=prompts.get("masks"),
            multimask_output=False,
        ).pred_masks
        expected = nn.functional.interpolate(low.flatten(0, 1), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        actual = network(image, **prompts)
    torch.testing.assert_close(actual.flatten(0, 1), expected[:, 0], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- prompts and classes


@pytest.mark.parametrize("kinds", KINDS[:-1])
def test_each_prompt_set_is_segmented_by_itself(network, perturb_adapters, kinds):
    perturb_adapters(network)
    image, prompts = torch.rand(2, 3, SIZE, SIZE), make_prompts(kinds)
    with torch.no_grad():
        embedding = network.encode_image(image)
        together = network.decode(embedding, **prompts)
        assert torch.equal(network(image, **prompts), together)
        for b in range(2):
            for k in range(SETS):
                one = {name: tensor[b : b + 1, k : k + 1] for name, tensor in prompts.items()}
                alone = network.decode(embedding[b : b + 1], **one)
                torch.testing.assert_close(alone[0, 0], together[b, k], atol=1e-4, rtol=1e-4)


def test_automatic_mode_gives_every_class_and_classes_choose_among_them(build, perturb_adapters):
    network = perturb_adapters(build(num_classes=4))
    embedding = torch.randn(2, 256, 16, 16)
    with torch.no_grad():
        every = network.decode(embedding)
        chosen = network.decode(embedding, classes=torch.tensor([3, 1]))
    assert every.shape == (2, 4, SIZE, SIZE)
    assert (every[:, 0] - every[:, 1]).abs().max() > 1e-2
    torch.testing.assert_close(chosen, every[:, [3, 1]], atol=1e-4, rtol=1e-4)


def test_fresh_classes_are_alike(build):
    every = build(num_classes=3).decode(torch.randn(1, 256, 16, 16))
    torch.testing.assert_close(every[:, 1:], every[:, :1].expand(-1, 2, -1, -1), atol=1e-5, rtol=1e-5)


def test_classes_condition_prompts(build, perturb_adapters):
    network = perturb_adapters(build(num_classes=2))
    embedding, prompts = torch.randn(1, 256, 16, 16), make_prompts("points", batch=1, sets=2)
    with torch.no_grad():
        plain = network.decode(embedding, **prompts)
        forward = network.decode(embedding, **prompts, classes=torch.tensor([0, 1]))
        network.class_embeddings.zero_()
        zeroed = network.decode(embedding, **prompts, classes=torch.tensor([0, 1]))
    assert (forward - plain).abs().max() > 1e-2
    torch.testing.assert_close(zeroed, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"point_coords": torch.rand(1, 2, 3, 2)}, "without point_labels"),
        ({"point_coords": torch.rand(1, 2, 2), "point_labels": torch.ones(1, 2)}, r"\(B, K, P, 2\)"),
        ({"point_coords": torch.rand(1, 2, 3, 3), "point_labels": torch.ones(1, 2, 3)}, r"\(B, K, P, 2\)"),
        ({"point_coords": torch.rand(1, 2, 3, 2), "point_labels": torch.ones(1, 2, 4)}, "point_labels"),
        ({"boxes": torch.rand(1, 4)}, r"boxes must be \(B, K, 4\)"),
        ({"boxes": torch.rand(1, 1, 6)}, r"boxes must be \(B, K, 4\)"),
        ({"masks": torch.rand(1, 64, 64)}, r"masks must be \(B, K, 64, 64\)"),
        ({"boxes": torch.rand(1, 2, 4), "classes": torch.tensor([0])}, "one class for each of 2 prompt sets"),
    ],
)
def test_prompts_of_another_shape_are_refused(network, prompts, message):
    with pytest.raises(ValueError, match=message):
        network.decode(torch.randn(1, 256, 16, 16), **prompts)


@pytest.mark.parametrize("shape", [(3, 256, 256), (1, 1, 256, 256), (1, 3, 250, 256), (1, 3, 256, 250)])
def test_images_of_another_shape_are_refused(network, shape):
    with pytest.raises(ValueError, match="image"):
        network.encode_image(torch.rand(shape))


@pytest.mark.parametrize("training", [False, True])
def test_mixed_precision_stays_close_to_single_precision(network, perturb_adapters, training):
    perturb_adapters(network).train(training)
    image, prompts = torch.rand(1, 3, SIZE, SIZE), make_prompts("points+boxes", batch=1)
    with torch.set_grad_enabled(training):
        expected = network(image, **prompts)
        with torch.autocast("cpu", torch.bfloat16):
            actual = network(image, **prompts)
    assert (actual.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


# ---------------------------------------------------------------- what trains


@pytest.mark.parametrize("hyper_prompting", HYPER_PROMPTING_FORMS)
@pytest.mark.parametrize("kinds", ["points", "none"])
def test_trained_adapters_change_the_output(build, perturb_adapters, kinds, hyper_prompting):
    network = build(hyper_prompting=hyper_prompting)
    image, prompts = torch.rand(1, 3, SIZE, SIZE), make_prompts(kinds, batch=1)
    with torch.no_grad():
        before = network(image, **prompts)
        assert (perturb_adapters(network)(image, **prompts) - before).abs().max() > 1e-2


def _backward(network):
    image = torch.rand(1, 3, SIZE, SIZE)
    embedding = network.encode_image(image)
    loss = (
        network.decode(embedding).square().mean()
        + network.decode(embedding, **make_prompts("points", batch=1)).square().mean()
    )
    loss.backward()


@pytest.mark.parametrize("train_norms", [False, True])
@pytest.mark.parametrize("hyper_prompting", HYPER_PROMPTING_FORMS)
def test_gradient_reaches_every_trained_parameter_and_none_of_the_base(
    build, perturb_adapters, tiny_sam, hyper_prompting, train_norms
):
    network = perturb_adapters(build(hyper_prompting=hyper_prompting, train_norms=train_norms, num_classes=2)).train()
    _backward(network)
    reached = {n for n, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    base = {n for n, _ in tiny_sam.named_parameters()}
    norms = {
        f"{prefix}.{name}"
        for prefix, module in tiny_sam.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name in ("weight", "bias")
    }
    ours = {n for n, _ in network.named_parameters()} - base
    assert len(ours) > 20
    assert norms
    assert reached == (ours | norms if train_norms else ours)
    assert network.trained_names == reached


def test_a_fresh_adapter_can_learn(build):
    """The up-projections are zero at the start, but their gradients are not."""
    network = build().train()
    _backward(network)
    ups = [p for n, p in network.named_parameters() if ".up." in n]
    assert len(ups) == 20  # 2 blocks x (2 encoder + 3 decoder adapters) x (weight, bias)
    assert all(p.grad.abs().sum() > 0 for p in ups)


@pytest.mark.parametrize("kinds", ["points", "none"])
def test_training_and_inference_give_the_same_masks(network, perturb_adapters, kinds):
    perturb_adapters(network)
    image, prompts = torch.rand(1, 3, SIZE, SIZE), make_prompts(kinds, batch=1)
    with torch.no_grad():
        expected = network(image, **prompts)
    torch.testing.assert_close(network.train()(image, **prompts), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- checkpoints


def _output(network):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return network.eval()(torch.rand(1, 3, SIZE, SIZE, generator=generator))


def _save_and_load(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True), buffer.getbuffer().nbytes


@pytest.fixture
def trained(build, perturb_adapters):
    return perturb_adapters(build(num_classes=2))


@pytest.mark.parametrize("train_norms", [False, True])
def test_state_dict_holds_what_trains_and_the_identity(build, train_norms):
    network = build(train_norms=train_norms)
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert set(network.state_dict()) == trainable | {"identity", "task"}
    assert any("norm" in name for name in trainable) == train_norms


def test_adapter_file_loads_strictly_into_another_network_on_the_same_base(build, trained):
    state, _ = _save_and_load(trained.state_dict())
    other = build(num_classes=2)
    assert not torch.allclose(_output(other), _output(trained), atol=1e-3)
    result = other.load_state_dict(state, strict=True)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert torch.equal(_output(other), _output(trained))


def test_incomplete_and_foreign_entries_are_refused_when_strict(build, trained):
    state = trained.state_dict()
    del state["mask_decoder.transformer.layers.0.mlp_adapter.up.weight"]
    state["mask_decoder.colour"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*mlp_adapter\.up\.weight.*Unexpected.*mask_decoder\.colour"):
        build(num_classes=2).load_state_dict(state)


def test_loading_leaves_the_file_s_dictionary_as_it_was(build, trained):
    state = trained.state_dict()
    names = list(state)
    build(num_classes=2).load_state_dict(state)
    assert list(state) == names


def test_adapter_of_another_base_is_refused(build, trained, make_sam, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(make_sam(SIZE, seed=1).state_dict(), path)
    other = build(sam_checkpoint=str(path), num_classes=2)
    before = {name: tensor.clone() for name, tensor in other.full_state_dict().items()}
    ours, theirs = (decode_identity(n.identity)["sha256"] for n in (other, trained))
    assert ours != theirs
    with pytest.raises(WeightsError, match=f"belongs to the base 'tiny' .*{theirs[:12]}.*built on 'tiny'.*{ours[:12]}"):
        other.load_state_dict(trained.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.full_state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 1.0}, "scale=0.5 .here 1.0."),
        ({"hyper_prompting": "weights"}, "hyper_prompting='additive' .here 'weights'."),
        ({"num_classes": 3}, "num_classes=2 .here 3."),
        ({"adapter_dim": 16}, "adapter_dim=8 .here 16."),
        ({"train_norms": True}, "train_norms=False .here True."),
        ({"scale": 1.0, "adapter_dim": 16}, "adapter_dim=8.*scale=0.5|scale=0.5.*adapter_dim=8"),
    ],
)
def test_adapter_of_other_settings_is_refused(build, trained, settings, message):
    with pytest.raises(WeightsError, match=f"other settings: .*({message})"):
        build(**{"num_classes": 2, **settings}).load_state_dict(trained.state_dict())


def test_a_file_that_is_no_adapter_is_refused(network, tiny_sam):
    with pytest.raises(WeightsError, match=r"no MedSA adapter.*'identity'.*sam_checkpoint"):
        network.load_state_dict(tiny_sam.state_dict())


@pytest.mark.parametrize(
    "identity",
    [
        torch.zeros(512, dtype=torch.uint8),
        torch.full((512,), 255, dtype=torch.uint8),
        torch.tensor(list(b"[1, 2]".ljust(512)), dtype=torch.uint8),
        torch.tensor(list(b'{"base": "tiny"}'.ljust(512)), dtype=torch.uint8),
        torch.randn(512),
    ],
)
def test_a_damaged_identity_is_refused(network, identity):
    with pytest.raises(WeightsError, match="'identity' is damaged"):
        network.load_state_dict({**network.state_dict(), "identity": identity})


def test_identity_survives_its_encoding_and_has_one_length():
    identity = {"base": "vit_b", "sha256": 64 * "0", "adapter": {"scale": 0.5, "adapter_dim": None}}
    assert decode_identity(encode_identity(identity)) == identity
    assert encode_identity(identity).shape == encode_identity({"base": ""}).shape
    with pytest.raises(ValueError, match=r"identity takes .* bytes"):
        encode_identity({"base": 1000 * "x"})


def test_full_state_dict_holds_everything_and_loads(build, trained, tiny_sam):
    full = trained.full_state_dict()
    assert set(full) == {n for n, _ in trained.named_parameters()} | {"identity", "task"} | set(tiny_sam.state_dict())
    expected = _output(trained)
    state, _ = _save_and_load(full)
    other = build(num_classes=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state, strict=True)
    assert torch.equal(_output(other), expected)


def test_base_state_dict_is_what_segment_anything_saves(trained, tiny_sam):
    base, expected = trained.base_state_dict(), tiny_sam.state_dict()
    assert set(base) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.items())


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential], ids=["DataParallel", "Sequential"])
def test_a_wrapped_network_saves_and_loads(build, trained, wrap):
    wrapped = wrap(trained)
    prefix = "module." if wrap is nn.DataParallel else "0."
    state, _ = _save_and_load(wrapped.state_dict())
    assert set(state) == {f"{prefix}{name}" for name in trained.state_dict()}
    inner = build(num_classes=2)
    wrap(inner).load_state_dict(state, strict=True)
    assert torch.equal(_output(inner), _output(trained))
    with pytest.raises(WeightsError, match="other settings"):
        wrap(build(num_classes=2, scale=1.0)).load_state_dict(state, strict=True)


@pytest.mark.parametrize("key", ["model", None], ids=["under a name", "bare"])
def test_monai_checkpoint_loader_restores_an_adapter(build, trained, tmp_path, key):
    from ignite.engine import Engine
    from monai.handlers import CheckpointLoader

    path = tmp_path / "model.pt"
    torch.save(trained.state_dict() if key is None else {key: trained.state_dict()}, path)
    other = build(num_classes=2)
    CheckpointLoader(str(path), {"model": other}, strict=True)(Engine(lambda engine, batch: None))
    assert torch.equal(_output(other), _output(trained))


def test_monai_copy_model_state_copies_an_adapter(build, trained):
    from monai.networks.utils import copy_model_state

    other = build(num_classes=2)
    _, changed, unchanged = copy_model_state(other, trained)
    assert set(changed) == set(trained.state_dict())
    assert unchanged == []
    assert torch.equal(_output(other), _output(trained))


def test_monai_copy_model_state_does_not_slip_past_the_identity(build, trained):
    from monai.networks.utils import copy_model_state

    with pytest.raises(WeightsError, match="other settings"):
        copy_model_state(build(num_classes=2, scale=1.0), trained)


@pytest.mark.parametrize("hyper_prompting", HYPER_PROMPTING_FORMS)
def test_an_adapter_file_of_lite_medsam_is_small(hyper_prompting):
    network = build_medsa("lite_medsam", pretrained=False, hyper_prompting=hyper_prompting, adapter_dim=48)
    _, size = _save_and_load(network.state_dict())
    assert size < 5e6


def test_the_default_adapter_file_of_lite_medsam_is_small():
    _, size = _save_and_load(build_medsa("lite_medsam", pretrained=False).state_dict())
    assert size < 5e6


# ---------------------------------------------------------------- TorchScript

SCRIPT_KINDS = ["none", "points", "boxes"]


def _script(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(network)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)


def test_scripted_lite_medsam_equals_eager(perturb_adapters, randomise):
    network = perturb_adapters(randomise(build_medsa("lite_medsam", pretrained=False, num_classes=2)))
    scripted = _script(network)
    image = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        embedding = network.encode_image(image)  # once, for it takes most of the time
        torch.testing.assert_close(scripted(image), network.decode(embedding), atol=1e-4, rtol=1e-4)
        for kinds in SCRIPT_KINDS:
            prompts = make_prompts(kinds, batch=1, sets=2)
            actual, expected = (n.decode(embedding, **prompts) for n in (scripted, network))
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hyper_prompting", HYPER_PROMPTING_FORMS)
def test_scripted_vit_equals_eager(build, perturb_adapters, hyper_prompting):
    network = perturb_adapters(build(hyper_prompting=hyper_prompting, num_classes=2))
    scripted = _script(network)
    with torch.no_grad():
        for kinds in [*SCRIPT_KINDS, "points+boxes", "masks"]:
            image, prompts = torch.rand(2, 3, SIZE, SIZE), make_prompts(kinds)
            torch.testing.assert_close(scripted(image, **prompts), network(image, **prompts), atol=1e-4, rtol=1e-4)


def test_every_base_is_described_with_the_statistics_it_was_trained_with():
    """SAM's are ImageNet's (arXiv 2304.02643); MedSAM and LiteMedSAM read intensities in [0, 1] as they are."""
    for name, base in BASES.items():
        with torch.device("meta"):
            network = build_medsa(name, pretrained=False)
        assert network.pixel_mean.shape == network.pixel_std.shape == (1, 3, 1, 1)
        plain = name in ("medsam", "lite_medsam")
        assert base.pixel_mean == pytest.approx((0, 0, 0) if plain else (0.485, 0.456, 0.406), abs=1e-3)
        assert base.pixel_std == pytest.approx((1, 1, 1) if plain else (0.229, 0.224, 0.225), abs=1e-3)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_sets_that_are_answered_by_turns_or_computed_twice_give_the_same(spatial_dims, perturb_adapters):
    network = perturb_adapters(build_medsa(pretrained=False, spatial_dims=spatial_dims, num_classes=3))
    image = torch.rand(1, 3, 64, 64, *[2] * (spatial_dims - 2))
    points, labels = 8.0 * torch.rand(1, 3, 2, spatial_dims), torch.ones(1, 3, 2, dtype=torch.long)
    with torch.no_grad():
        embedding = network.encode_image(image)
        at_once = network.decode(embedding, points, labels), network.decode(embedding)
        network.class_chunk = 2
        for found, expected in zip((network.decode(embedding, points, labels), network.decode(embedding)), at_once):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = []
    for network.checkpointing in (False, True):
        network.train().zero_grad()
        network.decode(embedding, points, labels).square().mean().backward()
        gradients.append([p.grad for p in network.mask_decoder.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
