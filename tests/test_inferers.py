from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.inferers import SlidingWindowInferer

from medsa_nets.build import build_medsa
from medsa_nets.inferers import (
    AllClassesInferer,
    ClassesInferer,
    EmbeddingCache,
    MainComponentsInferer,
    MirrorInferer,
    PromptInferer,
    SlabInferer,
    SpreadInferer,
    adapter_key,
    obey,
    rebuilt,
    shared_cache,
    slab_inferer,
    tensor_sha256,
)
from medsa_nets.prompts import Prompts, with_prompts
from medsa_nets.prompts.earlier import as_earlier

pytestmark = pytest.mark.usefixtures("small_base")


@pytest.fixture(scope="module")
def network(perturb_adapters):
    torch.manual_seed(0)
    network = build_medsa("small", pretrained=False, spatial_dims=3, num_classes=2, adapter_dim=8).eval()
    return perturb_adapters(network, std=0.05)


@pytest.fixture(scope="module")
def flat():
    """A network whose slices don't see each other: slabs change nothing."""
    torch.manual_seed(0)
    return build_medsa("small", pretrained=False, spatial_dims=3, num_classes=2, adapter_dim=8).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_an_adapter_without_click_feedback_has_one_name_whatever_the_branch_was_drawn_with(network):
    keys = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        settings = {"spatial_dims": 3, "num_classes": 2, "adapter_dim": 8, "click_feedback": True}
        other = build_medsa("small", pretrained=False, **settings)
        other.load_state_dict(network.state_dict())
        keys.append(adapter_key(other))
    assert keys[0] == keys[1]
    other.click_feedback.to_logits[-1].weight.add_(1.0)
    assert adapter_key(other) != keys[0]


def click(z: float = 1.0, classes: list[int] | None = None) -> Prompts:
    named = None if classes is None else torch.tensor(classes)
    return Prompts(points=torch.tensor([[[20.0, 30.0, z]]]), labels=torch.ones(1, 1), classes=named)


def count_encodings(network, function) -> int:
    calls = []
    handle = network.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    function()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("depth", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_slabs_give_what_one_pass_gives_where_slices_do_not_see_each_other(flat, depth, overlap):
    image = torch.rand(1, 1, 32, 32, depth)
    expected = flat(image)
    found = SlabInferer(slab_depth=4, overlap=overlap)(image, flat)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_volume_within_one_slab_is_one_pass(network, depth):
    image = torch.rand(2, 1, 32, 32, depth)
    torch.testing.assert_close(SlabInferer(slab_depth=6)(image, network), network(image), atol=1e-5, rtol=1e-5)
    prompts = [click(0.0)] * 2
    expected = network(image, **Prompts.batched(prompts))
    found = SlabInferer(slab_depth=6)(image, network, prompts=prompts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("depth", "slab", "overlap"), [(10, 4, 0.5), (11, 4, 0.25), (1000, 16, 0.25), (17, 16, 0.9)])
def test_slabs_cover_every_slice_and_end_with_the_volume(depth, slab, overlap):
    starts = SlabInferer(slab_depth=slab, overlap=overlap).starts(depth)
    covered = {z for start in starts for z in range(start, start + slab)}
    assert covered == set(range(depth))
    assert starts == sorted(set(starts))


@pytest.mark.parametrize("prompts", [Prompts(), click(5.0), Prompts(boxes=torch.tensor([[4.0, 5, 2, 20, 25, 6]]))])
def test_results_do_not_depend_on_how_many_slabs_are_computed_at_once(network, prompts):
    image = torch.rand(1, 1, 32, 32, 11)
    one = SlabInferer(slab_depth=4, overlap=0.5, sw_batch_size=1)(image, network, prompts=prompts)
    for size in (2, 3, 16):
        many = SlabInferer(slab_depth=4, overlap=0.5, sw_batch_size=size)(image, network, prompts=prompts)
        torch.testing.assert_close(many, one, atol=1e-4, rtol=1e-4)


def test_clicks_are_counted_from_the_first_slice_of_each_slab(flat):
    image = torch.rand(1, 1, 32, 32, 9)
    found = SlabInferer(slab_depth=4, overlap=0.0)(image, flat, prompts=click(6.0))
    torch.testing.assert_close(found, flat(image, **click(6.0).arguments()), atol=1e-4, rtol=1e-4)
    box = Prompts(boxes=torch.tensor([[4.0, 5, 3, 20, 25, 6]]))
    found = SlabInferer(slab_depth=4, overlap=0.0)(image, flat, prompts=box)
    torch.testing.assert_close(found, flat(image, **box.arguments()), atol=1e-4, rtol=1e-4)


def test_any_size_in_plane_is_padded_and_cut_again(network):
    image = torch.rand(1, 1, 30, 37, 3)
    found = SlabInferer(slab_depth=4)(image, network)
    assert found.shape == (1, 2, 30, 37, 3)
    padded = torch.nn.functional.pad(image, (0, 0, 0, 3, 0, 2))
    torch.testing.assert_close(found, network(padded)[:, :, :30, :37])


def test_each_slab_is_encoded_once_whatever_the_prompts(network):
    image = torch.rand(1, 1, 32, 32, 10)
    inferer = SlabInferer(slab_depth=4, overlap=0.5)
    slabs = len(inferer.starts(10))
    many = Prompts(points=torch.rand(5, 1, 3) * 10, labels=torch.ones(5, 1))
    for prompts in (Prompts(), click(), many):
        assert count_encodings(network, lambda p=prompts: inferer(image, network, prompts=p)) == slabs


def test_a_second_click_runs_the_decoder_alone_and_gives_the_same_bit_for_bit(network):
    image = MetaTensor(torch.rand(1, 1, 32, 32, 10))
    cached = SlabInferer(slab_depth=4, overlap=0.5, sw_batch_size=2, cache=EmbeddingCache())
    fresh = SlabInferer(slab_depth=4, overlap=0.5, sw_batch_size=2)
    first = cached(image, network, prompts=click(1.0))
    assert torch.equal(first, fresh(image, network, prompts=click(1.0)))
    results = []
    assert count_encodings(network, lambda: results.append(cached(image, network, prompts=click(7.0)))) == 0
    assert torch.equal(results[0], fresh(image, network, prompts=click(7.0)))
    assert torch.equal(cached(image, network), fresh(image, network))
    assert (cached.cache.hits, cached.cache.misses) == (2, 1)


def test_another_image_window_slab_or_adapter_is_encoded_anew(network, flat):
    image = torch.rand(1, 1, 32, 32, 5)
    cache = EmbeddingCache()
    inferer = SlabInferer(slab_depth=4, cache=cache)
    inferer(image, network)
    for other_image, depth in ((image * 0.9, 4), (image, 3)):
        other = SlabInferer(slab_depth=depth, cache=cache)
        assert count_encodings(network, lambda o=other, i=other_image: o(i, network)) > 0
    assert count_encodings(network, lambda: inferer(image, network)) == 0
    assert count_encodings(network, lambda: inferer(image, network, image_key="a name")) > 0
    assert count_encodings(network, lambda: inferer(image, network, image_key="a name")) == 0
    assert count_encodings(flat, lambda: inferer(image, flat)) > 0


def test_the_cache_is_bounded_and_forgets_the_least_recently_used():
    cache = EmbeddingCache(max_bytes=1000)
    slab = torch.zeros(1, 100)  # 400 bytes
    cache.put("a", [slab])
    cache.put("b", [slab])
    assert cache.get("a") is not None
    cache.put("c", [slab])
    assert cache.bytes <= 1000
    assert cache.get("b") is None
    assert cache.get("a") is not None
    cache.put("large", [slab, slab, slab])
    assert cache.get("large") is None
    assert len(cache) == 2
    cache.clear()
    assert cache.bytes == 0


def test_a_volume_too_large_for_the_cache_is_segmented_all_the_same(network):
    image = torch.rand(1, 1, 32, 32, 9)
    inferer = SlabInferer(slab_depth=4, cache=EmbeddingCache(max_bytes=100_000))
    torch.testing.assert_close(inferer(image, network), SlabInferer(slab_depth=4)(image, network))
    assert len(inferer.cache) == 0


def test_hashes_tell_values_shapes_and_types_apart():
    a = torch.arange(6.0)
    assert tensor_sha256(a) == tensor_sha256(a.clone())
    others = [a.reshape(2, 3), a.double(), a + 1, a.int()]
    assert len({tensor_sha256(t) for t in (a, *others)}) == 5


def test_plain_sliding_windows_work_in_automatic_mode(network):
    image = torch.rand(1, 1, 32, 32, 10)
    found = SlidingWindowInferer((32, 32, 4), sw_batch_size=2, overlap=0.5, mode="gaussian")(image, network)
    assert found.shape == (1, 2, 32, 32, 10)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slab_depth": 0}, "slab_depth"),
        ({"others": "none"}, "others"),
        ({"overlap": 1.0}, "overlap"),
        ({"sw_batch_size": 0}, "sw_batch_size"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SlabInferer(**settings)


def test_wrong_networks_and_volumes_are_named(network):
    with pytest.raises(ValueError, match="spatial_dims=3"):
        SlabInferer()(torch.rand(1, 1, 8, 8, 8), torch.nn.Identity())
    with pytest.raises(ValueError, match=r"\(B, C, H, W, D\)"):
        SlabInferer()(torch.rand(1, 1, 8, 8), network)


def two_clicks() -> Prompts:
    points = torch.tensor([[[20.0, 30.0, 1.0]], [[5.0, 8.0, 9.0]]])
    return Prompts(points=points, labels=torch.ones(2, 1), classes=torch.tensor([0, 2]))


@pytest.fixture(scope="module")
def three(perturb_adapters):
    torch.manual_seed(1)
    network = build_medsa("small", pretrained=False, spatial_dims=3, num_classes=3, adapter_dim=8).eval()
    return perturb_adapters(network, std=0.05)


def test_prompts_that_travel_with_the_volume_are_taken(network):
    image = MetaTensor(torch.rand(1, 1, 32, 32, 5))
    inferer = SlabInferer(slab_depth=4)
    expected = inferer(image, network, prompts=click(classes=[1]))
    image = with_prompts(image[0], click(classes=[1]))[None]
    assert torch.equal(inferer(image, network), expected)
    assert not torch.equal(inferer(image.as_tensor(), network), expected)
    assert torch.equal(inferer(image, network, prompts=Prompts()), inferer(image.as_tensor(), network))


def test_each_volume_of_a_batch_is_answered_by_its_own_prompts(network):
    images = MetaTensor(torch.rand(2, 1, 32, 32, 5))
    inferer = SlabInferer(slab_depth=4)
    items = [with_prompts(MetaTensor(image), click(z)) for image, z in zip(images.as_tensor(), (1.0, 4.0))]
    found = inferer(list_data_collate(items), network)
    assert torch.equal(found, torch.cat([inferer(item[None], network) for item in items]))
    with pytest.raises(ValueError, match="each of 2 images, got them for 1"):
        inferer(images, network, prompts=click())


def test_classes_without_prompt_stay_as_the_automatic_pass_gave_them(three):
    image = torch.rand(1, 1, 32, 32, 11)
    plain = SlabInferer(slab_depth=4)
    automatic = plain(image, three)
    clicked = plain(image, three, prompts=two_clicks())
    cache = EmbeddingCache()
    inferer = SlabInferer(slab_depth=4, every_class=True, others="automatic", cache=cache)
    found = inferer(image, three, prompts=two_clicks())
    assert torch.equal(found[:, 1], automatic[:, 1])
    assert torch.equal(found[:, [0, 2]] > 0, clicked > 0)
    taken = (clicked > 0).any(dim=1)
    assert taken.any()
    assert not taken.all()
    assert torch.equal(found.argmax(dim=1)[taken], torch.tensor([0, 2])[clicked.argmax(dim=1)][taken])
    assert torch.equal(inferer(image, three), automatic)
    assert count_encodings(three, lambda: inferer(image, three, prompts=two_clicks())) == 0
    assert torch.equal(inferer(image, three, prompts=two_clicks()), found)


@pytest.mark.parametrize("spread", [False, True])
def test_classes_alone_are_segmented_automatically_in_their_channels(three, spread):
    image = torch.rand(1, 1, 32, 32, 6)
    found = SlabInferer(slab_depth=4, every_class=True, spread=spread)(
        image, three, prompts=Prompts(classes=torch.tensor([0, 2]))
    )
    expected = SlabInferer(slab_depth=4)(image, three)
    torch.testing.assert_close(found[:, [0, 2]], expected[:, [0, 2]], atol=1e-4, rtol=1e-4)
    assert (found[:, 1] == -20.0).all()


def test_a_prompt_spreads_from_its_slab_as_far_as_its_mask():
    image = torch.rand(1, 1, 32, 32, 23)
    decoded = []

    def decode(embedding, point_coords, point_labels, classes=None):
        """A mask on the slices 5 to 12 of the volume, wherever the click lies."""
        first = 8 - int(point_coords[0, 0, 0, 2])  # the click's slice, 8, as the slab counts it
        decoded.append(first)
        z = torch.arange(4) + first
        return torch.where((z >= 5) & (z <= 12), 5.0, -5.0).expand(1, 1, 32, 32, 4)

    network = build_medsa("small", pretrained=False, spatial_dims=3, num_classes=2, adapter_dim=8).eval()
    network.decode = decode
    inferer = SlabInferer(slab_depth=4, overlap=0.25, spread=True)
    assert inferer.starts(23) == [0, 3, 6, 9, 12, 15, 18, 19]
    found = inferer(image, network, prompts=click(8.0))
    assert sorted(decoded) == [3, 6, 9, 12]
    positive = (found > 0)[0, 0].any(0).any(0)
    assert positive.nonzero().flatten().tolist() == list(range(5, 13))
    assert (found[..., :3] == -20.0).all()
    assert (found[..., 16:] == -20.0).all()


@pytest.mark.parametrize("overlap", [0.25, 0.0])
def test_the_next_slab_gets_a_click_in_the_middle_of_the_mask_where_the_two_meet(overlap):
    image = torch.rand(1, 1, 32, 32, 20)
    asked = {}

    def decode(embedding, point_coords, point_labels, classes=None):
        """A mask of rows 4 to 12 and columns 10 to 20 on the slices 2 to 16, wherever the click lies."""
        first = 8 - int(point_coords[0, 0, 0, 2])
        clicks = [(*c.tolist(), int(label)) for c, label in zip(point_coords[0, 0], point_labels[0, 0])]
        asked[first] = [(row, column, z + first, label) for row, column, z, label in clicks]
        z = torch.arange(4) + first
        mask = torch.full((1, 1, 32, 32, 4), -5.0)
        mask[:, :, 4:13, 10:21] = torch.where((z >= 2) & (z <= 16), 5.0, -5.0)
        return mask

    network = build_medsa("small", pretrained=False, spatial_dims=3, num_classes=2, adapter_dim=8).eval()
    network.decode = decode
    inferer = SlabInferer(slab_depth=4, overlap=overlap, spread=True)
    found = inferer(image, network, prompts=click(8.0))
    user = asked[next(first for first, clicks in asked.items() if len(clicks) == 1)][0]
    for first, (own, *handed_on) in asked.items():
        assert own == user
        if handed_on:
            ((row, column, z, label),) = handed_on
            assert (row, label) == (8, 1)
            assert 14 <= column <= 16
            outwards = 1 if first > 8 else -1
            assert first - 1 <= z <= first + 4
            assert (z - first) * outwards <= 1, "on the side of the slab that it came from"
        else:
            assert first <= 8 < first + 4
    assert len(asked) > 4
    assert (found > 0)[0, 0].any(0).any(0).nonzero().flatten().tolist() == list(range(2, 17))


@pytest.mark.parametrize(
    ("automatic", "expected"),
    [
        (range(5, 13), range(3, 16)),  # slabs from 3 and 12 meet others where the automatic mask ends
        (range(23), range(23)),
        (range(0), range(23)),  # it knows nothing of the class
        (range(18, 23), range(23)),  # nor of what was clicked
    ],
)
def test_a_mask_that_leaves_its_organ_goes_on_no_further_than_the_automatic_one(automatic, expected):
    image = (torch.arange(23) / 100).expand(1, 1, 32, 32, 23).contiguous()

    def decode(embedding, point_coords=None, point_labels=None, classes=None):
        """A click finds rows 4 to 12 in every slice; without one the second class has them in some."""
        z = (embedding[0, 0, 0, 0] * 100).round().long()
        mask = torch.full((1, 2 if classes is None else 1, 32, 32, 4), -5.0)
        known = (
            torch.isin(z, torch.tensor(list(automatic))) if point_coords is None else torch.ones(4, dtype=torch.bool)
        )
        mask[:, -1, 4:13] = torch.where(known, 5.0, -5.0)
        return mask

    network = build_medsa("small", pretrained=False, spatial_dims=3, num_classes=2, adapter_dim=8).eval()
    network.encode_image, network.decode = (lambda slab: slab), decode
    prompts = click(8.0, [1])

    def slices(**settings):
        found = SlabInferer(slab_depth=4, overlap=0.25, spread=True, every_class=True, **settings)(
            image, network, prompts=prompts
        )
        return (found[0, 1] > 0).any(0).any(0).nonzero().flatten().tolist()

    assert slices(others="automatic") == list(expected)
    assert slices(others="absent") == list(range(23))


def test_the_automatic_mask_of_a_class_is_computed_where_it_is_looked_at_and_kept(three):
    image = torch.rand(1, 1, 32, 32, 23)
    whole = SlabInferer(slab_depth=4)(image, three)[0, 1] > 0
    base = SlabInferer(slab_depth=4, cache=EmbeddingCache())
    inferer = SpreadInferer(base, automatic_masks="near")
    (slabs,) = inferer.open(image, three, None)
    decoded: list[int] = []
    plain = base.decode
    base.decode = lambda slabs, g, prompts: [decoded.append(g), plain(slabs, g, prompts)][1]
    for look in (inferer._automatic_mask(slabs, 1), inferer._automatic_mask(slabs, 1)):
        assert torch.equal(look(range(9, 12)), whole[..., 9:12])
        assert torch.equal(look(range(10, 16)), whole[..., 10:16])
    assert decoded == [2, 3, 4, 5]
    assert len(slabs.groups) == 8


def test_spreading_is_the_whole_answer_where_the_mask_spans_the_volume(network):
    image = torch.rand(1, 1, 32, 32, 11)
    box = Prompts(boxes=torch.tensor([[0.0, 0, 0, 31, 31, 10]]))
    torch.testing.assert_close(
        SlabInferer(slab_depth=4, spread=True)(image, network, prompts=box),
        SlabInferer(slab_depth=4)(image, network, prompts=box),
    )


def test_after_a_spreading_click_the_whole_study_is_encoded(three):
    image = torch.rand(1, 1, 32, 32, 20)
    inferer = SlabInferer(slab_depth=4, overlap=0.0, spread=True, every_class=True, cache=EmbeddingCache())
    fresh = SlabInferer(slab_depth=4, overlap=0.0, spread=True, every_class=True)
    assert torch.equal(inferer(image, three, prompts=two_clicks()), fresh(image, three, prompts=two_clicks()))
    far = replace(two_clicks(), points=torch.tensor([[[9.0, 9.0, 19.0]], [[5.0, 8.0, 15.0]]]))
    results = []
    assert count_encodings(three, lambda: results.append(inferer(image, three, prompts=far))) == 0
    assert torch.equal(results[0], fresh(image, three, prompts=far))


def test_what_an_older_adapter_computed_is_dropped(three, perturb_adapters):
    image = torch.rand(1, 1, 32, 32, 4)
    cache = EmbeddingCache()
    inferer = SlabInferer(slab_depth=4, cache=cache)
    inferer(image, three)
    inferer(image * 0.5, three)
    assert len(cache) == 2
    torch.manual_seed(2)
    newer = build_medsa("small", pretrained=False, spatial_dims=3, num_classes=3, adapter_dim=8).eval()
    newer.load_state_dict(three.state_dict())
    perturb_adapters(newer, std=0.1)
    inferer(image, newer)
    assert len(cache) == 1


def test_users_who_click_at_once_get_what_each_would_get_alone(three):
    images = [torch.rand(1, 1, 32, 32, 9) for _ in range(3)]
    alone = [SlabInferer(slab_depth=4)(image, three, prompts=click()) for image in images]
    room = 3 * 3 * 4 * 256 * 64 * 4 * 2 // 3  # for two of three volumes
    inferer = SlabInferer(slab_depth=4, cache=EmbeddingCache(max_bytes=room))

    def ask(i: int) -> bool:
        with torch.no_grad():
            return torch.equal(inferer(images[i % 3], three, prompts=click()), alone[i % 3])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(24)))
    assert inferer.cache.bytes <= room
    assert inferer.cache.hits > 0


def test_tasks_of_one_process_share_a_cache():
    assert shared_cache(0) is None
    assert shared_cache(1234) is shared_cache(1234)
    assert shared_cache(1234) is not shared_cache(4321)
    assert shared_cache(1234).max_bytes == 1234


def test_a_network_in_training_mode_answers_anew_each_time(network):
    cache = EmbeddingCache()
    volume = torch.rand(1, 1, 32, 32, 4)
    network.train()
    try:
        with torch.no_grad():
            SlabInferer(slab_depth=4, every_class=True, others="automatic", cache=cache)(volume, network)
    finally:
        network.eval()
    assert len(cache) == 0


@pytest.mark.parametrize("axes", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize(
    "prompts",
    [
        Prompts(),
        click(7.0),
        Prompts(boxes=torch.tensor([[4.0, 5, 2, 20, 25, 6]])),
        Prompts(masks=torch.randn(1, 32, 32, 10)),
    ],
)
def test_a_mirrored_volume_with_mirrored_prompts_has_the_mirrored_masks(network, axes, prompts):
    image = torch.rand(1, 1, 32, 32, 10)
    dims = [axis + 2 for axis in axes]
    inferer = SlabInferer(slab_depth=4, overlap=0.5, mirror_axes=axes)  # its slabs lie alike from both ends
    found = inferer(image, network, prompts=prompts)
    images = inferer(image.flip(dims), network, prompts=prompts.mirror(axes, image.shape[2:]))
    torch.testing.assert_close(images.flip(dims), found, atol=1e-4, rtol=1e-4)
    alone = SlabInferer(slab_depth=4, overlap=0.5)(image, network, prompts=prompts)
    assert (alone - found).abs().max() > 1e-3


def test_mirror_images_have_embeddings_of_their_own(network):
    image = torch.rand(1, 1, 32, 32, 4)
    inferer = SlabInferer(slab_depth=4, mirror_axes=[0, 1], cache=EmbeddingCache())
    for key in (None, "volume"):
        first = []
        assert count_encodings(network, lambda k=key, f=first: f.append(inferer(image, network, image_key=k))) == 4
        assert count_encodings(network, lambda k=key: inferer(image, network, image_key=k, prompts=click())) == 0
        assert torch.equal(inferer(image, network, image_key=key), first[0])


@pytest.mark.parametrize("axes", [[3], [0, 0], [-1]])
def test_axes_that_a_volume_does_not_have_are_refused(axes):
    with pytest.raises(ValueError, match="mirror_axes must hold 0, 1 or 2"):
        SlabInferer(mirror_axes=axes)


def test_masks_that_cover_padding_are_not_mirrored(network):
    prompts = Prompts(masks=torch.randn(1, 32, 32, 4))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(30, 32, 4\). Pad the volume"):
        SlabInferer(slab_depth=4, mirror_axes=[0])(torch.rand(1, 1, 30, 32, 4), network, prompts=prompts)


def test_the_mean_over_mirror_images_leaves_other_classes_as_they_are(network):
    image = torch.rand(1, 1, 32, 32, 10)
    settings = {"slab_depth": 4, "every_class": True, "others": "automatic", "spread": True}
    inferer = SlabInferer(**settings, mirror_axes=[0], cache=EmbeddingCache())
    found = inferer(image, network, prompts=click(7.0, [1]))
    torch.testing.assert_close(found[:, 0], inferer(image, network)[:, 0], atol=0, rtol=0)


@pytest.fixture
def session_network(small_base):
    torch.manual_seed(0)
    network = build_medsa(small_base, pretrained=False, click_feedback=True).eval()
    for parameter in network.click_feedback.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def _clicks(*labels, classes=None):
    points = torch.tensor([[[9.0, 9.0], [40.0, 20.0], [20.0, 50.0]]])[:, : len(labels)]
    return Prompts(points=points, labels=torch.tensor([list(labels)]).float(), classes=classes)


@pytest.mark.parametrize("classes", [None, torch.tensor([0])])
def test_clicks_on_an_image_are_answered_one_after_the_other_and_obeyed(session_network, classes):
    image, network = torch.rand(1, 3, 64, 64), session_network
    with torch.no_grad():
        found = PromptInferer()(image, network, prompts=_clicks(1, 0, 1, classes=classes))
        embedding = network.encode_image(image)
        earlier = None if classes is None else network.decode(embedding)
        for number in (1, 2, 3):
            clicks = _clicks(*[1, 0, 1][:number], classes=classes)
            before = None if earlier is None else as_earlier(earlier, embedding.shape[2:4])[0]
            logits = network.decode(embedding, **replace(clicks, masks=before).arguments())
            if earlier is not None:
                logits = torch.minimum(logits, earlier) if number == 2 else torch.maximum(logits, earlier)
            earlier = obey(logits, image, [clicks])
    torch.testing.assert_close(found, earlier)
    assert [bool(found[0, 0, y, x] > 0) for y, x in ((9, 9), (40, 20), (20, 50))] == [True, False, True]


def test_a_padding_click_changes_no_answer(session_network):
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        two, three = (PromptInferer()(image, session_network, prompts=_clicks(1, 0, *more)) for more in ((), (-1,)))
    assert torch.equal(two, three)


def test_clicks_go_to_the_decoder_at_once_where_the_branch_is_not_trained(small_base):
    network = build_medsa(small_base, pretrained=False, click_feedback=True).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = PromptInferer()(image, network, prompts=_clicks(1, 0))
        assert torch.equal(found, network(image, **_clicks(1, 0).arguments()))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_small_parts_of_automatic_masks_are_dropped_and_those_of_prompts_are_not(share, monkeypatch):
    network = build_medsa("small", pretrained=False, spatial_dims=3, num_classes=2).eval()
    shown = torch.full((1, 2, 32, 32, 4), -2.0)
    shown[:, 0, :20, :20, :] = 2.0
    shown[:, 0, 28:, 28:, 1] = 2.0

    def decode(embedding, classes=None, **prompts):
        return shown if not prompts else shown[:, :1]

    monkeypatch.setattr(network, "decode", decode)
    inferer = SlabInferer(slab_depth=4, component_share=share)
    volume = torch.rand(1, 1, 32, 32, 4)
    assert bool((inferer(volume, network)[..., 28:, 28:, 1] > 0).any()) == (share == 0.0)
    click = Prompts(points=torch.tensor([[[30.0, 30.0, 1.0]]]), labels=torch.ones(1, 1), classes=torch.tensor([0]))
    assert bool((inferer(volume, network, prompts=click)[0, 0, 28:, 28:, 1] > 0).all())
    with pytest.raises(ValueError, match="component_share must lie between 0 and 1"):
        SlabInferer(component_share=2.0)


def test_inferers_go_around_each_other(three):
    image, prompts = torch.rand(1, 1, 32, 32, 11), click(classes=[1])
    slabs = SlabInferer(slab_depth=4)
    mirror = MirrorInferer(SpreadInferer(slabs), axes=[0])
    every = AllClassesInferer(MainComponentsInferer(mirror, share=0.5), others="automatic")
    settings = {"slab_depth": 4, "spread": True, "mirror_axes": [0], "component_share": 0.5}
    for asked in (prompts, Prompts()):
        alone = SpreadInferer(slabs)(image, three, prompts=asked)
        mirrored = SpreadInferer(slabs)(image.flip(2), three, prompts=asked.mirror((0,), image.shape[2:])).flip(2)
        assert torch.equal(mirror(image, three, prompts=asked), (alone + mirrored) / 2)
        assert torch.equal(
            every.inferer(image, three, prompts=asked), SlabInferer(**settings)(image, three, prompts=asked)
        )
    found = every(image, three, prompts=prompts)
    assert found.shape[1] == 3
    assert torch.equal(found[:, [0, 2]], every(image, three)[:, [0, 2]])
    assert every.slab_depth == every.starts(11)[1] + 1 == 4


def test_a_changed_copy_leaves_an_inferer_as_it_is(three):
    inferer = AllClassesInferer(MirrorInferer(SlabInferer(slab_depth=4)))
    copied = rebuilt(inferer, lambda own: own.inferer if isinstance(own, AllClassesInferer) else own)
    slab_inferer(copied).cache = EmbeddingCache()
    assert isinstance(copied, MirrorInferer)
    assert slab_inferer(inferer).cache is None
    assert inferer.cache is None


@pytest.fixture(scope="module")
def three_in_pictures(perturb_adapters):
    torch.manual_seed(0)
    network = build_medsa("small", pretrained=False, num_classes=3, classes_per_pass=3, click_feedback=True).eval()
    return perturb_adapters(network, std=0.05)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("others", ["absent", "automatic"])
def test_a_picture_has_a_channel_for_every_class_whichever_are_asked_for(three_in_pictures, overlap, others):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    points = Prompts(points=torch.tensor([[[30.0, 20.0]]]), labels=torch.ones(1, 1), classes=torch.tensor([1]))
    inferer = ClassesInferer(overlap=overlap, others=others)
    automatic = inferer(image, three_in_pictures)
    own = PromptInferer()(image, three_in_pictures, prompts=points)
    torch.testing.assert_close(automatic, PromptInferer()(image, three_in_pictures), rtol=0, atol=0)
    answer = inferer(image, three_in_pictures, prompts=points)
    assert answer.shape == automatic.shape == (1, 3, 64, 64)
    assert torch.equal(answer[:, 1] > 0, own[:, 0] > 0)
    if others == "absent":
        assert not (answer[:, [0, 2]] > 0).any()
    else:
        assert torch.equal(answer[:, [0, 2]], automatic[:, [0, 2]])
    if overlap or others == "absent":
        assert torch.equal(answer[:, 1], own[:, 0])
    else:  # what is asked for is above the others where it is
        assert bool((answer.argmax(1) == 1)[own[:, 0] > 0].all())


def test_one_class_of_a_picture_is_answered_as_ever(session_network):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for prompts in (None, _clicks(1, 0)):
        ours, theirs = (one(image, session_network, prompts=prompts) for one in (ClassesInferer(), PromptInferer()))
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="others must be absent or automatic"):
        ClassesInferer(others="none")


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_an_answer_is_the_mean_over_the_turned_image(session_network, size, cache):
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    inferer = PromptInferer(turns=[0, 1, 3], cache=EmbeddingCache() if cache else None)
    for prompts in (Prompts(), _clicks(1, 0)):
        expected = torch.zeros(1, 1, *size)
        for turn in (0, 1, 3):
            view = torch.rot90(image, turn, (2, 3))
            own = PromptInferer()(view, session_network, prompts=prompts.turn(turn, size))
            expected += torch.rot90(own, -turn, (2, 3)) / 3
        for _ in range(2):  # from the cache, the second time
            torch.testing.assert_close(inferer(image, session_network, prompts=prompts), expected)
    assert torch.equal(
        PromptInferer(turns=[0]).decode(image, session_network, [_clicks(1)]),
        session_network.decode(session_network.encode_image(image), **_clicks(1).arguments()),
    )
    assert inferer.cache is None or inferer.cache.hits == 9


def test_an_image_of_two_like_halves_is_answered_alike_in_both(session_network):
    half = torch.rand(1, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    image = torch.cat([half, torch.rot90(half, 2, (2, 3))], 3)
    found = PromptInferer(turns=[0, 2])(image, session_network)
    torch.testing.assert_close(found, torch.rot90(found, 2, (2, 3)))
    assert not torch.allclose(*(PromptInferer()(image, session_network).rot90(k, (2, 3)) for k in (0, 2)))


@pytest.mark.parametrize("turns", [[], [0, 0], [4], [0.5]])
def test_turns_are_quarter_turns(turns):
    with pytest.raises(ValueError, match="turns must be quarter turns"):
        PromptInferer(turns=turns)
