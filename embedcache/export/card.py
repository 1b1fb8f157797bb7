"""The model card of an export: what is in it, under which licenses, how good it is, and how to load it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embedcache.export.base import MODALITIES, Run, Written
from embedcache.files import write_atomic
from embedcache.provenance import read_json

_KNOWN = {
    ("lite", "efficientnet-lite"): "apache-2.0",
    ("st", "all-MiniLM-L6-v2"): "apache-2.0",
    ("use", "multilingual-v3"): "apache-2.0",
    ("wordllama", "l2_supercat"): "mit",
}
_UNKNOWN = "not known: ask its authors"


def write_card(path: Path, run: Run, written: Written, form: str, figures: Any) -> None:
    """Write `README.md`.

    Args:
        path: the file, in the export's folder.
        run: what was exported.
        written: what the format says of it.
        form: the format's name.
        figures: what `embedcache evaluate` wrote as JSON; None: nothing was given.
    """
    licenses: dict[str, str | None] = {modality: license(run.config.tower_input(modality)) for modality in MODALITIES}
    parts = [
        _front_matter(written, licenses),
        f"# {path.parent.name}\n",
        _about(run, written, form),
        _encoders(run, written, licenses),
        _training(run),
        _metrics(figures),
        _loading(path.parent.name, written),
    ]
    write_atomic(path, "\n".join(parts).encode())


def license(side: Any) -> str | None:
    """Find what is known of an encoder's license: what its folder or timm says, or None."""
    fingerprint = side.fingerprint
    for (family, start), known in _KNOWN.items():
        if fingerprint["family"] == family and fingerprint["model"].startswith(start):
            return known
    if fingerprint["family"] in ("hf", "st"):
        return _license_of_folder(Path(side.spec.partition(":")[2].partition(",")[0]))
    return None


def _license_of_folder(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = re.match(r"---\n.*?^license:\s*(\S+)\s*$.*?^---$", card.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def _front_matter(written: Written, licenses: Mapping[str, str | None]) -> str:
    inside = {licenses[modality] for modality in written.sides}
    known = inside.pop() if len(inside) == 1 else None
    lines = ["---", f"library_name: {written.library}", f"license: {known or 'other'}"]
    if known is None:
        lines.append("license_name: see-the-encoders")
    lines += [f"pipeline_tag: {written.task}"] if written.task else []
    return "\n".join([*lines, "tags:", "- embedcache", "- image-text-retrieval", "---", ""])


def _about(run: Run, written: Written, form: str) -> str:
    config = run.config
    what = {2: "An image and a text encoder, both frozen, with trained projectors into one space",
            1: "A frozen text encoder with a trained projector into a space shared with images",
            0: "Two trained projectors into one space, without their frozen encoders"}[len(written.sides)]  # fmt: skip
    lines = [
        f"{what} of {config.shared_width} numbers: projector `{config.projector}`. Trained with embedcache, exported "
        f"as `{form}`; embedcache is not needed to load it.\n",
        *(f"- {note}" for note in written.notes),
    ]
    if written.differences:
        worst = ", ".join(f"{what} {value:.1e}" for what, value in written.differences.items())
        lines.append(f"- Loaded with {written.library} and compared with the run at the export; largest difference in "
                     f"one number of a vector of length 1: {worst}.")  # fmt: skip
    return "\n".join([*lines, ""])


def _encoders(run: Run, written: Written, licenses: Mapping[str, str | None]) -> str:
    rows = ["## Encoders\n", "| | encoder | feature | license | inside |", "| --- | --- | --- | --- | --- |"]
    for modality in MODALITIES:
        side = run.config.tower_input(modality)
        name = f"{side.fingerprint['family']}:{side.fingerprint['model']}"
        feature = side.feature.rpartition("/")[2] if "+" not in side.feature else side.feature
        inside = "yes" if modality in written.sides else "no"
        rows.append(f"| {modality} | `{name}` | `{feature}` | {licenses[modality] or _UNKNOWN} | {inside} |")
    weights = [f"- {modality} weights: SHA-256 `{run.config.tower_input(modality).fingerprint['weights']}`"
               for modality in MODALITIES]  # fmt: skip
    return "\n".join([*rows, "", *weights, f"- run: weights SHA-256 `{run.config.weights_digest}`", ""])


def _training(run: Run) -> str:
    training = run.config.training
    loss, optimizer, split = (training.get(name, {}) for name in ("loss", "optimizer", "split"))
    lines = [
        "## Data and training\n",
        f"- data: {_data(run)}; its license: not known: ask its authors",
        f"- selection: {training.get('selection') or 'none, all samples of the training part'}",
        f"- language of the captions: {training.get('language') or 'all'}",
        f"- held out: split `{split.get('kind')}`, {split.get('val_share')} for validation, {split.get('test_share')} "
        "for test",
        f"- loss `{loss.get('name')}`, {optimizer.get('epochs')} epochs, seed {training.get('seed')}",
    ]
    if training.get("shuffle_pairs"):
        lines.append("- **trained on shuffled pairs, as a control: it knows nothing**")
    return "\n".join([*lines, ""])


def _data(run: Run) -> str:
    path = run.path / "record.json"
    outcome = read_json(path) if path.is_file() else {}
    names = [Path(name).name for name in outcome.get("settings", {}).get("caches", [])]
    return ", ".join(f"the cache `{name}`" for name in names) or f"the rows `{run.config.index_digest}`"


def _metrics(figures: Any) -> str:
    if figures is None:
        return "## Metrics\n\nNone were given.\n"
    rows = list(_figures(figures))
    if not rows:
        return "## Metrics\n\nThe file that was given holds no figures.\n"
    what = f"`{figures['task']}` on `{figures['dataset']}`. " if isinstance(figures, dict) and "task" in figures else ""
    table = ["| | value | 95 % interval |", "| --- | --- | --- |", *rows]
    return "\n".join(["## Metrics\n", f"{what}Written by `embedcache evaluate`.\n", *table, ""])


def _figures(values: Any, prefix: str = "") -> Iterator[str]:
    """Give a row for each figure of a result: those with an interval, and the plain ones of `metrics`."""
    if not isinstance(values, Mapping):
        return
    intervals = values.get("intervals")
    intervals = intervals if isinstance(intervals, Mapping) else {}
    for name, value in values.items():
        if name in intervals:
            low, high = intervals[name]
            yield f"| {prefix}{name} | {value} | [{low}, {high}] |"
        elif prefix.endswith("metrics ") and isinstance(value, (int, float)):
            yield f"| {name} | {value:.5g} | |"
        elif name != "intervals":
            yield from _figures(value, f"{prefix}{name} ".removeprefix("details "))


def _loading(name: str, written: Written) -> str:
    needs = " ".join(written.needs)
    code = written.code.format(folder=name)
    return f"## Load it\n\n`pip install {needs}`, then, from the folder above:\n\n```python\n{code}```\n"
