"""Summaries of what embedcache writes: a cache, a run, an index, a study or a selection."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.dataset import keytable
from embedcache.errors import CorruptError, PathError, pluralize
from embedcache.files import folder_bytes, open_path
from embedcache.metrics import metric_label
from embedcache.modalities import count_items
from embedcache.provenance import construct, read_json, read_report_json, read_study, recognize
from embedcache.reports.render import Presentation, Section
from embedcache.runs import PAIR, Run
from embedcache.search.faiss_index import IndexCard, read_card
from embedcache.settings import format_bytes
from embedcache.store.cache import Cache, caption_error_lines
from embedcache.store.commits import PENDING, REMOVED, has_failed
from embedcache.store.feature import Feature

_FEATURE_COLUMNS = ("feature", "modality", "shape", "dtype", "chunks", "failed", "bytes")
_KEY_COLUMNS = ("row", "key", "cache", "group", "kept_row", "kept_key")
_MOST_VALUES = 10
_NUM_SHOWN = 5
"""Items that are shown of each kind of failure."""


def summarize(location: str | Path) -> Presentation:
    """Return the presentation of the artifact at a path or URL: a cache, run, index, study or keyed table.

    Raises:
        PathError: the path does not exist, or embedcache did not write it.
        CorruptError: the artifact has changed since it was written, or lacks fields.
    """
    path = open_path(location)
    return construct(path, lambda: _SUMMARIES[recognize(path)](path))


def _summarize_cache(path: Path) -> Presentation:
    cache = Cache(path)
    notes = []
    rows = []
    records = []
    num_feature_bytes = 0
    for modality in cache.info.num_items:
        for feature in cache.features(modality):
            # Files of a feature on a remote disk are listed once, because listing is slow there.
            num_bytes = folder_bytes(feature.group.path / feature.feature)
            num_feature_bytes += num_bytes
            notes += [_describe_origin(feature), *failure_lines(cache, feature)]
            row = describe_feature(feature, num_bytes)
            rows.append(row)
            records.append(_feature_json(feature, row, num_bytes))

    total = folder_bytes(path)
    disk_line = f"{format_bytes(total)} on disk, {format_bytes(num_feature_bytes)} of them in features"
    return _present(
        "cache",
        [describe_cache(cache), disk_line, *caption_error_lines(cache)],
        {
            "path": str(path),
            "source": cache.info.source,
            "num_samples": cache.info.num_samples,
            "num_items": dict(cache.info.num_items),
            "chunk_size": cache.info.chunk_size,
            "columns": cache.columns,
            "features": records,
            "num_removed": cache.info.removed.get("num_samples", 0),
            "num_bytes": {"features": num_feature_bytes, "total": total},
        },
        Section(title="features", table=(_FEATURE_COLUMNS, rows)),
        notes or ["no features yet: add some with embedcache extract"],
    )


def _describe_origin(feature: Feature) -> str:
    """Return the encoder of a feature, and the features that it was derived from."""
    inputs = ", ".join(map(" ".join, feature.group.inputs))
    origin = f"{feature.group.spec}, from {inputs}" if inputs else feature.group.spec
    return f"{feature.name}: {origin}"


def _feature_json(feature: Feature, row: Sequence[str], num_bytes: int) -> dict[str, Any]:
    return {
        **dict(zip(_FEATURE_COLUMNS[:4], row[:4], strict=True)),
        "encoder": feature.group.spec,
        "inputs": list(map("/".join, feature.group.inputs)),
        "num_chunks": len(feature.commits),
        "num_committed": _num_committed(feature),
        "num_failed": _num_failed(feature),
        "num_pending": _count_reason(feature, PENDING),
        "num_removed": _count_reason(feature, REMOVED),
        "num_bytes": num_bytes,
    }


def _present(
    kind: str,
    lines: Sequence[str],
    record: Mapping[str, Any],
    section: Section | None = None,
    notes: Sequence[str] = (),
) -> Presentation:
    """Return the presentation of an artifact with one table, which is left out if it has no row."""
    sections = [section] if section and section.table and section.table[1] else []
    return Presentation(
        title=kind, lines=lines, sections=sections, notes=notes, record=lambda: {"kind": kind, **record}
    )


def describe_cache(cache: Cache) -> str:
    """Return one line with the number of samples and items, the source and the chunk size."""
    items = ", ".join(count_items(count, modality) for modality, count in cache.info.num_items.items())
    source = f"{cache.info.source.get('type')} {cache.info.source.get('path', '')}".strip()
    removed = f" ({cache.info.removed['num_samples']:,} removed)" if cache.info.removed else ""
    return (
        f"{cache.path}: {pluralize(cache.info.num_samples, 'sample')}{removed} with {items}, from {source}; "
        f"chunks of {cache.info.chunk_size:,}, format {cache.info.format}"
    )


def describe_feature(feature: Feature, num_bytes: int) -> list[str]:
    """Return the name, modality, shape, dtype, committed chunks, failed items and bytes on disk of a feature."""
    # A negative size is the number of tokens, which differs from item to item.
    shape = " × ".join("any" if size < 0 else f"{size:,}" for size in feature.shape)
    return [
        feature.name,
        feature.modality,
        shape,
        feature.dtype,
        f"{_num_committed(feature)}/{len(feature.commits)}",
        f"{_num_failed(feature):,}",
        f"{num_bytes:,}",
    ]


def _num_committed(feature: Feature) -> int:
    return sum(commit is not None for commit in feature.commits)


def _num_failed(feature: Feature) -> int:
    """Return how many items failed, without removed items and appended items that are not extracted yet."""
    return len(feature.failed[0]) - _count_reason(feature, PENDING) - _count_reason(feature, REMOVED)


def _count_reason(feature: Feature, reason: str) -> int:
    return int(pc.sum(pc.equal(feature.failed[1], reason)).as_py() or 0)


def failure_lines(cache: Cache, feature: Feature, *, num_shown: int = _NUM_SHOWN) -> list[str]:
    """Return lines about failed items: for each kind of reason, most frequent first, some of the items.

    Reads the rows of one chunk of the item table per item shown.
    """
    rows, reasons = feature.failed
    # Reasons of one kind are equal up to the first colon; the rest differs from item to item.
    kinds = pc.replace_substring_regex(reasons, "(?s):.*", "")
    counts = sorted(pc.value_counts(kinds).to_pylist(), key=lambda entry: -entry["counts"])

    lines = []
    for kind, count in map(dict.values, counts):
        if not has_failed(kind):
            lines.append(f"  {count:,} {kind}")
            continue

        lines.append(f"  {count:,} failed: {kind}")
        members = np.flatnonzero(pc.equal(kinds, kind))[:num_shown]
        member_reasons = reasons.take(pa.array(members)).to_pylist()
        for row, reason in zip(rows[members].tolist(), member_reasons, strict=True):
            lines.append(f"    {_describe_item(cache, feature, row)}: {reason}")
        if count > num_shown:
            lines.append(f"    … and {count - num_shown:,} more")
    return lines


def _describe_item(cache: Cache, feature: Feature, row: int) -> str:
    chunk, offset = divmod(row, cache.info.chunk_size)
    item = cache.items(feature.modality, chunk=chunk).slice(offset, 1).to_pylist()[0]
    path = f", {item['path']}" if item.get("path") else ""
    return f"row {row}, key {cache.key(item['sample'])}{path}{_describe_interval(item)}"


def _describe_interval(item: Mapping[str, Any]) -> str:
    """Return the interval of an audio or video item in its file; empty for a whole file."""
    start = item.get("start_s")
    stop = item.get("stop_s")
    if start is None and stop is None:
        return ""
    start_text = "start" if start is None else f"{start:g} s"
    stop_text = "end" if stop is None else f"{stop:g} s"
    return f", {start_text} to {stop_text}"


def _summarize_run(path: Path) -> Presentation:
    run = Run.open(path)
    info = run.info
    seed = info.settings.get("seed")
    if info.kind == PAIR:
        lines = [f"{path}: projector {run.projector}, shared width {run.shared_width}, seed {seed}"]
    else:
        arguments = ", ".join(f"{name}={value}" for name, value in info.arguments.items())
        lines = [f"{path}: {info.kind}({arguments}), seed {seed}"]

    if trainable := info.settings.get("parts", {}).get("trainable"):
        lines.append(f"trained parts: {trainable.replace('+', ', ')}; the others are those of the start")
    for name, digest in info.digests.items():
        if name.startswith("init_from "):
            # The other digests are compared by programs only.
            lines.append(f"part {name.removeprefix('init_from ')} started from weights {digest[:12]}")

    rows = [[name, entry.feature, f"{entry.width:,}", entry.spec] for name, entry in info.inputs.items()]
    inputs = Section(title="inputs", table=(("input", "feature", "width", "encoder"), rows))
    return _present("run", lines, {"path": str(path), **info.to_json()}, inputs, _training_notes(info.report))


def _training_notes(report: Mapping[str, Any]) -> list[str]:
    """Return the samples and the best validation of a training report, as far as it has them."""
    notes = []
    if report.get("num_samples"):
        notes.append(f"samples: {_join_counts(report['num_samples'])}")
    if report.get("measures"):
        measures = ", ".join(f"{metric_label(name)} {value:.3f}" for name, value in report["measures"].items())
        notes.append(f"validation of epoch {report.get('best_epoch')}: {measures}")
    return notes


def _summarize_index(path: Path) -> Presentation:
    record = {"path": str(path), **read_json(path / "card.json")}
    return _present("index", describe_index(path, read_card(path)), record)


def describe_index(path: Path, card: IndexCard) -> list[str]:
    """Return the contents of an index, its recall and latency, and its feature, in one line each."""
    projected = f", projected by {card.run}" if card.run else ""
    size = f"{format_bytes(card.file_bytes)}{' on disk' if card.on_disk else ''}"
    return [
        f"{path}: {count_items(card.num_vectors, card.modality)}, width {card.width}, {card.factory}, {size}",
        f"recall@10 {card.recall_at_10:.3f} against exact search on {card.num_queries:,} queries, "
        f"{card.latency_ms:.2f} ms per query",
        f"feature {card.feature} of {card.cache}{projected}",
    ]


def _summarize_study(path: Path) -> Presentation:
    study = read_study(path)
    report_path = path / "report.json"
    report = read_report_json(report_path) if report_path.is_file() else {}
    if report and not (isinstance(report, dict) and _is_of(report.get("study"), study)):
        raise CorruptError(
            f"{report_path}: expected the report of this study, got another file; run the same embedcache sweep again"
        )

    # An interrupted study has no report yet.
    counts = report.get("counts", {})
    features = ", ".join(f"{modality} {side['feature']}" for modality, side in study["sides"].items())
    lines = [
        f"{path}: sampler {study['sampler']}, pruner {study['pruner']}, seed {study['seed']}",
        f"features: {features}",
        f"searched: {', '.join(study['space']['space'])}",
        f"trials: {_join_counts(counts)}" if counts else "not finished: run the same embedcache sweep again",
    ]

    best = report.get("best", [])
    rows = [[str(trial["trial"]), f"{trial['score']:.3f}", _values(trial["params"])] for trial in best]
    notes = [f"to train the best again: {report['winner']['command']}"] if report.get("winner") else []
    record = {"path": str(path), **study, "counts": counts, "best": best}
    return _present("study", lines, record, Section(title="best", table=(("trial", "score", "settings"), rows)), notes)


def _is_of(reported: Any, study: Mapping[str, Any]) -> bool:
    """Return whether a report names a study. The digests of their splits differ after samples were removed."""
    if not isinstance(reported, dict):
        return False
    return all(reported.get(name) == study.get(name) for name in ("index_digest", "space"))


def _join_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _values(values: Mapping[str, Any]) -> str:
    """Return settings as text, without those that are not set."""
    parts = []
    for name, value in values.items():
        if value is not None:
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _summarize_table(path: Path) -> Presentation:
    """Summarize a keyed table: a selection, split, scores, hard negatives or removed samples."""
    about = keytable.read_header(path, "table")
    if "kind" not in about:
        raise PathError(f"{path}: expected a selection, got another Parquet file, which names no cache")
    with keytable.reading_table(path, "table"):
        table = keytable.load(path)

    lines = [f"{path}: {about['kind']} with {pluralize(len(table), 'sample')} of {' and '.join(about['caches'])}"]
    settings = _values(about.get("settings", {}))
    if "method" in about:
        lines.append(f"method {about['method']}" + (f": {settings}" if settings else ""))

    rows: list[Sequence[str]] = []
    for name, values in zip(table.column_names, table.columns, strict=True):
        # Rows, keys and groups differ from sample to sample, so frequent values would say nothing.
        if name not in _KEY_COLUMNS:
            for row in _describe_column(values):
                rows.append([name, *row])

    # Digests of whole caches mean nothing to a reader.
    record = {"path": str(path), **about, "num_samples": len(table)}
    record.pop("index_digests", None)
    return _present(
        about["kind"], lines, record, Section(title="columns", table=(("column", "value", "samples"), rows))
    )


def _describe_column(values: pa.ChunkedArray) -> list[list[str]]:
    """Return the most frequent values of a column, or the range of its numbers, each with a number of samples."""
    if pa.types.is_list(values.type):
        lengths = pc.list_value_length(values).to_numpy()
        return [[f"{int(lengths.sum()):,} in lists", f"{np.count_nonzero(lengths):,}"]]

    # Without nulls, which quantiles would not ignore.
    values = values.drop_null()
    if len(values) and (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        low, middle, high = np.quantile(values.to_numpy(), [0, 0.5, 1])
        return [[f"from {low:.4g} to {high:.4g}, half of them above {middle:.4g}", f"{len(values):,}"]]

    counts = pc.value_counts(values)
    order = np.argsort(-counts.field("counts").to_numpy(), kind="stable")[:_MOST_VALUES]
    rows = [[str(entry["values"]), f"{entry['counts']:,}"] for entry in counts.take(pa.array(order)).to_pylist()]
    if len(counts) > _MOST_VALUES:
        rows.append([f"and {pluralize(len(counts) - _MOST_VALUES, 'other value')}", ""])
    return rows


_SUMMARIES: Mapping[str, Callable[[Path], Presentation]] = {
    "cache": _summarize_cache,
    "run": _summarize_run,
    "index": _summarize_index,
    "study": _summarize_study,
    "selection": _summarize_table,
}
