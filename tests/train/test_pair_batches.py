"""Random batches of pairs and of rows, reading ahead, and the dataset of PyTorch."""

import math
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import embedcache
from embedcache.arrays import Array, Inputs
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.selections import HardNegatives
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError, SettingError, UnknownNameError
from embedcache.store.cache import Cache
from embedcache.train.batches import PairBatches, PairRows, RowBatches, load_pairs, read_ahead, shuffle_blocks
from embedcache.train.data import DrawnViews, open_data
from embedcache.train.distributed import check_batches
from tests.images import write_images
from tests.toy import IMAGE, TEXT


def make_pairs(samples: int, *, seed: int) -> Pairs:
    rng = np.random.default_rng(seed)
    text_samples = np.sort(np.concatenate([np.arange(samples), rng.integers(samples, size=samples)]))
    return Pairs(
        first=Items(rows=np.arange(samples) + 100, samples=np.arange(samples), contents=np.arange(samples)),
        second=Items(
            rows=np.arange(len(text_samples)) + 500,
            samples=text_samples,
            contents=rng.integers(samples, size=len(text_samples)),
        ),
    )


@pytest.mark.slow
@given(st.integers(2, 30), st.integers(2, 40), st.integers(0, 5), st.integers(0, 3))
def test_epoch_has_every_sample_once(samples: int, size: int, seed: int, epoch: int) -> None:
    pairs = make_pairs(samples, seed=seed)
    batches = PairBatches(pairs, batch_size=size, seed=seed)
    epoch_batches = list(batches.epoch(epoch))
    assert len(epoch_batches) == batches.num_steps
    sizes = [len(batch.first_rows) for batch in epoch_batches]
    assert 2 <= min(sizes) == batches.smallest
    assert max(sizes) <= max(size, 3)
    image_rows = np.concatenate([batch.first_rows for batch in epoch_batches])
    text_rows = np.concatenate([batch.second_rows for batch in epoch_batches])
    assert sorted(image_rows) == list(range(100, 100 + samples))
    assert (pairs.second.samples[text_rows - 500] == image_rows - 100).all()
    again = list(PairBatches(pairs, batch_size=size, seed=seed).epoch(epoch))
    for one, other in zip(epoch_batches, again, strict=True):
        np.testing.assert_array_equal(one.second_rows, other.second_rows)


@given(st.integers(2, 14), st.integers(0, 200))
def test_mixed_items_belong_together_if_both_of_their_items_do(samples: int, seed: int) -> None:
    pairs = make_pairs(samples, seed=seed)
    relation = pairs.relation().toarray()
    batches = PairBatches(pairs, batch_size=6, seed=seed, mixup=0.5)
    halves = []
    for batch in batches.epoch(1):
        half = len(batch.first_rows) // 2
        contents = pairs.first.contents[batch.first_rows - 100], pairs.second.contents[batch.second_rows - 500]
        of_first, of_second = (
            relation[np.ix_(*(side[part] for side in contents))] for part in (slice(half), slice(half, None))
        )
        found = np.zeros((half, half), bool)
        found[batch.positives] = True
        np.testing.assert_array_equal(found, of_first & of_second)
        halves.append(half)
    assert min(halves) == batches.smallest


@given(st.integers(1, 30), st.integers(0, 50))
def test_positives_match_the_whole_relation(samples: int, seed: int) -> None:
    pairs = make_pairs(samples, seed=seed)
    relation = pairs.relation().toarray()
    for batch in PairBatches(pairs, batch_size=7, seed=seed).epoch(seed):
        dense = np.zeros((len(batch.first_rows), len(batch.second_rows)), bool)
        dense[batch.positives] = True
        contents = pairs.first.contents[batch.first_rows - 100], pairs.second.contents[batch.second_rows - 500]
        np.testing.assert_array_equal(dense, relation[np.ix_(*contents)])


def draw_negatives(samples: int, seed: int) -> HardNegatives:
    """Draw hard negatives that respect random groups; numbers above the samples are of no training part."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(max(1, samples // 2), size=2 * samples)
    negatives = rng.integers(-1, 2 * samples, size=(2 * samples, 3))
    negatives[groups[negatives] == groups[:, None]] = -1
    return HardNegatives(negatives_SK=negatives.astype(np.int32), groups_S=groups)


@pytest.mark.slow
@given(st.integers(2, 30), st.integers(2, 40), st.integers(0, 50), st.integers(1, 4), st.sampled_from(["draw", "all"]))
def test_hard_negatives_are_in_the_batch_and_near_duplicates_are_excluded(
    samples: int, size: int, seed: int, num: int, captions: Literal["draw", "all"]
) -> None:
    pairs, negatives = make_pairs(samples, seed=seed), draw_negatives(samples, seed)
    size = max(size, min(2 * (1 + min(num, 3)), samples))  # a smaller one is refused
    options = {"batch_size": size, "seed": seed, "negatives": negatives, "num_negatives": num, "captions": captions}
    batches = PairBatches(pairs, **options)  # type: ignore[arg-type]
    drawn, epoch = [], list(batches.epoch(1))
    for batch in epoch:
        own, hard = np.split(batch.samples, [len(batch.samples) - batch.num_hard])
        drawn += own.tolist()
        assert len(set(batch.samples.tolist())) == len(batch.samples) <= size
        listed = negatives.negatives_SK[own]
        assert np.isin(hard, listed).all()
        for row in listed:
            left = np.setdiff1d(row[(row >= 0) & (row < samples)], batch.samples)
            assert (
                not len(left)
                or len(batch.samples) == size
                or np.isin(row, batch.samples).sum() >= min(num, len(np.unique(row)))
            )
        assert batch.excluded is not None
        texts = pairs.second.samples[batch.second_rows - 500]
        near = negatives.groups_S[batch.first_rows - 100][:, None] == negatives.groups_S[texts]
        near[batch.positives] = False
        np.testing.assert_array_equal(np.argwhere(near), np.transpose(batch.excluded))
        assert near[: len(own), len(batch.second_rows) :].sum() == 0
    assert sorted(drawn) == list(range(samples))
    again = list(PairBatches(pairs, **options).epoch(1, first_step=len(epoch) // 2))  # type: ignore[arg-type]
    for one, other in zip(epoch[len(epoch) // 2 :], again, strict=True):
        np.testing.assert_array_equal(one.second_rows, other.second_rows)
        np.testing.assert_array_equal(one.samples, other.samples)


@pytest.mark.parametrize(("size", "num", "smallest"), [(16, 15, 32), (8, 5, 12), (2, 1, 4), (11, 5, 12), (32, 15, 32)])
def test_two_samples_with_their_hard_negatives_fit_in_a_batch(size: int, num: int, smallest: int) -> None:
    table = np.random.default_rng(0).integers(99, size=(99, 20)).astype(np.int32)

    def sizes(batch_size: int, table_SK: Array) -> list[int]:
        negatives = HardNegatives(negatives_SK=table_SK, groups_S=np.arange(99))
        batches = PairBatches(
            make_pairs(99, seed=0), batch_size=batch_size, seed=0, negatives=negatives, num_negatives=num
        )
        return [len(batch.samples) for batch in batches.epoch(0)]

    assert max(sizes(smallest, table)) <= smallest  # also of the batch with three samples of an odd number
    assert max(sizes(4, table[:, :1])) == 4  # there are fewer negatives than may be drawn
    if size < smallest:
        with pytest.raises(SettingError, match=f"at least {smallest}"):
            sizes(size, table)


def test_hard_negatives_of_a_step_depend_on_seed_and_epoch_alone() -> None:
    """Check the draws by their definition: a run that was interrupted goes on with the same ones."""
    table = np.random.default_rng(0).integers(20, size=(20, 4)).astype(np.int32)
    negatives = HardNegatives(negatives_SK=table, groups_S=np.arange(20))
    pairs = make_pairs(20, seed=0)
    for step, batch in enumerate(PairBatches(pairs, batch_size=9, seed=5, negatives=negatives).epoch(2)):
        own, hard = np.split(batch.samples, [len(batch.samples) - batch.num_hard])
        keys = np.random.default_rng([5, 2, 3, step]).random((len(own), 4))
        assert hard.tolist() == sorted({*table[own, keys.argmin(axis=1)]} - {*own})


@pytest.mark.parametrize(("mix", "rows", "own"), [(None, 7, [2, 3, 4, 5, 6]), (0.5, 6, [1, 2, 4, 5])])
def test_a_process_loads_its_part_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, mix: float | None, rows: int, own: list[int]
) -> None:
    """The last two thirds, of mixed items those of both halves."""
    monkeypatch.setattr("embedcache.train.batches.own_slice", lambda count: slice(count // 3, count))
    table = np.arange(40, dtype=np.float32).reshape(20, 2)
    first = DrawnViews(
        readers={"plain": lambda rows: Inputs(table[rows]), "other": lambda rows: Inputs(-table[rows])},
        probabilities={"plain": 0.5, "other": 0.5},
        num_rows=20,
        seed=0,
        side=0,
    )
    batch = PairRows(
        samples=np.arange(rows),
        first_rows=np.arange(rows) + 3,
        second_rows=np.arange(rows) + 8,
        positives=(np.array([0, 1]), np.array([0, 2])),
        num_hard=0,
        mix=mix,
        views=(np.arange(rows) % 2, None),
        excluded=(np.array([1]), np.array([4])),
    )
    loaded = load_pairs(batch, {"image": first, "text": lambda rows: Inputs(table[rows], rows % 5)}, "cpu")
    image, text = loaded.inputs["image"], loaded.inputs["text"]
    signs = np.where(np.array(own) % 2, -1, 1)[:, None]
    assert image.rows.tolist() == [place + 3 for place in own]
    np.testing.assert_array_equal(image.values, table[image.rows] * signs)
    assert image.lengths is None
    assert text.rows.tolist() == [place + 8 for place in own]
    np.testing.assert_array_equal(text.values, table[text.rows])
    assert text.lengths.tolist() == [(place + 8) % 5 for place in own]
    assert set(loaded.targets.num_items.values()) == {rows if mix is None else rows // 2}
    positives = loaded.targets.positives
    assert [positives.first.tolist(), positives.second.tolist()] == [[0, 1], [0, 2]]
    assert [side.tolist() for side in positives.excluded] == [[1], [4]]


@pytest.mark.parametrize("image", ["cls", "patches"])
@pytest.mark.parametrize("text", ["mean", "tokens"])
def test_loaded_and_mapped_rows_are_equal(two_caches: list[Path], image: str, text: str) -> None:
    names = {"image": f"open_toy/{image}", "text": f"open_toy/{text}"}
    mapped, loaded = (open_data(two_caches, names, memory_bytes=size) for size in (0, 10**9))
    assert mapped.is_mapped
    assert not loaded.is_mapped
    rows = np.random.default_rng(0).permutation(120)[:50]
    for one, other in zip(mapped.readers.values(), loaded.readers.values(), strict=True):
        assert_same(one(rows), other(rows))
    caches = [Cache(path) for path in two_caches]
    for row, tokens in zip(
        rows, zip(*mapped.readers["text"](rows), strict=True) if text == "tokens" else [], strict=False
    ):
        cache, own = (caches[0], row) if row < 40 else (caches[1], row - 40)
        (expected,) = cache.feature("text", "open_toy/tokens").gather_tokens(np.array([own]))
        np.testing.assert_array_equal(tokens[0][: tokens[1]], expected)
        assert not tokens[0][tokens[1] :].any()


def assert_same(one: Inputs, other: Inputs) -> None:
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.lengths, other.lengths)  # type: ignore[arg-type]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3), st.sampled_from([1, 3]))
def test_row_batches_have_every_row_once(count: int, size: int, epoch: int, block_rows: int) -> None:
    batches = RowBatches(np.arange(count) + 100, batch_size=size, seed=1, block_rows=block_rows)
    found = [batch.tolist() for batch in batches.epoch(epoch)]
    assert len(found) == batches.num_steps == math.ceil(count / size)
    assert sorted(row for batch in found for row in batch) == list(range(100, 100 + count))
    assert min(map(len, found)) + 1 >= max(map(len, found)) <= size
    rest = [batch.tolist() for batch in batches.epoch(epoch, first_step=len(found) // 2)]
    assert rest == found[len(found) // 2 :]


def test_batches_are_read_ahead_on_one_thread() -> None:
    is_third = threading.Event()
    threads = set()

    def make() -> Iterator[int]:
        for number in range(6):
            threads.add(threading.current_thread().name)
            if number == 2:
                is_third.set()
            yield number

    batches = read_ahead(make())
    assert next(batches) == 0
    assert is_third.wait(60)  # before the second one is asked for
    assert list(batches) == [1, 2, 3, 4, 5]
    assert threads == {"loader_0"}


def test_error_of_a_batch_reaches_the_loop() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise SettingError("no")

    batches = read_ahead(make())
    assert next(batches) == 1
    with pytest.raises(SettingError, match="no"):
        next(batches)


@pytest.mark.parametrize(
    ("count", "block_rows", "buffered"), [(20, 3, 2), (21, 3, 2), (7, 2, 3), (5, 8, 1), (12, 4, 3)]
)
def test_rows_of_a_few_blocks_are_drawn_together(
    monkeypatch: pytest.MonkeyPatch, count: int, block_rows: int, buffered: int
) -> None:
    """Check that each part of the order has the rows of whole blocks, in order of no kind."""
    monkeypatch.setattr("embedcache.train.batches._BUFFER_BLOCKS", buffered)
    order = shuffle_blocks(count, block_rows, np.random.default_rng(3))
    assert sorted(order.tolist()) == list(range(count))
    starts = np.random.default_rng(3).permutation(-(-count // block_rows)) * block_rows
    drawn = [row for start in starts for row in range(start, min(start + block_rows, count))]
    size = block_rows * buffered
    for place in range(0, count, size):
        assert sorted(order[place : place + size].tolist()) == sorted(drawn[place : place + size])


def test_each_process_needs_its_items() -> None:
    check_batches(4, 2, least=2)
    check_batches(3, 2)
    with pytest.raises(SettingError, match="at least 2 items"):
        check_batches(3, 2, least=2)


FEATURES = {"feature": {"image": "open_toy/cls", "text": "open_toy/mean"}}


@pytest.fixture(scope="module")
def dataset(cache_path: Path) -> embedcache.PairDataset:
    return embedcache.PairDataset(cache_path, **FEATURES)


def test_pairs_are_those_of_the_cache(dataset: embedcache.PairDataset, cache_path: Path) -> None:
    cache = embedcache.Cache(cache_path)
    assert len(dataset) == 300
    assert repr(dataset) == f"PairDataset({cache_path}: 300 pairs of open_toy/cls and open_toy/mean)"
    rows = np.array([250, 3, 64])
    batch = dataset[rows]
    for modality, name in (("image", "open_toy/cls"), ("text", "open_toy/mean")):
        expected = cache.feature(modality, name).gather(rows).astype(np.float32)
        np.testing.assert_array_equal(batch[modality].numpy(), expected)
        np.testing.assert_array_equal(dataset[3][modality].numpy(), expected[1])
    assert batch["sample"].tolist() == rows.tolist()
    assert dataset[3]["sample"] == 3
    assert dataset[290:400]["sample"].tolist() == list(range(290, 300))
    assert dataset[::-50]["text"].shape == (6, 32)


def test_workers_may_start_in_another_folder(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache_path.parent)
    dataset = embedcache.PairDataset(cache_path.name, **FEATURES)
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(dataset))[3]["sample"] == 3  # noqa: S301


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # of a single core
def test_workers_read_the_same_pairs(dataset: embedcache.PairDataset) -> None:
    whole = dataset[np.arange(300)]
    state = pickle.dumps(dataset)  # what a spawned worker gets
    assert len(state) < 20_000, "mapped chunks were copied"
    for copy, num_workers in ((pickle.loads(state), 0), (dataset, 2)):  # noqa: S301
        batches = list(DataLoader(copy, batch_size=128, num_workers=num_workers, multiprocessing_context=None))
        assert [len(batch["sample"]) for batch in batches] == [128, 128, 44]
        for name, values in whole.items():
            assert torch.equal(torch.cat([batch[name] for batch in batches]), values)


def test_parts_are_those_of_a_run(cache_path: Path, run_path: Path) -> None:
    split = read_split(run_path / "split.parquet", [embedcache.Cache(cache_path)])
    for part in ("train", "val"):
        some = embedcache.PairDataset(cache_path, **FEATURES, part=part, split=f"{run_path}/split.parquet")
        assert some.samples.tolist() == split.rows(part).tolist()


def test_captions_of_several_caches(two_caches: list[Path]) -> None:
    both = embedcache.PairDataset(two_caches, feature={"image": "open_toy/patches", "text": "open_toy/mean"})
    assert len(both) == 120
    cache = embedcache.Cache(two_caches[1])
    np.testing.assert_array_equal(
        both[45]["image"], cache.feature("image", "open_toy/patches").gather(np.array([5]))[0]
    )
    assert both.samples[45] == 45
    with pytest.raises(DataError, match="width"):
        embedcache.PairDataset(two_caches, feature={"image": ["open_toy/cls", "open_toy/patches"]})


def test_wrong_requests_raise(cache_path: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 2)
    (source / "00001.txt").write_text("short")
    embedcache.extract_features(
        source, tmp_path / "c", image_encoder=IMAGE, text_encoder=TEXT, feature=("cls", "tokens")
    )
    with pytest.raises(DataError, match="tokens"):
        embedcache.PairDataset(tmp_path / "c")
    with pytest.raises(UnknownNameError, match="splits"):
        embedcache.PairDataset(cache_path, **FEATURES, part="train", splits="key")
