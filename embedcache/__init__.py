"""Encode once, align many times: cache frozen encoders, train projectors on the cached features, search and curate.

The public names are the imports below. Each is imported when it is first used, so that `import embedcache` is quick.
"""

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedcache.curate.coverage import measure_coverage as measure_coverage
    from embedcache.curate.coverage import measure_coverage_by_modality as measure_coverage_by_modality
    from embedcache.curate.dedup import analyze as analyze_duplicates
    from embedcache.curate.dedup import dedup as remove_duplicates
    from embedcache.curate.leaks import find_leaks as find_leaks
    from embedcache.curate.map import build_map as build_map
    from embedcache.curate.negatives import mine_negatives as mine_negatives
    from embedcache.curate.outliers import find_outliers as find_outliers
    from embedcache.curate.score import score as score_samples
    from embedcache.curate.select.select import combine_selections as combine_selections
    from embedcache.curate.select.select import select as select_samples
    from embedcache.curate.settings import CoverageSettings as CoverageSettings
    from embedcache.curate.settings import DedupSettings as DedupSettings
    from embedcache.curate.settings import LeakSettings as LeakSettings
    from embedcache.curate.settings import MapSettings as MapSettings
    from embedcache.curate.settings import NegativesSettings as NegativesSettings
    from embedcache.curate.settings import OutlierSettings as OutlierSettings
    from embedcache.curate.settings import ScoreSettings as ScoreSettings
    from embedcache.curate.settings import SelectSettings as SelectSettings
    from embedcache.dataset.settings import SplitSettings as SplitSettings
    from embedcache.derive.derive import derive as derive_features
    from embedcache.derive.derive import derive_from_run as derive_from_run
    from embedcache.derive.rules import Derivation as Derivation
    from embedcache.encoders.base import EncoderSettings as EncoderSettings
    from embedcache.errors import EmbedcacheError as EmbedcacheError
    from embedcache.evaluate.adapter import evaluate_adapter as evaluate_adapter
    from embedcache.evaluate.encoder_pairs import evaluate_pairs as evaluate_pairs
    from embedcache.evaluate.probe import evaluate_probe as evaluate_probe
    from embedcache.evaluate.retrieval import compare_retrieval as compare_retrieval
    from embedcache.evaluate.retrieval import evaluate_retrieval as evaluate_retrieval
    from embedcache.evaluate.settings import AdapterEvalSettings as AdapterEvalSettings
    from embedcache.evaluate.settings import PairsSettings as PairsSettings
    from embedcache.evaluate.settings import ProbeSettings as ProbeSettings
    from embedcache.evaluate.settings import RetrievalSettings as RetrievalSettings
    from embedcache.evaluate.settings import ZeroShotSettings as ZeroShotSettings
    from embedcache.evaluate.zero_shot import compare_zero_shot as compare_zero_shot
    from embedcache.evaluate.zero_shot import evaluate_zero_shot as evaluate_zero_shot
    from embedcache.export.export import export_run as export_run
    from embedcache.export.settings import ExportSettings as ExportSettings
    from embedcache.extract.extract import extract as extract_features
    from embedcache.extract.extract import plan as plan_extraction
    from embedcache.extract.extract import retry_failed as retry_failed
    from embedcache.extract.repair import verify_cache as verify_cache
    from embedcache.extract.settings import ExtractSettings as ExtractSettings
    from embedcache.extract.settings import VerifySettings as VerifySettings
    from embedcache.inference import Model as Model
    from embedcache.inference import load as load
    from embedcache.maintain.copy import cut_cache as cut_cache
    from embedcache.maintain.copy import merge_caches as merge_caches
    from embedcache.maintain.prune import plan_prune as plan_prune
    from embedcache.maintain.prune import prune_cache as prune_cache
    from embedcache.maintain.remove import plan_removal as plan_removal
    from embedcache.maintain.remove import remove_samples as remove_samples
    from embedcache.maintain.settings import PruneSettings as PruneSettings
    from embedcache.maintain.settings import RemoveSettings as RemoveSettings
    from embedcache.search.index import build_index as build_index
    from embedcache.search.queries import Queries as Queries
    from embedcache.search.search import OpenIndex as OpenIndex
    from embedcache.search.search import search as search_index
    from embedcache.search.settings import Filter as Filter
    from embedcache.search.settings import IndexSettings as IndexSettings
    from embedcache.search.settings import SearchSettings as SearchSettings
    from embedcache.sources.media import Video as Video
    from embedcache.sources.open import SourceSettings as SourceSettings
    from embedcache.sources.open import open_source as open_source
    from embedcache.store.cache import Cache as Cache
    from embedcache.store.feature import Feature as Feature
    from embedcache.sweep.settings import SweepSettings as SweepSettings
    from embedcache.sweep.sweep import sweep as sweep_projectors
    from embedcache.train.adapter import fit_adapter as fit_adapter
    from embedcache.train.pair_dataset import PairDataset as PairDataset
    from embedcache.train.settings import AdapterSettings as AdapterSettings
    from embedcache.train.settings import LossSettings as LossSettings
    from embedcache.train.settings import MachineSettings as MachineSettings
    from embedcache.train.settings import ModelSettings as ModelSettings
    from embedcache.train.settings import OptimizerSettings as OptimizerSettings
    from embedcache.train.settings import TrainSettings as TrainSettings
    from embedcache.train.train import train as train_projectors
    from embedcache.vectors.exporting import export_vectors as export_vectors
    from embedcache.vectors.importing import import_vectors as import_vectors
    from embedcache.vectors.opening import open_vectors as open_vectors
    from embedcache.vectors.settings import ImportSettings as ImportSettings
    from embedcache.vectors.settings import VectorExportSettings as VectorExportSettings

    __version__: str
    # Type checkers export a name that differs from the imported one only if it is listed.
    __all__ = [
        "analyze_duplicates",
        "derive_features",
        "extract_features",
        "plan_extraction",
        "remove_duplicates",
        "score_samples",
        "search_index",
        "select_samples",
        "sweep_projectors",
        "train_projectors",
    ]


@cache
def _read_homes() -> dict[str, tuple[str, str]]:
    """Return public name -> (module, attribute), from the imports that type checkers read above."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))

    # One list of names serves type checkers and the imports on first use.
    homes: dict[str, tuple[str, str]] = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            [name] = node.names
            homes[name.asname or name.name] = (node.module or "", name.name)
    return homes


# A type checker that saw `__getattr__` would accept any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version("embedcache")
        homes = _read_homes()
        public = sorted(homes)
        if name == "__all__":
            return public
        if name not in homes:
            similar_names = [other for other in public if name.lower() in other.lower()]
            listed = ", ".join(similar_names or public)
            raise AttributeError(f"module 'embedcache' has no attribute {name!r}; it has {listed}")

        module, attribute = homes[name]
        return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_read_homes(), "__version__"})
