"""Run benchmarks: python -m benchmarks [--quick] [NAME …]

`--quick` uses a tenth of the data and one run, to check that a benchmark works rather than to compare.
"""

import importlib
import sys
from collections.abc import Callable

NAMES = (
    "help",
    "gather",
    "extract",
    "index",
    "decode",
    "train",
    "speech",
    "likelihood-training",
    "evaluate",
    "search",
    "coverage",
    "dedup",
    "serve",
    "object-store",
)
PARTS = {
    "object-store": "object_store:main",
    "images": "extract:images",
    "texts": "extract:texts",
    "peers": "extract:peers",
    "precision": "extract:precision",
    "thresholds": "thresholds:main",
    "likelihood-training": "likelihood_training:main",
    "serve-load": "serve:under_load",
    "speech-training": "speech_training:main",
    "speech-decoding": "speech:decoding",
}
"""Parts of `extract`, `coverage`, `serve` and `speech` that can be run alone, and names other than their module."""


def load(name: str) -> Callable[..., None]:
    """Return the function that runs a benchmark."""
    module, _, function = PARTS.get(name, f"{name}:main").partition(":")
    benchmark: Callable[..., None] = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    return benchmark


def main() -> None:
    """Run the named benchmarks, or all of them."""
    names = [word for word in sys.argv[1:] if word != "--quick"] or NAMES
    for name in names:
        if name not in (*NAMES, *PARTS):
            sys.exit(f"unknown benchmark {name!r}; known: {', '.join((*NAMES, *PARTS))}")
        load(name)(quick="--quick" in sys.argv)


if __name__ == "__main__":
    main()
