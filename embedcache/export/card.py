"""The model card of an export: contents, licenses, training, metrics, and how to load it."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embedcache.dataset.settings import KINDS
from embedcache.export.base import ExportNotes, ExportRun
from embedcache.files import read_text, write_atomic
from embedcache.runs import RunInput
from embedcache.train.initialization import default_initialization

_KNOWN_LICENSES = {
    ("lite", "efficientnet-lite"): "apache-2.0",
    ("st", "all-MiniLM-L6-v2"): "apache-2.0",
}
_UNKNOWN_LICENSE = "unknown: ask its authors"
_HELD_OUT = {"val": "validation", "test": "test"}
"""Part that training does not use -> its purpose."""


def write_card(path: Path, run: ExportRun, notes: ExportNotes, format_name: str, metrics: Any) -> None:
    """Write the model card, `README.md`."""
    from huggingface_hub import ModelCard, ModelCardData

    sides = run.trained.info.inputs
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
        run=run.trained,
        notes=notes,
        format_name=format_name,
        sides=sides,
        licenses=licenses,
        unknown=_UNKNOWN_LICENSE,
        metrics=_metrics(metrics, run),
        packages=shlex.join(notes.requirements),
        code=notes.code.format(folder=path.parent.name),
        **_training(run),
    )
    write_atomic(path, f"{card}\n".encode())


def _find_license(tower_input: RunInput) -> str | None:
    """Return the license of a packaged encoder, or that in the model card of its folder; None if unknown."""
    fingerprint = tower_input.fingerprint
    for (family, start), known in _KNOWN_LICENSES.items():
        if fingerprint["family"] == family and fingerprint["model"].startswith(start):
            return known
    if fingerprint["family"] not in ("hf", "st"):
        return None
    card = Path(tower_input.spec.partition(":")[2].partition(",")[0]) / "README.md"
    if not card.is_file():
        return None
    match = re.match(r"---\n.*?^license:\s*(\S+)\s*$.*?^---$", read_text(card), re.MULTILINE | re.DOTALL)
    return match[1] if match else None


def _training(run: ExportRun) -> dict[str, Any]:
    """Return the part of the card on training; of files only the names, as a card may become public."""
    training, report = run.trained.info.settings, run.trained.info.report
    selection = training.get("selection")

    return {
        "training": training,
        "widths": sorted({*training.get("loss", {}).get("widths", ())} - {run.trained.shared_width}),
        "caches": [f"the cache `{(run.path / name).resolve().name}`" for name in run.trained.info.caches],
        "selection": Path(selection).name if selection else None,
        "held_out": _held_out(training.get("split", {}), report.get("num_samples") or {}),
        "weights": _weights_line(run, report.get("best_epoch")),
    }


def _held_out(split: Mapping[str, Any], num_samples: Mapping[str, int]) -> str:
    """Return how many samples were held out, and by what split; of a file only the name, as a card may be public."""
    kind = str(split.get("kind"))
    counts = [f"{num_samples[part]:,} for {noun}" for part, noun in _HELD_OUT.items() if part in num_samples]
    name = f"by `{kind}`" if kind in KINDS else f"of the file `{Path(kind).name}`"
    return ", ".join([f"split {name}", *counts])


def _weights_line(run: ExportRun, best_epoch: int | None) -> str:
    """Return where the weights come from; `best_epoch` is 0 if the initialization was kept, None if unknown."""
    training = run.trained.info.settings
    model, loss, optimizer = (training.get(name, {}) for name in ("model", "loss", "optimizer"))
    form = model.get("initialization") or default_initialization(run.pair)
    start = "other runs" if training.get("parts", {}).get("init_from") else f"`{form}`"
    if not optimizer.get("epochs"):
        return f"weights: the initialization ({start}), without training"
    trained = f"loss `{loss.get('name')}`, {optimizer['epochs']} epochs"
    if best_epoch is None:
        return trained
    if not best_epoch:
        return f"weights: the initialization ({start}); {trained}, none of which was better on validation"
    return f"{trained}; weights of epoch {best_epoch}"


def _metrics(metrics: Any, run: ExportRun) -> str:
    """Return the metrics of the exported run's recipe, and whether they are a mean over several seeds."""
    if metrics is None:
        return "No report was given."
    report = _report_of(metrics, run)
    rows = list(_metric_rows(report))
    if not rows:
        return "The given report contains no metrics of this run."
    task = f"`{report['task']}` on `{report['dataset']}`. " if {"task", "dataset"} <= report.keys() else ""
    table = ["| | value | 95% interval |", "| --- | --- | --- |", *rows]
    return "\n".join([f"{task}Computed by `embedcache evaluate`. {_seeds_line(report, run)}".rstrip(), "", *table])


def _report_of(metrics: Any, run: ExportRun) -> Mapping[str, Any]:
    """Return the report of the run's recipe among those of a file, without those of other recipes; empty if missing."""
    reports = list(metrics) if isinstance(metrics, list) else [metrics]
    for report in list(reports):
        reports += _mapping(_mapping(report, "details"), "others").values()
    named = [report for report in reports if isinstance(report, Mapping)]
    if all("pretrained" not in report for report in named):
        return named[0] if named else {}
    own = [report for report in named if _names(report, run)]
    if not own:
        return {}
    details = {name: value for name, value in _mapping(own[0], "details").items() if name != "others"}
    return {**own[0], "details": details}


def _mapping(values: Any, name: str) -> Mapping[str, Any]:
    """Return the JSON object that another one has under a name; empty if there is none."""
    value = values.get(name) if isinstance(values, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _names(report: Mapping[str, Any], run: ExportRun) -> bool:
    """Return whether a report is of a run, alone or with other seeds of its recipe."""
    return run.path.resolve().name in {Path(name).name for name in str(report.get("pretrained", "")).split(",")}


def _seeds_line(report: Mapping[str, Any], run: ExportRun) -> str:
    details, own = _mapping(report, "details"), run.trained.info.settings.get("seed")
    seeds = details.get("seeds")
    if not isinstance(seeds, list) or len(seeds) < 2:
        return ""
    by_seed = next((values for name, values in details.items() if name.endswith("_by_seed")), None)
    alone = ""
    if own in seeds and isinstance(by_seed, list) and len(by_seed) == len(seeds):
        alone = f", whose own mean recall or accuracy is {by_seed[seeds.index(own)]}"
    return f"Means over the seeds {', '.join(map(str, seeds))} of one recipe; this is seed {own}{alone}."


def _metric_rows(values: Any, prefix: str = "") -> Iterator[str]:
    """Yield a table row per metric of a report: those with an interval, and the plain ones of `metrics`."""
    if not isinstance(values, Mapping):
        return
    intervals = _mapping(values, "intervals")
    for name, value in values.items():
        if name in intervals:
            yield f"| {prefix}{name} | {value} | {intervals[name]} |"
        elif prefix.endswith("metrics ") and isinstance(value, (int, float)):
            yield f"| {name} | {value:.5g} | |"
        elif name != "intervals":
            yield from _metric_rows(value, f"{prefix}{name} ".removeprefix("details "))
