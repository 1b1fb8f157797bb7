"""What every method of selection keeps to."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from embedcache.curate.select.pool import Pool
from embedcache.curate.select.select import SELECTORS, Selector, SelectSettings, check_settings
from embedcache.dataset.selections import Selection
from embedcache.errors import SettingError


class SelectorContract:
    """Subclass it with the method's name, and what it needs besides a budget.

    The fixture `pool` makes a pool of the three hundred pictures, `other` one of the same in chunks of another size.
    """

    name: str
    settings: ClassVar[dict[str, Any]] = {}
    budget: int | None = 40

    @pytest.fixture
    def selector(self) -> Selector:
        selector: Selector = SELECTORS.load(self.name)()
        return selector

    def asked(self, **others: Any) -> SelectSettings:
        return SelectSettings(**{"budget": self.budget, **self.settings, **others})

    def select(self, selector: Selector, pools: Any, which: str = "cache", **others: Any) -> Selection:
        within = others.pop("within", None)
        pool: Pool = pools(which, selector, within=within)
        return selector.select(pool, self.asked(**others))

    def test_it_takes_these_settings(self, selector: Selector) -> None:
        check_settings(self.name, selector, self.asked())

    def test_each_sample_is_selected_once_in_order_with_a_reason(self, selector: Selector, pools: Any) -> None:
        found = self.select(selector, pools)
        assert found.rows.dtype == np.int64
        assert (np.diff(found.rows) > 0).all()
        assert len(found.reasons) == len(found.rows)
        assert all(reason.strip() for reason in found.reasons)

    def test_the_budget_is_met(self, selector: Selector, pools: Any) -> None:
        if self.budget is None:
            return
        for budget in (1, 7, 40):
            assert len(self.select(selector, pools, budget=budget).rows) == budget

    def test_the_same_seed_selects_the_same_and_another_another(self, selector: Selector, pools: Any) -> None:
        first, again, other = (self.select(selector, pools, seed=seed) for seed in (3, 3, 4))
        assert np.array_equal(first.rows, again.rows)
        assert list(first.reasons) == list(again.reasons)
        if self.budget is not None:
            assert np.array_equal(first.rows, other.rows) != selector.uses_seed

    def test_chunks_of_another_size_select_the_same(self, selector: Selector, pools: Any) -> None:
        rows, other = (self.select(selector, pools, which).rows for which in ("cache", "other"))
        assert np.array_equal(rows, other)

    def test_only_what_it_may_select_is_selected(self, selector: Selector, pools: Any, tmp_path: Path) -> None:
        keys = [f"{number:05d}" for number in range(0, 300, 2)]
        pool: Pool = pools("cache", selector)
        known = pool.cache.samples["key"].to_pylist()
        inside = [key for key in known if Path(key).stem in keys]
        (tmp_path / "keys.txt").write_text("\n".join(inside))
        rows = self.select(selector, pools, within=tmp_path / "keys.txt").rows
        assert {known[row] for row in rows.tolist()} <= set(inside)

    def test_a_setting_that_it_does_not_look_at_is_refused(self, selector: Selector) -> None:
        every = {"budget": 3, "per_concept": 2, "threshold": 0.5, "head": 2.0, "clusters": (3,), "drawn": 9}
        for name in every.keys() - set(selector.accepts):
            with pytest.raises(SettingError, match=f"--method {self.name} does not look at --{name.replace('_', '-')}"):
                check_settings(self.name, selector, SelectSettings(**{name: every[name]}))
