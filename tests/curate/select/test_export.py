"""Selections for other tools, and back."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.curate.select.export import _suffix, export_selection, to_uids, write_shards
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.errors import DataError, PathError
from embedcache.extract.extract import extract
from embedcache.modalities import Scalar
from embedcache.provenance import replacing_files
from embedcache.sources import Sample, Source, SourceSettings, TextItem, open_source
from embedcache.sources.open import remember
from embedcache.store.cache import Cache
from embedcache.store.indexing import index
from tests.images import write_images
from tests.media_files import cloud, encode_video, moving_square, npz, tone, wav
from tests.recorded import RecordedProgress
from tests.sources.files import jpeg, write
from tests.toy import IMAGE, TEXT

UIDS = st.lists(st.binary(min_size=16, max_size=16).map(bytes.hex), min_size=1, max_size=9, unique=True)


@given(UIDS)
def test_uids_of_keys(keys: list[str]) -> None:
    found = to_uids(pa.chunked_array([keys[:2], keys[2:]], pa.string()))
    assert found.dtype == np.dtype("u8,u8")
    assert [f"{high:016x}{low:016x}" for high, low in found.tolist()] == keys
    with pytest.raises(DataError, match="a/b"):
        to_uids(pa.chunked_array([[*keys, "a/b"]]))


def test_keys_with_line_breaks_raise(tmp_path: Path) -> None:
    keys = ["a", "b\nc", "d\n"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"uid": key, "caption": key}) for key in keys))
    indexed(open_source(tmp_path / "t.jsonl", settings=SourceSettings(key_column="uid")), tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    write_selection(tmp_path / "s.parquet", cache, Selection(rows=np.arange(3)), {"method": "hand"})
    with pytest.raises(DataError, match="line breaks"):
        export_selection(cache.path, tmp_path / "s.parquet", tmp_path / "keys.txt", "keys")
    assert not (tmp_path / "keys.txt").exists()


def indexed(source: Source, path: Path) -> None:
    """Index a source as its user does."""
    info = index(source, path)
    remember(info.source, info.index_digest)


@pytest.fixture
def made(cache_path: Path, tmp_path: Path) -> tuple[Cache, Path]:
    """A cache and a selection of seven of its samples."""
    cache = Cache(cache_path)
    rows = np.array([2, 3, 40, 41, 199, 250, 299])
    write_selection(tmp_path / "s.parquet", cache, Selection(rows=rows), {"method": "hand"})
    return cache, tmp_path / "s.parquet"


def test_keys_roundtrip(made: tuple[Cache, Path], tmp_path: Path) -> None:
    cache, path = made
    assert export_selection(cache.path, path, tmp_path / "keys.txt", "keys") == 7
    assert np.array_equal(read_selection(tmp_path / "keys.txt", [cache]), read_selection(path, [cache]))


def test_output_is_checked_first(made: tuple[Cache, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with replacing_files(False), pytest.raises(PathError, match=r"mine\.txt"):
        export_selection(made[0].path, tmp_path / "none.parquet", tmp_path / "mine.txt", "keys")


def test_shards_roundtrip(made: tuple[Cache, Path], image_folder: Path, tmp_path: Path) -> None:
    cache, path = made
    rows = read_selection(path, [cache])
    progress = RecordedProgress()
    (tmp_path / "shards").mkdir()
    write_shards(cache, rows, tmp_path / "shards", size=3, progress=progress)
    assert (progress.started, progress.advances) == ([("writing shards", 7, "samples")], [3, 3, 1])
    assert sorted(file.name for file in (tmp_path / "shards").iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(tmp_path / "shards" / "00002.tar") as tar:
        assert tar.getnames() == ["000000299.png", "000000299.txt", "000000299.json"]
        image = tar.extractfile("000000299.png")
        assert image is not None
        assert image.read() == (image_folder / "00299.png").read_bytes()
    extract(open_source(tmp_path / "shards"), tmp_path / "again", image_encoder=[IMAGE], text_encoder=[TEXT])
    again = Cache(tmp_path / "again")
    assert again.samples["key"].to_pylist() == [cache.samples["key"].to_pylist()[row] for row in rows]
    for modality, feature in (("image", "open_toy/cls"), ("text", "open_toy/mean")):
        assert np.array_equal(again.feature(modality).load(), cache.feature(modality, feature).load()[rows])


class Made:
    """A source of the given samples, whose files are read by another."""

    def __init__(self, source: Source, samples: Sequence[Sample]) -> None:
        self.describe, self.read, self._samples = source.describe, source.read, samples

    def samples(self) -> Iterator[Sample]:
        return iter(self._samples)


ABOUT: list[tuple[list[TextItem], dict[str, Scalar]]] = [
    ([TextItem(text="eins", language="de"), TextItem(text="one", language="en")], {"n": 1}),
    ([TextItem(text="a\nb"), TextItem(text="c"), TextItem(text="c")], {"caption_error": "none", "n": None}),
    ([], {"embedcache": "é", "label": "cat"}),
    ([TextItem(text="")], {"label": "dog", "n": 3}),
]


def test_captions_languages_and_columns_are_read_again(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "p", 4))
    described = zip(source.samples(), ABOUT, strict=True)
    samples = [replace(sample, texts=tuple(texts), columns=columns) for sample, (texts, columns) in described]
    indexed(Made(source, samples), tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    write_shards(cache, np.arange(4), tmp_path / "shards", size=3)
    again = list(open_source(tmp_path / "shards").samples())
    assert [sample.key for sample in again] == cache.column("key").to_pylist()
    assert [sample.texts for sample in again] == [tuple(texts) for texts, _ in ABOUT]
    names = [name for name in cache.columns if name != "key"]
    assert [sample.columns for sample in again] == [{name: about.get(name) for name in names} for _, about in ABOUT]
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        text, fields = (tar.extractfile(f"000000000.{suffix}") for suffix in ("txt", "json"))
        assert text is not None
        assert fields is not None
        assert text.read() == b"eins"
        read = json.load(fields)
    assert read == {"key": "00000", "captions": ["eins", "one"], "language": ["de", "en"], "n": 1} | dict.fromkeys(
        ("caption_error", "embedcache", "label")
    )


def test_shards_are_deterministic(made: tuple[Cache, Path], tmp_path: Path) -> None:
    cache, path = made
    for name in ("a", "b"):
        export_selection(cache.path, path, tmp_path / name, "webdataset")
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()
    (tmp_path / "c").write_text("")
    for name, got in (("a", "one that is not empty"), ("c", "a file")):
        with pytest.raises(PathError, match=got):
            export_selection(cache.path, path, tmp_path / name, "webdataset")


def test_shards_hold_one_image_per_sample(image_folder: Path, tmp_path: Path) -> None:
    source = open_source(image_folder)
    doubled = [replace(sample, images=sample.images * (1 + (row == 1))) for row, sample in enumerate(source.samples())]
    indexed(Made(source, doubled), tmp_path / "cache")
    with pytest.raises(DataError, match="00001"):
        write_shards(Cache(tmp_path / "cache"), np.arange(3), tmp_path / "shards")


def test_files_of_all_modalities_are_read_again(tmp_path: Path) -> None:
    sound, points = wav(tone(0.1)), npz(cloud(5))
    video, silent = encode_video(moving_square(3), samples=tone(0.2)), encode_video(moving_square(2), kind="webm")
    image = jpeg()
    files = {"a.jpg": image, "a.wav": sound, "a.npz": points, "b.mp4": video, "c.webm": silent, "c.flac": b"fLaC"}
    source = open_source(write(tmp_path / "f", {**files, "a.txt": "a tone"}))
    indexed(source, tmp_path / "cache")
    write_shards(Cache(tmp_path / "cache"), np.arange(3), tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        names = [name.removeprefix("00000000") for name in tar.getnames() if not name.endswith(".json")]
    assert names == ["0.jpg", "0.wav", "0.npz", "0.txt", "1.mp4", "2.flac", "2.webm"]
    again = open_source(tmp_path / "shards")
    assert [contents(again, sample) for sample in again.samples()] == [
        {"image": image, "audio": sound, "points": points},
        {"video": video, "audio": video},
        {"video": silent, "audio": b"fLaC"},
    ]
    assert [contents(source, sample) for sample in source.samples()] == [
        contents(again, sample) for sample in again.samples()
    ]


def contents(source: Source, sample: Sample) -> dict[str, bytes]:
    """Return modality -> bytes of the one file of a sample."""
    found = {name: sample.items_in_files(name) for name in ("image", "audio", "video", "points")}
    return {name: source.read(item) for name, items in found.items() for item in items}


def test_intervals_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path, {"a.wav": wav(tone(0.2)), "t.csv": "audio,stop_s,text\na.wav,,x\na.wav,0.1,y\na.wav,0.2,z\n"})
    indexed(open_source(tmp_path / "t.csv"), tmp_path / "cache")
    (tmp_path / "a.wav").unlink()
    cache = Cache(tmp_path / "cache")
    with pytest.raises(DataError, match="t/1"):
        write_shards(cache, np.arange(3), tmp_path / "shards")
    with pytest.raises(DataError, match="t/0"):
        write_shards(cache, np.arange(1), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_missing_image_leaves_no_shards(tmp_path: Path) -> None:
    write_images(tmp_path / "p", 4)
    extract(open_source(tmp_path / "p"), tmp_path / "cache", image_encoder=[IMAGE])
    (tmp_path / "p" / "00002.png").unlink()
    with pytest.raises(DataError, match="00002"):
        write_shards(Cache(tmp_path / "cache"), np.arange(4), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    assert not list(tmp_path.glob(".shards*"))


def test_suffix_is_that_of_the_source() -> None:
    paths = ("a/b.PNG", "s3://b/c.webp", "a.tar", "a.parquet")
    assert [_suffix("image", path) for path in paths] == ["png", "webp", "jpg", "jpg"]
    assert [_suffix(name, "a.tar") for name in ("audio", "video", "points")] == ["wav", "mp4", "npz"]
