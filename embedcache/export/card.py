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
    """Write the model card, `README.md`; of files it has only the names, as it may become public.

    Raises:
        SettingError: the metrics are those of another run.
    """
    from huggingface_hub import ModelCard, ModelCardData

    sides = run.info.inputs
    training = run.info.settings
    licenses = {modality: _find_license(side) for modality, side in sides.items()}
    included = {licenses[modality] for modality in notes.encoders}
    known_license = included.pop() if len(included) == 1 else None

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
    """Return the license of a packaged encoder, or that in the model card of its folder; None if unknown."""
    from huggingface_hub import ModelCard

    fingerprint = tower_input.fingerprint
    for (family, start), known in _KNOWN_LICENSES.items():
        if fingerprint["family"] == family and fingerprint["model"].startswith(start):
            return known
    card = Path(tower_input.spec.partition(":")[2].partition(",")[0]) / "README.md"
    if not card.is_file():
        return None
    license_name: str | None = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    return license_name


def _report_of(run: Run, metrics: Any) -> Mapping[str, Any]:
    """Return the report of a run, alone or with other seeds of its recipe, among those of `evaluate --output`."""
    try:
        for report in metrics if isinstance(metrics, list) else [metrics]:
            if run.path.resolve().name in {Path(name).name for name in report["pretrained"].split(",")}:
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
