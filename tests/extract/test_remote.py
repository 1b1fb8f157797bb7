"""Source and cache behind a URL, on a server that speaks S3."""

import hashlib
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.errors import FingerprintError, PathError
from embedcache.extract.extract import extract
from embedcache.extract.repair import measure_drift, repair
from embedcache.extract.settings import ExtractSettings
from embedcache.files import open_path
from embedcache.progress import Progress
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.crash import forked_workers
from tests.extract.cases import FEATURES
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.sources.s3 import bucket, forget_clients, s3_server, upload
from tests.toy import IMAGE, TEXT

__all__ = ["bucket", "s3_server"]

pytestmark = pytest.mark.slow


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three tars of five images each."""
    image_folder, folder = write_images(tmp_path / "images", 15), tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for path in sorted(image_folder.iterdir())[10 * shard : 10 * (shard + 1)]:
                tar.add(path, path.name)
    return folder


def run(source: str, cache: str, *, progress: Progress | None = None, **options: Any) -> list[str]:
    settings = ExtractSettings(**{"features": FEATURES, "chunk_size": 8, **options})
    reports = extract(
        open_source(source), cache, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings, progress=progress
    )
    return [report.line() for report in reports]


def digests_of(cache: str) -> dict[str, str]:
    """Return the MD5 of each file, which S3 lists, but not of cache.json, which names the source, locks and records."""
    root = open_path(cache)
    if "://" in cache:
        found = {path: info["ETag"].strip('"') for path, info in root.fs.find(root.path, detail=True).items()}  # type: ignore[attr-defined]
    else:
        files = [path for path in root.rglob("*") if path.is_file()]
        found = {str(path): hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() for path in files}
    unlike = ("cache.json", "records/", ".lock", ".claims")
    digests = {path.partition(f"{root.name}/")[2]: digest for path, digest in found.items()}
    return {name: digest for name, digest in digests.items() if not any(part in name for part in unlike)}


def test_remote_cache_has_the_bytes_of_a_local_one_and_is_read(shards: Path, bucket: str, tmp_path: Path) -> None:
    source, remote, local = upload(shards, f"{bucket}/shards"), f"{bucket}/cache [1]", str(tmp_path / "local")
    progress = RecordedProgress()
    with forked_workers():
        lines = run(f"{source}/{{00000..00002}}.tar", remote, devices=("cpu", "cpu"), progress=progress)
    assert "encoding images" in [step for step, _, _ in progress.started]
    assert lines[0] == "open_toy (cls, patches): encoded 15 images, reused 0, failed 0"
    run(str(shards), local)
    assert digests_of(remote) == digests_of(local)
    assert len(digests_of(remote)) > 20
    assert "encoded 0 images, reused 15" in run(f"{source}/{{00000..00002}}.tar", remote)[0]

    feature, rows = Cache(remote).feature("image", "open_toy/cls"), np.array([14, 0, 8, 8])
    whole = feature.load()
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(feature.gather(rows), whole[rows])
    assert len(Cache(remote).feature("text").gather_tokens(rows)) == 4


def test_resume_extend_and_repair_remote_cache(shards: Path, bucket: str) -> None:
    source, cache = upload(shards, f"{bucket}/shards"), f"{bucket}/cache"
    last = open_path(f"{source}/00002.tar")
    data, vectors = last.read_bytes(), dict[str, Any](features=("cls", "tokens"))
    last.unlink()
    run(source, cache, **vectors)
    for file in ("image/open_toy/chunks/00001.json", "text/open_toy/tokens/values/00000/c/0/0"):
        open_path(f"{cache}/{file}").unlink()
    assert "encoded 2 images, reused 8" in run(source, cache, **vectors)[0]
    last.write_bytes(data)
    with pytest.raises(FingerprintError, match="it has 5 more"):
        run(source, cache, **vectors)
    assert "encoded 5 images, reused 10" in run(source, cache, **vectors, extend=True)[0]
    before = digests_of(cache)
    chunk = open_path(f"{cache}/image/open_toy/cls/c/1/0")
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    repair(Cache(cache), verify(Cache(cache)))
    assert digests_of(cache) == before
    assert [drift.is_bad for drift in measure_drift(Cache(cache), 0.2)] == [False] * 2


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"])
def test_unreachable_service_raises(shards: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9" if "URL" in name else "")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_clients()
    with pytest.raises(PathError, match=f"{bucket}/cache"):
        run(str(shards), f"{bucket}/cache")
    with pytest.raises(PathError, match=f"{bucket}/cache"):
        Cache(f"{bucket}/cache")
