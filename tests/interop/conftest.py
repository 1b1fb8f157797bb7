"""A cache with what can go wrong in an export: a failed image, a sample of two captions, columns and languages."""

import json
from pathlib import Path

import pytest

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from tests.pictures import write_pictures
from tests.toy import IMAGE, TEXT

NUM_SAMPLES = 40
FAILED = 7
TWO_CAPTIONS = 3


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures with a caption each and columns `label` and `split`, in chunks of 16. Not to be changed."""
    folder = tmp_path_factory.mktemp("labeled")
    pictures = write_pictures(folder / "pictures", NUM_SAMPLES)
    rows = []
    for number, path in enumerate(sorted(pictures.glob("*.png"))):
        said = [path.with_suffix(".txt").read_text().strip()]
        said += ["another caption"] * (number == TWO_CAPTIONS)
        about = {"key": f"{number:032x}", "image": f"pictures/{path.name}", "captions": said, "language": "en"}
        rows.append({**about, "label": number % 3, "split": "test" if number >= 30 else "train"})
    (pictures / f"{FAILED:05d}.png").write_bytes(b"no picture")
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ExtractSettings(chunk_size=16)
    extract(
        open_source(folder / "table.jsonl"),
        folder / "cache",
        image_encoders=[IMAGE],
        text_encoders=[TEXT],
        settings=settings,
    )
    return folder / "cache"
