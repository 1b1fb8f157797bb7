"""Recordings, videos and point clouds in folders, tars and tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from embedcache.errors import SourceError
from embedcache.modalities import FILE_MODALITIES, MODALITIES, ModalityName
from embedcache.sources import FileItem, Sample, Source, SourceSettings, open_source
from embedcache.sources.files import MEDIA_SUFFIXES
from embedcache.sources.media import decode_audio
from embedcache.sources.points import decode_points
from embedcache.sources.table import ITEM_NAMES
from embedcache.testing.sources import SourceContract
from tests.media_files import cloud, encode_video, moving_square, npz, tone, wav
from tests.sources.files import jpeg, write, write_parquet, write_tar

SOUND = wav(tone(0.1))
POINTS = npz(cloud(5))


def modalities(sample: Sample) -> dict[str, list[str]]:
    """Return modality -> paths of a sample's items."""
    files: Mapping[str, tuple[FileItem, ...]] = {"image": sample.images, **sample.files}
    return {name: [item.path for item in items] for name, items in files.items() if items}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"a.jpg": jpeg(), "a.wav": SOUND, "a.npz": POINTS, "a.txt": "a red square\n", "b.mp4": b"", "c.mp4": b""}
    return write(
        tmp_path / "f", {**files, "c.FLAC": SOUND, "d/e.opus": SOUND, "d/e.json": '{"label": 3}', "z.jpg": b""}
    )


def test_every_table_has_all_modalities() -> None:
    page = "see docs/howto/own_modality.md"
    in_files = {modality.name for modality in FILE_MODALITIES}
    assert get_args(ModalityName) == tuple(MODALITIES), page
    assert set(MEDIA_SUFFIXES) == in_files, page
    assert set(ITEM_NAMES) == in_files, page
    assert len({name[0] for name in MODALITIES}) == len(MODALITIES), "directions such as i2t would be the same"


def test_files_of_one_name_are_one_sample(folder: Path) -> None:
    samples = list(open_source(folder).samples())
    assert {sample.key: modalities(sample) for sample in samples} == {
        "a": {"image": ["a.jpg"], "audio": ["a.wav"], "points": ["a.npz"]},
        "b": {"video": ["b.mp4"], "audio": ["b.mp4"]},
        "c": {"video": ["c.mp4"], "audio": ["c.FLAC"]},
        "d/e": {"audio": ["d/e.opus"]},
        "z": {"image": ["z.jpg"]},
    }
    assert samples[0].texts[0].text == "a red square"
    assert samples[3].columns == {"folder": "d", "label": 3}
    assert samples[0].files["audio"][0].length == len(SOUND)


def test_names_between_those_of_one_sample(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": jpeg(), "a.k.jpg": jpeg(), "a-1.jpg": jpeg(), "a.txt": "words", "a.k/b.jpg": jpeg()})
    samples = list(open_source(tmp_path).samples())
    assert [sample.key for sample in samples] == ["a", "a-1", "a.k", "a.k/b"]
    assert samples[0].texts[0].text == "words"


def test_members_of_a_tar(tmp_path: Path) -> None:
    members = [("a.jpg", jpeg()), ("a.wav", SOUND), ("a.npz", POINTS), ("b.mp4", b"video"), ("b.txt", "text")]
    source = open_source(write_tar(tmp_path / "s.tar", members))
    first, second = source.samples()
    assert modalities(first) == {"image": ["s.tar"], "audio": ["s.tar"], "points": ["s.tar"]}
    assert modalities(second) == {"video": ["s.tar"], "audio": ["s.tar"]}
    assert source.read(first.files["audio"][0]) == SOUND
    assert source.read(second.files["video"][0]) == source.read(second.files["audio"][0]) == b"video"


def test_columns_of_a_table(tmp_path: Path) -> None:
    text = "key,video,audio_path,point_cloud,caption,start_s,stop_s\n"
    text += "x,clips/x.mp4,,clouds/x.npz,a car,1.5,2.5\ny,,y.wav,,a bus,,\n"
    write(tmp_path, {"t.csv": text, "clips/x.mp4": b"v", "clouds/x.npz": POINTS, "y.wav": SOUND})
    source = open_source(tmp_path / "t.csv")
    first, second = source.samples()
    assert first.files == {
        "video": (FileItem(path="clips/x.mp4", start_s=1.5, stop_s=2.5),),
        "points": (FileItem(path="clouds/x.npz"),),
    }
    assert second.files == {"audio": (FileItem(path="y.wav"),)}
    assert first.columns == second.columns == {}
    assert len(decode_points(source.read(first.files["points"][0]))["xyz"]) == 5


def test_one_column_is_audio_and_video(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,start_s,stop_s\na.mp4,0.5,\n")
    (tmp_path / "a.mp4").write_bytes(encode_video(moving_square(25), samples=tone(1)))
    source = open_source(table, settings=SourceSettings(item_columns={"audio": "path", "video": "path"}))
    (sample,) = source.samples()
    item = FileItem(path="a.mp4", start_s=0.5)
    assert (sample.images, sample.files) == ((), {"audio": (item,), "video": (item,)})
    assert len(decode_audio(source.read(item), item.start_s, item.stop_s)) == pytest.approx(8_000, abs=2_100)


def test_interval_columns_of_other_tables_stay_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,start_s\nhello,1.5\n")
    (sample,) = open_source(tmp_path / "t.csv").samples()
    assert sample.columns == {"start_s": "1.5"}


def test_numbers_in_a_named_column_raise(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "t.parquet", score=[1, 2])
    with pytest.raises(SourceError, match="column score of .*--item-column points=COLUMN"):
        list(open_source(table, settings=SourceSettings(item_columns={"points": "score"})).samples())


class TestMediaFolder(SourceContract):
    """A folder without images passes the contract."""

    has_images = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write(tmp_path, {"a.wav": SOUND, "a.txt": "a tone", "b.npz": POINTS, "b.txt": "points"}))
