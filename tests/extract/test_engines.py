"""Several processes on one cache, of this machine and without record locks."""

import errno
import fcntl
import os
import re
import signal
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import EmbedcacheError, PathError, SettingError, UnfinishedError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.files import SKIP_LOCKS, Leases, has_locks, locked
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.crash import call, forked_workers, running_processes, start, start_call
from tests.extract.cases import FEATURES, NUM_IMAGES, extract_slowly, run, same_bytes, tree
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("engines") / "source", NUM_IMAGES)


@pytest.fixture(scope="module")
def one_process(source: Path) -> Path:
    """The cache of one process. Not to be changed."""
    run(source, source.parent / "one", features=FEATURES, chunk_size=8)
    return source.parent / "one"


@pytest.mark.slow
@pytest.mark.parametrize("num_killed", [1, 2])
def test_killed_process_leaves_its_chunks_to_others(
    source: Path, one_process: Path, tmp_path: Path, num_killed: int
) -> None:
    commits, killed = tmp_path / "c/image/open_toy/chunks", tmp_path / "killed"
    num_committed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while len(list(commits.glob("*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        num_committed.append(len(list(commits.glob("*.json"))))
        for process in running_processes()[:num_killed]:
            os.kill(process, signal.SIGKILL)
        killed.touch()  # until then, each process works on its third chunk

    progress, killer = RecordedProgress(), threading.Thread(target=kill)
    killer.start()
    died = pytest.raises(UnfinishedError, match="2 of 2 worker processes died; finished chunks are stored; run")
    with forked_workers(), died if num_killed == 2 else nullcontext():
        image = f"{IMAGE},wait_for={killed}"
        extract_slowly(source, tmp_path / "c", progress, delay_ms=0, image=image, devices=("cpu", "cpu"))
    if num_killed == 1:
        assert progress.notes == ["1 of 2 worker processes died; the others finished their chunks"]
    killer.join()
    assert 2 <= num_committed[0] < 8
    run(source, tmp_path / "c", features=FEATURES)
    assert same_bytes(one_process, tmp_path / "c")


@pytest.mark.slow
def test_two_processes_share_the_chunks(source: Path, one_process: Path, tmp_path: Path) -> None:
    words = ["extract", str(source), str(tmp_path / "c"), "--feature", ",".join(FEATURES), "--chunk-size", "8"]
    words += ["--image-encoder", f"{IMAGE},delay_ms=50", "--text-encoder", TEXT, "--device", "cpu"]
    outputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    processes = [start(words, output=output) for output in outputs]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    encoded = re.findall(r"encoded (\d+) (image|text)s", "".join(output.read_text() for output in outputs))
    for modality in ("image", "text"):
        num_encoded = sum(int(count) for count, kind in encoded if kind == modality)
        assert num_encoded == NUM_IMAGES, "no chunk was encoded twice"
    assert same_bytes(one_process, tmp_path / "c")


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_parts_of_a_shard_cover_it_once(num_shards: int, num_parts: int, data: st.DataObject) -> None:
    whole = ExtractSettings(shard=f"{data.draw(st.integers(0, num_shards - 1))}/{num_shards}")
    parts = [whole.split_shard(number, num_parts) for number in range(num_parts)]
    chunks = sorted(
        chunk for number, count in (part.shard_numbers for part in parts) for chunk in range(number, 40, count)
    )
    number, count = whole.shard_numbers
    assert chunks == list(range(number, 40, count))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"image_encoder": [IMAGE, f"{IMAGE},scale=2"]}, "stored as"),
        ({"image_encoder": [IMAGE], "view": ("flip", "flip")}, "open_toy@flip"),
        ({"text_encoder": [TEXT], "view": ("flip",)}, "no image encoder"),
        ({"image_encoder": [IMAGE], "view": ("flop",)}, "flip"),
        ({"image_encoder": [IMAGE], "device": ("cuda:7",)}, "cuda:7"),
        ({"image_encoder": ["toy"]}, "family:model"),
        ({"image_encoder": ["tim:resnet18"]}, "timm"),
        ({"image_encoder": ["frames:tim:resnet18"]}, "'tim'"),
        ({"image_encoder": ["hf:/nowhere/model"]}, "/nowhere/model"),
        ({"image_encoder": ["frames:hf:./nowhere,rate=1"]}, "nowhere"),
        ({"image_encoder": ["timm:resnet18,weights=nowhere.pth"]}, "nowhere.pth"),
        ({"encoder": {"sound": [IMAGE]}}, "audio"),
        ({}, "none"),
    ],
)
def test_invalid_request_is_rejected_before_indexing(
    source: Path, tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(EmbedcacheError, match=word):
        extract(open_source(source), tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("shard", ["4/4", "1", "a/b", "-1/2", "0/0"])
def test_invalid_shard_raises(shard: str) -> None:
    with pytest.raises(SettingError, match="shard"):
        ExtractSettings(shard=shard)


SETTINGS: dict[str, Any] = {"features": ("cls", "patches", "tokens"), "chunk_size": 8}


def disable_locks(code: int) -> None:
    """Make every record lock of this process fail, as the system call does."""

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    fcntl.lockf = fail  # type: ignore[assignment]


def extract_shard(code: int, source: Path, cache: Path, shard: str) -> None:
    disable_locks(code)
    os.environ[SKIP_LOCKS] = "1"
    run(source, cache, shard=shard, **SETTINGS)


@pytest.mark.slow
def test_shards_can_do_without_locks(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 40)
    run(source, tmp_path / "whole", **SETTINGS)
    codes = (errno.ENOLCK, errno.ENOSYS)
    shards = [start_call(extract_shard, code, source, tmp_path / "c", f"{i}/2") for i, code in enumerate(codes)]
    for shard in shards:
        shard.join()
    assert [shard.exitcode for shard in shards] == [0, 0]
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")
    assert verify(Cache(tmp_path / "c")) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_missing_locks_are_one_line(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "lockf", fcntl.lockf)
    disable_locks(code)
    expected = r"has no record locks \(.*\); set EMBEDCACHE_SKIP_LOCKS=1"
    with pytest.raises(PathError, match=expected), locked(tmp_path):
        pass
    with pytest.raises(PathError, match=expected):
        Leases(tmp_path).acquire(3)
    monkeypatch.setenv(SKIP_LOCKS, "1")
    with locked(tmp_path):
        assert Leases(tmp_path).acquire(3)
    assert not has_locks(tmp_path)


def acquire(folder: Path, *, is_free: bool) -> None:
    assert Leases(folder).acquire(3) == is_free


@pytest.mark.slow
def test_all_leases_are_one_process_s(tmp_path: Path) -> None:
    own = Leases(tmp_path)
    assert own.acquire(None)
    call(partial(acquire, is_free=False), tmp_path)
    own.release(None)
    call(partial(acquire, is_free=True), tmp_path)
