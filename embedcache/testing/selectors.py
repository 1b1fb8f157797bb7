"""Contract tests for methods of selection."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embedcache.curate.select.select import Pool, apply_method, load_method, named_inputs
from embedcache.curate.settings import SelectSettings
from embedcache.dataset.selections import Selection
from embedcache.store.cache import Cache
from embedcache.testing.examples import write_examples

Select = Callable[..., Selection]
"""`select(name, **settings)` selects from a pool of 80 samples or more, `cache` or `other`, which differ in chunk
size."""


class SelectorContract:
    """Tests of a method. `name` is its name with its parameters, and `budget` may be None.

    The pools are example caches with the inputs of the method. A method that needs other data overrides the fixture
    `paths` with a path for each of `cache`, `other` and its inputs among `scores`, `concepts`, `target` and `run`. It
    may override `select` instead, see `Select`.

    Example:
        >>> class TestMine(SelectorContract):
        ...     name = "my_selectors:choose:threshold=0.5"
        ...     budget = None  # the threshold decides how many are selected
    """

    name: str
    budget: int | None = 40

    @pytest.fixture
    def paths(self, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
        """Return the paths of the example caches `cache` and `other`, and of inputs. See `write_examples`."""
        return write_examples(tmp_path_factory.getbasetemp() / "embedcache-examples")

    @pytest.fixture
    def select(self, paths: Mapping[str, Path]) -> Select:
        """Return a function that selects from one of the example caches, with the budget of the contract."""
        bound = load_method(self.name)

        def select_from(pool_name: str = "cache", **settings: Any) -> Selection:
            inputs = {name: paths[name] for name in named_inputs(bound) if name in paths}
            select_settings = SelectSettings(**{"budget": self.budget, **inputs, **settings})

            # Prompts have the encoder of captions.
            modality = "text" if "concepts" in inputs else "image"
            return apply_method(bound, Pool(paths[pool_name], modality, select_settings), select_settings)

        return select_from

    def test_rows_ascend_with_columns(self, select: Select) -> None:
        selection = select()
        assert selection.rows.dtype == np.int64
        assert (np.diff(selection.rows) > 0).all(), "rows ascend, each once"
        for values in selection.columns.values():
            assert len(values) == len(selection.rows)

    def test_budget_is_met(self, select: Select) -> None:
        for budget in (1, 7, 40) if self.budget is not None else ():
            assert len(select(budget=budget).rows) == budget

    def test_seed(self, select: Select) -> None:
        """Check that the same seed selects the same, and another seed other samples if the method accepts one."""
        first = select(seed=3)
        second = select(seed=3)
        assert np.array_equal(first.rows, second.rows)
        assert pa.table(dict(first.columns)).equals(pa.table(dict(second.columns)))

        # A method without a budget may select everything with every seed.
        other_seed = select(seed=4)
        if self.budget is not None:
            has_seed = "seed" in named_inputs(load_method(self.name))
            assert np.array_equal(first.rows, other_seed.rows) != has_seed, "take a seed if it changes the result"

    def test_chunk_size_changes_nothing(self, select: Select) -> None:
        assert np.array_equal(select("cache").rows, select("other").rows)

    def test_selection_limits_the_pool(self, select: Select, paths: Mapping[str, Path], tmp_path: Path) -> None:
        keys = Cache(paths["cache"]).column("key").to_pylist()
        (tmp_path / "keys.txt").write_text("\n".join(keys[::2]))
        rows = select(selection=tmp_path / "keys.txt").rows
        assert (rows % 2 == 0).all(), "select from pool.samples only"
