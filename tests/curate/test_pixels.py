"""Copies by pixels: resized, re-compressed and re-encoded drawings, beside drawings that differ in a line."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from embedcache.curate.dedup import analyze, dedup
from embedcache.curate.pixels import SAME_PICTURE, hash_image
from embedcache.curate.settings import DedupSettings
from embedcache.extract.extract import extract
from embedcache.settings import replace_fields
from embedcache.sources import open_source
from embedcache.sources.open import read_below
from tests.toy import IMAGE


def face(mouth: tuple[int, int] = (20, 160), color: str = "gold") -> Image.Image:
    """Draw a face on white; the mouth is an arc between two angles."""
    image = Image.new("RGB", (192, 192), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 20, 172, 172), fill=color, outline="black", width=5)
    draw.ellipse((65, 70, 80, 85), fill="black")
    draw.ellipse((112, 70, 127, 85), fill="black")
    draw.arc((62, 95, 130, 145), *mouth, fill="black", width=6)
    return image


def as_file(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("other", "is_copy"),
    [
        (as_file(face(), compress_level=1), True),
        (as_file(face(), "JPEG", quality=50), True),
        (as_file(face(), "WEBP", quality=60), True),
        (as_file(face().resize((96, 96))), True),
        (as_file(face().resize((301, 301))), True),
        (as_file(face(mouth=(200, 340))), False),
        (as_file(face(color="deepskyblue")), False),
        (as_file(face().transpose(Image.Transpose.FLIP_TOP_BOTTOM)), False),
    ],
)
def test_only_copies_have_a_small_distance(other: bytes, is_copy: bool) -> None:
    distance = np.abs(hash_image(as_file(face())).astype(int) - hash_image(other)).max()
    assert (distance <= SAME_PICTURE) == is_copy


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a face, its copy by bytes, two by pixels, and a face with another mouth."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "source").mkdir()
    files = {
        "0.png": as_file(face()),
        "1.png": as_file(face()),
        "2.jpg": as_file(face(), "JPEG", quality=50),
        "3.png": as_file(face().resize((96, 96))),
        "4.png": as_file(face(mouth=(200, 340))),
    }
    for name, data in files.items():
        (folder / "source" / name).write_bytes(data)
    extract(open_source(folder / "source"), folder / "cache", image_encoder=[IMAGE])
    return folder / "cache"


def removed(cache: Path, tmp_path: Path, settings: DedupSettings) -> dict[str, tuple[bool, bool]]:
    """Return for each removed key whether it is a copy, and whether it has a hash distance."""
    done = dedup(cache, tmp_path / "kept.parquet", settings)
    rows = pq.read_table(done.removed_path).to_pylist()
    assert {row["kept_key"] for row in rows} <= {"0"}
    return {row["key"]: (row["is_copy"], row["hash_distance"] is not None) for row in rows}


def test_copies_by_bytes_and_by_pixels_are_removed(faces: Path, tmp_path: Path) -> None:
    settings = DedupSettings(copies_only=True)
    copies = {"1": (True, False), "2": (True, True), "3": (True, True)}
    assert removed(faces, tmp_path, settings) == copies
    assert removed(faces, tmp_path, replace_fields(settings, pixels=False)) == {"1": (True, False)}
    assert removed(faces, tmp_path, DedupSettings(cosine=0.9)) == {**copies, "4": (False, True)}


@pytest.mark.slow
def test_report_names_copies_by_pixels(faces: Path, tmp_path: Path) -> None:
    analysis = analyze(faces)
    assert analysis.to_json()["num_same_picture"] == 3
    assert next(level.num_gone for level in analysis.levels()) == 3
    done = dedup(faces, tmp_path / "kept.parquet", copies=True)
    assert (done.to_json()["num_removed_copies"], done.to_json()["num_removed_same_picture"]) == (3, 2)


def test_moved_source_leaves_copies_by_bytes(faces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = faces.parent / "source"
    source.rename(faces.parent / "moved")
    try:
        assert removed(faces, tmp_path, DedupSettings(copies_only=True)) == {"1": (True, False)}
        assert analyze(faces).to_json()["num_same_picture"] is None
        assert removed(faces, tmp_path, DedupSettings(cosine=0.9)).keys() == {"1", "2", "3", "4"}
        assert all(record.getMessage().startswith("pixels are not compared: ") for record in caplog.records)
        assert len(caplog.records) == 3
        with read_below(faces.parent / "moved"):  # nothing is found there: the cache names the old paths
            moved = dedup(faces, tmp_path / "kept.parquet", copies=True)
        assert len(moved.removed) == 1
    finally:
        (faces.parent / "moved").rename(source)


def test_unreadable_image_is_no_copy(faces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = faces.parent / "source" / "3.png"
    data = path.read_bytes()
    path.write_bytes(b"not an image")
    try:
        assert removed(faces, tmp_path, DedupSettings(copies_only=True)).keys() == {"1", "2"}
    finally:
        path.write_bytes(data)
    assert "pixels of 1 images are not compared: not an image" in caplog.text
