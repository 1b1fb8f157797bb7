"""Contract tests for methods of selection.

class TestMine(SelectorContract):
    name = "mypackage.selection:MySelector"
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from embedcache.curate.select.pool import Pool
from embedcache.curate.select.select import SELECTORS, Selector, check_method_settings
from embedcache.curate.select.settings import METHOD_SETTINGS, SelectSettings
from embedcache.dataset.selections import Selection
from embedcache.errors import SettingError
from embedcache.testing.examples import write_examples

Pools = Callable[..., Pool]
"""`pools(which, selector, selection=None)` opens a pool of 80 samples or more, `cache` or `other`, which differ in
chunk size."""

_VALUES: dict[str, Any] = {
    "budget": 3,
    "per_concept": 2,
    "threshold": 0.5,
    "head": 2.0,
    "clusters": (3,),
    "candidates": 9,
    "score": "score",
    "at_least": 0.5,
    "at_most": 0.5,
}
"""A value of each of `METHOD_SETTINGS`."""


class SelectorContract:
    """Tests of a method; `name` is its name, `settings` are what it needs beside `budget`, which may be None.

    The pools are example caches with what the method requires. A method that needs other data overrides the fixture
    `pools`, see `Pools`, or `paths`: a path for each of `cache`, `other` and the method's `required_inputs`.
    """

    name: str
    settings: ClassVar[dict[str, Any]] = {}
    budget: int | None = 40

    @pytest.fixture
    def paths(self, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
        """Return the paths of the example caches `cache` and `other`, and of inputs; see `write_examples`."""
        return write_examples(tmp_path_factory.getbasetemp() / "embedcache-examples")

    @pytest.fixture
    def pools(self, paths: Mapping[str, Path]) -> Pools:
        """Return a function that opens a pool with all that a method requires."""

        def open_pool(which: str, selector: Selector, *, selection: Path | None = None) -> Pool:
            inputs: dict[str, Any] = {name: paths[name] for name in selector.required_inputs}
            return Pool(paths[which], selector.modality or "image", SelectSettings(selection=selection, **inputs))

        return open_pool

    @pytest.fixture
    def selector(self) -> Selector:
        """Return the method under test."""
        selector: Selector = SELECTORS.load(self.name)()
        return selector

    def select(
        self, selector: Selector, pools: Pools, which: str = "cache", *, selection: Path | None = None, **others: Any
    ) -> Selection:
        """Select from one of the `pools`, with the budget and settings of the contract unless others are given."""
        settings = SelectSettings(**{"budget": self.budget, **self.settings, **others})
        return selector.select(pools(which, selector, selection=selection), settings)

    def test_rows_ascend_with_columns(self, selector: Selector, pools: Pools) -> None:
        found = self.select(selector, pools)
        assert found.rows.dtype == np.int64
        assert (np.diff(found.rows) > 0).all(), "rows ascend, each once"
        assert all(len(values) == len(found.rows) for values in found.columns.values())

    def test_budget_is_met(self, selector: Selector, pools: Pools) -> None:
        for budget in (1, 7, 40) if self.budget is not None else ():
            assert len(self.select(selector, pools, budget=budget).rows) == budget

    def test_seed(self, selector: Selector, pools: Pools) -> None:
        """Check that the same seed selects the same, and another seed something else if the method uses it."""
        first, again, other = (self.select(selector, pools, seed=seed) for seed in (3, 3, 4))
        assert np.array_equal(first.rows, again.rows)
        assert pa.table(dict(first.columns)).equals(pa.table(dict(again.columns)))
        if self.budget is not None:
            assert np.array_equal(first.rows, other.rows) != selector.uses_seed, "uses_seed says what the seed changes"

    def test_chunk_size_changes_nothing(self, selector: Selector, pools: Pools) -> None:
        rows, other = (self.select(selector, pools, which).rows for which in ("cache", "other"))
        assert np.array_equal(rows, other)

    def test_selection_limits_the_pool(self, selector: Selector, pools: Pools, tmp_path: Path) -> None:
        keys = pools("cache", selector).cache.column("key").to_pylist()
        (tmp_path / "keys.txt").write_text("\n".join(keys[::2]))
        rows = self.select(selector, pools, selection=tmp_path / "keys.txt").rows
        assert (rows % 2 == 0).all(), "select from pool.samples only"

    def test_unused_setting_raises(self, selector: Selector) -> None:
        for name in set(METHOD_SETTINGS) - set(selector.accepts):
            with pytest.raises(
                SettingError, match=f"--method {self.name}: expected .*, got --{name.replace('_', '-')}"
            ):
                check_method_settings(self.name, selector, SelectSettings(**{name: _VALUES[name]}))
