"""Curation in the pipeline of icons: equal numbers of pairs by several methods, and recipes trained on each.

The settings of a recipe for a budget are chosen by the validation part of the first seed, on random draws alone.
Finished selections, runs and results are reused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedcache.arrays import Ints
from embedcache.cli.console import open_progress, print_line
from embedcache.curate.dedup import analyze
from embedcache.curate.select.methods import default_levels, draw_rows
from embedcache.curate.select.select import combine_selections, load_method, named_inputs, select
from embedcache.curate.settings import DedupSettings, SelectSettings
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError
from embedcache.provenance import digest_file
from embedcache.runs import Run
from pipelines.icons.curve import (
    RECIPES,
    Recipe,
    SeedRuns,
    choice_steps,
    choose,
    list_tests,
    read_report,
    selection_path,
)
from pipelines.icons.steps import Data, Holdout
from pipelines.parallel import run_parallel
from pipelines.results import file_name

BUDGETS = (3_000, 10_000, 30_000)
TAUGHT: Mapping[str, Recipe] = {name: RECIPES[name] for name in ("CCA", "mlp")}
"""A closed form and a trained recipe, with which all selections are compared."""
_MOST_CLUSTERED = 40_000  # samples that clusters are counted for: k-means of more clusters would take hours


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command of `embedcache curate`: `dedup`, or a method of `select`.

    Args:
        method: its name.
        options: budget and parameters of the method; the last step of a method has the budget besides.
        everything: options in place of the budget by which it selects all that it can, where that is less; None if it
            can always select as many.
        draw: number that makes random seeds differ.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    everything: Mapping[str, Any] | None = None
    draw: int = 0

    @property
    def inputs(self) -> Sequence[str]:
        """What it needs of `concepts`, `target` and `run`."""
        if self.method == "dedup":
            return ()
        return [name for name in named_inputs(load_method(self.method)) if name in ("concepts", "target", "run")]


DRAWS: Mapping[str, Sequence[Step]] = {
    f"random, draw {draw}": [Step(method="random", draw=draw)] for draw in range(1, 4)
}
"""Random draws; what is gained is gained over them."""
AGAIN = "random again"
"""One more random draw, compared like a method: what it gains is chance. Its closed form computes scores for others."""
_DEDUP = Step(method="dedup", options={"cosine": 0.9})
_RANDOM = Step(method="random")
_EVERY_MATCH = {"head": 2.0**31}
_WORDS = Step(method="metaclip", everything=_EVERY_MATCH)
_BALANCED = Step(method="metaclip", options={"threshold": Holdout().text_cosine}, everything=_EVERY_MATCH)
_HIERARCHICAL = Step(method="hierarchical")
METHODS: Mapping[str, Sequence[Step]] = {
    "dedup + random": [_DEDUP, _RANDOM],
    "concept-balanced": [_BALANCED],
    "metaclip": [_WORDS],
    "rare-first": [Step(method="rare-first")],
    "dedup + balanced": [_DEDUP, _BALANCED],
    "hierarchical": [_HIERARCHICAL],
    "clip-score": [Step(method="clip-score")],
    "image-based": [Step(method="image-based", everything={})],
    "dedup + hierarchical": [_DEDUP, _HIERARCHICAL],
    "clip-score half + balanced": [Step(method="clip-score", options={"budget": 0.5}), _BALANCED],
}
"""Method -> its steps, each within what the step before has left."""


class ComparedRun(NamedTuple):
    """A run that is compared: the runs of its method and seed, its recipe and budget, and the number of its choice."""

    of_seed: SeedRuns
    recipe: str
    budget: int
    choice: int

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.of_seed.path(self.recipe, self.budget, self.choice)


class Curation:
    """Selections and runs of all methods, in the folder `curation`.

    Args:
        data: the icons, whose concepts and target exist.
        seeds: seeds of splits, selections and trainings.
        budgets: numbers of pairs; those that not every training part exceeds are left out.
        methods: methods beside random draws.
        recipes: what is trained on each selection, a closed form first.

    Raises:
        DataError: no training part exceeds any budget.
    """

    def __init__(
        self,
        data: Data,
        seeds: Sequence[int],
        budgets: Sequence[int],
        methods: Mapping[str, Sequence[Step]] = METHODS,
        recipes: Mapping[str, Recipe] = TAUGHT,
    ) -> None:
        self._data, self._folder = data, data.folder / "curation"
        self._written: dict[Path, dict[str, Any]] = {}
        smallest = min(data.split(seed)["train"] for seed in seeds)
        self.budgets = [budget for budget in sorted(set(budgets)) if budget < smallest]
        if not self.budgets:
            raise DataError(f"budgets: expected one below {smallest:,}, the pairs of a training part, got {budgets}")
        self.methods = {**DRAWS, AGAIN: [Step(method="random", draw=len(DRAWS) + 1)], **methods}
        self.runs = {name: [self._open_runs(name, seed, recipes) for seed in seeds] for name in self.methods}

    def _open_runs(self, name: str, seed: int, recipes: Mapping[str, Recipe]) -> SeedRuns:
        return SeedRuns(
            folder=self._folder / file_name(name) / f"seed{seed}",
            icons=self._data.icons.path,
            tests=list_tests(self._data),
            split=f"{self._data.folder}/split-{{seed}}.parquet",
            num_pairs={budget: budget for budget in self.budgets},
            seed=seed,
            recipes=recipes,
        )

    def run_all(self) -> dict[tuple[str, int], int]:
        """Select, train and measure, but for what is finished.

        Returns:
            Recipe and budget -> number of its choice.
        """
        with_scores = [name for name, steps in self.methods.items() if any("run" in step.inputs for step in steps)]
        self._select_all([name for name in self.methods if name not in with_scores], {})
        first = [self.runs[name][0] for name in DRAWS]
        run_parallel([step for draw in first for step in choice_steps(draw)])
        chosen = choose(first)
        scorer = next(iter(first[0].recipes))
        asked = [(runs, budget) for runs in self.runs[AGAIN] for budget in self.budgets]
        run_parallel([(runs.train, scorer, budget, chosen[scorer, budget]) for runs, budget in asked])
        scorers = {(runs.seed, size): runs.path(scorer, size, chosen[scorer, size]) for runs, size in asked}
        self._select_all(with_scores, scorers)
        every = self.all_runs(chosen)
        run_parallel([(run.of_seed.train, run.recipe, run.budget, run.choice) for run in every])
        for run in every:
            count = read_report(run.path).num_samples["train"]
            assert count == run.budget, f"{run.of_seed.folder}: trained on {count} pairs, not {run.budget}"
        run_parallel([(run.of_seed.measure, run.recipe, run.budget, run.choice) for run in every])
        return chosen

    def all_runs(self, chosen: Mapping[tuple[str, int], int]) -> list[ComparedRun]:
        """Return all runs that are compared.

        Args:
            chosen: recipe and budget -> number of its settings that validation chose.
        """
        return [
            ComparedRun(runs, recipe, budget, choice)
            for of_method in self.runs.values()
            for runs in of_method
            for (recipe, budget), choice in chosen.items()
        ]

    def _select_all(self, names: Sequence[str], scorers: Mapping[tuple[int, int], Path]) -> None:
        for name in names:
            for runs in self.runs[name]:
                for budget in self.budgets:
                    self.select(name, runs.seed, budget, scorers.get((runs.seed, budget)))

    def select(self, name: str, seed: int, budget: int, scorer: Path | None = None) -> dict[str, Any]:
        """Write the pairs of a method, exactly as many as the budget.

        Where a method has fewer, pairs are drawn at random of those that its last step chose from, then of all.

        Args:
            name: the method.
            seed: seed of the split.
            budget: number of pairs.
            scorer: run by which pairs are scored, of the random draw `AGAIN`, whose pairs are then left out.

        Returns:
            Number of pairs drawn at random where the method had fewer.
        """
        folder, steps = self._folder / file_name(name) / f"seed{seed}", self.methods[name]
        folder.mkdir(parents=True, exist_ok=True)
        out = selection_path(folder, budget)

        def compute() -> Mapping[str, Any]:
            """Run the steps one after another, each on the pairs that the one before kept."""
            pools = [self._pool(seed)]
            if scorer is not None:
                pools.append(self._without_scored(pools[0], seed, budget))
            for step in steps[:-1]:
                pools.append(self._filter(step, pools[-1], seed, scorer))
            rows = self._last(steps[-1], pools[-1], out, seed, budget, scorer)
            num_filled = budget - len(rows)
            if num_filled:
                rows = self._fill(rows, pools, budget, seed)
                write_selection(out, self._data.icons, Selection(rows=rows), {"method": name})
            print_line(f"{name}, seed {seed}: {budget:,} pairs, {num_filled:,} of them at random")
            return {"num_filled": num_filled}

        settings = {**self._settings(seed), "steps": [repr(step) for step in steps], "budget": budget}
        if scorer is not None:
            settings["scorer"] = Run.open(scorer).info.weights
        return self._step(out, settings, compute)

    def _step(self, out: Path, settings: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the values of the step that writes a selection, `Data.step`, once in a process."""
        if out not in self._written:
            name = str(out.relative_to(self._data.folder).with_suffix(""))
            self._written[out] = self._data.step(name, settings, compute)
        return self._written[out]

    def _settings(self, seed: int) -> dict[str, Any]:
        """Return what all selections of a seed depend on."""
        holdout = self._data.holdout
        return {
            "split": digest_file(self._data.folder / f"split-{seed}.parquet"),
            "concepts": digest_file(self._data.folder / "concepts.txt"),
            "cosines": [holdout.image_cosine, holdout.text_cosine],
        }

    def _pool(self, seed: int) -> Path:
        """Write the training part as a selection, once; return its path."""
        path, split = self._folder / "pools" / f"seed{seed}" / "train.parquet", f"split-{seed}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)

        def compute() -> Mapping[str, int]:
            rows = read_split(self._data.folder / split, [self._data.icons]).rows("train")
            write_selection(path, self._data.icons, Selection(rows=rows), {"seed": seed})
            return {"num_samples": len(rows)}

        self._step(path, self._settings(seed), compute)
        return path

    def _without_scored(self, pool: Path, seed: int, budget: int) -> Path:
        """Write the pairs that the run which computes scores was not trained on, whose own pairs score higher."""
        out = pool.with_name(f"{budget}-unscored.parquet")
        own = selection_path(self.runs[AGAIN][0].folder.with_name(f"seed{seed}"), budget)
        combine_selections(self._data.icons.path, out, pool, "minus", own)
        return out

    def _filter(self, step: Step, pool: Path, seed: int, scorer: Path | None) -> Path:
        """Write what a step leaves of a pool, once; return its path."""
        out = pool.with_name(f"{pool.stem}-{step.method}.parquet")

        def compute() -> Mapping[str, Any]:
            if step.method == "dedup":
                return self._dedup(step, pool, out, seed)
            self._select(step, pool, out, seed, scorer)
            return {}

        settings = {**self._settings(seed), "step": repr(step), "pool": digest_file(pool)}
        self._step(out, settings, compute)
        return out

    def _dedup(self, step: Step, pool: Path, out: Path, seed: int) -> dict[str, Any]:
        """Write what `curate dedup --selection` keeps of a pool; return how many these are.

        Unlike the command, which would write nothing, it keeps all if there are no duplicates.
        """
        analysis = analyze(self._data.icons.path, DedupSettings(selection=pool, seed=seed), progress=open_progress())
        assert analysis.near is not None
        cosine = max(step.options["cosine"], analysis.near.limit)
        kept = np.setdiff1d(analysis.samples, analysis.removed(cosine)["sample"])
        about = {"method": "dedup", **analysis.to_json(), "cosine": cosine}
        write_selection(out, self._data.icons, Selection(rows=kept), about)
        return {"cosine": cosine, "num_samples": len(analysis.samples), "num_kept": len(kept)}

    def _last(self, step: Step, pool: Path, out: Path, seed: int, budget: int, scorer: Path | None) -> Ints:
        """Write as many of a pool as a step can select, but not more than the budget; return their rows."""
        rows = read_selection(pool, [self._data.icons])
        if len(rows) <= budget:
            return rows
        try:
            self._select(step, pool, out, seed, scorer, budget=budget)
        except DataError:
            if step.everything is None:
                raise
            self._select(step, pool, out, seed, scorer, **step.everything)
        return read_selection(out, [self._data.icons])

    def _select(self, step: Step, pool: Path, out: Path, seed: int, scorer: Path | None, **options: Any) -> None:
        folder = self._data.folder
        inputs = {"concepts": folder / "concepts", "target": folder / "target", "run": scorer}
        parameters = {**step.options, **options}
        budget = parameters.pop("budget", None)
        if step.method in ("hierarchical", "image-based"):
            levels = default_levels(min(len(read_selection(pool, [self._data.icons])), _MOST_CLUSTERED))
            parameters["clusters"] = "+".join(map(str, levels)) if step.method == "hierarchical" else levels[0]
        named = ",".join(f"{name}={value}" for name, value in parameters.items())
        method = f"{step.method}:{named}" if named else step.method

        needed: dict[str, Any] = {name: inputs[name] for name in step.inputs}
        settings = SelectSettings(selection=pool, seed=seed + 1000 * step.draw, budget=budget, **needed)
        select(self._data.icons.path, out, method, settings, progress=open_progress())

    def _fill(self, rows: Ints, pools: Sequence[Path], budget: int, seed: int) -> Ints:
        """Add random samples of the last pool, then of those before it, until there are as many as the budget."""
        for pool in reversed(pools):
            others = np.setdiff1d(read_selection(pool, [self._data.icons]), rows)
            rows = np.union1d(rows, draw_rows(others, budget - len(rows), seed=seed))
        return rows
