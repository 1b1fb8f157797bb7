"""Views drawn per epoch: which view a row is read from, and runs that use them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedcache.arrays import Inputs, Ints
from embedcache.dataset.inputs import Reader, view_feature
from embedcache.dataset.pairs import Items, Pairs
from embedcache.errors import SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.data import DrawnViews, TrainData, open_data, parse_views
from tests.images import write_images
from tests.toy import IMAGE, TEXT
from tests.train.runs import interrupted_after, log_lines, run

VIEWS = ("image=plain:1,flip:3",)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 90 images with their mirror images. Not to be changed."""
    folder = tmp_path_factory.mktemp("flipped")
    source = open_source(write_images(folder / "source", 90))
    settings = ExtractSettings(features=("cls", "patches", "mean"), chunk_size=32, views=("flip",))
    extract(source, folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return folder / "cache"


def constant(value: float) -> Reader:
    def read(rows: Ints) -> Inputs:
        return Inputs(np.stack([rows, np.full(len(rows), value)], axis=1).astype(np.float32))

    return read


def test_views_are_drawn_by_weight_seed_and_epoch() -> None:
    probabilities = parse_views(["image=plain:1,flip:3", "text=plain,upper"])
    assert probabilities == {"image": {"plain": 0.25, "flip": 0.75}, "text": {"plain": 0.5, "upper": 0.5}}
    readers = {"plain": constant(0), "flip": constant(1)}

    def draw(seed: int, epoch: int, side: int = 0) -> Ints:
        views = DrawnViews(readers=readers, probabilities=probabilities["image"], num_rows=10_000, seed=seed, side=side)
        return views.draw(epoch)

    assert abs(draw(0, 0).mean() - 0.75) < 0.02
    np.testing.assert_array_equal(draw(3, 4), draw(3, 4))
    for other in (draw(0, 1), draw(1, 0), draw(0, 0, side=1)):
        assert abs((draw(0, 0) == other).mean() - (0.75**2 + 0.25**2)) < 0.03  # independent
    chances = np.random.default_rng([3, 4, 1]).random(10_000), np.random.default_rng([3, 4, 2]).random(10_000)
    np.testing.assert_array_equal(draw(3, 4), chances[0] >= 0.25)
    np.testing.assert_array_equal(draw(3, 4, side=1), chances[1] >= 0.25)
    drawn = DrawnViews(readers=readers, probabilities=probabilities["image"], num_rows=9, seed=0, side=0)
    rows = np.array([7, 2, 2, 5])
    inputs = drawn.read(rows, np.array([1, 0, 1, 0]))
    np.testing.assert_array_equal(inputs.values, [[7, 1], [2, 0], [2, 1], [5, 0]])


@pytest.mark.parametrize(("spared", "is_loaded"), [(0, True), (1, False)])
def test_views_share_the_memory_of_their_side(flipped: Path, spared: int, is_loaded: bool) -> None:
    num_bytes = Cache(flipped).feature("image", "open_toy@flip/cls").load().nbytes
    features = {"image": "open_toy/cls", "text": "open_toy/mean"}
    data = open_data(flipped, features, memory_bytes=4 * num_bytes - spared)  # two sides, two views of one
    reader = data.draw_views("image", {"plain": 0.5, "flip": 0.5}, 0).readers["flip"]
    assert hasattr(reader, "__self__") != is_loaded  # a method reads the rows of its feature from disk


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mixup": 0.5}, {"image": "open_toy/patches", "projector": "token+mlp"}])
def test_resume_with_views_is_identical(flipped: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"views": VIEWS, "checkpoint_s": 0, "batch_size": 20, "initialization": "random", "epochs": 2, **options}
    run(flipped, tmp_path / "whole", **options)
    with interrupted_after(4), pytest.raises(InterruptedError):
        run(flipped, tmp_path / "run", **options)
    run(flipped, tmp_path / "run", **options)
    assert set(Run.open(tmp_path / "run").info.digests) == {"view image@plain", "view image@flip"}
    for name in ("model.safetensors", "last.safetensors", "losses.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_views_change_training_and_not_validation(flipped: Path, tmp_path: Path) -> None:
    for name, views in (("none", ()), ("plain", ("image=plain",)), ("drawn", VIEWS)):
        run(flipped, tmp_path / name, views=views, initialization="random", epochs=1, batch_size=20)
    none, plain, drawn = (log_lines(tmp_path / name) for name in ("none", "plain", "drawn"))
    assert none == plain
    assert none[0]["validation"] == drawn[0]["validation"]
    assert none[1]["loss"] != drawn[1]["loss"]


@pytest.mark.parametrize("word", ["flip", "picture=flip", "image=flip:x", "image=flip:0", "image=a,a", "image=:1"])
def test_wrong_views_are_named(word: str) -> None:
    for words in ([word], ["image=flip", "image=plain"]):
        with pytest.raises(SettingError, match=words[-1]):
            parse_views(words)


def test_pairs_have_all_views_of_their_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that were made for some of the items, of the first side or of the second one."""
    rows = np.arange(6)
    items = Items(rows=rows, samples=rows, contents=rows)
    made = {"image": rows != 2, "text": rows % 5 > 0}
    monkeypatch.setattr(
        TrainData, "open_views", lambda _, modality, views: {v: [SimpleNamespace(valid=made[modality])] for v in views}
    )
    data = TrainData(caches=[], sides={"image": [], "text": []}, memory_bytes=0)
    for views, left in (
        ({"image": ["flip"]}, [0, 1, 3, 4, 5]),
        ({"text": ["upper"]}, [1, 2, 3, 4]),
        ({"image": ["flip"], "text": ["upper"]}, [1, 3, 4]),
    ):
        pairs = data.with_views(Pairs(first=items, second=items), views)
        assert pairs.first.samples.tolist() == pairs.second.samples.tolist() == left


def test_missing_view_lists_what_there_is(flipped: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"open_toy@crop-0\.5/cls.*open_toy@flip/cls"):
        run(flipped, tmp_path / "run", views=("image=plain,crop-0.5",), batch_size=20)
    with pytest.raises(SettingError, match="views: expected views of image or text, got audio"):
        run(flipped, tmp_path / "run", views=("audio=plain",), batch_size=20)
    assert view_feature("a/cls+a/patches", "flip") == "a@flip/cls+a@flip/patches"
