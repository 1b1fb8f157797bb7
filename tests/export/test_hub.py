"""Caches on the Hub: uploaded to a hub on this machine, interrupted, updated, and read back over `hf://`."""

import hashlib
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import EmbedcacheError, PathError, SettingError, UnfinishedError
from embedcache.export.hub import push_cache
from embedcache.export.settings import HubSettings
from embedcache.store.cache import Cache
from embedcache.store.removal import remove_rows
from tests.crash import call_elsewhere
from tests.hub_server import Hub, serve_hub


def push(path: Path, name: str = "me/vectors") -> str:
    """Upload a cache; return what was done, or the error."""
    try:
        return push_cache(path, name, HubSettings(license="cc-by-4.0")).location
    except EmbedcacheError as error:
        return f"{type(error).__name__} {error}"


def push_again_and_again(folder: Path, other: Path) -> list[str]:
    """Upload caches that change in between; return the outcomes."""
    lines = [push(folder) for _ in range(3)]  # the last commit of the first upload is refused
    Cache("hf://datasets/me/vectors").feature("image", "open_toy/cls").load().tofile(other / "cls")
    lines.append(Cache("hf://datasets/me/vectors").column("key").to_pylist()[0])
    for path in sorted((folder / "text" / "open_toy" / "tokens").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "records" / "new.json").parent.mkdir(exist_ok=True)
    (folder / "records" / "new.json").write_text("{}")
    return [*lines, push(folder), push(other / "cache"), push(folder, "me/closed"), push(folder, "you/models")]


@pytest.fixture(scope="module")
def uploaded(
    small_cache: Path, two_caches: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Hub, list[str], Path]:
    """Upload a cache again and again, in a process that uses the hub: its state, and the outcomes."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(small_cache, folder / "cache")
    (folder / "cache" / ".lock").touch()
    shutil.copytree(two_caches[0], folder / "other" / "cache")
    with serve_hub() as hub:
        hub.failing_commit = 2
        hub.repositories["you/models"] = {"weights.bin": b"0"}
        paths = folder / "cache", folder / "other"
        lines = call_elsewhere(push_again_and_again, *paths, environment=hub.environment())
    return hub, lines, folder


def files_of(folder: Path) -> set[str]:
    """Return the files of a cache, without locks."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


@pytest.mark.slow
def test_interrupted_upload_resumes(small_cache: Path, uploaded: tuple[Hub, list[str], Path]) -> None:
    """Check that each large file is sent once, and that nothing but the last commit makes the files a cache."""
    hub, lines, _ = uploaded
    assert lines[0].startswith("PathError cannot upload to me/vectors: ")
    assert "500" in lines[0]
    assert re.fullmatch("hf://datasets/me/vectors@[0-9a-f]{40}", lines[1])
    assert lines[2] == lines[1]
    contents = Counter(hashlib.sha256((small_cache / name).read_bytes()).hexdigest() for name in files_of(small_cache))
    assert all(count <= contents[oid] for oid, count in hub.stored.items())  # copies in one commit are each sent
    assert len(hub.stored) > 10
    files, card, last = (set(names) for _, names in hub.commits[:3])
    assert last == {"cache.json", "samples-0.parquet", "image/items-0.parquet", "text/items-0.parquet"}
    assert card == {"README.md"}
    assert files == files_of(small_cache) - last


@pytest.mark.slow
def test_uploaded_cache_is_read_back_and_updated(small_cache: Path, uploaded: tuple[Hub, list[str], Path]) -> None:
    hub, lines, folder = uploaded
    expected = Cache(small_cache).feature("image", "open_toy/cls").load()
    read = np.fromfile(folder / "other" / "cls", expected.dtype).reshape(expected.shape)
    np.testing.assert_array_equal(read, expected)
    assert lines[3] == Cache(small_cache).column("key")[0].as_py()
    assert "license: cc-by-4.0" in hub.repositories["me/vectors"]["README.md"].decode()

    local = files_of(folder / "cache")
    assert set(hub.repositories["me/vectors"]) == local | {"README.md"}
    assert not any("tokens" in name for name in local)
    assert all(hub.repositories["me/vectors"][name] == (folder / "cache" / name).read_bytes() for name in local)
    assert lines[4] != lines[2]


@pytest.mark.slow
def test_other_repositories_are_refused(uploaded: tuple[Hub, list[str], Path]) -> None:
    hub, lines, _ = uploaded
    assert lines[5].startswith("FingerprintError repository")
    assert lines[6].startswith("PathError cannot upload to me/closed: ")
    assert lines[7].startswith("SettingError repository")
    assert hub.repositories["you/models"] == {"weights.bin": b"0"}


def test_wrong_requests_raise(small_cache: Path, tmp_path: Path) -> None:
    for call, error, word in (
        (lambda: push_cache(small_cache, "vectors"), SettingError, "OWNER/NAME"),
        (lambda: HubSettings(license="mine: all"), SettingError, "license"),
        (lambda: push_cache(small_cache, "me/vectors"), PathError, "HF_HUB_OFFLINE"),
    ):
        with pytest.raises(error, match=word):
            call()
    cache = Path(shutil.copytree(small_cache, tmp_path / "cache"))
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (cache / "image" / "notes").symlink_to(secret)
    with pytest.raises(PathError, match=f"image/notes: expected a file of the cache, got a link to {secret}"):
        push_cache(cache, "me/vectors")
    (cache / "image" / "notes").unlink()
    remove_rows(Cache(cache), np.array([0]), [Cache(cache).key(0)])
    with pytest.raises(UnfinishedError, match="a removal of samples was interrupted"):
        push_cache(cache, "me/vectors")
