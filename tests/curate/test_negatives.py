"""Hard negatives: mined, written, read and drawn; near-duplicates are never among them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.curate.negatives import _is_first, join_equal, mine_negatives
from embedcache.curate.settings import NegativesSettings
from embedcache.dataset import keytable
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.selections import read_negatives
from embedcache.dataset.splits import read_split
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, EmbedcacheError, FingerprintError, SettingError
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.settings import replace_fields
from embedcache.store.cache import Cache
from tests.evaluate.test_retrieval import train_run
from tests.train.runs import IMAGE, TEXT

FEATURES = {"image": IMAGE, "text": TEXT}
LOOSE = {"cosines": {"image": 0.999, "text": 0.999}}  # captions of the toy images repeat, and all are alike


@pytest.fixture(scope="module")
def own_run(two_caches: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smaller cache."""
    return train_run(two_caches[0], tmp_path_factory.mktemp("own") / "run")


def table_of(path: Path, cache_path: Path) -> pa.Table:
    """Return a table with a row per sample, group -1 for one that was not looked at."""
    table = keytable.read(path, [Cache(cache_path)], "test").align(len(Cache(cache_path)))
    return table.set_column(0, "group", pc.fill_null(table["group"], -1))


@pytest.mark.slow
def test_random_draws_differ_by_seed(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    base = NegativesSettings(run=run_path, **LOOSE)
    plain = mine_negatives(cache_path, tmp_path / "plain.parquet", base)
    rows = []
    for seed in (0, 1):
        settings = replace_fields(base, sampling="random", range_max=50, seed=seed)
        drawn = mine_negatives(cache_path, tmp_path / f"{seed}.parquet", settings)
        assert (drawn.mean_score or 1) < (plain.mean_score or 0)
        rows.append(pq.read_table(tmp_path / f"{seed}.parquet")["negatives"])
    assert not rows[0].equals(rows[1])


def test_no_negatives_and_other_indexes_raise(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "images", IndexSettings(run=run_path))
    build_index(cache_path, tmp_path / "small", IndexSettings(run=run_path, modality="text", width=3))
    calls: list[tuple[dict[str, Any], type[EmbedcacheError], str]] = [
        ({"max_score": -0.99}, DataError, "range-max"),
        ({"cosines": {"image": -1.0, "text": 0.999}}, DataError, "1 near-duplicate group"),
        ({"modality": "audio"}, SettingError, "audio"),
        ({"index": tmp_path / "images"}, FingerprintError, "modality: stored 'image', requested 'text'"),
        ({"index": tmp_path / "small"}, FingerprintError, r"width: stored 3, requested \d+"),
    ]
    for options, error, word in calls:
        with pytest.raises(error, match=word):
            mine_negatives(
                cache_path, tmp_path / "x.parquet", NegativesSettings(**{"run": run_path, **LOOSE, **options})
            )
    assert not (tmp_path / "x.parquet").exists()


def test_without_a_run_items_are_compared_with_their_own_modality(cache_path: Path, tmp_path: Path) -> None:
    settings = NegativesSettings(modality="text", **LOOSE)
    report = mine_negatives(cache_path, tmp_path / "negatives.parquet", settings, feature=FEATURES)
    assert report.num_samples == 300
    assert report.mean_own_score is None
    table = pq.read_table(tmp_path / "negatives.parquet")
    texts = Vectors(cache_path, "text", TEXT).read(np.arange(300))
    groups, first = table["group"].to_numpy(), table["scores"][0].as_py()
    np.testing.assert_allclose(first[0], (texts @ texts[0])[groups != groups[0]].max(), atol=1e-5)


@pytest.mark.slow
@given(st.integers(1, 30), st.integers(0, 1000), st.data())
def test_joined_groups_hold_all_equal_items(samples: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    sides = []
    for _ in "it":
        extra = rng.integers(samples, size=data.draw(st.integers(0, 5)))
        owners = np.sort(np.concatenate([np.arange(samples), extra]))
        contents = rng.integers(data.draw(st.integers(1, 40)), size=len(owners))
        sides.append(Items(rows=np.arange(len(owners)), samples=3 * owners, contents=contents))
    labels = rng.integers(data.draw(st.integers(1, 30)), size=samples)
    pairs = Pairs(first=sides[0], second=sides[1])
    groups = join_equal(labels, pairs)
    assert 0 <= groups.min() <= groups.max() < samples
    same = groups[:, None] == groups
    assert same[labels[:, None] == labels].all()
    for side in sides:
        numbers = side.samples // 3
        assert same[np.ix_(numbers, numbers)][side.contents[:, None] == side.contents].all()
    first, second = pairs.positives()
    assert same[pairs.first.samples[first] // 3, pairs.second.samples[second] // 3].all()


def test_first_of_equal_values() -> None:
    found = _is_first(np.array([[4, 2, 4, 2, 1], [0, 0, 0, 3, 3]]))
    assert found.tolist() == [[True, True, False, False, True], [True, False, False, True, False]]


def test_tables_of_several_caches_are_counted_across_them(two_caches: list[Path], tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for cache, path in zip(two_caches, paths, strict=True):
        mine_negatives(cache, path, NegativesSettings(num_negatives=1, **LOOSE), feature=FEATURES)
    caches = [Cache(path) for path in two_caches]
    negatives = read_negatives(paths[::-1], caches)
    assert negatives.negatives_SK[:40].max() < 40 <= negatives.negatives_SK[40:][negatives.negatives_SK[40:] >= 0].min()
    assert not set(negatives.groups_S[:40]) & set(negatives.groups_S[40:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"range_min": 2, "range_max": 5, "num_negatives": 2},
        {"range_min": 1, "range_max": 60, "num_negatives": 50},
        {"max_score": 0.4, "range_max": 40},
        {"relative_margin": 0.5, "range_max": 40},
        {"max_score": 0.4, "range_max": 4, "index": "index"},
    ],
)
def test_negatives_equal_a_plain_search(
    two_caches: list[Path], own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Check every sample against a sort of all candidates of other groups, whatever the size of a block."""
    monkeypatch.setattr("embedcache.curate.negatives._BLOCK", 16)
    path = two_caches[0]
    if "index" in options:
        options = {**options, "index": tmp_path / "index"}
        build_index(path, options["index"], IndexSettings(run=own_run, modality="text"))
    settings = NegativesSettings(run=own_run, **LOOSE, **options)
    report = mine_negatives(path, tmp_path / "n.parquet", settings)
    table = table_of(tmp_path / "n.parquet", path)
    groups = table["group"].to_numpy()
    train = read_split(own_run / "split.parquet", [Cache(path)]).rows("train")
    images, texts = (Vectors(path, name, FEATURES[name], own_run).read(train) for name in ("image", "text"))
    own = np.einsum("np,np->n", images, texts)
    last = settings.range_max or settings.range_min + 10 * settings.num_negatives
    found = []
    for number, row in enumerate(train.tolist()):
        scores = texts @ images[number]
        limit = own[number] - abs(own[number]) * (settings.relative_margin or 0)
        has_margin = settings.relative_margin is not None
        others = np.flatnonzero(groups[train] != groups[row])
        ranked = others[np.argsort(-scores[others], kind="stable")][settings.range_min : last]
        kept = [
            (scores[place], int(train[place]))
            for place in ranked.tolist()
            if (settings.max_score is None or scores[place] <= settings.max_score)
            and (not has_margin or scores[place] <= limit)
        ][: settings.num_negatives]
        np.testing.assert_allclose(table["scores"][row].as_py(), [score for score, _ in kept], atol=1e-5)
        found += kept
    assert report.num_negatives == len(found)
    assert report.num_samples == len(train)
    assert report.num_with_negatives == sum(map(bool, table["negatives"].to_pylist()))
    assert report.num_groups == len(np.unique(groups[groups >= 0]))
    assert report.mean_score == pytest.approx(np.mean([score for score, _ in found]), abs=1e-5)
    assert report.mean_own_score == pytest.approx(float(own.mean()), abs=1e-5)
    assert set(np.flatnonzero(groups == -1)) == set(range(40)) - set(train.tolist())


@pytest.mark.slow
def test_limits_are_inclusive(two_caches: list[Path], own_run: Path, tmp_path: Path) -> None:
    """Check the nearest neighbor of a sample with its own cosine as the limit."""
    settings = NegativesSettings(run=own_run, num_negatives=1, **LOOSE)

    def nearest(**options: Any) -> list[list[float]]:
        mine_negatives(two_caches[0], tmp_path / "n.parquet", replace_fields(settings, **options))
        scores: list[list[float]] = table_of(tmp_path / "n.parquet", two_caches[0])["scores"].to_pylist()
        return scores

    found = nearest()
    row = next(row for row, scores in enumerate(found) if scores)
    score = found[row][0]
    assert nearest(max_score=score)[row] == [score]


@pytest.mark.slow
def test_an_index_is_asked_for_twice_the_neighbors_and_64(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    """Check every sample against the nearest 84 images, of which few are of the selection."""
    build_index(cache_path, tmp_path / "index", IndexSettings(run=run_path))
    keys = Cache(cache_path).column("key").to_pylist()
    (tmp_path / "keys.txt").write_text("\n".join(keys[::12]))
    selected = set(range(0, 300, 12))
    options = {"run": run_path, "modality": "text", "index": tmp_path / "index", "selection": tmp_path / "keys.txt"}
    settings = NegativesSettings(num_negatives=10, range_max=10, **LOOSE, **options)
    mine_negatives(cache_path, tmp_path / "negatives.parquet", settings)
    table = table_of(tmp_path / "negatives.parquet", cache_path)
    groups = table["group"].to_numpy()
    images, texts = (Vectors(cache_path, name, FEATURES[name], run_path).read(np.arange(300)) for name in FEATURES)
    for row in selected:
        near = np.argsort(-(images @ texts[row]), kind="stable")[:84].tolist()
        expected = [other for other in near if other in selected and groups[other] != groups[row]][:10]
        assert table["negatives"][row].as_py() == expected


def test_few_samples_raise(two_caches: list[Path], tmp_path: Path) -> None:
    keys = Cache(two_caches[0]).column("key").to_pylist()
    for count, word in ((1, "two samples"), (2, "none")):
        (tmp_path / "keys.txt").write_text("\n".join(keys[:count]))
        settings = NegativesSettings(selection=tmp_path / "keys.txt", max_score=-1)
        with pytest.raises(DataError, match=word):
            mine_negatives(two_caches[0], tmp_path / "n.parquet", settings, feature=FEATURES)
