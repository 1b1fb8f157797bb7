from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcache.encoders.open import open_encoder
from embedcache.errors import FingerprintError, SettingError, SourceError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache
from tests.pictures import write_pictures
from tests.toy import IMAGE, TEXT


def run(source: Path, cache: Path, **settings: object) -> list[str]:
    reports = extract(
        open_source(source),
        cache,
        image=[IMAGE],
        text=[TEXT],
        settings=ExtractSettings(**settings),  # type: ignore[arg-type]
    )
    return [report.line() for report in reports]


def test_the_cache_holds_what_the_encoders_give_item_by_item(pictures: Path, cache_path: Path) -> None:
    cache = Cache(cache_path)
    image, text = open_encoder(IMAGE, modality="image"), open_encoder(TEXT, modality="text")
    for row in (0, 63, 64, 299):
        item = cache.items("image").slice(row, 1).to_pylist()[0]
        picture = decode_image((pictures / item["path"]).read_bytes())
        expected = image.encode(image.prepare([picture]), ["cls", "patches"])
        for name, (value,) in expected.items():
            found = cache.feature("image", f"open_toy/{name}").gather(np.array([row]))[0]
            np.testing.assert_array_equal(found, value.astype(np.float16))
        caption = cache.items("text")["text"][row].as_py()
        tokens = text.encode(text.prepare([caption]), ["tokens"])["tokens"][0]
        (found,) = cache.feature("text", "open_toy/tokens").gather_tokens(np.array([row]))
        np.testing.assert_array_equal(found, tokens.astype(np.float16))


def test_a_second_run_encodes_nothing_and_says_so(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "c", chunk_size=64)
    assert run(pictures, tmp_path / "c") == [
        "open_toy (cls): encoded 0 images, reused 300, failed 0",
        "open_toy (mean): encoded 0 texts, reused 300, failed 0",
    ]


def test_a_feature_added_later_leaves_the_others_as_they_are(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "c", chunk_size=64)
    before = (tmp_path / "c/image/open_toy/cls/c/2/0").stat().st_mtime_ns
    run(pictures, tmp_path / "c", features=("patches", "cls"))
    assert (tmp_path / "c/image/open_toy/cls/c/2/0").stat().st_mtime_ns == before
    cls = Cache(tmp_path / "c").feature("image", "open_toy/cls").load()
    patches = Cache(tmp_path / "c").feature("image", "open_toy/patches").load()
    np.testing.assert_array_equal(patches.reshape(300, -1), cls)


def test_an_item_that_changed_before_a_feature_is_added_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "s", 6)
    run(folder, tmp_path / "c")
    size = (folder / "00002.png").stat().st_size
    (folder / "00002.png").write_bytes(b"x" * size)
    with pytest.raises(
        FingerprintError, match="image 00002.png in row 2 has other bytes now than when open_toy was extracted"
    ):
        run(folder, tmp_path / "c", features=("patches",))


def test_an_encoder_that_lacks_nothing_is_left_alone(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "s", 6)
    run(folder, tmp_path / "c")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c/image/open_toy").rglob("*.parquet")}
    whole = (folder / "00002.png").read_bytes()
    (folder / "00002.png").write_bytes(b"x" * len(whole))  # cannot be decoded any more
    extract(open_source(folder), tmp_path / "c", image=[IMAGE, "tests.toy:open_other"], text=[TEXT])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    cache = Cache(tmp_path / "c")
    assert cache.feature("image", "open_toy/cls").valid.all()
    assert cache.feature("image", "open_other/cls").failures.keys() == {2}


def test_equal_captions_get_equal_features(cache_path: Path) -> None:
    cache = Cache(cache_path)
    texts = cache.items("text")["text"].to_pylist()
    caption, count = Counter(texts).most_common(1)[0]
    assert count > 1
    rows = np.flatnonzero(np.array(texts) == caption)
    vectors = cache.feature("text", "open_toy/mean").gather(rows)
    assert (vectors == vectors[0]).all()


def test_bad_items_are_rows_with_reasons(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "s", 8)
    (folder / "00001.png").write_bytes((folder / "00001.png").read_bytes()[:200])
    (folder / "00002.png").write_bytes(b"")
    (folder / "00003.png").write_text("no picture at all")
    Image.new("1", (30_000, 30_000)).save(folder / "00004.png")
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
    assert run(folder, tmp_path / "c")[0].startswith("open_toy (cls): encoded 0 images, reused 8, failed 4: 1 ")


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_chunk_whose_file_is_damaged_is_made_again(pictures: Path, tmp_path: Path, damage: str) -> None:
    names = ("cls", "tokens")
    run(pictures, tmp_path / "c", chunk_size=64, features=names)
    whole = {path: path.read_bytes() for path in (tmp_path / "c").rglob("c/**/*") if path.is_file()}
    for file in (
        "image/open_toy/cls/c/2/0",
        "text/open_toy/tokens/values/00001/c/0/0",
        "text/open_toy/tokens/lengths/c/3",
    ):
        path = tmp_path / "c" / file
        path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-5])
    lines = run(pictures, tmp_path / "c", features=names)
    assert "encoded 64 images, reused 236" in lines[0]
    assert "encoded 128 texts, reused 172" in lines[1]
    assert {path: path.read_bytes() for path in whole} == whole


def test_a_source_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "s", 3)
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SourceError, match="all 3 images failed: 3 empty file; mend the source"):
        run(folder, tmp_path / "c")


def test_workers_share_the_chunks_and_give_the_bytes_of_one(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "one", chunk_size=64)
    encoded = [run(pictures, tmp_path / "many", chunk_size=64, worker=f"{number}/3")[0] for number in (2, 0, 1)]
    assert [line.partition(": ")[2] for line in encoded] == [
        "encoded 64 images, reused 0, failed 0",
        "encoded 128 images, reused 64, failed 0",
        "encoded 108 images, reused 192, failed 0",
    ]
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file() and "records" not in path.parts:
            assert (tmp_path / "many" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("worker", ["4/4", "1", "a/b", "-1/2", "0/0"])
def test_a_worker_that_is_none_is_refused(worker: str) -> None:
    with pytest.raises(SettingError, match="write i/n with i from 0 to n - 1"):
        ExtractSettings(worker=worker)


def test_hashes_say_which_items_are_equal(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "s", 3)
    (folder / "00002.png").write_bytes((folder / "00000.png").read_bytes())
    run(folder, tmp_path / "c")
    hashes = Cache(tmp_path / "c").feature("image").hashes
    assert hashes[2] == hashes[0] != hashes[1]


def test_another_encoder_under_the_same_name_is_refused(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "c")
    with pytest.raises(FingerprintError, match="encoder 'open_toy'.*weights: .* there, .* asked"):
        extract(open_source(pictures), tmp_path / "c", image=[f"{IMAGE},scale=2"])


def test_values_beyond_float16_ask_for_float32(pictures: Path, tmp_path: Path) -> None:
    image = f"{IMAGE},scale=1e5"
    with pytest.raises(
        ValueError, match="feature open_toy/cls holds .* beyond the range of float16; .*--dtype float32"
    ):
        extract(open_source(pictures), tmp_path / "c", image=[image])
    settings = ExtractSettings(dtype="float32")
    extract(open_source(pictures), tmp_path / "c", image=[image], settings=settings)
    assert Cache(tmp_path / "c").feature("image").load().max() > 65_504


def test_mistakes_are_named(pictures: Path, tmp_path: Path) -> None:
    source = open_source(pictures)
    with pytest.raises(SettingError, match="expected at least one encoder"):
        extract(source, tmp_path / "c")
    with pytest.raises(UnknownNameError, match="unknown feature 'clss'; did you mean 'cls'"):
        extract(source, tmp_path / "c", image=[IMAGE], settings=ExtractSettings(features=("clss",)))
    with pytest.raises(UnknownNameError, match="unknown encoder family 'tim'; did you mean 'timm'"):
        extract(source, tmp_path / "c", image=["tim:resnet18"])
    with pytest.raises(SettingError, match="threads is 0"):
        ExtractSettings(threads=0)


def test_a_source_without_captions_has_no_text_to_encode(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "s", 2)
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(SourceError, match="has no text items; leave --text-encoder out"):
        extract(open_source(folder), tmp_path / "c", image=[IMAGE], text=[TEXT])
