"""The rules that are part of the package, against NumPy on whole arrays."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embedcache.dataset.splits import read_split
from embedcache.derive.derive import derive
from embedcache.derive.rules import MEAN as MEAN_RULE
from embedcache.derive.rules import Block, Derivation, Rule, open_rule, to_items
from embedcache.errors import DataError, ItemError, SettingError, UnknownNameError
from embedcache.maintain.copy import cut_cache
from embedcache.store.cache import Cache
from tests.derive.cases import CLS, MEAN, PATCHES
from tests.train.runs import run as train

Lengths = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@pytest.fixture
def cache(cache_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_path, tmp_path / "c"))


def derived(cache: Path | str, rule: str, *inputs: tuple[str, str], **options: Any) -> np.ndarray:
    report = derive(cache, Derivation(name="derived", inputs=inputs, rule=rule, dtype="float32", **options))
    return Cache(cache).feature(report.modality, "derived").load()


def stored(cache: Path, feature: tuple[str, str]) -> np.ndarray:
    return Cache(cache).feature(*feature).load().astype(np.float64)


@given(Lengths, st.integers(1, 3))
def test_block_items_and_rows_are_the_same_values(lengths: list[int], width: int) -> None:
    values = np.arange(sum(lengths) * width, dtype=np.float32).reshape(-1, width)
    block = Block(values, np.array(lengths))
    assert [len(item) for item in block.items()] == lengths
    np.testing.assert_array_equal(np.concatenate(block.items()), block.rows())
    assert [item.tolist() for item in block.with_rows(2 * block.rows()).items()] == [
        (2 * item).tolist() for item in block.items()
    ]


Shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@given(arrays(np.float16, Shapes, elements=st.integers(-9, 9)))
def test_mean_of_fixed_and_of_varying_tokens_agree(values: np.ndarray) -> None:
    fixed = MEAN_RULE.apply([Block(values)], {})["mean"]
    lengths = np.full(len(values), values.shape[1])
    varying = MEAN_RULE.apply([Block(values.reshape(-1, values.shape[-1]), lengths)], {})["mean"]
    np.testing.assert_allclose(np.stack(list(varying)), fixed, rtol=1e-6)  # type: ignore[arg-type]


def test_mean_of_no_tokens_is_a_failure() -> None:
    block = Block(np.ones((2, 3), np.float16), np.array([0, 2]))
    empty, full = to_items("mean", MEAN_RULE.apply([block], {})["mean"], 2)
    assert isinstance(empty, ItemError)
    np.testing.assert_array_equal(full, np.ones(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_normalized", [True, False])
def test_concat_of_two_modalities(cache: Path, is_normalized: bool) -> None:
    found = derived(cache, "concat", CLS, MEAN, parameters={"normalize": is_normalized})
    parts = [stored(cache, CLS), stored(cache, MEAN)]
    if is_normalized:
        parts = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    np.testing.assert_allclose(found, np.concatenate(parts, axis=1), atol=1e-6)


def test_pca_spans_the_largest_directions(cache: Path) -> None:
    found = derived(cache, "pca", CLS, parameters={"width": 3})
    cls = stored(cache, CLS)
    centered = cls - cls.mean(axis=0)
    _, singular, directions = np.linalg.svd(centered, full_matrices=False)
    assert singular[2] > 1.05 * singular[3], "the three directions are well defined"
    np.testing.assert_allclose(np.abs(found), np.abs(centered @ directions[:3].T), atol=1e-3)
    signs = np.sign(directions[np.arange(3), np.abs(directions[:3]).argmax(axis=1)])
    np.testing.assert_allclose(found, centered @ (directions[:3] * signs[:, None]).T, atol=1e-3)


@pytest.mark.slow
def test_pca_whitens_over_the_training_part(cache: Path, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", epochs=1)
    found = derived(
        cache, "pca", CLS, parameters={"width": 4, "whiten": True}, fit_split=tmp_path / "run/split.parquet"
    )
    parts = np.array(read_split(tmp_path / "run/split.parquet", [Cache(cache)]).parts)
    np.testing.assert_allclose(np.cov(found[parts == "train"].T, bias=True), np.eye(4), atol=2e-3)
    assert not np.allclose(np.cov(found.T, bias=True), np.eye(4), atol=2e-3)


def test_standardize(cache: Path) -> None:
    found = derived(cache, "standardize", MEAN)
    mean = stored(cache, MEAN)
    is_constant = mean.std(axis=0) == 0
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(found.std(axis=0), np.where(is_constant, 0, 1), atol=1e-3)


@pytest.mark.parametrize(
    ("rule", "inputs", "parameters", "word"),
    [
        ("mean", [CLS], {}, "tokens"),
        ("mean", [PATCHES, PATCHES], {}, "1 input"),
        ("concat", [PATCHES], {}, "vector"),
        ("pca", [CLS], {"width": 49}, "1 to 48"),
        ("pca", [CLS], {"width": "5"}, "such as 64"),
        ("pca", [CLS], {"whiten": 1}, "such as False"),
        ("pca", [CLS], {"widht": 5}, "width"),
    ],
)
def test_refusals(cache: Path, rule: str, inputs: list[tuple[str, str]], parameters: dict[str, Any], word: str) -> None:
    with pytest.raises((SettingError, UnknownNameError), match=word):
        derived(cache, rule, *inputs, parameters=parameters)


def test_parameter_of_another_type_raises() -> None:
    rule = Rule(name="r", apply=lambda *_: {}, outputs=lambda *_: {}, parameters={"grids": [], "cap": 0.9})
    checked = rule.check_parameters({"grids": [{"a": 1}], "cap": 1})
    assert checked == {"grids": [{"a": 1}], "cap": 1}
    assert isinstance(checked["cap"], float), "the same digest as for 1.0"
    assert rule.check_parameters({"cap": np.float32(0.5)}) == {"grids": [], "cap": 0.5}
    with pytest.raises(SettingError, match="grids"):
        rule.check_parameters({"grids": 3})


def test_a_rule_is_fitted_in_a_cache_behind_a_url(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("\n".join(Cache(cache_path).column("key").to_pylist()[:20]))
    caches: list[Path | str] = [tmp_path / "c", "memory://fitted/c"]
    for copied in caches:
        cut_cache(cache_path, tmp_path / "keys.txt", copied, features=CLS[1])
    for _ in range(2):  # derived, then reused
        local, remote = (derived(copied, "standardize", CLS) for copied in caches)
    np.testing.assert_array_equal(local, remote)


def test_whitening_more_directions_than_there_are_raises() -> None:
    line = np.outer(np.arange(5.0), [1.0, 2.0, 3.0])
    rule = open_rule("pca")
    assert rule.fit is not None
    for vectors, width, words in ((line, 2, "have 1; use width=1"), (np.ones_like(line), 1, "have 0; all vectors are")):
        with pytest.raises(DataError, match=f"whitening to {width} .*{words}"):
            rule.fit(iter([[Block(vectors)]]), {"width": width, "whiten": True})
