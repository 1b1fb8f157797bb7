"""An import becomes a normal cache, goes on after a stop, and says what is wrong with its files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embedcache
from embedcache.dataset.settings import SplitSettings
from embedcache.errors import (
    DataError,
    EmbedcacheError,
    FingerprintError,
    SettingError,
    SourceError,
    UnknownNameError,
)
from embedcache.extract.extract import extract
from embedcache.extract.repair import repair
from embedcache.maintain.copy import merge_caches
from embedcache.maintain.remove import remove_samples
from embedcache.modalities import FileItem
from embedcache.progress import PlainProgress
from embedcache.reports.summary import failure_lines
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import search
from embedcache.search.settings import IndexSettings, SearchSettings
from embedcache.sources import open_source, read_below
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from embedcache.train.settings import OptimizerSettings, TrainSettings
from embedcache.train.train import train
from embedcache.vectors.exporting import export_vectors
from embedcache.vectors.importing import import_vectors
from embedcache.vectors.opening import open_vectors
from tests.extract.cases import tree as files_of
from tests.recorded import RecordedProgress
from tests.sources.files import reopen
from tests.toy import IMAGE, TEXT
from tests.vectors.cases import import_files, unit_rows, write_tree

CAPTIONS = [f"caption {row}" for row in range(40)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Forty rows in four partitions, of images and texts."""
    return write_tree(tmp_path / "tree", unit_rows(40), caption=CAPTIONS)


def test_bad_vectors_and_captions_are_failed_items(tmp_path: Path) -> None:
    vectors = unit_rows(40)
    vectors[3, 2], vectors[21] = np.nan, np.inf
    captions = [None if row == 5 else " " if row == 6 else f"{row}" for row in range(40)]
    tree = write_tree(tmp_path / "tree", vectors, caption=captions)
    cache, [report, _] = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    reason = "NaN or infinity in the imported vector"
    assert cache.feature("image").failures == dict.fromkeys((3, 21), reason)
    assert cache.feature("text").failures == {3: reason, 5: "empty caption", 6: "empty caption", 21: reason}
    assert f"    row 3, key k3: {reason}" in failure_lines(cache, cache.feature("image"))
    assert report.line() == f"img_emb (vector): imported 40 images, reused 0, failed 2: 2 {reason}"
    assert not verify(cache)


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_float64_is_stored_as_float32(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = np.random.default_rng(0).standard_normal((20, 8))
    vectors[3, 2], vectors[13, 1] = np.nan, -1e39
    if form == "npy":
        np.save(tmp_path / "x.npy", vectors)
        opened = open_vectors("npy", files={"image": tmp_path / "x.npy"})
    else:
        pq.write_table(pa.table({"image_vector": list(vectors)}), tmp_path / "x.parquet")
        opened = open_vectors("parquet", tmp_path / "x.parquet")
    import_vectors(opened, tmp_path / "cache", chunk_size=8, progress=PlainProgress())
    assert "float64 is stored as float32" in capsys.readouterr().err
    feature = Cache(tmp_path / "cache").feature("image")
    assert (str(feature.dtype), list(feature.failures)) == ("float32", [3, 13])
    is_stored = ~np.isin(np.arange(20), (3, 13))
    np.testing.assert_array_equal(feature.load()[is_stored], vectors[is_stored].astype(np.float32))


def test_second_import_reuses_or_rejects(tree: Path, tmp_path: Path) -> None:
    import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    _, reports = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    assert [(report.computed, report.reused) for report in reports] == [(0, 40), (0, 40)]
    assert files_of(tmp_path / "cache") == before

    with pytest.raises(FingerprintError, match="columns.key_column: stored None, requested 'caption'"):
        import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache", key_column="caption")
    tree = tree.rename(tmp_path / "elsewhere")
    assert import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")[1][0].reused == 40
    np.save(tree / "img_emb" / "img_emb_2.npy", unit_rows(10, seed=1) * np.float16(2))
    with pytest.raises(FingerprintError, match="files: stored .*, requested .*; restore the files"):
        import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    assert files_of(tmp_path / "cache") == before


@pytest.mark.slow
def test_damaged_chunk_is_repaired(tree: Path, tmp_path: Path) -> None:
    cache, _ = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    before = files_of(cache.path)
    path = cache.path / "image" / "img_emb" / "vector" / "c" / "2" / "0"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    findings = verify(Cache(cache.path))
    assert [finding.chunk for finding in findings] == [2]
    with pytest.raises(SettingError, match="same embedcache import again"):
        repair(Cache(cache.path), findings)
    _, reports = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    assert [report.computed for report in reports] == [8, 0]
    assert files_of(cache.path) == before
    remove_samples(cache.path, cache.key(17))
    before = files_of(cache.path / "image")
    (cache.path / "image" / "img_emb" / "chunks" / "00002.json").unlink()
    import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    assert files_of(cache.path / "image") == before


@pytest.mark.slow
def test_train_and_index_on_import(tree: Path, tmp_path: Path) -> None:
    cache, _ = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    optimizer = OptimizerSettings(epochs=1, batch_size=8)
    train(cache.path, tmp_path / "run", settings=TrainSettings(split=SplitSettings(kind="key"), optimizer=optimizer))
    build_index(cache.path, tmp_path / "index", IndexSettings(run=tmp_path / "run"))
    [hits] = search(tmp_path / "index", Queries(keys=["k7"]), SearchSettings(k=1))
    assert hits[0].key == "k7"
    for queries in (["a dog"], Queries(vectors=unit_rows(40))):
        with pytest.raises(DataError, match="vectors"):
            search(tmp_path / "index", queries)
    model = embedcache.load(tmp_path / "run")
    projected = model.project(unit_rows(40).astype(np.float64), "image")
    assert projected.dtype == np.float32
    [hits] = search(tmp_path / "index", Queries(vectors=projected[7]), SearchSettings(k=1))
    assert (hits[0].key, round(hits[0].score, 5)) == ("k7", 1)
    with pytest.raises(SettingError, match="project"):
        model.encode_text("a dog")


def test_extract_into_import_raises(tree: Path, tmp_path: Path, image_folder: Path) -> None:
    import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    cache = tmp_path / "cache"
    with pytest.raises(SettingError, match="was imported from .*; to encode its captions: "):
        extract(open_source(image_folder), cache, text_encoder=[TEXT])
    with pytest.raises(SettingError, match="encode its captions only; extract the"):
        extract(cache, cache, image_encoder=[IMAGE])
    with pytest.raises(SourceError, match="was imported: it has vectors"):
        extract(open_source(f"imported:{tree}"), tmp_path / "other", image_encoder=["tests.toy:open_toy"])


def test_captions_of_imported_vectors_are_encoded(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", unit_rows(40))
    texts = [*CAPTIONS[:38], "  ", CAPTIONS[0]]
    pq.write_table(pa.table({"key": [f"k{row}" for row in range(40)], "caption": texts}), tmp_path / "rows.parquet")
    arrays = open_vectors("npy", files={"image": tmp_path / "images.npy"}, table=tmp_path / "rows.parquet")
    cache, _ = import_files(arrays, tmp_path / "cache", chunk_size=16)
    with pytest.raises(UnknownNameError, match="no text features; extract some: embedcache extract .*cache --t"):
        cache.feature("text")
    (tmp_path / "images.npy").rename(tmp_path / "moved.npy")  # captions are in the cache
    (report,) = extract(f"{tmp_path}/./cache/", tmp_path / "cache", text_encoder=TEXT, feature="mean")
    assert (report.computed, report.failures) == (40, {"empty caption": 1})
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts if text.strip()))
    extract(tmp_path / "texts.txt", tmp_path / "texts", text_encoder=TEXT, feature="mean")
    encoded, expected = (Cache(tmp_path / name).feature("text") for name in ("cache", "texts"))
    valid = np.flatnonzero(encoded.valid)
    assert valid.tolist() == [*range(38), 39]
    np.testing.assert_array_equal(encoded.gather(valid), expected.load())
    assert verify(cache) == []
    (tmp_path / "moved.npy").rename(tmp_path / "images.npy")
    _, (again,) = import_files(arrays, tmp_path / "cache", chunk_size=16)
    assert (again.computed, again.reused) == (0, 40)


def test_paths_in_a_table_in_another_folder_than_the_array(tmp_path: Path) -> None:
    for name in ("arrays", "tables/media"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "tables/media")
    (tmp_path / "tables/media/0.wav").write_bytes(b"sound")
    paths = ["media/0.wav", "/elsewhere/1.wav", "http://host/2.wav", None]
    pq.write_table(pa.table({"audio_path": paths}), tmp_path / "tables/rows.parquet")
    for folder in ("arrays", "linked", "tables"):
        np.save(tmp_path / folder / "sounds.npy", unit_rows(4))
        arrays = open_vectors(
            "npy", files={"audio": tmp_path / folder / "sounds.npy"}, table=tmp_path / "tables/rows.parquet"
        )
        cache, _ = import_files(arrays, tmp_path / f"{folder}-cache")
        assert cache.items("audio")["path"].to_pylist() == [*paths[:3], ""]
        assert reopen(cache.info.source).read(FileItem(path="media/0.wav")) == b"sound"
        export_vectors("parquet", cache.path, tmp_path / f"{folder}.parquet")
        first = pq.read_table(tmp_path / f"{folder}.parquet")["audio_path"][0].as_py()
        assert Path(first).read_bytes() == b"sound"


def test_merged_cache_takes_no_encoder_beside_imported_vectors(tmp_path: Path, image_folder: Path) -> None:
    np.save(tmp_path / "images.npy", unit_rows(4))
    paths = [str(path) for path in sorted(image_folder.glob("*.png"))[:4]]
    pq.write_table(pa.table({"image_path": paths, "caption": CAPTIONS[:4]}), tmp_path / "rows.parquet")
    arrays = open_vectors("npy", files={"image": tmp_path / "images.npy"}, table=tmp_path / "rows.parquet")
    import_files(arrays, tmp_path / "imported")
    (tmp_path / "texts.txt").write_text("a\nb\n")
    for name, source in (("imported", tmp_path / "imported"), ("texts", tmp_path / "texts.txt")):
        extract(source, tmp_path / name, text_encoder=TEXT)
    caches, both = [tmp_path / "imported", tmp_path / "texts"], tmp_path / "both"
    merge_caches(caches, both, prefix_keys=True)
    with pytest.raises(SettingError, match="both has imported vectors of images: encode its captions"):
        extract(both, both, image_encoder=IMAGE)
    assert len(Cache(both).encoders("image")) == 1
    merge_caches(caches, tmp_path / "without", features="open_toy/mean", prefix_keys=True)
    with read_below(image_folder):
        (report,) = extract(tmp_path / "without", tmp_path / "without", image_encoder=IMAGE)
    assert (report.computed, report.failures) == (4, {})


@pytest.mark.slow
def test_vectors_of_two_imports_are_imported_together(tmp_path: Path) -> None:
    """Nothing says that one model computed both: each comparison of them names what to do instead."""
    paths = {}
    for seed, name in enumerate(("pool", "test")):
        captions = [f"{name} {row}" for row in range(40)]
        tree = write_tree(tmp_path / name, unit_rows(40, seed=seed), caption=captions)
        paths[name] = tmp_path / f"{name}-cache"
        import_vectors(open_vectors("clip-retrieval", tree), paths[name])
    array = pa.FixedSizeListArray.from_arrays(unit_rows(40).ravel(), 8)
    pq.write_table(pa.table({"a": array, "b": array, "caption": captions}), tmp_path / "other.parquet")
    other = open_vectors("parquet", tmp_path / "other.parquet", vector_columns={"image": "a", "text": "b"})
    import_vectors(other, tmp_path / "other-cache")
    embedcache.train_projectors(paths["pool"], tmp_path / "run", epochs=0, split="key", shared_width=4)
    advice = "import both at once, and divide them with: embedcache cache cut"
    with pytest.raises(FingerprintError, match=advice):
        embedcache.evaluate_retrieval(paths["test"], tmp_path / "run")
    with pytest.raises(UnknownNameError, match=f"known: a/vector; .*{advice}"):
        embedcache.evaluate_retrieval(tmp_path / "other-cache", tmp_path / "run")
    for test in (paths["test"], tmp_path / "other-cache"):
        reasons = [leaks.reason for leaks in embedcache.find_leaks(paths["pool"], test).leaks]
        assert all(reason is not None and reason.endswith(advice) for reason in reasons)


def test_leaks_do_not_compare_hashes_of_vectors_with_those_of_files(tmp_path: Path, image_folder: Path) -> None:
    paths = [str(path) for path in sorted(image_folder.glob("*.png"))[:4]]
    pq.write_table(pa.table({"image_path": paths, "caption": CAPTIONS[:4]}), tmp_path / "rows.parquet")
    np.save(tmp_path / "images.npy", unit_rows(4))
    arrays = open_vectors("npy", files={"image": tmp_path / "images.npy"}, table=tmp_path / "rows.parquet")
    import_files(arrays, tmp_path / "imported")
    extract(tmp_path / "rows.parquet", tmp_path / "files", image_encoder=IMAGE)
    with pytest.raises(DataError, match="compare"):
        embedcache.find_leaks(tmp_path / "files", tmp_path / "imported")
    for name in ("imported", "files"):
        extract(tmp_path / name, tmp_path / name, text_encoder=TEXT)
    progress = RecordedProgress()
    report = embedcache.find_leaks(tmp_path / "imported", tmp_path / "files", progress=progress)
    by = report.to_json()["by"]
    assert (list(by), by["text"]["num_samples_copied"], len(report.leaked_samples)) == (["text"], 4, 4)
    assert progress.notes[0].startswith("images are not compared: the hashes of imported vectors are not those of")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Four vectors of images and of texts, and their table."""
    for name in ("images", "texts"):
        np.save(tmp_path / f"{name}.npy", unit_rows(4))
    table = {"name": list("abcd"), "said": list("1234"), "more": ["m"] * 4, "where": [f"{row}.bin" for row in range(4)]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"no Parquet")
    return tmp_path


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_columns_can_be_named(modality: str, files: Path) -> None:
    vectors = {modality: files / "images.npy", "text": files / "texts.npy"}
    opened = open_vectors("npy", files=vectors, table=files / "rows.parquet")
    columns: dict[str, Any] = {"key_column": "name", "caption_columns": ("said",), "item_columns": {modality: "where"}}
    cache, _ = import_files(opened, files / "cache", **columns)
    assert cache.samples["key"].to_pylist() == list("abcd")
    assert cache.items("text")["text"].to_pylist() == list("1234")
    assert cache.items(modality)["path"].to_pylist() == [f"{row}.bin" for row in range(4)]


@pytest.mark.parametrize(
    ("table", "settings", "error", "word"),
    [
        (None, {}, SettingError, "text vectors need a table"),
        ("rows.parquet", {}, SourceError, "need a column of captions"),
        ("rows.parquet", {"key_column": "id"}, SourceError, "--key-column"),
        ("rows.parquet", {"caption_columns": ("text",)}, SourceError, "--caption-column"),
        ("rows.parquet", {"caption_columns": ("said", "more")}, SourceError, "row 0"),
        ("rows.parquet", {"caption_columns": ("said",), "key_column": "more"}, SourceError, "unique"),
        ("rows.parquet", {"item_columns": {"audio": "where"}}, SettingError, "item_column"),
        ("damaged.parquet", {}, SourceError, "damaged.parquet"),
    ],
)
def test_wrong_tables_raise(
    table: str | None, settings: dict[str, object], error: type[EmbedcacheError], word: str, files: Path
) -> None:
    opened = open_vectors("npy", files={"text": files / "texts.npy"}, table=table and files / table)
    with pytest.raises(error, match=word):
        import_files(opened, files / "cache", **settings)


def test_columns_of_tables_need_a_table(files: Path) -> None:
    opened = open_vectors("npy", files={"image": files / "images.npy"})
    with pytest.raises(SettingError, match="key_column"):
        import_files(opened, files / "cache", key_column="name")


@pytest.mark.parametrize("count", [24, 26])
def test_metadata_of_another_length(tmp_path: Path, count: int) -> None:
    tree = write_tree(tmp_path / "tree", unit_rows(25), rows_per_file=100)
    np.save(tree / "img_emb" / "img_emb_0.npy", unit_rows(count))
    with pytest.raises(SourceError, match=rf"metadata_0.parquet: expected {count} rows as in .*img_emb_0.npy, got 25"):
        import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
