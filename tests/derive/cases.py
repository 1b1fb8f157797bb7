"""Derivations on the toy features, shared by the tests; `HALVE` and `LABEL` are rules of a user's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array
from embedcache.derive.derive import derive
from embedcache.derive.rules import Block, Derivation, Output, Rule
from embedcache.errors import ItemError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from tests.toy import IMAGE, TEXT

FEATURES = ("cls", "patches", "mean", "tokens")
CLS, PATCHES = ("image", "open_toy/cls"), ("image", "open_toy/patches")
MEAN, TOKENS = ("text", "open_toy/mean"), ("text", "open_toy/tokens")


def halve(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    """Multiply the first input by a factor, and sum all inputs: one output per purpose."""
    first = inputs[0]
    rows = zip(*(block.items() for block in inputs), strict=True)
    totals = [sum(float(item.sum(dtype=np.float64)) for item in items) for items in rows]
    return {
        "half": first.with_rows(first.rows() * parameters["factor"]),
        "total": np.array(totals, np.float32)[:, None],
    }


def label(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    """Return the largest column of each vector, and a reason for those below a threshold."""
    labels: list[Array | ItemError] = [
        np.array([row.argmax()]) if row.max() >= parameters["least"] else ItemError("too dark")
        for row in inputs[0].rows()
    ]
    return {"label": labels}


HALVE = Rule(
    name="tests.derive.cases:HALVE",
    apply=halve,
    outputs=lambda shapes, _: {"half": shapes[0], "total": (1,)},
    parameters={"factor": 0.5},
)
LABEL = Rule(
    name="tests.derive.cases:LABEL", apply=label, outputs=lambda _, __: {"label": (1,)}, parameters={"least": 0.0}
)


def halved(*inputs: tuple[str, str], factor: float = 0.5) -> Derivation:
    parameters = {"factor": factor}
    return Derivation(name="halved", inputs=inputs or (CLS,), rule=HALVE, parameters=parameters, dtype="float32")


def labels(least: float = 0.0) -> Derivation:
    return Derivation(name="labels", inputs=(CLS,), rule=LABEL, parameters={"least": least}, dtype="int16")


def derive_pca(cache: Path) -> None:
    """Fit and derive in a process of its own."""
    derive(cache, Derivation(name="pca", inputs=(PATCHES,), rule="pca", parameters={"width": 2}))


def run(source: Path, cache: Path, **settings: Any) -> None:
    """Extract all toy features in chunks of 8."""
    chosen = ExtractSettings(**{"features": FEATURES, "chunk_size": 8, **settings})
    extract(open_source(source), cache, image_encoder=[IMAGE], text_encoder=[TEXT], settings=chosen)
