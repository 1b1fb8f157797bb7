"""Curation in the pipeline of icons: equal numbers of pairs by several methods, and recipes trained on each.

The validation part of the first seed chooses the settings of a recipe for each budget, only on random draws. Finished
selections, runs and results are reused.
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
_MOST_CLUSTERED = 40_000  # samples for the number of clusters: k-means with more clusters would take hours


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command of `embedcache curate`: `dedup`, or a method of `select`.

    Args:
        method: name of the command or method.
        options: budget and parameters of the method. The last step of a method also gets the budget.
        everything: options that select all that the method can, instead of the budget, if that is less. None if the
            method can always fill the budget.
        draw: number that makes random seeds differ.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    everything: Mapping[str, Any] | None = None
    draw: int = 0

    @property
    def inputs(self) -> Sequence[str]:
        """Which of `concepts`, `target` and `run` the step needs."""
        if self.method == "dedup":
            return ()
        return [name for name in named_inputs(load_method(self.method)) if name in ("concepts", "target", "run")]


DRAWS: Mapping[str, Sequence[Step]] = {
    f"random, draw {draw}": [Step(method="random", draw=draw)] for draw in range(1, 4)
}
"""Random draws, over which gains are measured."""
AGAIN = "random again"
"""One more random draw, compared like a method: its gain is chance. Its closed form scores pairs for other methods."""
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
"""Method -> its steps. Each step selects from the pairs that the step before kept."""


class ComparedRun(NamedTuple):
    """A compared run: the runs of its method and seed, its recipe and budget, and the number of its choice."""

    seed_runs: SeedRuns
    recipe: str
    budget: int
    choice: int

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.seed_runs.path(self.recipe, self.budget, self.choice)


class Curation:
    """Selections and runs of all methods, in the folder `curation`.

    Args:
        data: the icons, whose concepts and target exist.
        seeds: seeds of splits, selections and trainings.
        budgets: numbers of pairs. Budgets that some training part does not exceed are left out.
        methods: methods besides random draws.
        recipes: recipes to train on each selection, a closed form first.

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
        self._data = data
        self._folder = data.folder / "curation"
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
        """Select, train and measure, except for finished steps.

        Returns:
            Recipe and budget -> number of its choice.
        """
        with_scores = [name for name, steps in self.methods.items() if any("run" in step.inputs for step in steps)]
        self._select_all([name for name in self.methods if name not in with_scores], {})

        # Only random draws choose the settings, so that no method has an advantage.
        draws = [self.runs[name][0] for name in DRAWS]
        run_parallel([step for draw in draws for step in choice_steps(draw)])
        choices = choose(draws)

        # Methods that need scores get them from the closed form of a draw that is not among those compared with.
        scorer = next(iter(draws[0].recipes))
        scorer_runs = [(runs, budget) for runs in self.runs[AGAIN] for budget in self.budgets]
        run_parallel([(runs.train, scorer, budget, choices[scorer, budget]) for runs, budget in scorer_runs])
        scorers = {}
        for runs, budget in scorer_runs:
            scorers[runs.seed, budget] = runs.path(scorer, budget, choices[scorer, budget])
        self._select_all(with_scores, scorers)

        compared = self.all_runs(choices)
        run_parallel([(run.seed_runs.train, run.recipe, run.budget, run.choice) for run in compared])
        for run in compared:
            count = read_report(run.path).num_samples["train"]
            assert count == run.budget, f"{run.seed_runs.folder}: trained on {count} pairs, not {run.budget}"

        run_parallel([(run.seed_runs.measure, run.recipe, run.budget, run.choice) for run in compared])
        return choices

    def all_runs(self, choices: Mapping[tuple[str, int], int]) -> list[ComparedRun]:
        """Return all compared runs.

        Args:
            choices: recipe and budget -> number of its settings that validation chose.
        """
        compared = []
        for method_runs in self.runs.values():
            for runs in method_runs:
                compared += [ComparedRun(runs, recipe, budget, choice) for (recipe, budget), choice in choices.items()]
        return compared

    def _select_all(self, names: Sequence[str], scorers: Mapping[tuple[int, int], Path]) -> None:
        for name in names:
            for runs in self.runs[name]:
                for budget in self.budgets:
                    self.select(name, runs.seed, budget, scorers.get((runs.seed, budget)))

    def select(self, name: str, seed: int, budget: int, scorer: Path | None = None) -> dict[str, Any]:
        """Write the pairs of a method, exactly as many as the budget.

        A method with fewer pairs is filled up at random: from the pairs that its last step chose from, then from all.

        Args:
            name: the method.
            seed: seed of the split.
            budget: number of pairs.
            scorer: run of the random draw `AGAIN` that scores pairs. Its own pairs are left out.

        Returns:
            Number of pairs that were filled up at random.
        """
        steps = self.methods[name]
        folder = self._folder / file_name(name) / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        out = selection_path(folder, budget)

        def compute() -> Mapping[str, Any]:
            """Run the steps one after another, each on the pairs that the step before kept."""
            # Earlier pools are kept, because a method that selects too few is filled up from them.
            pools = [self._pool(seed)]
            if scorer is not None:
                pools.append(self._without_scored(pools[0], seed, budget))

            for step in steps[:-1]:
                pools.append(self._filter(step, pools[-1], seed, scorer))

            rows = self._last(steps[-1], pools[-1], out, seed, budget, scorer)

            # Equal budgets compare methods only if every selection is exactly as large.
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
        """Run a step of `Data` that writes a selection, at most once in a process, and return its values."""
        if out not in self._written:
            name = str(out.relative_to(self._data.folder).with_suffix(""))
            self._written[out] = self._data.step(name, settings, compute)
        return self._written[out]

    def _settings(self, seed: int) -> dict[str, Any]:
        """Return the inputs of all selections of a seed."""
        holdout = self._data.holdout
        return {
            "split": digest_file(self._data.folder / f"split-{seed}.parquet"),
            "concepts": digest_file(self._data.folder / "concepts.txt"),
            "cosines": [holdout.image_cosine, holdout.text_cosine],
        }

    def _pool(self, seed: int) -> Path:
        """Write the training part as a selection, once, and return its path."""
        path = self._folder / "pools" / f"seed{seed}" / "train.parquet"
        split = f"split-{seed}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)

        def compute() -> Mapping[str, int]:
            rows = read_split(self._data.folder / split, [self._data.icons]).rows("train")
            write_selection(path, self._data.icons, Selection(rows=rows), {"seed": seed})
            return {"num_samples": len(rows)}

        self._step(path, self._settings(seed), compute)
        return path

    def _without_scored(self, pool: Path, seed: int, budget: int) -> Path:
        """Write a pool without the training pairs of the scoring run, which it scores higher than others."""
        out = pool.with_name(f"{budget}-unscored.parquet")
        scorer_pairs = selection_path(self.runs[AGAIN][0].folder.with_name(f"seed{seed}"), budget)
        combine_selections(self._data.icons.path, out, pool, "minus", scorer_pairs)
        return out

    def _filter(self, step: Step, pool: Path, seed: int, scorer: Path | None) -> Path:
        """Write the pairs of a pool that a step keeps, once, and return their path."""
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
        """Write the pairs of a pool that `curate dedup --selection` keeps, and return their number.

        If there are no duplicates, all are kept; the command would write nothing.
        """
        analysis = analyze(self._data.icons.path, DedupSettings(selection=pool, seed=seed), progress=open_progress())
        assert analysis.near is not None

        # Pairs below the limit of the analysis were not searched.
        cosine = max(step.options["cosine"], analysis.near.limit)
        rows = np.setdiff1d(analysis.samples, analysis.removed(cosine)["sample"])
        about = {"method": "dedup", **analysis.to_json(), "cosine": cosine}
        write_selection(out, self._data.icons, Selection(rows=rows), about)
        return {"cosine": cosine, "num_samples": len(analysis.samples), "num_kept": len(rows)}

    def _last(self, step: Step, pool: Path, out: Path, seed: int, budget: int, scorer: Path | None) -> Ints:
        """Write as many pairs of a pool as a step can select, up to the budget, and return their rows."""
        rows = read_selection(pool, [self._data.icons])
        if len(rows) <= budget:
            return rows

        # Some methods cannot fill a budget; they then select all that they can.
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

        # Clusters grow with the pool, up to a number that k-means can handle.
        if step.method in ("hierarchical", "image-based"):
            levels = default_levels(min(len(read_selection(pool, [self._data.icons])), _MOST_CLUSTERED))
            parameters["clusters"] = "+".join(map(str, levels)) if step.method == "hierarchical" else levels[0]

        options_text = ",".join(f"{name}={value}" for name, value in parameters.items())
        method = f"{step.method}:{options_text}" if options_text else step.method

        step_inputs: dict[str, Any] = {name: inputs[name] for name in step.inputs}
        settings = SelectSettings(selection=pool, seed=seed + 1000 * step.draw, budget=budget, **step_inputs)
        select(self._data.icons.path, out, method, settings, progress=open_progress())

    def _fill(self, rows: Ints, pools: Sequence[Path], budget: int, seed: int) -> Ints:
        """Add random samples of the last pool, then of earlier pools, up to the budget."""
        for pool in reversed(pools):
            rest = np.setdiff1d(read_selection(pool, [self._data.icons]), rows)
            rows = np.union1d(rows, draw_rows(rest, budget - len(rows), seed=seed))
        return rows
