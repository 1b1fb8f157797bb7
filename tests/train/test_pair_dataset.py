"""The dataset of PyTorch: its pairs are those of the cache, in batches, parts and worker processes."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import embedcache
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError, UnknownNameError
from tests.images import write_images
from tests.toy import IMAGE, TEXT

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
