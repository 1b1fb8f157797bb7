"""Does it work at scale? Some 350,000 icons of Iconify with their names: curated, aligned, and tested on the unseen.

    npm install @iconify/json
    python -m pipelines.icons work/ --limit 5000            # minutes on 2 cores
    python -m pipelines.icons work/                         # all that allow use: hours; a second call goes on
    python -m pipelines.icons work/ --icons package/ --seeds 0
    python -m pipelines.icons work/ --curve                 # recipes on 1,000 pairs, 3,000, … and all: more hours
    python -m pipelines.icons work/ --curation              # methods that select 3,000 pairs, 10,000 and 30,000: hours
    python -m pipelines.icons work/ --ablation              # batch, temperature and width on 100,000 pairs: hours
    python -m pipelines.icons work/ --features              # tokens and other encoders on 100,000 pairs: hours

Icons are extracted, compared for duplicates and with OpenMoji, and counted by the names that many families share. Whole
families are held out. The rest is split strictly, once per seed: training drops icons that are near the test part. A
closed form, an `mlp` that starts from it, and a control of shuffled pairs are measured on new names, on new families,
on OpenMoji's strict test, and on Fashion-MNIST if it is installed.

With `--curve`, more recipes are measured on more and more pairs, with settings that validation chooses. With
`--curation`, two recipes are measured on as many pairs as each method of `embedcache curate` selects, and on random
draws. With `--ablation`, one setting of a recipe changes at a time. With `--features`, more features are extracted for
a cut of the icons, and tokens and pairs of encoders are compared with the first seed.

Each number of icons has a folder with a page and a JSON file of each step, splits and runs. The report and the last
four studies write `NAME.json`, `NAME.html`, and `NAME.md` with its figures. A step is skipped if its output exists for
the same icons and settings. A larger `--limit` appends icons.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from embedcache.cli.console import print_table, run_program
from embedcache.processes import Precision
from embedcache.reports.render import Table, format_percent
from pipelines.icons.ablation import NUM_PAIRS, run_ablation
from pipelines.icons.curation import BUDGETS
from pipelines.icons.curation_page import run_curation
from pipelines.icons.curve import RECIPES, SIZES, Recipe, in_precision
from pipelines.icons.curve_page import run_curve
from pipelines.icons.features import run_features
from pipelines.icons.steps import PACKAGE, Data

BASE: Mapping[str, Recipe] = {name: RECIPES[name] for name in ("CCA", "mlp", "CCA of shuffled pairs")}
"""Recipes without other options: a closed form, `mlp` starting from it, and the control."""


def run(data: Data, seeds: Sequence[int], recipes: Mapping[str, Recipe] = BASE) -> dict[str, Any]:
    """Run all steps on all icons, and return the results as JSON values."""
    data.prepare()
    data.report_duplicates()
    data.measure_coverage()
    splits = {seed: data.split(seed) for seed in seeds}
    print_table(*split_table(splits), title="icons of each part")
    return run_curve(data, seeds, [], recipes, name="report")


def split_table(counts: Mapping[int, Mapping[str, int]]) -> Table:
    """Return the number of icons in each part of the split of each seed, and outside all parts."""
    names = list(next(iter(counts.values())))
    rows = []
    for seed, parts in counts.items():
        total = max(1, sum(parts.values()))
        rows.append([str(seed), *(f"{count:,} ({format_percent(count / total)})" for count in parts.values())])
    return ["seed", *names], rows


def main() -> None:
    """Run the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="folder for caches, runs and pages; existing results are reused")
    parser.add_argument("--icons", type=Path, default=PACKAGE, help=f"folder of the npm package; default: {PACKAGE}")
    parser.add_argument("--limit", type=int, help="number of icons; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    help_text = "measure learning curves instead, on these numbers of pairs; default: 1,000 to 100,000, and all"
    parser.add_argument("--curve", type=int, nargs="*", metavar="PAIRS", help=help_text)
    parser.add_argument("--without", action="append", default=[], choices=RECIPES, help="omit a recipe of the curves")
    parser.add_argument("--precision", choices=get_args(Precision), help="precision in which the curves' runs train")
    help_text = "compare methods of curation instead, which select so many pairs; default: 3,000, 10,000 and 30,000"
    parser.add_argument("--curation", type=int, nargs="*", metavar="BUDGET", help=help_text)
    help_text = "change one setting at a time instead, on so many pairs; default: 100,000"
    parser.add_argument("--ablation", type=int, nargs="?", const=NUM_PAIRS, metavar="PAIRS", help=help_text)
    help_text = "compare other features instead, on so many pairs; default: 100,000"
    parser.add_argument("--features", type=int, nargs="?", const=NUM_PAIRS, metavar="PAIRS", help=help_text)
    options = parser.parse_args()

    # Without a study, the three recipes of the report run on all icons.
    data = Data(options.workdir, options.icons, options.limit)
    if options.curve is options.curation is options.ablation is options.features is None:
        run(data, options.seeds)
        return

    data.prepare()
    if options.curve is not None:
        recipes = {name: recipe for name, recipe in RECIPES.items() if name not in options.without}
        recipes = in_precision(recipes, options.precision) if options.precision else recipes
        run_curve(data, options.seeds, options.curve or SIZES, recipes)
    if options.curation is not None:
        run_curation(data, options.seeds, options.curation or BUDGETS)
    if options.ablation is not None:
        run_ablation(data, options.seeds, options.ablation)
    if options.features is not None:
        run_features(data, options.seeds[0], options.features)


if __name__ == "__main__":
    run_program(main)
