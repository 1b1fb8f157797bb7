"""What feature writers read of the commits of their chunks."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from embedcache.store import group
from tests.extract.cases import FEATURES, run
from tests.images import write_images


def test_commits_are_read_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read_commit = group.read_commit

    def count_read(folder: Path, chunk: int) -> Any:
        reads[f"{folder.parent.name}/{chunk}"] += 1
        return read_commit(folder, chunk)

    monkeypatch.setattr(group, "read_commit", count_read)
    source = write_images(tmp_path / "source", 24)
    run(source, tmp_path / "c", features=FEATURES, chunk_size=8)
    assert set(reads.values()) == {4}  # to list missing chunks, with the lease, to commit, and for the report
    reads.clear()
    run(source, tmp_path / "c", features=FEATURES)
    assert set(reads.values()) == {2}
