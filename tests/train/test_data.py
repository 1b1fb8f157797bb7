"""The input of a run: caches, selections, all captions, token features, hard negatives, and views drawn per epoch."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.arrays import Inputs, Ints
from embedcache.curate.negatives import mine_negatives
from embedcache.dataset.inputs import Reader, view_feature
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.selections import read_negatives
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError, FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.sources.open import SourceSettings
from embedcache.store.cache import Cache
from embedcache.train.batches import PairBatches
from embedcache.train.data import DrawnViews, TrainData, open_data, parse_views
from tests.edits import edit_record
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT
from tests.train.runs import IMAGE as IMAGE_FEATURE
from tests.train.runs import TEXT as TEXT_FEATURE
from tests.train.runs import beats_chance, interrupted_after, log_lines, run
from tests.train.test_resume import assert_same_run, run_interrupted
from tests.train.test_resume import run as run_whole


@pytest.mark.slow
def test_two_caches_train_as_one(two_caches: list[Path], tmp_path: Path) -> None:
    report = run(two_caches, tmp_path / "run")
    assert sum(report.num_samples.values()) == 120
    split = read_split(tmp_path / "run/split.parquet", [Cache(path) for path in two_caches])
    for path, parts in zip(two_caches, (split.parts[:40], split.parts[40:]), strict=True):
        assert evaluate_retrieval(path, [tmp_path / "run"]).num_items["image"] == [parts.count("test")]
    assert run(two_caches, tmp_path / "run").reused
    with pytest.raises(FingerprintError, match="index_digest"):
        run(two_caches[::-1], tmp_path / "run")


def test_caches_of_different_encoders_are_refused(two_caches: list[Path], tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "s", 10))
    extract(source, tmp_path / "c", image_encoder=["tests.toy:open_toy,scale=2"], text_encoder=[TEXT])
    with pytest.raises(FingerprintError, match="open_toy/cls"):
        open_data([two_caches[0], tmp_path / "c"], {"image": IMAGE_FEATURE, "text": TEXT_FEATURE}, memory_bytes=0)


def test_the_same_samples_twice_are_refused(two_caches: list[Path], tmp_path: Path) -> None:
    larger = Path(shutil.copytree(two_caches[1], tmp_path / "larger"))
    info = Cache(two_caches[0]).info
    edit_record(larger / "cache.json", earlier_versions=[{"index_digest": info.index_digest, "num_parts": 1}])
    for caches in ([two_caches[0], two_caches[0]], [two_caches[0], larger], [larger, two_caches[0]]):
        with pytest.raises(DataError, match="different samples"):
            open_data(caches, {"image": IMAGE_FEATURE, "text": TEXT_FEATURE}, memory_bytes=0)


@pytest.mark.slow
def test_captions_in_several_languages_are_trained_on_in_the_first(tmp_path: Path) -> None:
    """Check captions in two languages, of which the encoder finds those of the second alike."""
    folder = write_images(tmp_path / "s", 80)
    rows = ["file_name,caption,language"]
    for number in range(80):
        caption = folder / f"{number:05d}.txt"
        rows += [f"{number:05d}.png,{caption.read_text().strip()},en", f"{number:05d}.png,ein Bild,de"]
        caption.unlink()
    (folder / "table.csv").write_text("\n".join(rows))
    source = open_source(folder / "table.csv", settings=SourceSettings(key_column="file_name"))
    extract(source, tmp_path / "c", image_encoder=[IMAGE], text_encoder=[TEXT])

    options = {"split": "strict", "cosine": 0.999, "epochs": 0, "batch_size": 16}
    progress = RecordedProgress()
    run(tmp_path / "c", tmp_path / "run", **options, progress=progress)
    assert Run.open(tmp_path / "run").info.settings["language"] == "en"
    assert any("only those in en" in note for note in progress.notes)
    assert run(tmp_path / "c", tmp_path / "run", **options, language="en").reused
    with pytest.raises(SettingError, match="language"):
        run(tmp_path / "c", tmp_path / "any", **options, language="any")


@pytest.mark.slow
def test_selection_limits_the_training_part(cache_path: Path, tmp_path: Path) -> None:
    keys = Cache(cache_path).samples["key"].to_pylist()
    (tmp_path / "keys.txt").write_text("\n".join(keys[:100]) + "\n")
    pq.write_table(pa.table({"row": range(100), "key": keys[:100], "reason": ["first"] * 100}), tmp_path / "s.parquet")
    whole = run(cache_path, tmp_path / "whole", epochs=1)
    texts, tables = (
        run(cache_path, tmp_path / name, selection=str(tmp_path / file), batch_size=32, epochs=1)
        for name, file in (("text", "keys.txt"), ("table", "s.parquet"))
    )
    split = read_split(tmp_path / "text/split.parquet", [Cache(cache_path)])
    assert texts.num_samples["train"] == split.parts[:100].count("train") < whole.num_samples["train"]
    assert {part: texts.num_samples[part] for part in ("val", "test")} == {
        part: whole.num_samples[part] for part in ("val", "test")
    }
    assert (tmp_path / "text/model.safetensors").read_bytes() == (tmp_path / "table/model.safetensors").read_bytes()
    assert tables.measures == texts.measures
    held_out = 100 - texts.num_samples["train"]
    assert f"WARNING: {held_out} of the selected samples are held out" in texts.line(tmp_path / "text")
    assert "WARNING" not in whole.line(tmp_path / "whole")
    whole_part = run(cache_path, tmp_path / "part", selection=str(tmp_path / "whole/split.parquet"), epochs=1)
    assert (whole_part.num_samples, whole_part.num_held_out) == (whole.num_samples, 0)


@pytest.mark.slow
def test_condition_limits_all_parts(cache_path: Path, tmp_path: Path) -> None:
    condition = "key < '00200'"
    report = run(cache_path, tmp_path / "run", where=condition, batch_size=32, epochs=1)
    split = read_split(tmp_path / "run/split.parquet", [Cache(cache_path)])
    assert all(split.parts[:200])
    assert split.parts.count("") == report.num_samples["left out"] == 100
    assert run(cache_path, tmp_path / "run", where=condition, batch_size=32, epochs=1).reused
    with pytest.raises(FingerprintError, match="where"):
        run(cache_path, tmp_path / "run", where="key < '00100'", batch_size=32, epochs=1)
    with pytest.raises(DataError, match="got none"):
        run(cache_path, tmp_path / "none", where="key > 'z'")


@pytest.mark.parametrize("keys", ["00003\nb\n", "\n"])
def test_selection_is_read_before_the_split_is_made(cache_path: Path, tmp_path: Path, keys: str) -> None:
    (tmp_path / "keys.txt").write_text(keys)
    with pytest.raises(DataError, match="keys"):
        run(cache_path, tmp_path / "run", selection=str(tmp_path / "keys.txt"))
    assert not (tmp_path / "run" / "split.parquet").exists()


@pytest.mark.slow
@pytest.mark.no_mutants
@pytest.mark.parametrize(
    ("image", "text", "projector"),
    [
        ("open_toy/patches", "open_toy/tokens", "token"),
        ("open_toy/patches", "open_toy/mean", "token+mlp"),
        ("open_toy/cls", "open_toy/tokens", "mlp+token_mlp"),
        ("open_toy/cls", "open_toy/mean", "token+token_mlp"),
    ],
)
def test_token_features_beat_chance(
    cache_path: Path, two_caches: list[Path], tmp_path: Path, image: str, text: str, projector: str
) -> None:
    run(cache_path, tmp_path / "run", image=image, text=text, projector=projector, epochs=8, lr=0.02)
    assert beats_chance(evaluate_retrieval(cache_path, [tmp_path / "run"]))
    run(two_caches, tmp_path / "two", image=image, text=text, projector=projector, epochs=1, memory=1)


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


@pytest.fixture(scope="module")
def table(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hard negatives of all samples, also of those that are held out. Not to be changed."""
    path = tmp_path_factory.mktemp("mined") / "negatives-0.parquet"
    options = {"modality": "image", "cosine": 0.999, "num_negatives": 5}
    mine_negatives(cache_path, path, feature={"image": IMAGE_FEATURE, "text": TEXT_FEATURE}, **options)
    return path


@pytest.mark.slow
def test_hard_negatives_of_the_training_part_are_added(
    cache_path: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, draw = [], PairBatches._draw_hard

    def watch(*args: object) -> np.ndarray:
        hard = draw(*args)  # type: ignore[arg-type]
        batches: PairBatches = args[0]  # type: ignore[assignment]
        seen.append((batches._samples[args[1]], batches._samples[hard]))  # type: ignore[index]
        return hard

    monkeypatch.setattr(PairBatches, "_draw_hard", watch)
    progress, path = RecordedProgress(), str(table).replace("-0", "-{seed}")
    report = run(cache_path, tmp_path / "run", negatives=path, num_negatives=2, progress=progress)
    train = set(read_split(tmp_path / "run/split.parquet", [Cache(cache_path)]).rows("train").tolist())
    negatives = read_negatives([table], [Cache(cache_path)])
    num_some = sum(bool(train & set(negatives.negatives_SK[sample].tolist())) for sample in train)
    assert progress.notes == [f"{num_some} of {len(train)} training samples have hard negatives in the training part"]
    assert {sample for _, hard in seen for sample in hard.tolist()} <= train
    for own, hard in seen:
        assert len(own) <= 22  # 64 // 3 and one
        assert np.isin(hard, negatives.negatives_SK[own]).all()
        assert not set(own.tolist()) & set(hard.tolist())
    assert sum(len(own) for own, _ in seen) == 2 * report.num_samples["train"]
    steps = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    assert len(steps) == len(seen)
    assert set(Run.open(tmp_path / "run").info.digests) == {"negatives 0"}


@pytest.mark.slow
def test_resume_with_hard_negatives_is_identical(cache_path: Path, table: Path, tmp_path: Path) -> None:
    options = {"negatives": str(table), "mixup": 0.0, "epochs": 2}
    run_whole(cache_path, tmp_path / "whole", **options)
    run_interrupted(cache_path, tmp_path / "run", 5, **options)
    run_whole(cache_path, tmp_path / "run", **options)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_another_table_is_another_run(cache_path: Path, table: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.parquet"
    shutil.copy(table, copy)
    run(cache_path, tmp_path / "run", epochs=1, negatives=str(copy))
    copy.unlink()
    with pytest.raises(PathError, match="got nothing"):
        run(cache_path, tmp_path / "run", epochs=1, negatives=str(copy))
    mine_negatives(cache_path, copy, feature={"image": IMAGE_FEATURE, "text": TEXT_FEATURE}, cosine=0.999)
    with pytest.raises(FingerprintError, match="negatives 0"):
        run(cache_path, tmp_path / "run", epochs=1, negatives=str(copy))


@pytest.mark.slow
def test_useless_hard_negatives_are_refused(
    cache_path: Path, table: Path, two_caches: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="mixup"):
        run(cache_path, tmp_path / "run", negatives=str(table), mixup=1.0)
    with pytest.raises(DataError, match="negatives-0"):
        run(two_caches[0], tmp_path / "other", negatives=str(table))
    assert not (tmp_path / "other").exists()
    few = tmp_path / "few.txt"  # two samples of one group have no negatives among them
    groups = read_negatives([table], [Cache(cache_path)]).groups_S
    twins = np.flatnonzero(groups == np.bincount(groups).argmax())
    few.write_text("\n".join(Cache(cache_path).column("key")[int(row)].as_py() for row in twins))
    with pytest.raises(DataError, match="got none"):
        run(cache_path, tmp_path / "few", negatives=str(table), selection=str(few), batch_size=None)
