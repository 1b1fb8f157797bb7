"""Parts of the training loop by themselves: processes, threads, best weights, reports, and errors of bad losses."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from embedcache.arrays import Inputs
from embedcache.dataset.inputs import InputFeature
from embedcache.dataset.pairs import Items, Pairs
from embedcache.errors import DataError
from embedcache.projectors.pair import AlignedPair
from embedcache.train import distributed, pair
from embedcache.train.data import TrainData, _gather
from embedcache.train.losses import Positives
from embedcache.train.pair import PairTask, Validation
from embedcache.train.pair_batches import Batch, LoadedBatch, LoadedInputs
from embedcache.train.settings import LossSettings, MachineSettings, OptimizerSettings
from embedcache.train.train import TrainReport
from embedcache.train.trainer import _BestWeights, _threads, learning_rate
from tests.store.features import random_items, write_feature


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of a single process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_process_changes_nothing(one_process: None) -> None:
    rows = torch.randn(5, 3, requires_grad=True)
    gathered = distributed.gather_rows(rows, 5)
    assert torch.equal(gathered, rows)
    (gathered * torch.arange(15.0).reshape(5, 3)).sum().backward()
    assert torch.equal(rows.grad, torch.arange(15.0).reshape(5, 3))  # type: ignore[arg-type]
    logs = torch.tensor([0.5, -30.0, 100.0])
    torch.testing.assert_close(distributed.log_sum_over_processes(logs), logs)
    summed = torch.ones(2)
    distributed.sum_over_processes(summed)
    assert summed.tolist() == [1, 1]
    assert distributed.broadcast_from_first("x") == "x"
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.run_on_first(lambda: 3) == 3
    with distributed.process_group("cpu") as device:
        assert device == "cpu"
    assert dist.is_initialized()  # it was there before

    def fail() -> None:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        distributed.run_on_first(fail)


def test_without_a_group_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(3)
    assert distributed.gather_rows(values, 3) is values
    assert distributed.log_sum_over_processes(values) is values
    assert distributed.gather_objects(1) == [1]
    assert (distributed.num_processes(), distributed.process_rank()) == (1, 0)
    for rank, expected in ((None, True), ("0", True), ("1", False)):
        monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
        assert distributed.is_first_process() is expected


def test_gradients_of_gathered_rows_are_those_of_one_process(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DistributedDataParallel divides them by the number of processes; here the first of two, alone in its group."""
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    rows = torch.ones(2, 3, requires_grad=True)
    gathered = distributed.gather_rows(rows, 5)
    assert gathered.tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 3
    (gathered * torch.arange(15.0).reshape(5, 3)).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[0, 2, 4], [6, 8, 10]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "used", "backend"),
    [("cpu", "cpu", "gloo"), ("cuda", "cuda:1", "nccl"), ("cuda:0", "cuda:0", "nccl")],
)
def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch, asked: str, used: str, backend: str) -> None:
    calls: list[Any] = []
    distributed._join_store.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, *, store, rank, world_size: calls.append((backend, rank, world_size)),
    )
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("wait"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("leave"))
    with distributed.process_group(asked) as device:
        assert device == used
    distributed._join_store.cache_clear()
    assert calls == [*([used] if asked == "cuda" else []), (backend, 1, 2), "wait", "leave"]


@pytest.mark.parametrize(("count", "processes"), list(itertools.product((0, 1, 7, 12), (1, 2, 3, 5))))
def test_slices_of_processes_are_consecutive_and_of_one_size(
    monkeypatch: pytest.MonkeyPatch, count: int, processes: int
) -> None:
    monkeypatch.setattr(distributed, "num_processes", lambda: processes)
    slices = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "process_rank", lambda rank=rank: rank)
        slices.append(distributed.own_slice(count))
    assert [row for part in slices for row in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) - min(sizes) <= 1


def test_small_steps_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    for flops, threads, expected in ((6.6e9, None, 1), (2e10 / 3, None, 6), (1.0, 3, 3), (1e12, 2, 2)):
        used.clear()
        with _threads(flops, MachineSettings(threads=threads)):
            assert used == [expected]
        assert used == [expected, 6]


def test_best_weights_are_the_first_of_equal_scores() -> None:
    best, module = _BestWeights(), nn.Linear(1, 1)
    assert best.epoch == 0
    for epoch, (score, expected) in enumerate([(float("nan"), 0), (0.2, 1), (0.2, 1), (0.1, 1), (0.3, 4)]):
        nn.init.constant_(module.weight, epoch)
        best.update(epoch, score, {"x": score}, module)
        assert best.epoch == expected
        assert best.weights["weight"].item() == expected
    again = _BestWeights.from_state(best.to_state())
    assert (again.epoch, again.score, again.measures) == (4, 0.3, {"x": 0.3})


def test_learning_rate_rises_then_falls_to_zero() -> None:
    settings = OptimizerSettings(lr=2.0, warmup_fraction=0.25)
    rates = [learning_rate(settings, step, 12) for step in range(12)]
    expected = [2 * (step + 1) / 3 for step in range(3)]
    expected += [1 + np.cos(np.pi * step / 9) for step in range(9)]
    assert rates == pytest.approx(expected)
    assert learning_rate(OptimizerSettings(lr=2.0, warmup_fraction=0), 0, 1) == 2
    assert learning_rate(OptimizerSettings(lr=2.0, warmup_fraction=0), 2, 3) == pytest.approx(1)
    assert learning_rate(OptimizerSettings(lr=2.0, warmup_fraction=1), 3, 4) == 2


def test_report_warns_of_a_useless_training_and_of_held_out_samples(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "reused": False,
        "num_samples": {"train": 1000, "val": 20},
        "num_parameters": 5000,
        "flops_per_pair": 2_340_000,
        "best_epoch": 2,
        "recalls": {"i2t r@1": 0.25},
        "pairs_per_s": 9.0,
        "wait_fraction": 0.0,
    }
    warned = ({"num_held_out": 1234}, {"best_epoch": 0})
    silent = ({}, {"num_held_out": 0}, {"best_epoch": 0, "pairs_per_s": 0.0})
    for changed in (*warned, *silent):
        report = TrainReport(**{**values, **changed})
        assert ("WARNING" in report.line(tmp_path)) == (changed in warned)
        assert TrainReport.model_validate(report.to_json()) == report


def test_bad_losses_name_five_samples_or_the_feature(tmp_path: Path) -> None:
    network = AlignedPair("linear", widths={"image": 2, "text": 2}, shared_width=2)
    rows = np.arange(7)
    keys = [f"k{row}" for row in rows]
    loaded = LoadedInputs(values=torch.ones(7, 2), lengths=None, rows=rows, num_items=7)
    batch = Batch(samples=rows, first_rows=rows, second_rows=rows, positives=(rows, rows), num_hard=2)
    step = LoadedBatch(batch=batch, first=loaded, second=loaded, positives=None)  # type: ignore[arg-type]
    task = PairTask(
        module=network,
        loader=None,  # type: ignore[arg-type]
        validation=None,
        loss=LossSettings(),
        precision="float32",
        keys=keys,
        forward_flops=0,
    )
    assert task.count(step) == 5
    message = str(task.explain(step, loss=float("nan"), step=9))
    assert message.startswith(
        "the loss is nan at step 9 with temperature 0.07, in the batch of the 7 keys k0, k1, k2, "
    )
    assert "k3, k4 …; lower --lr" in message
    loaded.values[3, 1] = torch.inf
    with pytest.raises(DataError, match=r"at step 9, the image feature holds NaN or infinity.*3"):
        task.explain(step, loss=float("nan"), step=9)


def test_validation_is_of_evenly_spaced_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(9)
    items = Items(rows=rows + 100, samples=rows, contents=rows)
    read: list[list[int]] = []

    def reader(wanted: np.ndarray) -> Inputs:
        read.append(wanted.tolist())
        return Inputs(np.ones((len(wanted), 2), np.float32))

    for most, expected in ((4, [100, 102, 105, 108]), (9, list(range(100, 109)))):
        monkeypatch.setattr(pair, "_MAX_SAMPLES", most)
        read.clear()
        Validation(Pairs(first=items, second=items), reader, reader, device="cpu")
        assert read == [expected, expected]


def test_features_of_half_the_memory_are_loaded(tmp_path: Path) -> None:
    feature = InputFeature([write_feature(tmp_path, random_items(8, (4,), seed=0), (4,), chunk_size=4)])
    for memory, is_mapped in ((2 * 64, False), (2 * 64 - 1, True)):
        data = TrainData(caches=[], sides={"image": [feature], "text": [feature]}, memory_bytes=memory)
        assert data.is_mapped is is_mapped
        assert TrainData(caches=[], sides={"image": [feature] * 2}, memory_bytes=2 * memory).is_mapped is is_mapped
        reads_from_disk = [hasattr(reader, "__self__") for reader in data.readers.values()]  # a method of the feature
        assert reads_from_disk == [is_mapped, is_mapped]


def test_rows_are_numbered_across_readers() -> None:
    tables = [np.arange(3), np.arange(10, 12), np.arange(20, 24)]
    readers = [lambda rows, table=table: Inputs(table[rows].astype(np.float16)[:, None]) for table in tables]
    rows = np.array([8, 0, 3, 4, 2, 5, 3])
    found = _gather(readers, np.array([3, 5, 9]), rows, np.dtype(np.float32))
    assert found.values[:, 0].tolist() == [23, 0, 10, 11, 2, 20, 10]
    assert found.values.dtype == np.float32


def test_parts_of_a_large_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check sizes of parts: vectors count, of which an item of tokens has several."""
    sizes: list[int] = []
    assert pair.MAX_VECTORS == 2**15
    objective = SimpleNamespace(_project=lambda tower, values, lengths: sizes.append(len(values)) or values)
    monkeypatch.setattr(pair, "MAX_VECTORS", 6)
    tower = nn.Linear(2, 2)
    for shape, expected in (
        ((6, 2), [6]),
        ((7, 2), [6, 1]),
        ((4, 3, 2), [2, 2]),
        ((2, 3, 2), [2]),
        ((3, 9, 2), [1] * 3),
    ):
        sizes.clear()
        values = torch.randn(shape)
        loaded = LoadedInputs(values=values, lengths=None, rows=np.arange(shape[0]), num_items=shape[0])
        found = pair.Objective._embed(objective, tower, loaded)  # type: ignore[arg-type]
        assert sizes == expected
        assert torch.equal(found, values)
    sizes.clear()
    normed = nn.Sequential(nn.BatchNorm1d(2))
    values = torch.randn(7, 2)
    loaded = LoadedInputs(values=values, lengths=None, rows=np.arange(7), num_items=7)
    pair.Objective._embed(objective, normed, loaded)  # type: ignore[arg-type]
    assert sizes == [7]  # a batch that is normalized is not divided


def test_a_batch_of_one_part_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass projects the parts of a larger one again."""
    sizes: list[int] = []
    network = AlignedPair("linear", widths={"image": 2, "text": 2}, shared_width=2)
    network.towers[0].register_forward_pre_hook(lambda _, values: sizes.append(len(values[0])))
    objective = pair.Objective(network, LossSettings(), precision="float32")
    monkeypatch.setattr(pair, "MAX_VECTORS", 6)
    for count, forward, backward in ((6, [6], []), (7, [6, 1], [1, 6])):
        rows = np.arange(count)
        inputs = LoadedInputs(values=torch.randn(count, 2), lengths=None, rows=rows, num_items=count)
        places = torch.arange(count)
        batch = Batch(samples=rows, first_rows=rows, second_rows=rows, positives=(rows, rows), num_hard=0)
        step = LoadedBatch(batch=batch, first=inputs, second=inputs, positives=Positives(first=places, second=places))
        sizes.clear()
        loss = objective(step)
        assert sizes == forward
        loss.backward()
        assert sorted(sizes[len(forward) :]) == backward
