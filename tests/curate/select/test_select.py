"""Selecting into a file: what is written, what training takes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.curate.select.methods import random_draw
from embedcache.curate.select.select import combine_selections, select
from embedcache.curate.settings import SelectSettings
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, PathError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.indexing import index
from tests.curate.select.conftest import FEATURES

TEXT_FEATURE, IMAGE_FEATURE = FEATURES["text"], FEATURES["image"]


def chosen(around: dict[str, Path], out: Path, method: str = "random", **options: Any) -> np.ndarray:
    """Select from the pool and return the rows that are written."""
    options.setdefault("feature", TEXT_FEATURE if "concepts" in options else IMAGE_FEATURE)
    select(around["cache"], out, method, SelectSettings(**options))
    return read_selection(out, [Cache(around["cache"])])


def test_selection_metadata(around: dict[str, Path], tmp_path: Path) -> None:
    rows = chosen(around, tmp_path / "a.parquet", "rare-first:per_concept=5", concepts=around["concepts"])
    table = pq.read_table(tmp_path / "a.parquet")
    record = json.loads(table.schema.metadata[b"embedcache"])
    assert len(rows) == 20
    assert (record["method"], record["modality"], record["feature"]) == ("rare-first", "text", TEXT_FEATURE)
    assert record["parameters"] == {"per_concept": 5}
    given = {"feature": TEXT_FEATURE, "concepts": str(around["concepts"])}
    assert record["settings"] == {**given, "seed": 0, "label": "label", "join_names": False}
    assert table.column_names == ["row", "key", "concept", "cosine", "rank"]
    chosen(around, tmp_path / "b.parquet", budget=3, selection=tmp_path / "a.parquet")
    record = json.loads(pq.read_schema(tmp_path / "b.parquet").metadata[b"embedcache"])
    assert (record["settings"]["budget"], record["settings"]["selection"]) == (3, str(tmp_path / "a.parquet"))


def test_budget_as_fraction(around: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert len(chosen(around, path, budget=0.1)) == 30
    report = select(around["cache"], path, "random", budget=0.001, feature=IMAGE_FEATURE)
    assert report.line() == f"{path}: 1 of 300 samples (0.3%)"


def test_random_draw_needs_no_feature(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,caption\n" + "".join(f"k{n},caption {n}\n" for n in range(9)))
    index(open_source(tmp_path / "t.csv"), tmp_path / "cache")
    select(tmp_path / "cache", tmp_path / "a.parquet", "random", budget=4, modality="text")
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 4
    with pytest.raises(UnknownNameError, match="has no text features"):
        select(tmp_path / "cache", tmp_path / "b.parquet", "random", budget=4, modality="text", feature="x/y")
    with pytest.raises(DataError, match="images"):
        select(tmp_path / "cache", tmp_path / "b.parquet", "random", budget=4, modality="image")


def test_methods_of_a_user(around: dict[str, Path], tmp_path: Path) -> None:
    assert len(chosen(around, tmp_path / "a.parquet", f"{random_draw.__module__}:random_draw", budget=3)) == 3


def test_select_is_deterministic(around: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        chosen(around, tmp_path / name, "k-center", budget=9, seed=2)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    table = pq.read_table(tmp_path / "a.parquet")
    numbers = table["number"].to_pylist()
    assert sorted(numbers) == list(range(1, 10))
    assert table["nearest_cosine"][numbers.index(1)].as_py() == -1


def test_combine_and_sample(around: dict[str, Path], tmp_path: Path) -> None:
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    one, other = set(chosen(around, a, budget=100, seed=1)), set(chosen(around, b, budget=100, seed=2))
    cache = Cache(around["cache"])
    assert combine_selections(around["cache"], tmp_path / "and.parquet", a, "and", b) == len(one & other)
    assert set(read_selection(tmp_path / "and.parquet", [cache])) == one & other
    combine_selections(around["cache"], tmp_path / "minus.parquet", a, "minus", b)
    assert set(read_selection(tmp_path / "minus.parquet", [cache])) == one - other
    some = chosen(around, tmp_path / "some.parquet", budget=10, selection=tmp_path / "minus.parquet", seed=3)
    assert len(some) == 10
    assert set(some) < one - other
    with pytest.raises(DataError, match="got none"):
        combine_selections(cache.path, tmp_path / "none.parquet", a, "minus", a)
    assert not (tmp_path / "none.parquet").exists()
    with pytest.raises(PathError, match=r"\.parquet"):
        chosen(around, tmp_path / "a.txt", budget=3)


def test_columns_are_those_of_the_files(around: dict[str, Path], tmp_path: Path) -> None:
    cache, rng = Cache(around["cache"]), np.random.default_rng(0)
    keys = cache.samples["key"].to_pylist()
    values: dict[str, dict[str, str]] = {}
    for name in ("a", "b"):
        order = rng.permutation(300)[:120].tolist()
        table = pa.table({"key": [keys[row] for row in order], "why": [f"{name}, {row}" for row in order]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        values[name] = dict(zip(table["key"].to_pylist(), table["why"].to_pylist(), strict=True))
    (tmp_path / "c.txt").write_text("\n".join(keys[:200]))
    out = tmp_path / "out.parquet"

    combine_selections(cache.path, out, tmp_path / "a.parquet", "and", tmp_path / "b.parquet")
    both = [key for key in keys if key in values["a"] and key in values["b"]]
    expected = {"key": both, "why": [values["a"][key] for key in both], "why_2": [values["b"][key] for key in both]}
    assert pq.read_table(out).drop_columns("row").to_pydict() == expected
    combine_selections(cache.path, out, tmp_path / "b.parquet", "minus", tmp_path / "c.txt")
    rest = [key for key in keys[200:] if key in values["b"]]
    expected = {"key": rest, "why": [values["b"][key] for key in rest]}
    assert pq.read_table(out).drop_columns("row").to_pydict() == expected
    combine_selections(cache.path, out, tmp_path / "c.txt", "and", tmp_path / "b.parquet")
    assert pq.read_table(out)["why"].to_pylist() == [values["b"][key] for key in keys[:200] if key in values["b"]]


MISTAKES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("rare-frist", {"budget": 3}, UnknownNameError, "rare-frist"),
    ("random", {}, SettingError, "budget"),
    ("random", {"budget": 301}, SettingError, "301"),
    ("random", {"budget": 3, "concepts": "concepts"}, SettingError, "concepts"),
    ("random:head=4", {"budget": 3}, UnknownNameError, "head"),
    ("rare-first", {"budget": 3}, SettingError, "concepts"),
    ("rare-first:per_concept=4", {"budget": 3, "concepts": "concepts"}, SettingError, "per_concept"),
    ("rare-first:per_concept=0", {"concepts": "concepts"}, SettingError, "per_concept"),
    ("metaclip", {"concepts": "concepts"}, SettingError, "none"),
    ("metaclip:heads=4", {"concepts": "concepts"}, UnknownNameError, "known: head, threshold"),
    ("clip-score", {"budget": 3}, SettingError, "run"),
    ("clip-score:threshold=1", {"run": "run", "feature": None}, DataError, "1.0"),
    ("image-based", {"budget": 3}, SettingError, "target"),
    ("image-based:clusters=9+3", {"budget": 3}, SettingError, "clusters"),
    ("hierarchical:clusters=5+9", {"budget": 3}, SettingError, "5.9"),
    ("hierarchical:clusters=9+9", {"budget": 3}, SettingError, "9.9"),
    ("hierarchical:clusters=999", {"budget": 3}, SettingError, "999"),
    ("k-center:candidates=5", {"budget": 9}, SettingError, "candidates"),
]


@pytest.mark.parametrize(("method", "options", "error", "word"), MISTAKES)
def test_invalid_settings_raise(
    around: dict[str, Path], tmp_path: Path, method: str, options: dict[str, Any], error: type[Exception], word: str
) -> None:
    inputs = {name: around[name] for name in ("concepts", "run") if name in options}
    with pytest.raises(error, match=word):
        chosen(around, tmp_path / "a.parquet", method, **{**options, **inputs})
    assert not (tmp_path / "a.parquet").exists()


def test_join_names(around: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red\nblue\nred\n")
    extract(open_source(f"prompts:{tmp_path}/names.txt"), tmp_path / "names", text_encoder=["tests.toy:open_toy"])
    path = tmp_path / "a.parquet"
    with pytest.raises(DataError, match="red"):
        chosen(around, path, "rare-first:per_concept=4", concepts=tmp_path / "names")
    rows = chosen(around, path, "rare-first:per_concept=4", concepts=tmp_path / "names", join_names=True)
    assert len(rows) == 8
