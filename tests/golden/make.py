"""Write the golden cache in the format of this version: `just golden`.

Run it once per new format. The cache of an old format is never made again: all later versions must open it.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.layout import FORMAT_VERSION, write_info
from tests.images import write_images
from tests.toy import IMAGE, TEXT

FOLDER = Path(__file__).parent
FEATURES = {"image": ("cls", "patches"), "text": ("mean", "tokens")}


def make() -> Path:
    """Write `cache-N` and `cache-N.npz`; return the path of the cache."""
    path = FOLDER / f"cache-{FORMAT_VERSION}"
    shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        source = write_images(Path(folder) / "golden", 10)
        (source / "00003.png").write_bytes(b"")
        (source / "00006.txt").write_text("")
        (source / "00001.txt").write_text("a first caption\nand a second one\n")
        names = tuple(name for names in FEATURES.values() for name in names)
        extract(
            open_source(source),
            path,
            image_encoder=[IMAGE],
            text_encoder=[TEXT],
            settings=ExtractSettings(features=names, chunk_size=4),
        )
    shutil.rmtree(path / "records")
    write_info(path, replace(Cache(path).info, source={"type": "folder", "path": "golden", "settings": {}}))
    np.savez(path.with_suffix(".npz"), **expected(Cache(path)))  # type: ignore[arg-type]
    return path


def expected(cache: Cache) -> dict[str, np.ndarray]:
    """Return every valid row of every feature; token features concatenated, with their lengths."""
    arrays = {}
    for modality, names in FEATURES.items():
        for name in names:
            feature = cache.feature(modality, f"open_toy/{name}")
            items = feature.gather_tokens(np.flatnonzero(feature.valid))
            arrays[name] = np.concatenate([np.atleast_2d(item) for item in items])
            arrays[f"{name} lengths"] = np.array([len(np.atleast_2d(item)) for item in items])
            arrays[f"{name} valid"] = feature.valid
    return arrays


if __name__ == "__main__":
    make()
