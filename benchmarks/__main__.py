"""Run benchmarks: python -m benchmarks [--quick] [NAME …]

`--quick` uses a tenth of the data and one run, to check that a benchmark works rather than to compare. `scale` takes
hours and 60 GB of disk and runs only if it is named; `--pairs N,N` gives other numbers of pairs, `--key-length N`
longer keys, `--folder` where its data are made, `--commands NAME,NAME` the beginnings of the names of the commands that
are run.
"""

import argparse
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
    "evaluate",
    "search",
    "coverage",
    "dedup",
    "copies",
    "serve",
    "object-store",
)
PARTS = {
    "object-store": "object_store:main",
    "images": "extract:images",
    "texts": "extract:texts",
    "peers": "extract:peers",
    "precision": "extract:precision",
    "training-steps": "train:steps",
    "serve-load": "serve:under_load",
    "serve-map": "serve:draw_map",
    "speech-training": "speech_training:main",
    "speech-decoding": "speech:decoding",
    "scale": "scale:main",
}
"""Parts of other benchmarks that can be run alone, names other than their module, and `scale`, which runs only if it is
named."""


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
    parser.add_argument("--key-length", type=int)
    parser.add_argument("--folder")
    parser.add_argument("--commands", type=lambda text: text.split(","))
    options = parser.parse_args()
    for name in options.names or NAMES:
        if name not in (*NAMES, *PARTS):
            sys.exit(f"unknown benchmark {name!r}; known: {', '.join((*NAMES, *PARTS))}")
        given = {
            key: value for key in ("pairs", "key_length", "folder", "commands") if (value := getattr(options, key))
        }
        load(name)(quick=options.quick, **given)


if __name__ == "__main__":
    main()
