"""Answers of a person about items of concepts: which of them show it. They are saved beside a report of coverage."""

from collections.abc import Mapping
from pathlib import Path

from embedcache.errors import DataError, FingerprintError, PathError
from embedcache.files import AnyPath
from embedcache.modalities import noun
from embedcache.outputs import read_report_json, write_report_json
from embedcache.provenance import construct
from embedcache.store.cache import Cache

Answers = dict[str, dict[int, bool]]
"""Name of a concept -> row of an item -> whether it shows the concept."""


def answers_path(report: Path) -> Path:
    """Return where the answers about a report are saved: `coverage.json` -> `coverage.answers.json`."""
    return report.with_name(f"{report.name.removesuffix('.json')}.answers.json")


def write_answers(path: Path, answers: Mapping[str, Mapping[int, bool]], cache: Cache, modality: str) -> None:
    """Write answers about the items of a cache, whole or not at all; earlier ones of the file are replaced."""
    by_name = {name: {str(row): shows for row, shows in rows.items()} for name, rows in answers.items() if rows}
    write_report_json(path, {"index_digest": cache.info.index_digest, "modality": modality, "answers": by_name})


def read_answers(path: AnyPath, cache: Cache, modality: str) -> Answers:
    """Read answers about the items of a cache; those about items that were removed since are left out.

    Raises:
        PathError: the file does not exist.
        CorruptError: it is no such file, or has changed since it was written.
        FingerprintError: the answers are about other samples.
        DataError: they are about items of another modality.
    """
    path = Path(path)
    if not path.is_file():
        raise PathError(f"answers: expected a file that the search page wrote, got {path}, which does not exist")
    values = read_report_json(path)
    digest, answered, answers = construct(
        path,
        lambda: (
            str(values["index_digest"]),
            str(values["modality"]),
            {
                str(name): {int(row): bool(shows) for row, shows in rows.items()}
                for name, rows in values["answers"].items()
            },
        ),
    )
    if not cache.info.has_rows_of(digest):
        raise FingerprintError(f"answers {path}: expected samples of {cache.path}, got others; answer anew")
    if answered != modality:
        raise DataError(f"answers {path}: expected answers about {noun(modality)}, got some about {noun(answered)}")
    is_removed = cache.removed_items(modality)
    return {
        name: {row: shows for row, shows in rows.items() if 0 <= row < len(is_removed) and not is_removed[row]}
        for name, rows in answers.items()
    }
