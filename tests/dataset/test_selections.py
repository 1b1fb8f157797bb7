import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.curate.select.select import read_reasons
from embedcache.dataset.scores import read_scores, write_scores
from embedcache.dataset.selections import Selection, read_selected_reasons, read_selection, write_selection
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import read_split, write_split
from embedcache.errors import CorruptError, DataError, EmbedcacheError, PathError
from embedcache.provenance import write_record
from embedcache.store import columns
from embedcache.store.cache import Cache
from embedcache.store.rows import keys_of
from embedcache.train.data import open_data
from tests.edits import no_more_files


def test_what_is_written_is_read(cache_path: Path, tmp_path: Path) -> None:
    cache, rows = Cache(cache_path), np.array([3, 7, 200])
    write_selection(tmp_path / "s.parquet", cache, Selection(rows=rows, reasons=["a", "b", "c"]), {"method": "random"})
    assert np.array_equal(read_selection(tmp_path / "s.parquet", [cache]), rows)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table["reason"].to_pylist() == ["a", "b", "c"]
    about = json.loads(table.schema.metadata[b"embedcache"])
    assert (about["method"], about["index_digest"]) == ("random", cache.info.index_digest)


@pytest.mark.parametrize("kind", ["selection", "split", "scores"])
def test_table_that_the_system_does_not_open_is_not_called_another(cache_path: Path, tmp_path: Path, kind: str) -> None:
    cache, path = Cache(cache_path), tmp_path / "t.parquet"
    read = {
        "selection": lambda: read_selection(path, [cache]),
        "split": lambda: read_split(path, [cache]),
        "scores": lambda: read_scores(path, cache),
    }[kind]
    write_selection(path, cache, Selection(rows=np.arange(3), reasons=["a", "b", "c"]), {})
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        read()


def test_rows_that_do_not_ascend_raise(cache_path: Path, tmp_path: Path) -> None:
    for rows, word in (([3, 200, 7], "7 after 200"), ([3, 3, 7], "3 after 3"), ([], "no sample")):
        selection = Selection(rows=np.array(rows, np.int64), reasons=["a", "b", "c"][: len(rows)])
        with pytest.raises(DataError, match=word):
            write_selection(tmp_path / "s.parquet", Cache(cache_path), selection, {})
    assert not (tmp_path / "s.parquet").exists()


def test_keys_beyond_what_one_array_holds(
    two_caches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow's `string` holds 2 GiB, as 20 million keys of 108 characters take; here 100 bytes."""
    names, rows = {"image": "open_toy/cls", "text": "open_toy/mean"}, np.arange(0, 80, 7)
    settings = SplitSettings(kind="key")
    data = open_data(two_caches, names, memory_bytes=10**9)
    split = data.split(data.pairs(None), settings)
    write_split(tmp_path / "split.parquet", split)
    monkeypatch.setattr(columns, "_MAX_STRING_BYTES", 100)
    wide = open_data(two_caches, names, memory_bytes=10**9)
    assert {str(keys_of(wide.caches).type), str(wide.caches[1].column("key").type)} == {"large_string"}
    second = wide.caches[1]
    write_selection(tmp_path / "s.parquet", second, Selection(rows=rows, reasons=["a"] * len(rows)), {})
    write_scores(tmp_path / "scores.parquet", second, {"score": np.arange(80, dtype=np.float32)}, {})
    assert read_scores(tmp_path / "scores.parquet", second).values.tolist() == list(range(80))
    assert wide.split(wide.pairs(None), settings) == split == read_split(tmp_path / "split.parquet", wide.caches)
    found = read_selection(tmp_path / "s.parquet", wide.caches)
    monkeypatch.undo()
    assert found.tolist() == read_selection(tmp_path / "s.parquet", data.caches).tolist()
    assert np.array_equal(read_selection(tmp_path / "s.parquet", data.caches[1:]), rows)


def test_columns_of_a_selection_may_be_added_and_left_out(cache_path: Path, tmp_path: Path) -> None:
    cache, path, rows = Cache(cache_path), tmp_path / "s.parquet", np.array([3, 7, 200])
    write_selection(path, cache, Selection(rows=rows, reasons=["a", "b", "c"]), {"method": "random"})
    table = pq.read_table(path)
    for changed in (table.select(["key"]), table.append_column("mine", [[1, 2, 3]]), table.slice(0, 3)):
        pq.write_table(changed, path)
        assert np.array_equal(read_selection(path, [cache]), rows)
    renamed = table.rename_columns(["row", "key", "why"])
    pq.write_table(renamed.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(CorruptError, match="why"):
        read_selection(path, [cache])
    pq.write_table(renamed.replace_schema_metadata(), path)
    assert np.array_equal(read_selection(path, [cache]), rows)


@pytest.mark.slow
def test_flipped_bits_are_noticed(cache_path: Path, tmp_path: Path) -> None:
    """Values, headers of pages and the footer: the same samples and reasons, or one line."""
    cache, rng, path = Cache(cache_path), np.random.default_rng(0), tmp_path / "s.parquet"
    rows = np.arange(0, 40, 2)
    write_selection(path, cache, Selection(rows=rows, reasons=["a", "b"] * 10), {"method": "random"})
    data, expected, num_refused = path.read_bytes(), reasons_of(path, cache), 0
    for place in [*range(data.index(b"PAR1", 4) - 1500, len(data), 3), *rng.integers(len(data), size=200).tolist()]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
        try:
            assert reasons_of(path, cache) == expected, place
        except EmbedcacheError as error:
            num_refused += 1 if "\n" not in str(error) else -9999
    assert num_refused > 200


def reasons_of(path: Path, cache: Cache) -> dict[int, str]:
    known = read_reasons(path, cache)
    reasons = known.take(np.arange(len(known.rows)))
    return dict(zip(known.rows.tolist(), reasons.to_pylist(), strict=True))


@pytest.mark.slow
def test_flipped_bits_of_a_split_select_no_other_samples(run_path: Path, cache_path: Path, tmp_path: Path) -> None:
    """A split that was copied from its run, so that no digest covers it: without its parts it would select all."""
    cache, path, rng = (
        Cache(cache_path),
        Path(shutil.copy(run_path / "split.parquet", tmp_path)),
        np.random.default_rng(0),
    )
    data, expected, num_refused = path.read_bytes(), read_selection(path, [cache]).tolist(), 0
    names = [place + at for name in (b"part", b"group") for place in _places(data, name) for at in range(len(name))]
    for place in [*names, *range(len(data) - 2000, len(data), 5)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
        try:
            assert read_selection(path, [cache]).tolist() == expected, place
        except EmbedcacheError as error:
            num_refused += 1 if "\n" not in str(error) else -9999
    assert num_refused > len(names) / 4


def _places(data: bytes, name: bytes) -> list[int]:
    return [match.start() for match in re.finditer(name, data)]


def test_split_of_a_run_or_study_is_compared(run_path: Path, cache_path: Path, tmp_path: Path) -> None:
    cache, run = Cache(cache_path), Path(shutil.copytree(run_path, tmp_path / "run"))
    path = run / "split.parquet"
    selected = read_selection(path, [cache])
    split = read_split(path, [cache])
    write_split(path, replace(split, parts=["train"] * len(split.keys)))
    for read in (lambda: read_split(path, [cache]), lambda: read_selection(path, [cache])):
        with pytest.raises(CorruptError, match="config.json"):
            read()
    (run / "config.json").unlink()  # an unfinished run, which has no digest yet
    assert read_split(path, [cache]).parts.count("train") == len(split.keys) > len(selected)
    write_record(run / "study.json", {"split_digest": "0" * 64})
    with pytest.raises(CorruptError, match="study.json"):
        read_split(path, [cache])


def test_keys_of_several_caches(two_caches: list[Path], tmp_path: Path) -> None:
    """Check text files: a key may be of both caches, or listed twice, and lines may be empty."""
    caches, path = [Cache(folder) for folder in two_caches], tmp_path / "keys.txt"
    path.write_text("00003\n\n00041\n00003\n")
    assert read_selection(path, caches).tolist() == [3, 43, 81]
    assert read_selection(str(path), caches[1:]).tolist() == [3, 41]
    for lines, word in ((["00003", "d", "b", "c", "a"], "4 are"), (["00003", "b"], "'b'"), ([], "none")):
        path.write_text("\n".join(lines))
        with pytest.raises(DataError, match=word):
            read_selection(path, caches)
    pq.write_table(pa.table({"key": ["00003", None, "b"]}), tmp_path / "s.parquet")
    with pytest.raises(DataError, match="None"):
        read_selection(tmp_path / "s.parquet", caches)
    with pytest.raises(PathError, match="none"):
        read_selection(tmp_path / "none", caches)


def test_marks_and_line_ends_are_no_part_of_keys(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_bytes(b"\xef\xbb\xbf00003\r\n00041\r\n")
    assert read_selection(tmp_path / "keys.txt", [Cache(cache_path)]).tolist() == [3, 41]
    (tmp_path / "latin.txt").write_bytes("00003\né\n".encode("latin-1"))
    with pytest.raises(CorruptError, match="0xe9"):
        read_selection(tmp_path / "latin.txt", [Cache(cache_path)])


def test_tables_without_keys_raise(two_caches: list[Path], tmp_path: Path) -> None:
    cache, path = Cache(two_caches[0]), tmp_path / "s.parquet"
    for values in ({"row": [1]}, {"part": ["train"], "uid": ["00001"]}):
        pq.write_table(pa.table(values), path)
        with pytest.raises(CorruptError, match="s.parquet"):
            read_selection(path, [cache])
    pq.write_table(pa.table({"key": ["00001", "00002"], "part": ["train", "val"]}), path)  # no split: it has no groups
    assert read_selection(path, [cache]).tolist() == [1, 2]
    assert read_selected_reasons(path).to_pydict() == {"key": [], "reason": []}
    pq.write_table(pa.table({"key": ["00001", "00002"], "reason": ["a", "b"]}), path)
    assert read_selected_reasons(path).to_pydict() == {"key": ["00001", "00002"], "reason": ["a", "b"]}
    scores = tmp_path / "scores.parquet"  # of embedcache, but no selection
    write_scores(scores, cache, {"light": np.zeros(40, np.float32)}, {})
    with pytest.raises(CorruptError, match="scores.parquet"):
        read_selected_reasons(scores)
