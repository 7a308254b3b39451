"""What a refinement of clicks changes, its files, and whether training one helps on images that it never saw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from medsa_nets.errors import DataError, WeightsError
from medsa_nets.interaction import refinement_training as training
from medsa_nets.interaction.answers import AnswerSettings, answer_identity, refinement_of
from medsa_nets.interaction.grids import Grids
from medsa_nets.interaction.record import read_settings
from medsa_nets.interaction.refinement import Click, CropRefinement, Refinement, VoxelRefinement, beside, kept, refine
from medsa_nets.interaction.refinement.crops import MAPS
from medsa_nets.interaction.refinement.learning import CropLearner, Samples, VoxelLearner
from medsa_nets.interaction.refinement.practice import Case, PracticeSession, bend
from medsa_nets.interaction.refinement.voxels import NAMES, describe
from medsa_nets.interaction.refinement_training import RefinementTraining
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.interaction.users import SimulatedUser


def scene(dims: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A ball, logits of a mask that misses a part of it, grey values, and the middle of what is missing."""
    size = 25 if dims == 3 else 60
    where = np.indices((size,) * dims) - (size - 1) / 2
    logits = (size / 4 - np.sqrt((where**2).sum(0))).astype(np.float32)
    target = logits > 0
    logits[where[0] > size / 8] = -2.0
    random = np.random.default_rng(seed)
    image = (0.3 + 0.4 * target + 0.05 * random.normal(size=target.shape))[None].clip(0, 1).astype(np.float32)
    missing = target & (logits <= 0)
    return target, logits, image, np.rint(np.argwhere(missing).mean(0)).astype(int)


def made(kind: str, dims: int, reach: float, **options: Any) -> Refinement:
    if kind == "voxels":
        return VoxelRefinement(dims, reach, **{"width": 8, **options})
    return CropRefinement(dims, reach, **{"width": 4, "channels": 3 if dims == 2 else 1, **options})


def perturbed(dims: int, reach: float, seed: int = 0, kind: str = "voxels", **options: Any) -> Refinement:
    torch.manual_seed(seed)
    out = made(kind, dims, reach, **options)
    for parameter in out.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return out.eval().requires_grad_(False)


KINDS = pytest.mark.parametrize("kind", ["voxels", "crops"])


@KINDS
@pytest.mark.parametrize("dims", [2, 3])
def test_one_that_learnt_nothing_changes_nothing(dims: int, kind: str) -> None:
    _, logits, image, click = scene(dims)
    found = refine(
        made(kind, dims, 8, **({"channels": 1} if kind == "crops" else {})).eval(),
        logits,
        logits,
        image,
        click[None],
        np.ones(1),
        1,
        [1.0] * dims,
    )
    assert np.array_equal(found, logits)


@KINDS
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 2.1)])
def test_what_lies_beyond_its_reach_stays_bit_for_bit(spacing: tuple[float, ...], kind: str) -> None:
    _, logits, image, click = scene(3)
    found = refine(perturbed(3, 5.0, kind=kind), logits, logits, image, click[None], np.ones(1), 1, spacing)
    steps = np.array(spacing) / (min(spacing) if kind == "voxels" else 1.0)
    away = np.sqrt((((np.indices(logits.shape).T - click) * steps) ** 2).sum(-1)).T
    assert np.array_equal(found[away > 5.0], logits[away > 5.0])
    assert (found[away <= 5.0] != logits[away <= 5.0]).mean() > 0.9


@KINDS
def test_voxels_change_sides_with_certainty_alone(kind: str) -> None:
    _, logits, image, click = scene(3)
    logits = 0.05 * logits
    one = perturbed(3, 5.0, kind=kind)
    args = (logits, logits, image, click[None], np.ones(1), 1, [1.0] * 3)
    free = refine(one, *args)
    changed = (free > 0) != (logits > 0)
    one.certainty = float(np.median(np.abs(free[changed])))
    found = refine(one, *args)
    doubtful = changed & (np.abs(free) < one.certainty)
    assert doubtful.any()
    assert (changed & ~doubtful).any()
    assert np.array_equal(found[doubtful], logits[doubtful])
    assert np.array_equal(found[~doubtful], free[~doubtful])
    assert np.array_equal(refine(one, *args, certainty=0.0), free)
    with pytest.raises(ValueError, match="a certainty of 0 or more"):
        made(kind, 3, 5.0, certainty=-1.0)


def test_features_are_lengths_in_steps_and_exchange_both_sides() -> None:
    _, logits, image, click = scene(3)
    other = (click + np.array([0, 0, 2]))[None]
    clicked = Click(click, 1, logits, logits, image, other, np.ones(1), (0.7, 0.7, 1.4))
    place, inside, found = describe(6.0, clicked)
    table = dict(zip(NAMES, found.T))
    middle = int(np.flatnonzero((np.argwhere(inside) + [s.start for s in place] == click).all(1))[0])
    assert table["distance"][middle] == 0.0
    assert table["nearest click of its kind"][middle] == pytest.approx(4.0)  # two voxels of 1.4 mm are four steps
    assert table["nearest click of the other kind"].min() == 12.0
    assert found.shape == (int(inside.sum()), len(NAMES))
    inverted = dataclasses.replace(clicked, label=0, previous=-logits, values=-logits, labels=np.zeros(1))
    _, _, inverse = describe(6.0, inverted)
    signed = [i for i, name in enumerate(NAMES) if "logit" in name or name == "depth in the mask" or "nearest" in name]
    assert np.allclose(inverse[:, signed], found[:, signed], atol=1e-5)


def test_a_crop_shows_the_same_whatever_the_grid_that_it_comes_from() -> None:
    _, logits, image, click = scene(3)
    other = click + np.array([2, 0, -3])
    one = CropRefinement(3, 6.0, step=2.0, width=4)
    seen = one.crop(Click(click, 1, logits, logits - 1.0, image, other[None], np.zeros(1), (2.0, 2.0, 2.0)))
    fine = [np.repeat(np.repeat(a, 2, -3), 2, -2) for a in (logits, logits - 1.0, image)]
    turns = np.array([2, 2, 1])
    finer = one.crop(Click(click * turns, 1, *fine, (other * turns)[None], np.zeros(1), (1.0, 1.0, 2.0)))
    assert seen.shape == (1 + len(MAPS), 8, 8, 8)
    assert torch.allclose(seen, finer, atol=1e-4)
    table = dict(zip(["image", *MAPS], seen))
    assert table["foreground marks"][4, 4, 4] == table["click"][4, 4, 4] == 1.0
    assert table["background marks"][6, 4, 1] == 1.0
    assert table["logit before"][4, 4, 4] == pytest.approx(logits[tuple(click)] / 4.0)
    border = Click(np.array([0, 12, 24]), 0, logits, logits, image, np.empty((0, 3)), np.empty(0), (2.0, 2.0, 2.0))
    edge = one.crop(border)
    table = dict(zip(["image", *MAPS], edge))
    assert not table["within the image"][:4].any()
    assert table["within the image"][4:, :, :5].all()
    assert (table["logit before"][:4] == -2.0).all()
    assert (table["image"][:4] == 0.0).all()
    assert table["click"][4, 4, 4] == -1.0


def test_mirror_images_of_a_crop_give_mirror_images_of_what_it_says() -> None:
    _, logits, image, click = scene(3)
    one = perturbed(3, 6.0, kind="crops", mirror_axes=[0, 2])
    clicked = Click(click, 1, logits, logits, image, np.empty((0, 3)), np.empty(0), (1.0, 1.0, 1.0))
    crop = one.crop(clicked)  # type: ignore[attr-defined]
    _, _, found = one.added(clicked)
    means = [one(crop.flip(axes)[None])[0].flip([axis - 1 for axis in axes]) for axes in ([], [1], [3], [1, 3])]
    _, _, wanted = one.spread(sum(means) / 4.0, click, clicked.spacing, logits.shape)  # type: ignore[attr-defined]
    assert np.allclose(found, wanted, atol=1e-5)
    single = perturbed(3, 6.0, kind="crops").added(clicked)[2]
    assert not np.allclose(found, single, atol=1e-2)
    with pytest.raises(ValueError, match="axes from 0 to 2"):
        made("crops", 3, 5.0, mirror_axes=[3])


def test_what_a_crop_says_comes_back_to_its_place() -> None:
    one = CropRefinement(3, 6.0, width=4)
    where = np.indices((2 * one.arm,) * 3) - one.arm
    shape, click, spacing = (20, 18, 11), np.array([3, 9, 6]), np.array([0.5, 1.0, 1.5])
    place, inside, found = one.spread(torch.from_numpy(where[1].astype(np.float32)), click, spacing, shape)
    away = (np.stack(np.meshgrid(*[np.arange(s.start, s.stop) for s in place], indexing="ij"), -1) - click) * spacing
    assert np.array_equal(inside, np.sqrt((away**2).sum(-1)) <= 6.0)
    fading = np.exp(-2.0 * (away[inside] ** 2).sum(1) / 36.0)
    assert np.allclose(found, away[inside][:, 1] * fading, atol=0.15)  # both are interpolated together
    assert found[np.abs(away[inside]).sum(1) == 0.0] == 0.0
    assert one.within_reach()[one.arm + 6, one.arm, one.arm] == 1.0
    assert one.within_reach()[one.arm + 5, one.arm + 5, one.arm] == 0.0


@pytest.mark.parametrize("empty", [True, False])
def test_masks_without_a_border_are_described_too(empty: bool) -> None:
    _, logits, image, click = scene(2)
    whole = np.full_like(logits, -3.0 if empty else 3.0)
    none = np.empty((0, 2), int), np.empty(0)
    _, _, found = describe(9.0, Click(click, int(empty), whole, whole, image, *none, (1.0, 1.0)))
    assert np.isfinite(found).all()


@KINDS
def test_a_file_gives_back_what_was_saved_and_others_are_refused(tmp_path: Path, stand_in: Any, kind: str) -> None:
    one = perturbed(2, 7.0, kind=kind, asks=True)
    one.save(tmp_path / "r.pt")
    again = Refinement.load(tmp_path / "r.pt")
    assert type(again) is type(one)
    assert again.form() == one.form()
    assert (again.dims, again.reach, again.asks) == (2, 7.0, True)
    assert again.sha256 == one.sha256 != perturbed(2, 7.0, 1, kind=kind, asks=True).sha256
    with pytest.raises(WeightsError, match=r"none\.pt: there is no such file"):
        Refinement.load(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "r.pt").read_bytes()[:500])
    torch.save({"model": torch.ones(2)}, tmp_path / "other.pt")
    for name in ("cut.pt", "other.pt"):
        with pytest.raises(WeightsError, match=rf"{name}: no refinement"):
            Refinement.load(tmp_path / name)
    with pytest.raises(WeightsError, match="it refines clicks in 2 dimensions, not in 3"):
        refinement_of(AnswerSettings(refinement=str(tmp_path / "r.pt")), stand_in(volumes=True))


@KINDS
@pytest.mark.parametrize("volumes", [True, False])
def test_sessions_obey_and_undo_with_a_refinement_that_knows_nothing(
    tmp_path: Path, stand_in: Any, volumes: bool, kind: str
) -> None:
    perturbed(3 if volumes else 2, 6.0, kind=kind).save(tmp_path / "r.pt")
    results = []
    for name in (str(tmp_path / "r.pt"), ""):
        session = InteractiveSession(stand_in(volumes=volumes, feedback=not volumes), AnswerSettings(refinement=name))
        session.open("image_3.png")
        first = session.mask(0)
        random = np.random.default_rng(0)
        said = {}
        for _ in range(6):
            voxel = tuple(int(random.integers(n)) for n in first.shape)
            said[voxel] = int(random.integers(2))
            mask = session.point(list(voxel), said[voxel], 0)
            assert all(mask[place] == bool(label) for place, label in said.items())
        results.append(mask)
        for _ in range(6):
            session.undo()
        assert np.array_equal(session.mask(0), first)
    assert not np.array_equal(*results)


def test_a_session_may_ask_for_another_certainty(stand_in: Any) -> None:
    masks = []
    for own, asked in ((0.0, None), (9.0, None), (9.0, 0.0), (0.0, 9.0)):
        segmenter = stand_in(volumes=True)
        segmenter.refinement = perturbed(3, 6.0, certainty=own)
        session = InteractiveSession(segmenter, AnswerSettings(click_certainty=asked))
        session.open("image_3.png")
        first = session.mask(0)
        places = [[n // 2 for n in first.shape], [n // 3 for n in first.shape]]
        masks.append([session.point(place, int(not first[tuple(place)]), 0) for place in places])
    free, certain, freed, bound = masks
    assert not np.array_equal(free, certain)
    assert np.array_equal(free, freed)
    assert np.array_equal(certain, bound)
    with pytest.raises(ValueError, match="click_certainty must be 0 or more, got -1"):
        AnswerSettings(click_certainty=-1.0)


def test_a_log_of_another_refinement_is_not_replayed(tmp_path: Path, stand_in: Any) -> None:
    path = tmp_path / "image_3.png"
    path.touch()
    perturbed(2, 6.0).save(tmp_path / "r.pt")
    session = InteractiveSession(stand_in(volumes=False), AnswerSettings(refinement=str(tmp_path / "r.pt")))
    session.open(path)
    mask = session.point([3, 4], 1)
    _, log = session.save(tmp_path / "mask.png")
    again = InteractiveSession(stand_in(volumes=False))
    again.replay(log, path)
    assert np.array_equal(again.mask(), mask)
    perturbed(2, 6.0, 1).save(tmp_path / "r.pt")
    kept.cache_clear()
    with pytest.raises(DataError, match="refinement_sha256"):
        InteractiveSession(stand_in(volumes=False)).replay(log, path)


def test_logs_from_before_there_was_a_refinement_go_without(stand_in: Any) -> None:
    entry = dataclasses.asdict(AnswerSettings())
    del entry["refinement"], entry["click_certainty"]
    session = stand_in(volumes=True)
    session.refinement = perturbed(3, 5.0)
    assert answer_identity(read_settings(entry), session)["refinement_sha256"] == ""
    assert answer_identity(AnswerSettings(), session)["refinement_sha256"] == session.refinement.sha256


class Balls:
    """Volumes of a ball, masks with a dent or a bump, and a network that sees no more than that."""

    volumes, exclusive, feedback, prompted, refinement = True, True, False, False, None

    def __init__(self, *args: Any) -> None:
        self.items = [self._item(seed) for seed in range(10)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    @staticmethod
    def _item(seed: int) -> dict[str, Any]:
        random = np.random.default_rng(seed)
        where = np.indices((24, 24, 24)).astype(float)
        middle = 11.5 + random.uniform(-1, 1, 3)
        logits = 7.0 - np.sqrt(((where - middle.reshape(3, 1, 1, 1)) ** 2).sum(0))
        target = (logits > 0).astype(np.float32)
        for _ in range(3):
            place = middle + 7.0 * (direction := random.normal(size=3)) / np.linalg.norm(direction)
            near = np.exp(-(((where - place.reshape(3, 1, 1, 1)) ** 2).sum(0)) / 18.0)
            logits = logits + random.choice([-5.0, 5.0]) * near
        grey = 0.4 + 0.2 * target + 0.1 * ndimage.gaussian_filter(random.normal(size=target.shape), 1.0)
        meta = {"original_affine": np.eye(4), "spatial_shape": np.array(target.shape),
                "filename_or_obj": f"{seed}.nii"}  # fmt: skip
        make = lambda a: MetaTensor(torch.from_numpy(a.astype(np.float32))[None], affine=torch.eye(4), meta=dict(meta))  # noqa: E731
        return {"image": make(grey), "label": make(target), "logits": torch.from_numpy(logits).float()[None]}

    def automatic(self, image: MetaTensor) -> torch.Tensor:
        return self.items[int(image.meta["filename_or_obj"].split(".")[0])]["logits"]


def test_training_helps_on_volumes_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "NetworkSegmenter", Balls)
    options: dict[str, Any] = {"classes": ["ball"], "rounds": 2, "clicks": 4, "epochs": 8, "reach": 8.0, "width": 32}
    trained = RefinementTraining(torch.nn.Identity(), None, Balls(), output_dir=tmp_path, **options)  # type: ignore[arg-type]
    figures = trained.run()
    cases = trained._split(list(trained._cases(Balls())))[1]  # type: ignore[arg-type]
    without, _ = trained._curve(Balls(), cases, None)  # type: ignore[arg-type]
    assert figures["dice_after_0"] == pytest.approx(without[0])
    assert figures["dice_after_3"] - without[0] > 1.2 * (without[3] - without[0])
    assert (tmp_path / "refinement.png").is_file()
    found, harmful = trained._curve(Balls(), cases, Refinement.load(tmp_path / "refinement.clicks.pt"))  # type: ignore[arg-type]
    assert figures == {f"dice_after_{n}": value for n, value in enumerate(found)} | {"harmful": harmful}
    again = RefinementTraining(
        torch.nn.Identity(), None, Balls(), output_dir=tmp_path / "more",  # type: ignore[arg-type]
        start_from=tmp_path / "refinement.clicks.pt", others=[tmp_path / "samples.pt"], **{**options, "rounds": 1},
    )  # fmt: skip
    assert again.run()["dice_after_3"] > without[3]
    spoilt = RefinementTraining(
        torch.nn.Identity(), None, Balls(), output_dir=tmp_path / "spoilt",  # type: ignore[arg-type]
        start_from=tmp_path / "refinement.clicks.pt", **{**options, "rounds": 1, "learning_rate": 30.0},
    )  # fmt: skip
    assert spoilt.run() == figures  # what it began with stays where learning made it worse
    kept, start = (Refinement.load(tmp_path / place / "refinement.clicks.pt") for place in ("spoilt", "."))
    assert kept.sha256 == start.sha256
    torch.save({"names": ["a"]}, tmp_path / "others.pt")
    with pytest.raises(DataError, match=r"others\.pt: no samples of this version"):
        Samples.load(tmp_path / "others.pt")


@KINDS
def test_practice_on_the_part_around_a_mask_is_practice_on_the_whole(kind: str) -> None:
    where = np.indices((48, 40, 44)).astype(np.float32) - np.array([20, 18, 25], dtype=np.float32).reshape(3, 1, 1, 1)
    target = np.sqrt((where**2).sum(0)) < 8.0
    first = torch.from_numpy(6.0 - np.sqrt(((where - 2.0) ** 2).sum(0)))
    meta = {"original_affine": np.eye(4), "spatial_shape": np.array(target.shape), "filename_or_obj": "a.nii"}
    image = MetaTensor(torch.from_numpy(0.3 + 0.4 * target[None].astype(np.float32)), affine=torch.eye(4), meta=meta)
    whole = Case("a", image, Grids(image), 0, first, target)
    part = whole.part(10.0)
    assert part.target.shape == (35, 35, 35)
    assert part.target.sum() == target.sum()
    refinement = perturbed(3, 4.0, kind=kind)
    curves = []
    for case in (whole, part):
        settings = AnswerSettings(network="first")
        session = PracticeSession(
            Balls(),
            case,
            SimulatedUser(),
            np.random.default_rng(0),
            settings,
            case.first.numpy(),  # type: ignore[arg-type]
        )
        curves.append([session.dice])
        for _ in range(6):
            draft = session.click()
            assert draft is not None
            session.answer(draft, refinement)
            curves[-1].append(session.dice)
        clicks = [prompt.positions for prompt in session.prompts]
    assert len(set(curves[0])) > 3
    assert curves[1] == pytest.approx(curves[0], abs=1e-6)
    assert all((np.concatenate(clicks) >= 5).all(1))
    session.current = np.full_like(session.current, -1.0)
    assert session.click() is None  # the network, which would have to be asked, does not know a part of an image


def test_masks_that_are_all_empty_can_not_be_practised_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(Balls):
        def automatic(self, image: MetaTensor) -> torch.Tensor:
            return super().automatic(image) - 100.0

    monkeypatch.setattr(training, "NetworkSegmenter", Nothing)
    trained = RefinementTraining(torch.nn.Identity(), None, Nothing(), ["ball"], tmp_path, kind="crops")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="adapter finds none of the classes ball"):
        trained.run()


def test_crops_help_on_volumes_left_out_and_a_training_that_was_killed_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "NetworkSegmenter", Balls)
    options: dict[str, Any] = {"classes": ["ball"], "kind": "crops", "rounds": 3, "clicks": 3, "steps": 12, "batch": 3,
                               "reach": 8.0, "step": 2.0, "width": 8, "learning_rate": 0.01,
                               "flip_axes": [0, 1, 2]}  # fmt: skip

    def trained(folder: str) -> RefinementTraining:
        return RefinementTraining(torch.nn.Identity(), None, Balls(), output_dir=tmp_path / folder, **options)  # type: ignore[arg-type]

    whole = trained("whole")
    figures = whole.run()
    cases = whole._split(list(whole._cases(Balls())))[1]  # type: ignore[arg-type]
    without, _ = whole._curve(Balls(), cases, None)  # type: ignore[arg-type]
    assert figures["dice_after_3"] - without[0] > 1.2 * (without[3] - without[0])
    assert not (tmp_path / "whole" / "refinement_state.pt").exists()

    learn, told = CropLearner.learn, []

    def killed(self: CropLearner, practice: Any, number: int, *others: Any) -> tuple[float, float]:
        told.append(number)
        if len(told) == 3:
            raise KeyboardInterrupt
        return learn(self, practice, number, *others)

    monkeypatch.setattr(CropLearner, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        trained("killed").run()
    assert trained("killed").run() == figures
    assert told == [0, 1, 2, 2]
    one, other = (Refinement.load(tmp_path / name / "refinement.clicks.pt") for name in ("whole", "killed"))
    assert one.sha256 == other.sha256
    with pytest.raises(WeightsError, match="a refinement of crops in 3 dimensions; expected one of voxels"):
        RefinementTraining(
            torch.nn.Identity(), None, Balls(), ["ball"], tmp_path,  # type: ignore[arg-type]
            start_from=tmp_path / "whole" / "refinement.clicks.pt",
        ).run()  # fmt: skip


def test_a_training_on_voxels_that_was_killed_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "NetworkSegmenter", Balls)
    options: dict[str, Any] = {"classes": ["ball"], "rounds": 2, "clicks": 2, "epochs": 2, "reach": 8.0, "width": 8}

    def trained(folder: str) -> dict[str, float]:
        return RefinementTraining(torch.nn.Identity(), None, Balls(), output_dir=tmp_path / folder, **options).run()  # type: ignore[arg-type]

    figures = trained("whole")
    learn = VoxelLearner.learn

    def killed(self: VoxelLearner, practice: Any, number: int, *others: Any) -> tuple[float, float]:
        if number == 1:
            raise KeyboardInterrupt
        return learn(self, practice, number, *others)

    monkeypatch.setattr(VoxelLearner, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        trained("killed")
    monkeypatch.setattr(VoxelLearner, "learn", learn)
    assert trained("killed") == figures
    one, other = (Refinement.load(tmp_path / name / "refinement.clicks.pt") for name in ("whole", "killed"))
    assert one.sha256 == other.sha256


def test_the_smallest_certainty_with_few_harmful_clicks_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "NetworkSegmenter", Balls)
    start = perturbed(3, 8.0, seed=1)
    for parameter in start.parameters():
        parameter.mul_(0.5)
    start.save(tmp_path / "start.clicks.pt")
    options: dict[str, Any] = {"rounds": 1, "clicks": 4, "epochs": 1, "learning_rate": 1e-9, "held_out": 0.5}

    def trained(harmful: float, certainty: float | None = None) -> tuple[RefinementTraining, dict[str, float]]:
        out = RefinementTraining(
            torch.nn.Identity(), None, Balls(), ["ball"], tmp_path,  # type: ignore[arg-type]
            start_from=tmp_path / "start.clicks.pt", certainty=certainty, harmful=harmful, **options,
        )  # fmt: skip
        return out, out.run()

    training_, figures = trained(0.3)
    found = Refinement.load(tmp_path / "refinement.clicks.pt")
    assert 0.0 < found.certainty in training.CERTAINTIES
    assert figures["harmful"] <= 0.3
    cases = training_._split(list(training_._cases(Balls())))[1]  # type: ignore[arg-type]
    shares = {}
    for certainty in training.CERTAINTIES:
        found.certainty = certainty
        shares[certainty] = training_._curve(Balls(), cases, found)[1]  # type: ignore[arg-type]
    within = [certainty for certainty, share in shares.items() if share <= 0.3]
    assert Refinement.load(tmp_path / "refinement.clicks.pt").certainty == min(within)
    trained(1.0)
    assert Refinement.load(tmp_path / "refinement.clicks.pt").certainty == 0.0
    trained(0.0, certainty=0.25)
    assert Refinement.load(tmp_path / "refinement.clicks.pt").certainty == 0.25
    with pytest.raises(ValueError, match="harmful is a share of clicks, within 0 and 1, got 2"):
        trained(2.0)


@KINDS
def test_a_start_keeps_its_form_where_none_is_asked_for(tmp_path: Path, kind: str) -> None:
    own: dict[str, Any] = {"certainty": 0.3} | ({"mirror_axes": [0], "step": 2.0} if kind == "crops" else {})
    start = perturbed(3, 6.0, kind=kind, **own)
    start.save(tmp_path / "start.clicks.pt")

    def begun(**options: Any) -> Refinement:
        made = RefinementTraining(
            torch.nn.Identity(), None, [], ["ball"], tmp_path,  # type: ignore[arg-type]
            start_from=tmp_path / "start.clicks.pt", kind=kind, settings=AnswerSettings(network="first"), **options,
        )  # fmt: skip
        return made._learner(3, 1, Refinement.load(tmp_path / "start.clicks.pt")).refinement

    assert begun(certainty=0.3).sha256 == start.sha256
    other = begun(reach=9.0, step=3.0)
    assert (other.reach, other.certainty) == (9.0, 0.0)
    if isinstance(other, CropRefinement):
        assert other.step == 3.0
    state = start.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(WeightsError, match=r"start\.clicks\.pt: its hidden layers are . wide, not 12 \(refine_width\)"):
        begun(width=12)


def test_one_image_is_too_few_to_choose_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "NetworkSegmenter", Balls)
    balls = Balls()
    balls.items = balls.items[:1]
    with pytest.raises(DataError, match="expected two or more"):
        RefinementTraining(torch.nn.Identity(), None, balls, ["ball"], tmp_path).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(20, 31), (12, 9, 17)])
def test_bent_logits_keep_their_size(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    logits = np.zeros(shape, np.float32)
    assert {bend(logits, random).shape for _ in range(40)} == {shape}


def test_it_lies_beside_its_adapter(tmp_path: Path) -> None:
    assert beside(tmp_path / "a.b.pt") == beside("") == beside(None) == ""
    (tmp_path / "a.b.clicks.pt").touch()
    assert beside(tmp_path / "a.b.pt") == str(tmp_path / "a.b.clicks.pt")
