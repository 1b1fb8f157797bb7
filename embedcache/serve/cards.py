"""What an index, its run and its cache are, as rows to read."""

from collections.abc import Mapping
from typing import Any

from embedcache.artifact import read_json
from embedcache.curate.indexes.search import OpenIndex

Card = dict[str, Any]
"""`title`, and `rows`: pairs of a name and a text."""


def cards(index: OpenIndex) -> list[Card]:
    """Give the cards of an index, of the run that projected it, and of its cache. They hold no path."""
    found = [_index_card(index), _cache_card(index)]
    if index.run_path is not None:
        found.insert(1, _run_card(index))
    return found


def _index_card(index: OpenIndex) -> Card:
    card = index.card
    batch = [] if card.batch_latency_ms is None else [["milliseconds a query in a batch", f"{card.batch_latency_ms:g}"]]
    return {
        "title": "Index",
        "rows": [
            ["holds", f"{card.num_vectors:,} {card.modality}s"],
            ["feature", card.feature],
            ["encoder", card.spec],
            ["kind (FAISS)", card.factory],
            ["searched with", " ".join(f"{name} {value}" for name, value in card.search.items()) or "no setting"],
            ["width", f"{card.width:,}"],
            ["recall@10 against exact search", f"{card.recall_at_10:.3f} on {card.num_queries:,} queries"],
            ["milliseconds a query, where it was built", f"{card.latency_ms:g}"],
            *batch,
            ["on disk", "" if card.file_bytes is None else f"{card.file_bytes / 1e6:,.1f} MB"],
        ],
    }


def _run_card(index: OpenIndex) -> Card:
    config = index.asker.config
    assert config is not None
    assert index.run_path is not None
    path = index.run_path / "record.json"
    outcome = read_json(path).get("outcome", {}) if path.is_file() else {}
    return {
        "title": "Run",
        "rows": [
            ["name", index.run_path.resolve().name],
            ["projector", config.projector],
            ["shared width", f"{config.shared_width:,}"],
            ["images", f"{config.image.feature} of {config.image.spec}"],
            ["texts", f"{config.text.feature} of {config.text.spec}"],
            ["weights (SHA-256)", config.weights],
            *_flat("", outcome),
        ],
    }


def _cache_card(index: OpenIndex) -> Card:
    info = index.cache.info
    return {
        "title": "Cache",
        "rows": [
            ["name", index.cache.path.resolve().name],
            ["source", str(info.source.get("type"))],
            ["samples", f"{info.num_samples:,}"],
            *([f"{modality}s", f"{num:,}"] for modality, num in info.num_items.items()),
            ["columns", ", ".join(index.cache.columns)],
            ["rows (SHA-256)", info.spine],
        ],
    }


def _flat(prefix: str, values: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, value in values.items():
        title = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(f"{title}: ", value)
        elif value is not None:
            rows.append([title, _number(value)])
    return rows


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
