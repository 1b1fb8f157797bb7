"""Exported caches are imported unchanged: vectors bit for bit, keys, captions, labels and splits."""

import json
import multiprocessing
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.arrays import normalize
from embedcache.errors import DataError, EmbedcacheError, PathError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.files import open_path
from embedcache.provenance import replacing_files
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.tables import to_file_item
from embedcache.store.verify import verify
from embedcache.vectors import exporting
from embedcache.vectors.exporting import export_vectors
from embedcache.vectors.opening import open_vectors
from tests.images import write_images
from tests.sources.files import reopen
from tests.toy import IMAGE
from tests.vectors.cases import FORMATS, export_and_die, import_files, reopen_vectors, unit_rows
from tests.vectors.conftest import FAILED, NUM_SAMPLES

KEPT = [row for row in range(NUM_SAMPLES) if row != FAILED]


@pytest.mark.parametrize("form", FORMATS)
def test_export_then_import_is_identical(
    form: str, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in several files, and in blocks that are smaller than a file."""
    monkeypatch.setattr(exporting, "_ROWS_PER_FILE", 15)
    monkeypatch.setattr(exporting, "_BLOCK", 7)
    features, name = FORMATS[form]
    report = export_vectors(form, labeled, tmp_path / name)
    assert (report.num_rows, report.left_out) == (
        len(KEPT),
        "1 sample without a vector, 1 caption beyond a sample's first",
    )
    there, back = Cache(labeled), import_files(reopen_vectors(form, tmp_path / name), tmp_path / "cache")[0]

    for column in ("key", "label", "split"):
        assert back.samples[column].to_pylist() == there.samples[column].take(KEPT).to_pylist()
    texts = there.items("text").to_pylist()
    first = [next(text for text in texts if text["sample"] == row) for row in KEPT]
    assert back.items("text")["text"].to_pylist() == [text["text"] for text in first]
    assert back.items("text")["language"].to_pylist() == ["en"] * len(KEPT)

    images = there.feature("image").gather(np.array(KEPT))
    captions = there.feature("text").gather(np.array([texts.index(text) for text in first]))
    for modality, feature, then in zip(("image", "text"), features, (images, captions), strict=True):
        now = back.feature(modality, feature).load()
        assert now.dtype == np.float16
        if form == "clip-retrieval":  # its convention is length 1
            np.testing.assert_array_equal(now, normalize(then).astype(np.float16))
        else:
            np.testing.assert_array_equal(now, then)
    assert not verify(back)


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_intervals_of_recordings(form: str, tmp_path: Path) -> None:
    rows = {"audio": unit_rows(20), "points": unit_rows(20, seed=1).astype(np.float32), "text": unit_rows(20, 4)}
    files = {name: tmp_path / f"{name}.npy" for name in rows}
    for name, path in files.items():
        np.save(path, rows[name])
    (tmp_path / "calls.wav").write_bytes(b"RIFF")
    columns = {
        "key": [f"k{row}" for row in range(20)],
        "audio": ["calls.wav", *[None] * 19],
        "start_s": [row / 2 for row in range(20)],
        "stop_s": [row / 2 + 1 for row in range(20)],
        "caption": [f"call {row}" for row in range(20)],
        "image": [f"{row}.png" for row in range(20)],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    vectors = open_vectors("npy", files=files, table=tmp_path / "rows.parquet")
    once, reports = import_files(vectors, tmp_path / "once")
    assert [(report.modality, report.computed) for report in reports] == [(name, 20) for name in rows]
    (item,) = once.items("audio").slice(0, 1).to_pylist()
    assert reopen(once.info.source).read(to_file_item(item)) == b"RIFF"
    assert once.samples["image"].to_pylist() == columns["image"]  # no vectors of images: a column like any other
    out = tmp_path / ("out.parquet" if form == "parquet" else "out")
    report = export_vectors(form, once, out)
    assert (report.num_rows, report.left_out) == (20, "")
    twice, _ = import_files(reopen_vectors(form, out, list(rows)), tmp_path / "twice")
    assert twice.samples.drop_columns("key").to_pydict() == {"image": columns["image"]}
    for name, values in rows.items():
        np.testing.assert_array_equal(twice.feature(name).load(), values, strict=True)
    for name in ("start_s", "stop_s"):
        assert twice.items("audio")[name].to_pylist() == columns[name]
    (first,) = twice.items("audio").slice(0, 1).to_pylist()
    assert first["path"] == str(tmp_path / "calls.wav")
    assert verify(twice) == []


def test_selection_and_modality(labeled: Path, tmp_path: Path) -> None:
    chosen = [f"{row:032x}" for row in (5, 6, FAILED, 20)]
    (tmp_path / "chosen.txt").write_text("\n".join(chosen))
    report = export_vectors(
        "parquet", labeled, tmp_path / "some.parquet", selection=tmp_path / "chosen.txt", modality="image"
    )
    assert (report.num_rows, report.left_out) == (3, "1 sample without a vector")
    back = import_files(open_vectors("parquet", tmp_path / "some.parquet"), tmp_path / "cache")[0]
    assert back.samples["key"].to_pylist() == [chosen[0], chosen[1], chosen[3]]
    assert not back.features("text")
    assert len(back.items("text")) == 3  # their captions came along


@pytest.mark.parametrize("form", FORMATS)
def test_existing_output_is_not_overwritten(form: str, labeled: Path, tmp_path: Path) -> None:
    _, name = FORMATS[form]
    path = tmp_path / name
    path.mkdir() if form != "parquet" else None
    other = path if form == "parquet" else path / "other"
    other.write_text("mine")
    with replacing_files(False), pytest.raises(PathError, match="not empty|got one that exists"):
        export_vectors(form, labeled, path)
    assert other.read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("form", FORMATS)
def test_failed_export_leaves_nothing(form: str, labeled: Path, tmp_path: Path) -> None:
    _, name = FORMATS[form]
    export_vectors(form, labeled, tmp_path / "out" / name)
    back = import_files(reopen_vectors(form, tmp_path / "out" / name), tmp_path / "cache")[0]
    feature = back.features("image")[0]
    chunk = feature.group.path / feature.feature / "c" / "2" / "0"
    chunk.write_bytes(b"\1" * chunk.stat().st_size)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(EmbedcacheError, match="checksum|bytes"):
        export_vectors(form, back, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("form", ["npy", "parquet"])  # a folder and a file
def test_leftovers_of_killed_export_are_removed(form: str, labeled: Path, tmp_path: Path) -> None:
    _, name = FORMATS[form]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=export_and_die, args=(form, labeled, tmp_path / name))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    export_vectors(form, labeled, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("form", "options", "error", "words"),
    [
        ("csv", {}, UnknownNameError, "parquet"),
        ("npy", {"projection": "pca"}, UnknownNameError, "projection"),
        ("clip-retrieval", {"modality": "audio"}, SettingError, "modality"),
        ("parquet", {}, PathError, "ends in .parquet"),
        ("npy", {"feature": "nix"}, UnknownNameError, "open_toy/cls"),
        ("npy", {"language": "de"}, UnknownNameError, "known: en"),
        ("npy", {"feature": "open_toy/cls", "modality": "text"}, SettingError, "feature: expected features of text"),
        ("npy", {"run": Path("nowhere")}, PathError, "nowhere does not exist"),
        ("npy", {"selection": Path("nowhere.txt")}, PathError, "nowhere.txt: expected Parquet .* got nothing"),
        ("npy", {"selection": "failed.txt"}, DataError, "expected samples with image and text vectors, got none"),
    ],
)
def test_wrong_exports_raise(
    labeled: Path,
    form: str,
    options: dict[str, Any],
    error: type[EmbedcacheError],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("failed.txt").write_text(f"{FAILED:032x}\n")
    with pytest.raises(error, match=words):
        export_vectors(form, labeled, "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["failed.txt"]


def test_arrays_parse_as_in_embedding_reader(labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_ROWS_PER_FILE", 3)
    export_vectors("clip-retrieval", labeled, tmp_path / "tree")
    names = sorted(path.name for path in (tmp_path / "tree" / "img_emb").iterdir())
    assert names == [f"img_emb_{number:02d}.npy" for number in range(13)]  # int(log10(13)) + 1 digits
    for name in ("img_emb", "text_emb"):
        for number, path in enumerate(sorted((tmp_path / "tree" / name).iterdir())):
            first_line = path.read_bytes()[:300].split(b"\n")[0]
            assert re.search(rb"'descr': '<f2'", first_line)
            shape = re.search(rb"'shape': \((\d+), (\d+)\)", first_line)
            assert shape is not None
            rows, width = int(shape[1]), int(shape[2])
            assert path.stat().st_size == len(first_line) + 1 + rows * width * 2
            vectors = np.load(path)
            assert vectors.flags.c_contiguous
            np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
            metadata = pq.read_table(tmp_path / "tree" / "metadata" / f"metadata_{number:02d}.parquet")
            assert len(metadata) == rows
            assert metadata["caption"].null_count == metadata["image_path"].null_count == 0


def test_languages_that_begin_in_a_later_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / "photos", 6)
    (folder / "00001.txt").unlink()
    (folder / "00005.txt").unlink()
    (folder / "00005.json").write_text('{"caption": "ein roter Balken", "language": "de"}')
    extract(open_source(folder), tmp_path / "cache", image_encoder=[IMAGE])
    monkeypatch.setattr(exporting, "_BLOCK", 2)
    export_vectors("parquet", tmp_path / "cache", tmp_path / "rows.parquet", feature="open_toy/cls")
    written = pq.read_table(tmp_path / "rows.parquet")
    assert written["language"].to_pylist() == [None] * 5 + ["de"]
    captions = [(folder / f"{row:05d}.txt").read_text().strip() for row in (0, 2, 3, 4)]
    assert written["caption"].to_pylist() == [captions[0], None, *captions[1:], "ein roter Balken"]
    export_vectors("parquet", tmp_path / "cache", tmp_path / "de.parquet", feature="open_toy/cls", language="de")
    assert pq.read_table(tmp_path / "de.parquet")["caption"].to_pylist() == [None] * 5 + ["ein roter Balken"]


def test_flipped_vector_of_an_export_is_noticed(labeled: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    export_vectors("parquet", labeled, path, modality="image")
    group = pq.read_metadata(path).row_group(0)
    [column] = [group.column(i) for i in range(group.num_columns) if "image_vector" in group.column(i).path_in_schema]
    start, data = column.dictionary_page_offset or column.data_page_offset, path.read_bytes()
    place = start + column.total_compressed_size // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(EmbedcacheError, match="x.parquet"):
        import_files(open_vectors("parquet", path), tmp_path / "cache")


def test_image_paths_of_files_are_absolute_and_those_of_urls_unchanged(tmp_path: Path) -> None:
    folder, url = write_images(tmp_path / "images", 2), "memory://photos/00001.png"
    open_path(url).parent.mkdir(parents=True, exist_ok=True)
    open_path(url).write_bytes((folder / "00001.png").read_bytes())
    (tmp_path / "rows.csv").write_text(f"image,caption\nimages/00000.png,a\n{url},b\n")
    coco = {"images": [{"id": 0, "file_name": "00000.png"}, {"id": 1, "file_name": "00001.png"}], "annotations": []}
    (tmp_path / "captions_images.json").write_text(json.dumps(coco))
    files = [str(folder / f"0000{number}.png") for number in range(2)]
    for location, expected in (
        (f"{folder}", files),
        (f"{tmp_path / 'captions_images.json'}", files),
        (f"{tmp_path / 'rows.csv'}", [files[0], url]),
    ):
        cache = tmp_path / location.replace("/", "-")
        extract(open_source(location), cache, image_encoder=[IMAGE])
        export_vectors("parquet", cache, f"{cache}.parquet", modality="image")
        assert pq.read_table(f"{cache}.parquet")["image_path"].to_pylist() == expected
