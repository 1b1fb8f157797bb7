"""Labeled items of a cache: their labels, vectors and parts, and what cannot be measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError, SourceError, UnfinishedError, UnknownNameError
from embedcache.evaluate.probe import read_labeled
from embedcache.evaluate.settings import ProbeSettings
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.evaluate.conftest import FEATURE, ColumnsOf, color, make_cache, write_colors
from tests.evaluate.test_retrieval import train_run
from tests.toy import IMAGE


def test_parts_follow_the_column_split(labeled_path: Path) -> None:
    cache = Cache(labeled_path)
    data = read_labeled(cache, ProbeSettings(feature=FEATURE))
    values = np.array(cache.samples["split"].to_pylist())[data.items.samples]
    np.testing.assert_array_equal(data.parts == "test", values == "test")
    assert {part: len(data.rows(part)) for part in ("train", "val", "test")} == {"train": 162, "val": 18, "test": 60}
    assert data.split_rule == "parts by column 'split', 10% of train for validation"
    np.testing.assert_array_equal(data.parts, read_labeled(cache, ProbeSettings(feature=FEATURE)).parts)
    strict = SplitSettings(kind="strict", cosines={"image": 1, "text": 1})
    assert "split (strict" in read_labeled(cache, ProbeSettings(feature=FEATURE, split=strict)).split_rule
    assert (data.parts != read_labeled(cache, ProbeSettings(feature=FEATURE, split=SplitSettings(seed=1))).parts).any()


@pytest.mark.slow
def test_validation_is_drawn_from_labeled_items(tmp_path: Path) -> None:
    def columns_of(number: int, caption: str) -> dict[str, object]:
        label = caption.split()[0] if number % 4 == 0 else None
        return {"label": label, "split": "TEST" if number % 5 == 0 else "Train"}

    data = read_labeled(Cache(make_cache(tmp_path, columns_of, count=200)), ProbeSettings(feature=FEATURE))
    assert {part: len(data.rows(part)) for part in ("train", "val", "test")} == {"train": 36, "val": 4, "test": 10}


def test_vectors_and_labels_match_rows(labeled_path: Path) -> None:
    cache = Cache(labeled_path)
    data = read_labeled(cache, ProbeSettings(feature=FEATURE))
    np.testing.assert_array_equal(data.examples.vectors, cache.feature("image", FEATURE).load().astype(np.float32))
    assert [data.names[label] for label in data.examples.labels] == cache.samples["label"].to_pylist()


def test_only_selected_items_are_read(labeled_path: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("".join(f"{number:05d}\n" for number in range(100)))
    data = read_labeled(Cache(labeled_path), ProbeSettings(feature=FEATURE, selection=tmp_path / "keys.txt"))
    assert data.items.samples.tolist() == list(range(100))
    assert {part: len(data.rows(part)) for part in ("train", "val", "test")} == {"train": 67, "val": 8, "test": 25}


@pytest.mark.slow
def test_strict_split_is_the_default(tmp_path: Path) -> None:
    """Near images or captions are in one part, and equal ones; a split that is given is followed, and its limits."""
    path = make_cache(tmp_path, lambda number, caption: {"label": caption.split()[0]}, count=100, copies=60)
    cache, limits = Cache(path), {"image": 0.9999, "text": 0.9999}
    data = read_labeled(cache, ProbeSettings(feature=FEATURE, split=SplitSettings(cosines=limits)))
    assert data.split_rule == "parts by split (strict, cosine image > 0.9999, text > 0.9999)"
    assert {part: len(data.rows(part)) for part in ("train", "val", "test")} == {"train": 104, "val": 16, "test": 40}
    for content in np.unique(data.items.contents):
        assert len(set(data.parts[data.items.contents == content].tolist())) == 1

    train_run(path, tmp_path / "run", split="strict", seed=7, cosines=limits)
    given = SplitSettings(kind=str(tmp_path / "run" / "split.parquet"))
    held = read_labeled(cache, ProbeSettings(feature=FEATURE, split=given))
    split = read_split(tmp_path / "run" / "split.parquet", [cache])
    assert held.parts.tolist() == [split.parts[sample] for sample in held.items.samples]
    assert held.cosines == data.cosines == split.cosines
    assert held.split_rule == f"parts by {given.kind} (strict, cosine image > 0.9999, text > 0.9999)"


@pytest.mark.slow
def test_validation_part_is_used_or_tested(tmp_path: Path) -> None:
    def columns_of(number: int, caption: str) -> dict[str, object]:
        return {"label": caption.split()[0], "split": ["train", "train", "validation", "test", "extra"][number % 5]}

    cache = Cache(make_cache(tmp_path, columns_of, count=100))
    data = read_labeled(cache, ProbeSettings(feature=FEATURE))
    values = np.array(cache.samples["split"].to_pylist())[data.items.samples]
    assert set(zip(values.tolist(), data.parts.tolist(), strict=True)) == {
        ("train", "train"), ("validation", "val"), ("test", "test"),
    }  # fmt: skip
    assert (data.num_left_out, data.split_rule) == (20, "parts by column 'split'")
    held = read_labeled(cache, ProbeSettings(feature=FEATURE, part="val"))
    values = np.array(cache.samples["split"].to_pylist())[held.items.samples]
    assert set(zip(values.tolist(), held.parts.tolist(), strict=True)) == {
        ("train", "train"), ("train", "val"), ("validation", "test"),
    }  # fmt: skip
    assert "val is held out" in held.split_rule


def test_column_is_followed_only_if_there_is_one(tmp_path: Path) -> None:
    path = make_cache(tmp_path, lambda number, caption: {"label": caption.split()[0]}, count=40)
    with pytest.raises(SourceError, match="no column 'split'; use --split strict"):
        read_labeled(Cache(path), ProbeSettings(feature=FEATURE, split=SplitSettings(kind="column")))


@pytest.mark.parametrize(
    ("columns_of", "error", "word"),
    [
        (lambda n, c: {**color(n, c), "label": "red"}, DataError, "two classes"),
        (lambda n, c: {"label": None, "color": 1.5}, DataError, "none for 40"),
        (lambda n, c: {"color": "red"}, UnknownNameError, "known: color"),
        (lambda n, c: {**color(n, c), "split": "test" if n else "train"}, DataError, "val: 0"),
        (lambda n, c: {**color(n, c), "split": "val" if n % 3 else "train"}, DataError, "--part val"),
        (lambda n, c: {**color(n, c), "split": f"fold {n % 2}"}, DataError, "fold 0"),
    ],
    ids=["one class", "no label", "no column", "empty part", "no test", "no part at all"],
)
def test_unusable_data_raise(tmp_path: Path, columns_of: ColumnsOf, error: type[Exception], word: str) -> None:
    path = make_cache(tmp_path, columns_of, count=40)
    with pytest.raises(error, match=word):
        read_labeled(Cache(path), ProbeSettings(feature=FEATURE))


def test_unfinished_feature_is_refused(labeled_path: Path, tmp_path: Path) -> None:
    path = shutil.copytree(labeled_path, tmp_path / "cache")
    (path / "image" / "open_toy" / "chunks" / "00003.json").unlink()
    with pytest.raises(UnfinishedError, match="1 of 8 chunks is missing"):
        read_labeled(Cache(path), ProbeSettings(feature=FEATURE))


def test_failed_items_are_counted(tmp_path: Path) -> None:
    source = write_colors(tmp_path / "source", 60)
    for number, path in enumerate(sorted(source.glob("*.txt"))):
        path.with_suffix(".json").write_text(json.dumps(color(number, path.read_text().strip())))
    (source / "00007.png").write_bytes(b"not an image")
    extract(open_source(source), tmp_path / "cache", image_encoder=[IMAGE])
    data = read_labeled(Cache(tmp_path / "cache"), ProbeSettings(feature=FEATURE))
    assert data.num_left_out == 1
    assert 7 not in data.items.rows
