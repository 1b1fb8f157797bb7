"""Encode once, align many times: cache frozen encoders, train projectors on the cached features, search and curate.

The public names are the imports below. Each is imported when it is first used, so that `import embedcache` is quick.
"""

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedcache.curate.coverage import measure_coverage, measure_coverage_by_modality
    from embedcache.curate.dedup import analyze as analyze_duplicates
    from embedcache.curate.dedup import dedup as remove_duplicates
    from embedcache.curate.leaks import find_leaks
    from embedcache.curate.map import build_map
    from embedcache.curate.negatives import mine_negatives
    from embedcache.curate.outliers import find_outliers
    from embedcache.curate.score import score as score_samples
    from embedcache.curate.select.select import select as select_samples
    from embedcache.curate.select.settings import SelectSettings
    from embedcache.curate.settings import (
        CoverageSettings,
        DedupSettings,
        LeakSettings,
        MapSettings,
        NegativesSettings,
        OutlierSettings,
        ScoreSettings,
    )
    from embedcache.dataset.settings import SplitSettings
    from embedcache.derive.derive import Derivation, derive_from_run
    from embedcache.derive.derive import derive as derive_features
    from embedcache.encoders.settings import EncoderSettings
    from embedcache.errors import EmbedcacheError
    from embedcache.evaluate.encoder_pairs import evaluate_pairs
    from embedcache.evaluate.probe import evaluate_probe
    from embedcache.evaluate.retrieval import compare_retrieval, evaluate_retrieval
    from embedcache.evaluate.settings import PairsSettings, ProbeSettings, RetrievalSettings, ZeroShotSettings
    from embedcache.evaluate.zero_shot import compare_zero_shot, evaluate_zero_shot
    from embedcache.export.export import export_run
    from embedcache.export.settings import ExportSettings
    from embedcache.extract.extract import extract as extract_features
    from embedcache.extract.plan import plan as plan_extraction
    from embedcache.extract.repair import retry_failed, verify_cache
    from embedcache.extract.settings import ExtractSettings, VerifySettings
    from embedcache.inference import Model, load
    from embedcache.interop.formats import export_vectors, open_vectors
    from embedcache.interop.importing import import_vectors
    from embedcache.interop.settings import ImportSettings, VectorExportSettings
    from embedcache.maintain.copy import cut_cache, merge_caches
    from embedcache.maintain.prune import plan_prune, prune_cache
    from embedcache.maintain.remove import plan_removal, remove_samples
    from embedcache.maintain.settings import PruneSettings, RemoveSettings
    from embedcache.search.index import build_index
    from embedcache.search.queries import Queries
    from embedcache.search.search import OpenIndex
    from embedcache.search.search import search as search_index
    from embedcache.search.settings import Filter, IndexSettings, SearchSettings
    from embedcache.sources.open import open_source
    from embedcache.sources.settings import SourceSettings
    from embedcache.sources.video import Video
    from embedcache.store.cache import Cache
    from embedcache.store.feature import Feature
    from embedcache.sweep.settings import SweepSettings
    from embedcache.sweep.sweep import sweep as sweep_projectors
    from embedcache.train.pair_dataset import PairDataset
    from embedcache.train.settings import LossSettings, MachineSettings, ModelSettings, OptimizerSettings, TrainSettings
    from embedcache.train.train import train as train_projectors

    __version__: str


__all__ = [
    "Cache",
    "CoverageSettings",
    "DedupSettings",
    "Derivation",
    "EmbedcacheError",
    "EncoderSettings",
    "ExportSettings",
    "ExtractSettings",
    "Feature",
    "Filter",
    "ImportSettings",
    "IndexSettings",
    "LeakSettings",
    "LossSettings",
    "MachineSettings",
    "MapSettings",
    "Model",
    "ModelSettings",
    "NegativesSettings",
    "OpenIndex",
    "OptimizerSettings",
    "OutlierSettings",
    "PairDataset",
    "PairsSettings",
    "ProbeSettings",
    "PruneSettings",
    "Queries",
    "RemoveSettings",
    "RetrievalSettings",
    "ScoreSettings",
    "SearchSettings",
    "SelectSettings",
    "SourceSettings",
    "SplitSettings",
    "SweepSettings",
    "TrainSettings",
    "VectorExportSettings",
    "VerifySettings",
    "Video",
    "ZeroShotSettings",
    "analyze_duplicates",
    "build_index",
    "build_map",
    "compare_retrieval",
    "compare_zero_shot",
    "cut_cache",
    "derive_features",
    "derive_from_run",
    "evaluate_pairs",
    "evaluate_probe",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "export_run",
    "export_vectors",
    "extract_features",
    "find_leaks",
    "find_outliers",
    "import_vectors",
    "load",
    "measure_coverage",
    "measure_coverage_by_modality",
    "merge_caches",
    "mine_negatives",
    "open_source",
    "open_vectors",
    "plan_extraction",
    "plan_prune",
    "plan_removal",
    "prune_cache",
    "remove_duplicates",
    "remove_samples",
    "retry_failed",
    "score_samples",
    "search_index",
    "select_samples",
    "sweep_projectors",
    "train_projectors",
    "verify_cache",
]


@cache
def _read_homes() -> dict[str, tuple[str, str]]:
    """Return public name -> (module, attribute), from the imports that type checkers read above."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {name.asname or name.name: (node.module or "", name.name) for node in imports for name in node.names}


if not TYPE_CHECKING:  # a type checker that saw this would accept any name

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version("embedcache")
        if name not in __all__:
            known = [public for public in __all__ if name.lower() in public.lower()] or __all__
            raise AttributeError(f"module 'embedcache' has no attribute {name!r}; it has {', '.join(known)}")
        module, attribute = _read_homes()[name]
        return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
