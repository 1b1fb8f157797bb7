"""Encode once, align for ever: cache frozen encoders, train projectors on the cached features, search and curate.

Each name below is imported when it is first used, so that `import embedcache` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedcache.curate.coverage import CoverageSettings, measure_coverage
    from embedcache.curate.dedup import DedupSettings
    from embedcache.curate.dedup import dedup as remove_duplicates
    from embedcache.curate.leaks import find_leaks
    from embedcache.curate.select.select import SelectSettings
    from embedcache.curate.select.select import select as select_samples
    from embedcache.dataset.settings import SplitSettings
    from embedcache.encoders.settings import EncoderSettings
    from embedcache.errors import EmbedcacheError
    from embedcache.evaluate.retrieval import evaluate_retrieval
    from embedcache.evaluate.zero_shot import evaluate_zero_shot
    from embedcache.extract.extract import extract as extract_features
    from embedcache.extract.settings import ExtractSettings
    from embedcache.inference import Model, load
    from embedcache.search.index import build_index
    from embedcache.search.queries import Queries
    from embedcache.search.search import search as search_index
    from embedcache.search.settings import Filter, IndexSettings, SearchSettings
    from embedcache.sources.open import open_source
    from embedcache.sources.settings import SourceSettings
    from embedcache.store.cache import Cache
    from embedcache.train.settings import (
        LossSettings,
        MachineSettings,
        ModelSettings,
        OptimizerSettings,
        TrainSettings,
    )
    from embedcache.train.train import train as train_projectors

_HOMES = {
    "Cache": "embedcache.store.cache:Cache",
    "CoverageSettings": "embedcache.curate.coverage:CoverageSettings",
    "DedupSettings": "embedcache.curate.dedup:DedupSettings",
    "EmbedcacheError": "embedcache.errors:EmbedcacheError",
    "EncoderSettings": "embedcache.encoders.settings:EncoderSettings",
    "ExtractSettings": "embedcache.extract.settings:ExtractSettings",
    "Filter": "embedcache.search.settings:Filter",
    "IndexSettings": "embedcache.search.settings:IndexSettings",
    "LossSettings": "embedcache.train.settings:LossSettings",
    "MachineSettings": "embedcache.train.settings:MachineSettings",
    "Model": "embedcache.inference:Model",
    "ModelSettings": "embedcache.train.settings:ModelSettings",
    "OptimizerSettings": "embedcache.train.settings:OptimizerSettings",
    "Queries": "embedcache.search.queries:Queries",
    "SearchSettings": "embedcache.search.settings:SearchSettings",
    "SelectSettings": "embedcache.curate.select.select:SelectSettings",
    "SourceSettings": "embedcache.sources.settings:SourceSettings",
    "SplitSettings": "embedcache.dataset.settings:SplitSettings",
    "TrainSettings": "embedcache.train.settings:TrainSettings",
    "build_index": "embedcache.search.index:build_index",
    "evaluate_retrieval": "embedcache.evaluate.retrieval:evaluate_retrieval",
    "evaluate_zero_shot": "embedcache.evaluate.zero_shot:evaluate_zero_shot",
    "extract_features": "embedcache.extract.extract:extract",
    "find_leaks": "embedcache.curate.leaks:find_leaks",
    "load": "embedcache.inference:load",
    "measure_coverage": "embedcache.curate.coverage:measure_coverage",
    "open_source": "embedcache.sources.open:open_source",
    "remove_duplicates": "embedcache.curate.dedup:dedup",
    "search_index": "embedcache.search.search:search",
    "select_samples": "embedcache.curate.select.select:select",
    "train_projectors": "embedcache.train.train:train",
}

__all__ = [
    "Cache",
    "CoverageSettings",
    "DedupSettings",
    "EmbedcacheError",
    "EncoderSettings",
    "ExtractSettings",
    "Filter",
    "IndexSettings",
    "LossSettings",
    "MachineSettings",
    "Model",
    "ModelSettings",
    "OptimizerSettings",
    "Queries",
    "SearchSettings",
    "SelectSettings",
    "SourceSettings",
    "SplitSettings",
    "TrainSettings",
    "build_index",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "extract_features",
    "find_leaks",
    "load",
    "measure_coverage",
    "open_source",
    "remove_duplicates",
    "search_index",
    "select_samples",
    "train_projectors",
]

if not TYPE_CHECKING:  # a type checker that saw this would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'embedcache' has no attribute {name!r}; it has {', '.join(__all__)}")
        module, _, attribute = _HOMES[name].partition(":")
        return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
