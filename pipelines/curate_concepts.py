"""Is choosing worth it? Ways to select from a noisy pool, at equal budgets, by what training on them reaches.

    python -m pip install "embedcache[cpu,demo,clip-benchmark]"
    python -m pipelines.curate_concepts work/

Writes docs/benchmarks/curation.md and .svg. What is in the folder already is used again.
"""

import argparse
from pathlib import Path
from typing import Any

from embedcache.cache.cache import Cache
from embedcache.cache.split import read_split, spread_split, swap_parts, write_split
from embedcache.cli.console import open_progress, say
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.select import select, write_keys
from embedcache.evaluate.comparison import Method, write_comparison
from embedcache.evaluate.report import format_estimate
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.evaluate.zero_shot import evaluate_zero_shot
from embedcache.extract.extract import extract
from embedcache.projectors.saved import split_path
from embedcache.sources import open_source
from embedcache.train.data import open_data
from embedcache.train.options import settings_of
from embedcache.train.train import train_on

IMAGE, TEXT = "lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"
SOURCES = {"clean": "openmoji:en", "pool": "pairs:openmoji:en+de+ar+zh"}
SEEDS, BUDGETS = (0, 1, 2, 3, 4), (300, 600, 1200)
CLOSED = {"projector": "linear", "start": "cca", "epochs": 0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "top-score": ("top-score", {}),
    "CLIP-score": ("clip-score", {}),
    "rare first (the paper's)": ("rare-first", {}),
    "MetaCLIP": ("metaclip", {"threshold": 0.4}),
    "hierarchical k-means": ("hierarchical", {"clusters": (100, 10)}),
}
