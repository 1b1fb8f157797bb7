import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.arrays import normalize
from embedcache.dataset.inputs import open_input
from embedcache.dataset.labels import (
    Labels,
    check_prompts,
    class_vectors,
    has_label,
    has_prompts,
    read_labels,
    read_prompts,
)
from embedcache.errors import DataError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.projectors.base import project
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.toy import TEXT

PETS = ["cat", "dog", "cat", "newt", "dog"]


def make_cache(folder: Path, **columns: list[object]) -> Cache:
    """Create a cache of texts with additional columns."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    lines = [json.dumps({"key": f"k{number}", "text": "words", **row}) for number, row in enumerate(rows)]
    (folder / "table.jsonl").write_text("\n".join(lines))
    extract(open_source(folder / "table.jsonl"), folder / "cache", text_encoder=[TEXT])
    return Cache(folder / "cache")


def read(cache: Cache, **options: object) -> Labels:
    return read_labels(cache, np.arange(cache.info.num_samples), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "classes", "names", "numbers"),
    [
        (PETS, None, ["cat", "dog", "newt"], [0, 1, 0, 2, 1]),
        (PETS, ["newt", "eel", "dog", "cat"], ["newt", "eel", "dog", "cat"], [3, 2, 3, 0, 2]),
        ([10, 2, 10, 7], None, ["2", "7", "10"], [2, 0, 2, 1]),
        ([2, 0, 2], ["cat", "dog", "newt"], ["cat", "dog", "newt"], [2, 0, 2]),
        (["1", "0", "1"], ["cat", "dog"], ["cat", "dog"], [1, 0, 1]),
        (["1", "0", "1"], ["1", "0"], ["1", "0"], [0, 1, 0]),
        (["heron"], ["crane", "heron", "crane"], ["crane", "heron", "crane"], [1]),
        ([True, False], None, ["false", "true"], [1, 0]),
    ],
)
def test_read_labels(
    tmp_path: Path, labels: list[object], classes: list[str] | None, names: list[str], numbers: list[int]
) -> None:
    cache = make_cache(tmp_path, label=labels)
    read_all = read(cache, classes=classes)
    assert (read_all.names, read_all.numbers.tolist()) == (names, numbers)
    assert read_all.numbers.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "classes", "word"),
    [
        (["cat", "dgo", "dgo", "xyzzy"], ["cat", "dog"], "the classes are 'cat', 'dog'"),
        ([f"label {number}" for number in range(30)], list("abcdefghi"), "25 more"),
        (["0", "1", "x"], ["cat", "dog"], "3 of 3"),
        ([0, -1, 1], ["cat", "dog"], "-1"),
        ([0, 2, 1], ["cat", "dog"], "1 of 3"),
        (["crane", "heron"], ["crane", "heron", "crane"], "classes 0 and 2"),
        (["cat", None, "dog", None], None, "k1"),
    ],
)
def test_wrong_labels_raise(tmp_path: Path, labels: list[object], classes: list[str] | None, word: str) -> None:
    cache = make_cache(tmp_path, label=labels)
    with pytest.raises(DataError, match=word):
        read(cache, classes=classes)


def test_empty_cells_are_missing_labels(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("key,text,label,number\na,words,cat,1\nb,words,,2\nc,words,dog,3\n")
    extract(open_source(tmp_path / "table.csv"), tmp_path / "cache", text_encoder=[TEXT])
    cache = Cache(tmp_path / "cache")
    assert has_label(cache, np.array([2, 1, 0])).tolist() == [True, False, True]
    assert has_label(cache, np.arange(3), column="number").all()
    with pytest.raises(DataError, match="'b'"):
        read(cache)
    assert read_labels(cache, np.array([2, 0])).names == ["cat", "dog"]
    with pytest.raises(UnknownNameError, match="lable"):
        has_label(cache, np.arange(3), column="lable")


def float_cache(folder: Path, labels: list[float], kind: pa.DataType) -> Cache:
    """Create a cache of texts with labels in floating point, as pandas writes integers of which one is missing."""
    table = pa.table({"key": [f"k{number}" for number in range(len(labels))], "text": ["words"] * len(labels)})
    pq.write_table(
        table.append_column("label", pa.array(np.array(labels, kind.to_pandas_dtype()))), folder / "table.parquet"
    )
    extract(open_source(folder / "table.parquet"), folder / "cache", text_encoder=[TEXT])
    return Cache(folder / "cache")


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.float16()])
def test_whole_numbers_in_floating_point_are_class_numbers(tmp_path: Path, kind: pa.DataType) -> None:
    cache = float_cache(tmp_path, [10, math.nan, 2, 10], kind)
    assert has_label(cache, np.arange(4)).tolist() == [True, False, True, True]
    labels = read_labels(cache, np.array([0, 2, 3]))
    assert (labels.names, labels.numbers.tolist()) == (["2", "10"], [1, 0, 1])
    classes = [f"class {number}" for number in range(11)]
    assert read_labels(cache, np.array([3, 2]), classes=classes).numbers.tolist() == [10, 2]


@pytest.mark.parametrize("other", [0.5, math.inf, 2.0**53])
def test_other_floating_point_numbers_are_no_labels(tmp_path: Path, other: float) -> None:
    cache = float_cache(tmp_path, [1, other, 2], pa.float64())
    for function in (has_label, read_labels):
        with pytest.raises(DataError, match=re.escape(str(other))):
            function(cache, np.arange(3))


@pytest.fixture(scope="module")
def prompts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with two and three prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    classes = {"red": ["red bar", "a red bar"], "blue": ["blue bar", "blue bar left", "bar on blue"]}
    (folder / "classes.json").write_text(json.dumps(classes))
    extract(open_source(f"prompts:{folder / 'classes.json'}"), folder / "c", text_encoder=[TEXT])
    return folder / "c"


def test_class_vectors_are_mean_directions(prompts_path: Path, run_path: Path) -> None:
    cache = Cache(prompts_path)
    check_prompts(cache, "st:x")
    prompts = read_prompts(cache, open_input(cache, "text", "open_toy/mean"))
    assert prompts.names == ["red", "blue"]
    assert prompts.counts.tolist() == [2, 3]
    assert prompts.rows.tolist() == [0, 1, 2, 3, 4]
    assert prompts.classes.tolist() == [0, 0, 1, 1, 1]
    tower = Run.open(run_path).pair.tower("text")
    projected_TP = project(tower, prompts.feature.read(prompts.rows))
    expected = normalize(np.stack([projected_TP[:2].mean(axis=0), projected_TP[2:].mean(axis=0)]))
    np.testing.assert_allclose(class_vectors(prompts, tower), expected, atol=1e-6)


def test_classes_without_prompts_raise(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("class,caption\nred,red bar\ngone,\nblue,blue\nnone,\n")
    extract(open_source(tmp_path / "p.csv"), tmp_path / "c", text_encoder=[TEXT])
    cache = Cache(tmp_path / "c")
    with pytest.raises(DataError, match="gone"):
        read_prompts(cache, open_input(cache, "text"))


def test_cache_without_prompts_raises(cache_path: Path) -> None:
    cache = Cache(cache_path)
    assert not has_prompts(cache)
    for spec in ("st:x", "imported:text", "derived:mean"):
        with pytest.raises(DataError, match="prompts"):
            check_prompts(cache, spec)
