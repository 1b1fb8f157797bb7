"""What an extraction plans, stores and rejects."""

import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.errors import CorruptError, DiskFullError, FingerprintError, PathError, SettingError, SourceError
from embedcache.extract.extract import Plan, PlannedFeature, extract, plan
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import SourceSettings, open_source, read_below
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache
from tests.crash import forked_workers
from tests.encoders.checkpoints import save_timm
from tests.extract.cases import FEATURES, lines, run, tree
from tests.images import write_images
from tests.toy import IMAGE, TEXT


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images. Not to be changed."""
    return write_images(tmp_path_factory.mktemp("extract") / "source", 20)


@pytest.fixture(scope="module")
def extracted(source: Path) -> Path:
    """Vectors and tokens of the source in three chunks. Not to be changed."""
    run(source, source.parent / "cache", features=("cls", "tokens"), chunk_size=8)
    return source.parent / "cache"


@pytest.fixture
def cache(extracted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(extracted, tmp_path / "c"))


@pytest.mark.parametrize("name", ["image/open_toy/zarr.json", "text/open_toy/tokens/zarr.json"])
def test_unreadable_metadata_is_written_again_once_it_is_removed(source: Path, cache: Path, name: str) -> None:
    settings, before, path = {"features": ("cls", "tokens"), "chunk_size": 8}, tree(cache), cache / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptError, match=f"{name} is not valid JSON: .* or remove it and run the same embedcache"):
        run(source, cache, **settings)
    path.unlink()
    with pytest.raises(PathError, match=f"{name} does not exist; run the same"):  # no feature vanishes from a list
        Cache(cache).features()
    assert [report.computed for report in run(source, cache, **settings)] == [0, 0]
    assert tree(cache) == before


def test_cache_holds_the_encoders_outputs(image_folder: Path, cache_path: Path) -> None:
    cache = Cache(cache_path)
    image, text = open_encoder(IMAGE, modality="image"), open_encoder(TEXT, modality="text")
    for row in (0, 63, 64, 299):
        item = cache.items("image").slice(row, 1).to_pylist()[0]
        pil_image = decode_image((image_folder / item["path"]).read_bytes())
        expected = image.encode(image.prepare([pil_image]), ["cls", "patches"])
        for name, (value,) in expected.items():
            found = cache.feature("image", f"open_toy/{name}").gather(np.array([row]))[0]
            np.testing.assert_array_equal(found, value.astype(np.float16))
        caption = cache.items("text")["text"][row].as_py()
        tokens = text.encode(text.prepare([caption]), ["tokens"])["tokens"][0]
        (found,) = cache.feature("text", "open_toy/tokens").gather_tokens(np.array([row]))
        np.testing.assert_array_equal(found, tokens.astype(np.float16))


def test_adding_a_feature_keeps_the_others(source: Path, cache: Path) -> None:
    before = (cache / "image/open_toy/cls/c/2/0").stat().st_mtime_ns
    run(source, cache, features=("patches", "cls"))
    assert (cache / "image/open_toy/cls/c/2/0").stat().st_mtime_ns == before
    cls = Cache(cache).feature("image", "open_toy/cls").load()
    patches = Cache(cache).feature("image", "open_toy/patches").load()
    np.testing.assert_array_equal(patches.reshape(20, -1), cls)


def test_item_that_changed_before_a_feature_is_added(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "s", 6)
    run(folder, tmp_path / "c")
    size = (folder / "00002.png").stat().st_size
    (folder / "00002.png").write_bytes(b"x" * size)
    with pytest.raises(
        FingerprintError, match=r"image 00002.png in row 2 .* than when open_toy was extracted|other bytes"
    ):
        run(folder, tmp_path / "c", features=("patches",))


def test_cache_as_its_own_source(source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "s"))
    run(folder, tmp_path / "own", features=("cls", "tokens"), chunk_size=8)
    (folder / "new.png").write_bytes((folder / "00000.png").read_bytes())  # the source is not compared
    other = "tests.toy:open_other"
    monkeypatch.chdir(tmp_path)
    extract("own/", tmp_path / "own", image_encoder=other, text_encoder=TEXT, feature=("cls", "mean"))
    extract(source, cache, image_encoder=other, text_encoder=TEXT, feature=("cls", "mean"))
    assert tree(tmp_path / "own") == tree(cache) | {"cache.json": tree(tmp_path / "own")["cache.json"]}
    shutil.rmtree(folder)
    with forked_workers():
        (report,) = extract("own", "own", text_encoder=other, device=("cpu", "cpu"))
    assert (report.computed, report.failures) == (20, {})
    with pytest.raises(PathError, match="/s, which does not exist; .*; if the source of own has moved, name it"):
        extract("own", "own", image_encoder=IMAGE, feature="patches")


@pytest.mark.parametrize(
    ("name", "value"),
    [("extend", True), ("limit", 5), ("source_type", "folder"), ("language", ("de",)), ("chunk_size", 9)],
)
def test_cache_as_its_own_source_has_no_options(extracted: Path, name: str, value: object) -> None:
    with pytest.raises((SettingError, FingerprintError), match=name):
        extract(extracted, extracted, image_encoder=IMAGE, **{name: value})


def test_cache_as_the_source_of_another_raises(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a cache; to encode its samples with more encoders"):
        extract(cache, tmp_path / "new", text_encoder=TEXT)


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG whose header names a size, without the pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def test_bad_items_are_rows_with_reasons(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "s", 8)
    (folder / "00001.png").write_bytes((folder / "00001.png").read_bytes()[:200])
    (folder / "00002.png").write_bytes(b"")
    (folder / "00003.png").write_text("not an image")
    (folder / "00004.png").write_bytes(png_of_size(30_000, 30_000))
    (folder / "00005.txt").write_text("")
    run(folder, tmp_path / "c", chunk_size=4)
    cache = Cache(tmp_path / "c")
    image, text = cache.feature("image"), cache.feature("text")
    assert sorted(image.failures) == [1, 2, 3, 4]
    assert image.failures[2] == "empty file"
    assert "pixels" in image.failures[4]
    assert text.failures == {5: "empty caption"}
    assert np.isfinite(image.load()[[0, 5, 6, 7]]).all()
    assert np.isnan(image.load()[[1, 2, 3, 4]]).all()
    assert lines(folder, tmp_path / "c")[0].startswith("open_toy (cls): encoded 0 images, reused 8, failed 4: 1 ")


def test_unreadable_items_are_counted_by_kind(tmp_path: Path) -> None:
    folder, table = write_images(tmp_path / "s", 1), tmp_path / "s/t.csv"
    for name in ("a.png", "b.png"):
        (folder / name).symlink_to(name)
    (report,) = extract(open_source(folder), tmp_path / "c", image_encoder=[IMAGE])
    assert report.failures == {"cannot be read": 2}
    others = ["/dev/zero", "../x.png", "http://127.0.0.1:9/x.png", "http://127.0.0.1:9/y.png"]
    table.write_text("\n".join(["image", "00000.png", *others]))
    with read_below(folder):
        (report,) = extract(table, tmp_path / "d", image_encoder=[IMAGE])
    assert report.failures == {"outside the source and --image-folder": 4}
    pq.write_table(pa.table({"image": [(folder / "00000.png").read_bytes(), None, None]}), tmp_path / "t.parquet")
    (report,) = extract(tmp_path / "t.parquet", tmp_path / "e", image_encoder=[IMAGE])
    assert report.failures == {"no item in column image": 2}


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "short"])
def test_damaged_chunk_is_encoded_again(source: Path, cache: Path, is_gone: bool) -> None:
    before = tree(cache)
    for file in (
        "image/open_toy/cls/c/1/0",
        "text/open_toy/tokens/values/00001/c/0/0",
        "text/open_toy/tokens/lengths/c/2",
    ):
        path = cache / file
        path.unlink() if is_gone else path.write_bytes(path.read_bytes()[:-5])
    images, texts = lines(source, cache, features=("cls", "tokens"))
    assert "encoded 8 images, reused 12" in images
    assert "encoded 12 texts, reused 8" in texts
    assert tree(cache) == before


def test_source_without_readable_items_raises(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "s", 3)
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SourceError, match=r"all 3 images failed: 3 empty file; embedcache inspect .*/c names them"):
        run(folder, tmp_path / "c")


def test_shards_together_equal_one_run(source: Path, extracted: Path, tmp_path: Path) -> None:
    settings = {"chunk_size": 8, "features": ("cls", "tokens")}
    encoded = [lines(source, tmp_path / "c", shard=f"{number}/2", **settings)[0] for number in (1, 0)]
    assert [line.partition(": ")[2] for line in encoded] == [
        "encoded 8 images, reused 0, failed 0",
        "encoded 12 images, reused 8, failed 0",
    ]
    assert tree(tmp_path / "c") == tree(extracted)


def test_other_encoder_of_the_same_name_raises(source: Path, cache: Path) -> None:
    with pytest.raises(FingerprintError, match="encoder 'open_toy'.*weights: "):
        extract(open_source(source), cache, image_encoder=[f"{IMAGE},scale=2"])


def test_values_beyond_float16_need_float32(source: Path, tmp_path: Path) -> None:
    image = f"{IMAGE},scale=1e5"
    with pytest.raises(ValueError, match="open_toy/cls .* beyond the range of float16; .*--dtype float32"):
        extract(open_source(source), tmp_path / "c", image_encoder=[image])
    settings = ExtractSettings(dtype="float32")
    extract(open_source(source), tmp_path / "c", image_encoder=[image], settings=settings)
    assert Cache(tmp_path / "c").feature("image").load().max() > 65_504


def test_captions_in_columns_of_unusual_names(tmp_path: Path) -> None:
    """A forgotten --caption-column is named by the errors: with the columns, and later as that of the extraction."""
    folder = write_images(tmp_path / "s", 2)
    table = folder / "pairs.csv"
    table.write_text("image,alt,title\n00000.png,one,a\n00001.png,two,b\n")
    with pytest.raises(SourceError, match="; columns without a role are alt, title$"):
        run(table, tmp_path / "c")
    named = open_source(table, settings=SourceSettings(caption_columns=("alt", "title")))
    extract(named, tmp_path / "c", text_encoder=[TEXT])
    with pytest.raises(
        FingerprintError,
        match=r'pairs.csv with {"caption_columns": \["alt", "title"\]}; give the same options, or else remove',
    ):
        run(table, tmp_path / "c")


def test_source_without_captions_has_no_texts(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "s", 2)
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(SourceError, match="has no text items; omit --text-encoder SPEC"):
        run(folder, tmp_path / "c")
    table = folder / "captions.csv"
    table.write_text("image,caption\n00000.png,one\n00001.png,two\n")
    assert [report.computed for report in run(table, tmp_path / "c")] == [2, 2], "the folder's index is replaced"


SETTINGS = ExtractSettings(features=FEATURES, chunk_size=64)


def planned_for(image_folder: Path, cache: Path, settings: ExtractSettings = SETTINGS) -> Plan:
    return plan(open_source(image_folder), cache, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)


@pytest.mark.slow
def test_planned_bytes_match_the_stored_features(image_folder: Path, tmp_path: Path) -> None:
    planned = planned_for(image_folder, tmp_path / "c")
    assert [feature.name for feature in planned.features] == ["open_toy/cls", "open_toy/patches", "open_toy/tokens"]
    assert [feature.num_items for feature in planned.features] == [300, 300, 300]
    run(image_folder, tmp_path / "c", features=FEATURES)
    for feature in planned.features:
        folder = tmp_path / "c" / feature.modality / feature.name
        stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json")
        assert feature.num_items * feature.item_bytes == pytest.approx(stored, rel=0.1)  # the last chunk is padded


def test_plan_measures_a_rate_and_stores_nothing(image_folder: Path, tmp_path: Path) -> None:
    planned = planned_for(image_folder, tmp_path / "c")
    assert not [name for name in tree(tmp_path / "c") if "chunks" in name or "/c/" in name]
    assert planned.rates["image"] > 1
    assert planned.hours("image") == pytest.approx(300 / planned.rates["image"] / 3600)


@pytest.mark.slow
def test_plan_skips_existing_chunks(image_folder: Path, tmp_path: Path) -> None:
    run(image_folder, tmp_path / "c", features=("cls",), chunk_size=64, shard="0/5")
    planned = planned_for(image_folder, tmp_path / "c")
    assert {feature.name: feature.num_items for feature in planned.features}["open_toy/cls"] == 236
    run(image_folder, tmp_path / "c", features=FEATURES)
    assert planned_for(image_folder, tmp_path / "c").features == []


def test_plan_beyond_disk_space_raises() -> None:
    feature = PlannedFeature(name="e/patches", modality="image", num_items=20_000_000, item_bytes=530_000)
    planned = Plan(
        cache=Path("c"),
        features=[feature],
        rates={"image": 1000.0},
        num_processes=2,
        free_bytes=10**12,
        chunk_size=2048,
    )
    assert planned.hours("image") == pytest.approx(2.78, abs=0.01)
    assert planned.memory_bytes == 2 * 2048 * 530_000
    with pytest.raises(DiskFullError, match=r"expected 10,600\.48 GB of free disk space, got 1,000\.00 GB"):
        planned.check_space()
    replace(planned, free_bytes=None).check_space()


@pytest.mark.slow
def test_stored_features_keep_precision_and_backend(tmp_path: Path) -> None:
    photos = open_source(write_images(tmp_path / "photos", 8))
    encoder = f"timm:test_vit,weights={save_timm('test_vit', tmp_path, seed=0)}"

    def run(**options: object) -> None:
        settings = ExtractSettings(devices=("cpu",), encoder=EncoderSettings(**options))  # type: ignore[arg-type]
        extract(photos, tmp_path / "c", image_encoder=[encoder], settings=settings)

    run(precision="bfloat16")
    run()
    fingerprint = Cache(tmp_path / "c").feature("image").fingerprint
    assert (fingerprint["precision"], fingerprint["backend"]) == ("bfloat16", "torch")
    with pytest.raises(FingerprintError, match="precision: stored 'bfloat16', requested 'float32'"):
        run(precision="float32")
