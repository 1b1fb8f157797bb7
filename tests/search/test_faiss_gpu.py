"""What FAISS's GPUs are given. The CPU stands for a GPU here; tests/test_gpu.py has the tests for a real one."""

import logging
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from embedcache.arrays import Floats
from embedcache.devices import announce
from embedcache.errors import MissingExtraError
from embedcache.search import faiss_gpu
from embedcache.search.faiss_index import RowIndex, make_index, read_index
from embedcache.search.index import IndexSettings, build_index

VECTORS = np.random.default_rng(0).standard_normal((700, 48)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
ROWS = 3 * np.arange(700)
WITH_LISTS = (*("Flat", "SQ8", "SQfp16", "SQ6", "PQ2x4", "RaBitQ", "RaBitQ4", "RaBitQ,Refine(SQ8)"),)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """One GPU with 4 GB that copies whatever it is given; the copies are listed."""
    made: list[Any] = []

    def copy(resources: object, number: int, index: Any, options: object = None) -> Any:
        made.append(faiss.clone_index(index))
        return made[-1]

    standing = {
        "get_num_gpus": lambda: 1,
        "StandardGpuResources": object,
        "GpuClonerOptions": SimpleNamespace,
        "index_cpu_to_gpu": copy,
        "GpuMultipleClonerOptions": SimpleNamespace,
        "index_cpu_to_all_gpus": lambda index, **_options: index,
    }
    for name, function in standing.items():
        monkeypatch.setattr(faiss, name, function, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (4 * 10**9, 10**10))
    announce.cache_clear()
    yield made
    announce.cache_clear()


def filled(factory: str, device: str = "auto") -> RowIndex:
    index = make_index(factory, 48, device=device)
    if not index.is_trained:
        index.train(VECTORS)
    for part in (slice(0, 400), slice(400, 700)):
        index.add(ROWS[part], VECTORS[part])
    return index


def written(index: RowIndex, path: Path) -> bytes:
    index.write(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        *((factory, "") for factory in ("Flat", "IVF4,Flat", "IVF4,SQ4", "IVF4,SQ6", "IVF4,SQ8", "IVF4,SQfp16")),
        *((factory, "") for factory in ("IVF4,PQ12", "IVF4,PQ48", "IVF4_HNSW32,SQfp16")),
        ("HNSW32", "there is no IndexHNSWFlat on GPUs"),
        ("SQ8", "there is no IndexScalarQuantizer on GPUs"),
        ("IVF4,RaBitQ", "there is no IndexIVFRaBitQ on GPUs"),
        ("IVF4,RaBitQ,Refine(SQ8)", "there is no IndexRefine on GPUs"),
        ("OPQ4,IVF4,PQ4", "there is no IndexPreTransform on GPUs"),
        ("IVF4,SQbf16", "there is no such scalar quantizer on GPUs"),
        ("IVF4,PQ6", "there is no PQ6x8 on GPUs"),
        ("IVF4,PQ12x4", "there is no PQ12x4 on GPUs"),
    ],
)
def test_kinds_that_gpus_have(factory: str, reason: str) -> None:
    assert faiss_gpu.gpu_obstacle(faiss.index_factory(48, factory, faiss.METRIC_INNER_PRODUCT)) == reason


@pytest.mark.slow
def test_lengths_of_codes_that_gpus_have() -> None:
    """Check them against FAISS's `IVFPQ::isSupportedPQCodeLength`."""
    found = []
    for length in range(1, 130):
        index = faiss.index_factory(length, f"IVF4,PQ{length}", faiss.METRIC_INNER_PRODUCT)
        found += [] if faiss_gpu.gpu_obstacle(index) else [length]
    assert found == [1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize("factory", [*(f"IVF4,{codes}" for codes in WITH_LISTS), "IVF4_HNSW32,SQfp16", "RR48,IVF4,SQ8"])
def test_adding_with_a_gpu_ends_with_the_same_bytes(
    copies: list[Any], tmp_path: Path, factory: str, device: str
) -> None:
    found = written(filled(factory, device), tmp_path / "found")
    assert len(copies) == (device == "auto" and not factory.startswith("RR"))  # the centroids
    assert found == written(filled(factory, "cpu"), tmp_path / "expected")
    assert (read_index(tmp_path / "found").rows == ROWS).all()


def test_parts_of_lists_on_disk_are_the_same_with_a_gpu(copies: list[Any], tmp_path: Path) -> None:
    for device in ("auto", "cpu"):
        index = make_index("IVF4,SQfp16", 48, device=device)
        index.train(VECTORS)
        index.write(tmp_path / "trained")
        part = read_index(tmp_path / "trained", device=device)
        for rows in (slice(0, 400), slice(400, 700)):
            part.add_part(ROWS[rows], VECTORS[rows], rows.start)
        part.write(tmp_path / device)
        assert len(copies) == 1
    assert (tmp_path / "auto").read_bytes() == (tmp_path / "cpu").read_bytes()
    merged = read_index(tmp_path / "trained").merge_on_disk([part], tmp_path / "lists")
    assert faiss_gpu.gpu_obstacle(faiss.downcast_index(merged.wrapped.index)) == "its lists are on disk"


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQfp16"])
def test_batches_search_a_copy(copies: list[Any], factory: str) -> None:
    index, expected = filled(factory), filled(factory, "cpu")
    copies.clear()
    for left, right in zip(index.search(VECTORS[:64], 5), expected.search(VECTORS[:64], 5), strict=True):
        np.testing.assert_array_equal(left, right)  # of one list
    index._gpu.forget()
    copies.clear()
    parameters = {"nprobe": 9}  # more than there are lists
    for queries in (VECTORS[:63], VECTORS[:64]):
        found = index.search(queries, 5, parameters)
        for left, right in zip(found, expected.search(queries, 5, parameters), strict=True):
            np.testing.assert_array_equal(left, right)
        assert len(copies) == (len(queries) == 64)
    copies[0].reset()
    assert (index.search(VECTORS[:64], 5)[1] == -1).all()  # of the copy, which is empty now
    assert (index.search(VECTORS[:1], 5)[1] >= 0).all()
    assert (index.search(VECTORS[:64], 2048)[1] == -1).all()
    assert (index.search(VECTORS[:64], 2049)[1][:, 0] >= 0).all()
    assert (index.search(VECTORS[:64], 5, is_allowed_N=np.ones(700, bool))[1] >= 0).all()
    index.add(np.array([5000]), VECTORS[:1])
    assert (index.search(VECTORS[:64], 5)[1] >= 0).all()
    assert len(copies) == 2


def test_lookup_tables_are_float16_only_where_they_must_be(copies: list[Any]) -> None:
    options = [
        faiss_gpu.cloner_options(faiss.index_factory(48 * 49, f"IVF4,{codes}")) for codes in ("PQ48", "PQ49", "SQ8")
    ]
    assert [made.useFloat16 for made in options] == [False, True, False]
    assert all(made.allowCpuCoarseQuantizer and not made.use_cuvs for made in options)


def test_index_that_does_not_fit_is_searched_on_the_cpu(
    copies: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (2 * 2**30 + 100_000, 10**10))
    caplog.set_level(logging.INFO)
    index, fitting = filled("Flat"), filled("IVF4,SQ8")
    copies.clear()
    for _ in range(2):
        assert (index.search(VECTORS, 1)[1][:, 0] == ROWS).all()
    assert not copies
    reason = "it takes 2,147,618,048 bytes, and the GPU has 2,147,583,648 free"
    assert [line for line in caplog.messages if "CPU" in line] == [
        f"FAISS: the index is searched on the CPU ({reason})"
    ]
    fitting.search(VECTORS, 1)
    assert len(copies) == 1


@pytest.mark.parametrize(
    ("factory", "num_bytes"),
    [
        ("Flat", 700 * 48 * 4),
        ("IVF4,SQ8", (700 + 4 * 32) * (48 + 8) + 4 * 48 * 4),  # lists are padded to 32 vectors
        ("IVF4,SQfp16", (700 + 4 * 32) * (96 + 8) + 4 * 48 * 4),
    ],
)
def test_memory_of_a_copy(copies: list[Any], monkeypatch: pytest.MonkeyPatch, factory: str, num_bytes: int) -> None:
    index = filled(factory, "cpu")
    inner = faiss.downcast_index(index.wrapped.index)
    assert faiss_gpu.gpu_bytes(inner) == num_bytes
    for free, fits in ((2 * 2**30 + num_bytes - 1, False), (2 * 2**30 + num_bytes, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**10))
        assert (faiss_gpu.GpuSide(inner, "auto").search(VECTORS[:64], 1, 1) is not None) is fits
        assert len(copies) == fits


def test_gpu_selects_from_at_most_2048_lists(copies: list[Any]) -> None:
    index = filled("IVF4,Flat", "cpu")
    side = faiss_gpu.GpuSide(faiss.downcast_index(index.wrapped.index), "auto")
    assert side.search(VECTORS[:64], 1, 2049) is None
    assert side.search(VECTORS[:64], 2049, 1) is None
    assert not copies
    assert side.search(VECTORS[:64], 2048, 2048) is not None


def test_device_chooses_the_gpu(copies: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []

    def copy(resources: object, number: int, index: Any, options: object = None) -> Any:
        chosen.append(number)
        return faiss.clone_index(index)

    def free(number: int) -> tuple[int, int]:
        chosen.append(number)
        return 4 * 10**9, 10**10

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", copy)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    for device, number in (("auto", 0), ("cuda", 0), ("cuda:1", 1), ("cpu", None)):
        chosen.clear()
        filled("IVF4,SQ8", device).search(VECTORS, 1)
        assert chosen == ([] if number is None else [number] * 3)  # centroids, free memory, the copy


def test_machine_without_a_gpu_has_no_free_memory(
    copies: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    caplog.set_level(logging.INFO)
    filled("Flat").search(VECTORS, 1)
    assert caplog.messages[-1].endswith("bytes, and the GPU has 0 free)")


def test_number_of_gpus_is_logged(
    copies: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert [faiss_gpu.num_gpus(device) for device in ("auto", "cuda:1", "cpu")] == [1, 1, 0]
    monkeypatch.delattr(faiss, "get_num_gpus")  # faiss-cpu of some versions
    assert faiss_gpu.num_gpus() == 0
    assert caplog.messages == ["FAISS: 1 GPU", "FAISS: cpu"]


@pytest.mark.parametrize(
    ("has_cuda", "machine", "extra"),
    [(True, "x86_64", "faiss-gpu"), (True, "aarch64", "faiss-cpu"), (False, "x86_64", "faiss-cpu")],
)
def test_missing_faiss_names_the_build_for_the_machine(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, machine: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(MissingExtraError, match=rf"embedcache\[{extra}\]"):
        faiss_gpu.import_faiss()


def test_reason_of_an_error_is_its_last_words() -> None:
    for message, reason in (
        ("Error in f at /faiss/impl/io.cpp:67: Error: 'x' failed: could not open a for reading: No such file", "could"),
        ("could not parse 'HNS32'", "could not parse 'HNS32'"),
        ("Errors:\nError at a.cpp:1: Error: 'n > 0' failed: too few failed: at last", "at last"),
        ("CUDA error 2 at a.cu:9: out of memory", "out of memory"),
    ):
        assert faiss_gpu.faiss_reason(RuntimeError(message)).startswith(reason)


def test_error_of_a_gpu_leaves_the_work_to_the_cpu(
    copies: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError(
            "Error in void* faiss::gpu::StandardGpuResourcesImpl::allocMemory(const AllocRequest&) at "
            "/project/faiss/gpu/StandardGpuResources.cpp:559: Error: 'cudaSuccess == err' failed: Failed to cudaMalloc "
            "805306368 bytes on device 0 (error 2 out of memory"
        )

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", fail)
    caplog.set_level(logging.INFO)
    index = filled("IVF4,Flat")
    for _ in range(2):
        assert (index.search(VECTORS, 1, {"nprobe": 4})[1][:, 0] == ROWS).all()
    reason = "Failed to cudaMalloc 805306368 bytes on device 0 (error 2 out of memory"
    expected = [f"FAISS: the index is {what} on the CPU ({reason})" for what in ("filled", "searched")]
    assert [line for line in caplog.messages if "CPU" in line] == expected


def test_index_on_gpus_lives_until_training_has_ended(copies: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    index, freed = make_index("IVF4,Flat", 48), []

    def to_gpus(flat: Any) -> Any:
        weakref.finalize(flat, lambda: freed.append(index.is_trained))
        return flat

    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus)
    index.train(VECTORS)
    assert freed == [True]


@pytest.mark.slow
def test_build_with_a_gpu_writes_the_same_index(copies: list[Any], cache_path: Path, tmp_path: Path) -> None:
    cards = {}
    for device in ("auto", "cpu"):
        settings = IndexSettings(feature="open_toy/cls", factory="IVF4,SQfp16", device=device)
        cards[device] = build_index(cache_path, tmp_path / device, settings)
    assert len(copies) == 2  # the centroids, and the index that is tuned
    assert (tmp_path / "auto" / "index.faiss").read_bytes() == (tmp_path / "cpu" / "index.faiss").read_bytes()
    assert cards["auto"].search == cards["cpu"].search
    assert cards["auto"].recall_at_10 == cards["cpu"].recall_at_10


def test_cpu_makes_no_copy(copies: list[Any]) -> None:
    index = filled("IVF4,Flat", "cpu")
    found: tuple[Floats, Any] = index.search(VECTORS, 1)
    assert len(found[0]) == 700
    assert not copies
