"""The presentation of zero-shot classification: accuracies, classes, confusions and example items."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from embedcache.arrays import Array
from embedcache.dataset.thumbnails import PICTURED
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.settings import ZeroShotSettings
from embedcache.evaluate.zero_shot import ZeroShotPredictions, ZeroShotReport, classify
from embedcache.files import AnyPath
from embedcache.metrics import Estimate
from embedcache.modalities import noun
from embedcache.reports.figures import COLORS, INK, SOFT, estimate_bars, label, open_axes, svg
from embedcache.reports.items import ItemRenderer, PageItem, QueryExample, ranked_example, sample_outcomes
from embedcache.reports.render import (
    Presentation,
    Section,
    Table,
    clip_benchmark_json,
    estimates_json,
    format_count,
    format_percent,
    one_or_list,
    round_json,
)
from embedcache.reports.retrieval import report_lines, report_warnings
from embedcache.settings import replace_fields
from embedcache.store.cache import Cache

NO_CLASS_NAMED = "No class named: only items of classes whose name contains none of the run's prototypes."
_COLUMNS = {"acc1": "top-1", "acc5": "top-5", "mean_per_class_recall": "mean per class"}
_EXAMPLES_PER_OUTCOME = 6
_MAX_BARS = 40
_MAX_CONFUSION_CLASSES = 40
_MAX_LABELED_CLASSES = 20


def zero_shot_table(reports: Mapping[str, ZeroShotReport]) -> Table:
    """Return accuracies with their 95% intervals: rows per report, and one for the chance level of the first."""
    accuracies = {}
    for name, report in reports.items():
        accuracies[name] = report.accuracies
        if report.over_seeds:
            accuracies[f"{name}, over seeds"] = report.over_seeds
        if report.unnamed:
            accuracies[f"{name}, no class named"] = report.unnamed
    accuracies["chance"] = next(iter(reports.values())).chance

    rows = []
    for name, estimates in accuracies.items():
        rows.append([name, *(str(estimates[metric]) for metric in _COLUMNS)])
    return ["", *_COLUMNS.values()], rows


def confusion_table(report: ZeroShotReport, *, num_rows: int = 10) -> Table:
    """Return the pairs of classes that are confused most often."""
    errors_CC = report.confusion.copy()
    np.fill_diagonal(errors_CC, 0)
    totals_C = report.confusion.sum(axis=1)

    rows = []
    for position in np.argsort(-errors_CC, axis=None, kind="stable")[:num_rows]:
        true, predicted = divmod(int(position), len(errors_CC))
        count = int(errors_CC[true, predicted])
        # A good classifier has fewer confusions than rows.
        if count:
            fraction = format_percent(count / totals_C[true])
            rows.append([report.names[true], report.names[predicted], format_count(count), fraction])
    return ["class", "predicted as", noun(report.modality), "of the class"], rows


def zero_shot_json(report: ZeroShotReport) -> dict[str, Any]:
    """Return a report as JSON values: accuracies with intervals, chance, each class, counts, seeds and overlap.

    `num_images` counts the items of any modality, so that one reader suffices.
    """
    record = {**estimates_json(report.accuracies), "chance": estimates_json(report.chance)}
    if report.over_seeds:
        record["over_seeds"] = estimates_json(report.over_seeds)
    if report.unnamed:
        record["no_class_named"] = estimates_json(report.unnamed)
    if report.num_named is not None:
        record["num_named_classes"] = report.num_named

    by_class = {}
    for position, (name, accuracy) in enumerate(zip(report.names, report.by_class, strict=True)):
        # Classes may share a name; an object of JSON has each key once.
        key = name if report.names.count(name) == 1 else f"{name} ({position})"
        by_class[key] = round_json(accuracy)
    return {
        **record,
        "by_class": by_class,
        "acc1_by_seed": list(map(round_json, report.by_seed)),
        "num_images": report.num_items,
        "num_unlabelled": report.num_unlabeled,
        "num_classes": len(report.names),
        "num_prompts": list(report.num_prompts),
        "seeds": report.seeds,
        "part": report.part,
        "overlap": asdict(report.overlap) if report.overlap else None,
    }


def present_zero_shot(
    reports: Mapping[str, ZeroShotReport], cache: AnyPath, settings: ZeroShotSettings
) -> Presentation:
    """Return the presentation of reports on a cache, with the classes of the first and example items of its first run.

    Args:
        reports: name of a recipe -> its report, the main one first.
        cache: cache of the items.
        settings: settings of the evaluation.
    """
    cache = Cache(cache)
    first = next(iter(reports.values()))
    prompts = Cache(first.prompts_path)
    renderer = ItemRenderer(cache, first.modality)

    confusions = Section(
        title="Confusions",
        notes=["Sum over all runs."],
        table=confusion_table(first),
        num_printed=0,
        figures=lambda: [_confusion_matrix(first.names, first.confusion)],
    )

    # Loads the run and classifies again, since reports contain no predictions: for a page only.
    def show_items() -> list[QueryExample]:
        run = load_runs(first.run_paths[:1], device=settings.device)[0]
        return _examples(renderer, classify(cache, run, prompts, replace_fields(settings, check_overlap=False)))

    plural = noun(first.modality)
    items = Section(
        title=plural.capitalize(),
        notes=[f"Drawn at random: first {plural} whose top class is correct, then {plural} whose top class is wrong."],
        examples=show_items,
    )
    chance = first.chance["acc1"].value
    classes = Section(title="Classes", figures=lambda: [class_bars(first.names, first.by_class, chance)])
    return Presentation(
        title="Zero-shot classification",
        lines=report_lines(reports),
        warnings=report_warnings(reports),
        sections=[_accuracy_section(reports, chance), classes, confusions, items],
        record=lambda: one_or_list([_result(report, cache, prompts) for report in reports.values()]),
        renderers=[renderer],
    )


def _accuracy_section(reports: Mapping[str, ZeroShotReport], chance: float) -> Section:
    notes = [
        "In brackets the 95% interval; over seeds, one that holds the variance of seeds, too; for chance, the range "
        "that holds 95% of random guesses."
    ]
    bars = {}
    for name, report in reports.items():
        bars[name] = report.accuracies["acc1"]
        if report.unnamed and NO_CLASS_NAMED not in notes:
            notes.append(NO_CLASS_NAMED)
    return Section(
        title="Accuracy",
        notes=notes,
        table=zero_shot_table(reports),
        figures=lambda: [accuracy_bars(bars, chance)],
    )


def _result(report: ZeroShotReport, cache: Cache, prompts: Cache) -> dict[str, Any]:
    """Return a report as CLIP_benchmark's `zeroshot_classification`; `acc5` needs five classes, as there."""
    metrics = {name: estimate.value for name, estimate in report.accuracies.items()}
    if len(report.names) < 5:
        del metrics["acc5"]

    # CLIP_benchmark names one language per result, so prompts in several have none.
    languages = set(prompts.items("text", columns=["language"])["language"].to_pylist())
    return clip_benchmark_json(
        "zeroshot_classification",
        metrics,
        {"prompts": str(prompts.path), **zero_shot_json(report)},
        dataset=cache.path.name,
        pretrained=",".join(map(str, report.run_paths)),
        language=languages.pop() if len(languages) == 1 else None,
    )


def _examples(renderer: ItemRenderer, classified: ZeroShotPredictions) -> list[QueryExample]:
    """Return random items whose top class is correct, then random ones whose top class is wrong."""
    names = classified.names
    examples = []
    for position in sample_outcomes(classified.predicted[:, 0] == classified.labels, _EXAMPLES_PER_OUTCOME):
        true = int(classified.labels[position])
        results = []
        for number in classified.predicted[position].tolist():
            results.append(PageItem(text=names[number], is_correct=number == true))

        # A picture needs no key to be recognized, other items do.
        item = renderer.render(int(classified.items.rows[position]))
        text = names[true] if classified.modality in PICTURED else f"{item.text}: {names[true]}"
        answer = PageItem(text=names[true], is_correct=True)
        examples.append(
            ranked_example(replace(item, text=text), results, rank=int(classified.ranks[position]), answer=answer)
        )
    return examples


def accuracy_bars(rows: Mapping[str, Estimate], chance: float) -> str:
    """Draw one bar per accuracy with its 95% interval, and a line at the chance level, as an SVG element."""
    axes = open_axes(0.6 + 0.36 * len(rows))
    estimate_bars(axes, rows, height=0.6, colors=COLORS[:1])

    axes.axvline(chance, color=SOFT, linestyle="--")
    axes.set_xlim(0, 1)
    label(axes, "accuracy with its 95% interval; dashed: chance")
    return svg(axes.figure)


def class_bars(names: Sequence[str], accuracies_C: Array, chance: float) -> str:
    """Draw the accuracy of each class as an SVG element, best first. Of many classes, draw the best and the worst."""
    order = np.argsort(-np.nan_to_num(accuracies_C), kind="stable")
    if len(order) > _MAX_BARS:
        order = np.concatenate([order[: _MAX_BARS // 2], order[-_MAX_BARS // 2 :]])

    axes = open_axes(0.6 + 0.24 * len(order))
    axes.barh(range(len(order)), accuracies_C[order], color=COLORS[0], height=0.7)
    axes.axvline(chance, color=SOFT, linestyle="--")

    axes.set_yticks(range(len(order)), [names[number] for number in order], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    label(axes, "fraction of the class's items that are correct; dashed: chance")
    return svg(axes.figure)


def _confusion_matrix(names: Sequence[str], confusion_CC: Array) -> str:
    """Draw a confusion matrix in percent of each row as an SVG element, of many classes the most confused ones."""
    numbers: Array = np.arange(len(confusion_CC))
    if len(numbers) > _MAX_CONFUSION_CLASSES:
        # Errors in a class's row and column: its items that were missed, and the items that were taken for its own.
        errors_C = confusion_CC.sum(axis=1) + confusion_CC.sum(axis=0) - 2 * confusion_CC.diagonal()
        numbers = np.sort(np.argsort(-errors_C, kind="stable")[:_MAX_CONFUSION_CLASSES])
    fractions = confusion_CC[np.ix_(numbers, numbers)] / np.maximum(1, confusion_CC[numbers].sum(axis=1))[:, None]

    side = 2.2 + 0.3 * len(numbers)
    axes = open_axes(side, width=side + 1.5)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    if len(numbers) <= _MAX_LABELED_CLASSES:
        # Cells that round to 0% stay empty.
        for row, column in np.argwhere(fractions >= 0.005):
            color = "white" if fractions[row, column] > 0.5 else INK
            text = f"{100 * fractions[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)

    ticks = range(len(numbers))
    tick_names = [names[number] for number in numbers]
    axes.set_xticks(ticks, tick_names, rotation=90, fontsize=8)
    axes.set_yticks(ticks, tick_names, fontsize=8)
    label(axes, "predicted; numbers are % of the row", "true class")
    return svg(axes.figure)
