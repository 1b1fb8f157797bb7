"""A cache with what can go wrong in an export: a failed image, a sample of two captions, columns and languages."""

import json
from pathlib import Path

import pytest

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from tests.images import write_images
from tests.toy import IMAGE, TEXT

NUM_SAMPLES = 40
FAILED = 7
TWO_CAPTIONS = 3


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images with a caption each and columns `label` and `split`, in chunks of 16. Not to be changed."""
    folder = tmp_path_factory.mktemp("labeled")
    image_folder = write_images(folder / "images", NUM_SAMPLES)
    rows = []
    for number, path in enumerate(sorted(image_folder.glob("*.png"))):
        said = [path.with_suffix(".txt").read_text().strip()]
        said += ["another caption"] * (number == TWO_CAPTIONS)
        about = {"key": f"{number:032x}", "image": f"images/{path.name}", "captions": said, "language": "en"}
        rows.append({**about, "label": number % 3, "split": "test" if number >= 30 else "train"})
    (image_folder / f"{FAILED:05d}.png").write_bytes(b"not an image")
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ExtractSettings(chunk_size=16)
    extract(
        open_source(folder / "table.jsonl"),
        folder / "cache",
        image_encoder=[IMAGE],
        text_encoder=[TEXT],
        settings=settings,
    )
    return folder / "cache"
