from pathlib import Path

import pytest

from embedcache.errors import PathError
from embedcache.files import is_remote, open_path


def test_open_path_local(tmp_path: Path) -> None:
    for location in (str(tmp_path), tmp_path, "shards/{00..09}.tar", "a:b"):
        path = open_path(location)
        assert isinstance(path, Path)
        assert not is_remote(path)
        assert path == Path(location)


def test_open_path_url() -> None:
    folder = open_path("memory://bucket/folder")
    assert is_remote(folder)
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "sub" / "a.txt").write_bytes(b"hello")
    assert (folder / "sub" / "a.txt").read_bytes() == b"hello"
    assert [path.name for path in folder.glob("*/a.txt")] == ["a.txt"]
    assert str(folder / "sub") == "memory://bucket/folder/sub"


def test_open_path_unknown_protocol_raises() -> None:
    with pytest.raises(PathError, match="nonsense://x"):
        open_path("nonsense://x")
