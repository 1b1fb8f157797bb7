"""File systems without record locks, as NFS without its lock service and Lustre without `flock`."""

import errno
import fcntl
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import PathError
from embedcache.files import SKIP_LOCKS, Leases, has_locks, locked
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.crash import call, start_call
from tests.extract.cases import run, tree
from tests.images import write_images

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
