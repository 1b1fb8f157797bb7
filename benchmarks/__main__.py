"""Run benchmarks: python -m benchmarks [--quick] [NAME …]

`--quick` uses a tenth of the data and one run, to check that a benchmark works rather than to compare. `scale` takes
hours and 60 GB of disk and runs only if it is named; `--pairs N,N` gives other numbers of pairs, `--folder` where its
data are made, `--commands NAME,NAME` the beginnings of the names of the commands that are run.
"""

import argparse
import importlib
import sys
from collections.abc import Callable

NAMES = ("micro", "extract", "train", "search", "coverage", "dedup", "serve")
PARTS = {
    **{name: f"extract:{name}" for name in ("images", "texts", "peers")},
    **{name: f"micro:{name}" for name in ("start", "gather", "indexing", "evaluate")},
    "scale": "scale:main",
}
"""Parts of other benchmarks that can be run alone, and `scale`, which runs only if it is named."""


def load(name: str) -> Callable[..., None]:
    """Return the function that runs a benchmark."""
    module, _, function = PARTS.get(name, f"{name}:main").partition(":")
    benchmark: Callable[..., None] = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    return benchmark


def main() -> None:
    """Run the named benchmarks, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--folder")
    parser.add_argument("--commands", type=lambda text: tuple(text.split(",")))
    options = parser.parse_args()
    given = {key: value for key in ("pairs", "folder", "commands") if (value := getattr(options, key))}
    for name in options.names or NAMES:
        if name not in (*NAMES, *PARTS):
            sys.exit(f"unknown benchmark {name!r}; known: {', '.join((*NAMES, *PARTS))}")
        load(name)(quick=options.quick, **given)


if __name__ == "__main__":
    main()
