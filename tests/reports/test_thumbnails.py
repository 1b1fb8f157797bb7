"""Items on pages are read only where the user allows it, whatever a stranger's cache says; what has a player."""

import base64
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedcache.dataset.thumbnails import Thumbnails
from embedcache.errors import PathError
from embedcache.extract.extract import extract
from embedcache.registry import trust_files
from embedcache.reports.items import ItemRenderer, PageItem, QueryExample
from embedcache.reports.render import Presentation, Section
from embedcache.sources import open_source, read_below
from embedcache.sources.media import decode_audio
from embedcache.store.cache import Cache
from embedcache.vectors.importing import import_vectors
from embedcache.vectors.opening import open_vectors
from tests.cli.run import TOY, embedcache
from tests.images import write_images
from tests.media_files import encode_video, moving_square, tone, wav
from tests.media_toy import MEDIA
from tests.reports.contract import check_report
from tests.serve.test_untrusted import tamper
from tests.toy import IMAGE


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A cache whose first image is outside the folder of its source."""
    write_images(tmp_path / "photos", 12)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "secret.png")
    assert embedcache("extract", "photos", "cache", *TOY, cwd=tmp_path).code == 0
    tamper(tmp_path / "cache", paths=[str(tmp_path / "secret.png")])
    return tmp_path


def shown(renderer: ItemRenderer) -> list[bool]:
    return [renderer.render(row).image_url is not None for row in (0, 1)]


def test_images_below_the_folder_of_the_source(hostile: Path) -> None:
    cache = Cache(hostile / "cache")
    renderer = ItemRenderer(cache, "image")
    assert shown(renderer) == [False, True]
    (warning,) = renderer.warnings()
    assert warning.startswith("1 image is not shown: ")
    assert "outside the source and --image-folder" in warning
    with read_below(hostile):
        assert shown(ItemRenderer(cache, "image")) == [True, True]


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in the folder of its source, which somebody else has extracted."""
    write_images(tmp_path / "photos", 12)
    assert embedcache("extract", "photos", "photos/cache", *TOY, cwd=tmp_path).code == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    return tmp_path / "photos"


def test_source_of_a_stranger(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(foreign / "cache")
    renderer = ItemRenderer(cache, "image")
    assert shown(renderer) == [False, False]
    (line,) = caplog.messages
    assert line.startswith("images are not shown: the cache says that its source is ")
    (warning,) = renderer.warnings()
    assert warning.startswith("2 images are not shown: the cache says that its source is ")
    assert "you did not extract it on this machine; name its folder or URL with --image-folder, or" in warning
    with pytest.raises(PathError, match="you did not extract it"):
        Thumbnails(cache)
    with trust_files():
        assert shown(ItemRenderer(cache, "image")) == [True, True]


def test_a_table_that_holds_its_images_lies_beside_the_cache(tmp_path: Path) -> None:
    photos = sorted(write_images(tmp_path / "photos", 3).glob("*.png"))
    pq.write_table(pa.table({"image": [photo.read_bytes() for photo in photos]}), tmp_path / "pairs.parquet")
    extract(open_source(tmp_path / "pairs.parquet"), tmp_path / "cache", image_encoder=[IMAGE])
    assert Thumbnails(Cache(tmp_path / "cache")).places == [str(tmp_path)]
    assert shown(ItemRenderer(Cache(tmp_path / "cache"), "image")) == [True, True]


def test_vectors_without_files_have_no_folder_to_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "images.npy", np.eye(4, dtype=np.float32))
    import_vectors(open_vectors("npy", files={"image": tmp_path / "images.npy"}), tmp_path / "cache")
    renderer = ItemRenderer(Cache(tmp_path / "cache"), "image")
    assert shown(renderer) == [False, False]
    assert renderer.warnings() == ["2 images are not shown: the import named no file for this item"]
    assert "trust" not in caplog.text


@pytest.fixture
def sounds(tmp_path: Path) -> Cache:
    """A cache of a short and a long recording, and of a damaged one."""
    (tmp_path / "sounds").mkdir()
    for name, data in (("a", wav(tone(0.5))), ("b", wav(tone(9))), ("c", wav(tone(0.5)))):
        (tmp_path / "sounds" / f"{name}.wav").write_bytes(data)
    extract(open_source(tmp_path / "sounds"), tmp_path / "cache", encoder={"audio": [MEDIA]})
    (tmp_path / "sounds" / "c.wav").write_bytes(b"no sound")
    return Cache(tmp_path / "cache")


def test_recordings_have_players_if_they_are_short(sounds: Cache) -> None:
    renderer = ItemRenderer(sounds, "audio")
    short, long, damaged = (renderer.render(row) for row in range(3))
    assert (short.text, short.modality) == ("a", "audio")
    assert short.image_url is not None
    assert short.player_url is not None
    kind, _, text = short.player_url.partition(",")
    assert kind == "data:audio/wav;base64"
    assert len(decode_audio(base64.b64decode(text))) == 8_000
    assert long.image_url is not None
    assert (long.player_url, damaged.player_url, damaged.image_url) == (None, None, None)
    missing, silent = renderer.warnings()
    assert missing.startswith("1 recording is not shown: damaged recording: ")
    assert silent.startswith("1 recording has no player: ")


def test_players_of_a_page_are_limited(sounds: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.reports.items._PAGE_BYTES", 40_000)
    renderer = ItemRenderer(sounds, "audio")
    assert [renderer.render(0).player_url is not None for _ in range(3)] == [True, True, False]
    assert renderer.warnings()[0].startswith("1 recording has no player: ")


def show(item: PageItem) -> str:
    """Return a page with one item."""
    examples = [QueryExample(query=item, outcome="", is_correct=True, results=[])]
    return check_report(
        Presentation(lines=["x"], record=dict, sections=[Section(title="x", examples=lambda: examples)])
    )


@pytest.mark.slow
def test_recording_on_a_page(sounds: Cache) -> None:
    short, long = (ItemRenderer(sounds, "audio").render(row) for row in range(2))
    page = show(short)
    assert f'<img src="{short.image_url}" alt="a"' in page
    assert f'<audio controls preload="none" src="{short.player_url}" aria-label="Recording a"></audio>' in page
    page = show(long)
    assert f'<img src="{long.image_url}" alt="b"' in page
    assert "<audio" not in page


def test_interval_of_a_video_on_a_page(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(encode_video(moving_square(25)))
    (tmp_path / "clips" / "t.csv").write_text("key,video,start_s,stop_s\n0,a.mp4,0.2,0.6\n")
    extract(open_source(tmp_path / "clips" / "t.csv"), tmp_path / "cache", encoder={"video": [MEDIA]})
    item = ItemRenderer(Cache(tmp_path / "cache"), "video").render(0)
    assert item.image_url is not None
    assert item.player_url is not None
    assert item.player_url.startswith("data:video/mp4;base64,")
    assert item.player_url.endswith("#t=0.2,0.6")
    page = show(item)
    assert f'<video controls preload="none" src="{item.player_url}"' in page
    assert 'aria-label="Video 0 · a.mp4"' in page
