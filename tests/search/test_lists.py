"""Lists on disk: each is compared with its checksum before a search reads it."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from embedcache.arrays import Floats, normalize
from embedcache.errors import CorruptError, PathError
from embedcache.search.card import open_row_index, read_card, verify_index
from embedcache.search.faiss_index import RowIndex, read_index
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.store.arrays import SKIP_CHECKSUMS, file_checksum
from embedcache.store.cache import Cache
from tests.edits import edit_record, exchange
from tests.recorded import RecordedProgress

ON_DISK: dict[str, Any] = {"feature": "open_toy/cls", "min_recall": 0.0, "on_disk": True}
LISTS = "lists-300.ivfdata"
CHANGED = (
    rf"{LISTS}: expected checksum \w+ of list \d, got \w+: the bytes changed on disk; remove .* and build it again"
)


@pytest.fixture(scope="module")
def built(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 4 lists on disk."""
    path = tmp_path_factory.mktemp("lists") / "index"
    build_index(cache_path, path, IndexSettings(**ON_DISK, factory="IVF4,SQfp16"))
    return path


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


@pytest.fixture(scope="module")
def queries_QP(cache_path: Path) -> Floats:
    return normalize(Cache(cache_path).feature("image", "open_toy/cls").load()[::50])


def opened(path: Path) -> RowIndex:
    return open_row_index(path, read_card(path), device="cpu")


def bounds(path: Path) -> list[int]:
    """Return where each list begins in the file, and its end: FAISS writes one after another, codes then positions."""
    index = read_index(path / "index.faiss")
    lists = index._faiss.extract_index_ivf(index.wrapped.index).invlists
    sizes = [lists.list_size(number) * (lists.code_size + 8) for number in range(lists.nlist)]
    return [0, *np.cumsum(sizes).tolist()]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    exchange(path, data)


def test_card_has_a_checksum_per_list(built: Path) -> None:
    card, data = read_card(built), (built / LISTS).read_bytes()
    places = bounds(built)
    assert (card.format, card.lists, places[-1]) == (1, LISTS, len(data))
    crcs = [f"{google_crc32c.value(data[start:stop]):08x}" for start, stop in pairwise(places)]
    assert card.checksums == {"index.faiss": file_checksum(built / "index.faiss"), LISTS: "".join(crcs)}


def test_damage_is_found_when_its_list_is_searched(copy: Path, queries_QP: Floats) -> None:
    expected = opened(copy).search(queries_QP, 5, {"nprobe": 1})
    whole, num_found = (copy / LISTS).read_bytes(), 0
    for start, stop in pairwise(bounds(copy)):
        for place in (start, stop - 1):  # the first code, the last position
            flip(copy / LISTS, place)
            index, refused = opened(copy), []
            for query, scores, rows in zip(queries_QP, *expected, strict=True):
                try:
                    found = index.search(query[None], 5, {"nprobe": 1})
                except CorruptError:
                    refused.append(query)
                else:
                    assert (found[0] == scores).all()
                    assert (found[1] == rows).all()
            assert len(refused) < len(queries_QP)  # lists that are intact answer
            num_found += len(refused)
            for nprobe in (4, 9):
                with pytest.raises(CorruptError, match=CHANGED):
                    opened(copy).search(queries_QP, 5, {"nprobe": nprobe})
            exchange(copy / LISTS, whole)
    assert num_found == 2 * len(queries_QP)  # each query reads one list, and each list was damaged twice


def test_lists_are_compared_once(copy: Path, queries_QP: Floats) -> None:
    index = opened(copy)
    expected = index.search(queries_QP, 5, {"nprobe": 4})
    checksum = index.disk_lists._checksum  # type: ignore[union-attr]
    index.disk_lists._checksum = None  # type: ignore[union-attr, method-assign, assignment]
    again = index.search(queries_QP, 5, {"nprobe": 4})
    assert (again[0] == expected[0]).all()
    assert (again[1] == expected[1]).all()
    assert checksum(0) == read_card(copy).checksums[LISTS][:8]


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["IVF4,SQfp16", "IVF4,SQ8", "IVF3,PQ4x4", "IVF4_HNSW32,Flat", "IVF1,SQfp16"])
def test_results_are_those_of_faiss(cache_path: Path, tmp_path: Path, queries_QP: Floats, factory: str) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(**ON_DISK, factory=factory))
    is_allowed_N = np.arange(300) % 3 > 0
    for nprobe, allowed in ((1, None), (2, is_allowed_N), (9, None), (None, None)):
        compared, plain = opened(tmp_path / "index"), read_index(tmp_path / "index" / "index.faiss")
        parameters = None if nprobe is None else {"nprobe": nprobe}
        for one, other in zip(
            compared.search(queries_QP, 7, parameters, is_allowed_N=allowed),
            plain.search(queries_QP, 7, parameters, is_allowed_N=allowed),
            strict=True,
        ):
            assert (one == other).all()


def test_file_of_another_size_is_refused_when_opened(copy: Path) -> None:
    whole = (copy / LISTS).read_bytes()
    for data in (whole[:-1], whole + b"0", b""):
        (copy / LISTS).write_bytes(data)
        with pytest.raises(
            CorruptError, match=rf"{LISTS}: expected 4 lists in 31,200 bytes, .* {len(data):,} bytes; rem"
        ):
            opened(copy)
    (copy / LISTS).unlink()
    with pytest.raises(PathError, match=rf"{LISTS} does not exist; remove .* and build it again"):
        opened(copy)


def test_card_of_other_lists_is_refused(copy: Path, cache_path: Path, tmp_path: Path) -> None:
    checksums = dict(read_card(copy).checksums)
    edit_record(copy / "card.json", checksums={**checksums, LISTS: checksums[LISTS][:-8] + "0" * 16})
    with pytest.raises(
        CorruptError, match=rf"{LISTS}: expected 4 lists in 31,200 bytes, .* got 5 checksums and 31,200 bytes; remove"
    ):
        opened(copy)
    build_index(cache_path, tmp_path / "memory", IndexSettings(**{**ON_DISK, "on_disk": False}, factory="Flat"))
    shutil.copy(tmp_path / "memory" / "index.faiss", copy)
    of_index = {"index.faiss": file_checksum(copy / "index.faiss")}
    edit_record(copy / "card.json", checksums={**checksums, **of_index})
    with pytest.raises(CorruptError, match=rf"index.faiss: expected lists in {LISTS}, got an index in memory; remove "):
        opened(copy)


def test_lists_on_disk_are_not_mapped_twice(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda _: 1)  # a machine whose memory holds no index
    index = opened(copy)
    assert index.disk_lists is not None
    assert index.disk_lists.file == LISTS
    assert read_card(copy).file_bytes == sum((copy / name).stat().st_size for name in ("index.faiss", LISTS))


def test_verification_is_shown(copy: Path) -> None:
    progress, num_lists = RecordedProgress(), len(read_card(copy).checksums[LISTS]) // 8
    verify_index(copy, read_card(copy), progress=progress)
    assert progress.started == [("checking index.faiss", 1, "MiB"), ("checking", num_lists, "lists")]
    assert progress.counts == {"checking index.faiss": 1, "checking": num_lists}


def test_comparison_may_be_skipped(copy: Path, queries_QP: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(copy / LISTS, 0)
    monkeypatch.setenv(SKIP_CHECKSUMS, "1")
    opened(copy).search(queries_QP, 5, {"nprobe": 4})
    with pytest.raises(CorruptError, match=CHANGED):  # what is asked for is done
        verify_index(copy, read_card(copy))
