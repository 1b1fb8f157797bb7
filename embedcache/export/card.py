"""The model card of an export: contents, licenses, training, metrics, and how to load it."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embedcache.errors import SettingError
from embedcache.export.base import ExportNotes
from embedcache.files import write_atomic
from embedcache.runs import Run, RunInput

_KNOWN_LICENSES = {
    ("lite", "efficientnet-lite"): "apache-2.0",
    ("st", "all-MiniLM-L6-v2"): "apache-2.0",
}
_UNKNOWN_LICENSE = "unknown: ask its authors"


def write_card(path: Path, run: Run, notes: ExportNotes, format_name: str, metrics: Any) -> None:
    """Write the model card, `README.md`. It contains only names of files, not paths, as it may become public.

    Raises:
        SettingError: the metrics are about another run.
    """
    from huggingface_hub import ModelCard, ModelCardData

    sides = run.info.inputs
    training = run.info.settings
    licenses = {modality: _find_license(side) for modality, side in sides.items()}

    # A card has one license, so encoders under different licenses are described in its text.
    included_licenses = set(map(licenses.__getitem__, notes.encoders))
    known_license = included_licenses.pop() if len(included_licenses) == 1 else None

    data = ModelCardData(
        library_name=notes.library,
        license=known_license or "other",
        license_name=None if known_license else "see-the-encoders",
        pipeline_tag=notes.task,
        tags=["embedcache", f"{'-'.join(licenses)}-retrieval"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md.j2")),
        name=path.parent.name,
        run=run,
        notes=notes,
        format_name=format_name,
        sides=sides,
        licenses=licenses,
        unknown=_UNKNOWN_LICENSE,
        report=None if metrics is None else _report_of(run, metrics),
        metric_rows=_metric_rows,
        training=training,
        widths=sorted({*training.get("loss", {}).get("widths", ())} - {run.shared_width}),
        caches=[(run.path / name).resolve().name for name in run.info.caches],
        file_name=lambda file: Path(file).name,
        packages=shlex.join(notes.requirements),
    )
    write_atomic(path, f"{card}\n".encode())


def _find_license(tower_input: RunInput) -> str | None:
    """Return the license of a packaged encoder, or the license in the model card of its folder, or None if unknown."""
    from huggingface_hub import ModelCard

    fingerprint = tower_input.fingerprint
    for (family, start), license_name in _KNOWN_LICENSES.items():
        if fingerprint["family"] == family and fingerprint["model"].startswith(start):
            return license_name

    card = Path(tower_input.spec.partition(":")[2].partition(",")[0]) / "README.md"
    if not card.is_file():
        return None
    card_license: str | None = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    return card_license


def _report_of(run: Run, metrics: Any) -> Mapping[str, Any]:
    """Return the report of `evaluate --output` about a run, which may include other seeds of its recipe."""
    # The file may be any JSON, so each value may be missing or of another type.
    try:
        for report in metrics if isinstance(metrics, list) else [metrics]:
            names = [Path(path).name for path in report["pretrained"].split(",")]
            if run.path.resolve().name in names:
                return dict(report)
    except (KeyError, TypeError, AttributeError):
        pass

    raise SettingError(
        f"metrics: expected the report of the run {run.path} that embedcache evaluate --output writes, got another file"
    )


def _metric_rows(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float, Any]]:
    """Yield the name, value and interval of each metric of a report that has an interval."""
    intervals = values.get("intervals", {})
    for name, value in values.items():
        if name in intervals:
            yield f"{prefix}{name}", value, intervals[name]
        elif isinstance(value, Mapping) and name not in ("intervals", "others"):
            yield from _metric_rows(value, f"{prefix}{name} ".removeprefix("details "))
