"""Conditions on columns: equal to DuckDB's, refused where they are anything else, and applied by each command."""

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.curate.select.select import select
from embedcache.dataset import where
from embedcache.dataset.selections import read_selection
from embedcache.dataset.where import parse_where, rows_where, samples_within
from embedcache.errors import DataError, SettingError, UnknownNameError
from embedcache.sources.open import open_source
from embedcache.store.cache import Cache
from embedcache.store.indexing import index
from embedcache.store.removal import erase, remove_rows
from embedcache.vectors.exporting import export_vectors

TABLE = pa.table(
    {
        "year": [2019, 2021, None, 2024, -3],
        "score": [0.5, None, float("nan"), 2.5, -1.0],
        "license": ["MIT", "", None, "it's", "100%"],
        "is free": [True, False, None, True, False],
    }
)
NUMBERS = ["year", "score", "2020", "-1", ".5", "2.5e0", "year + 1", "score * 2 - 1", "(year / 2)"]
TEXTS = ["license", "'MIT'", "'it''s'", "''"]
ATOMS = st.one_of(
    st.builds(
        "{} {} {}".format, st.sampled_from(NUMBERS), st.sampled_from(["=", "!=", "<", ">="]), st.sampled_from(NUMBERS)
    ),
    st.builds("{} {} {}".format, st.sampled_from(TEXTS), st.sampled_from(["<>", "==", ">"]), st.sampled_from(TEXTS)),
    st.builds("{} BETWEEN {} AND {}".format, *[st.sampled_from(NUMBERS)] * 3),
    st.builds("{} not in ({}, {})".format, *[st.sampled_from(NUMBERS)] * 3),
    st.builds(
        "license {} {}".format, st.sampled_from(["LIKE", "not ilike"]), st.sampled_from(["'%t%'", "'M_T'", "''"])
    ),
    st.builds("{} is {}".format, st.sampled_from(["year", "license", "score"]), st.sampled_from(["null", "NOT null"])),
    st.sampled_from(['"is free"', "true", '"is free" = false']),
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("not {}".format, inner),
        st.builds("({})".format, inner),
        st.builds("{} {} {}".format, inner, st.sampled_from(["and", "OR"]), inner),
    ),
    max_leaves=6,
)


@given(CONDITIONS)
def test_condition_equals_duckdb(expression: str) -> None:
    places = range(len(TABLE))
    table = TABLE.append_column("place", pa.array(places)).set_column(
        1, "score", pa.array([None if value != value else value for value in TABLE["score"].to_pylist()])
    )
    with duckdb.connect() as database:
        database.register("samples", table)
        expected = database.execute(f"select place from samples where {expression} order by place").fetchall()
    assert parse_where(expression).rows(TABLE, len(TABLE)).tolist() == [place for (place,) in expected]


@pytest.mark.parametrize(
    "expression",
    [
        "read_csv('/etc/passwd')",
        "key = getenv('HOME')",
        "key in (select key)",
        "key = 'a'; drop table samples",
        "COPY samples TO 'x'",
        "INSTALL httpfs",
        "key",
        "key and true",
        "key > ",
        "label + 1 > 2",
        "label > 2020",
        "1 = 'one'",
        "key like label",
        "'open",
        "key = $1",
        "(" * 51 + "true" + ")" * 51,
        "true or " * 2000 + "true",
        "999999999999999999 * 100 > 1",
    ],
)
def test_other_expressions_are_refused(labeled: Path, expression: str) -> None:
    with pytest.raises(SettingError, match="where: ") as caught:
        rows_where([Cache(labeled)], expression)
    assert "\n" not in str(caught.value)


def test_unknown_column_names_the_known(labeled: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'label'"):
        rows_where([Cache(labeled)], "lable = 'cat'")


def test_cells_of_csv_are_numbers_beside_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("key,text,year\na,one,2019\nb,two,\nc,three, 2024\nd,four,007\n")
    index(open_source(tmp_path / "t.csv"), tmp_path / "cache")
    caches = [Cache(tmp_path / "cache")]
    assert rows_where(caches, "year > 2020").tolist() == [2]
    assert rows_where(caches, "year = 7 or year = '2019'").tolist() == [0, 3]
    assert rows_where(caches, "not year > 2020").tolist() == [0, 3]


def test_rows_of_all_caches_without_removed_ones(labeled: Path, two_caches: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(two_caches[0], tmp_path / "copy"))
    remove_rows(Cache(copy), np.array([1]), ["00001"])
    erase(copy)
    caches = [Cache(copy), Cache(two_caches[1])]
    assert rows_where(caches, "key in ('00001', '00003')").tolist() == [3, 41, 43]
    assert 1 not in rows_where(caches, "key is not null")


def test_condition_takes_no_longer_than_it_may(labeled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_BLOCK", 1)
    with pytest.raises(SettingError, match="within 0 s"):
        rows_where([Cache(labeled)], "key like '%a%'", timeout_s=0)


def test_select_and_export_within_a_condition(labeled: Path, tmp_path: Path) -> None:
    cache, condition = Cache(labeled), "label = 'cat' and split = 'val'"
    rows = [row for row, key in enumerate(cache.samples["key"].to_pylist()) if key.startswith("val/cat")]
    report = select(labeled, tmp_path / "s.parquet", "random", budget="100%", where=condition)
    assert (report.num_selected, report.num_pool) == (15, 15)
    assert read_selection(tmp_path / "s.parquet", [cache]).tolist() == rows
    export_vectors("parquet", labeled, tmp_path / "v.parquet", feature="image=open_toy/cls", where=condition)
    assert pq.read_table(tmp_path / "v.parquet")["split"].to_pylist() == ["val"] * 15
    assert samples_within([cache], tmp_path / "s.parquet", "key like '%3'").tolist() == rows[3::10]
    with pytest.raises(DataError, match="got none"):
        select(labeled, tmp_path / "t.parquet", "random", budget=1, where="label = 'bird'")
