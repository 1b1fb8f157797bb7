"""python -m benchmarks [--quick] [name …]

`--quick` takes a tenth of the data and one run: to see that a benchmark works, not to compare.
"""

import importlib
import sys

NAMES = ("help", "gather", "extract", "index", "decode", "train", "evaluate", "search", "coverage", "dedup", "serve")
PARTS = ("images", "texts", "peers", "precision", "thresholds")
"""Of `extract` and `coverage`, to be run alone."""


def main() -> None:
    """Run those that are named, or all."""
    quick = "--quick" in sys.argv
    for name in [word for word in sys.argv[1:] if word != "--quick"] or NAMES:
        if name not in (*NAMES, *PARTS):
            sys.exit(f"unknown benchmark {name!r}; known: {', '.join((*NAMES, *PARTS))}")
        importlib.import_module(f"benchmarks.{name}").main(quick=quick)


if __name__ == "__main__":
    main()
