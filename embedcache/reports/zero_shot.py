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
from embedcache.reports.retrieval import report_lines
from embedcache.settings import replace_fields
from embedcache.store.cache import Cache

_COLUMNS = {"acc1": "top-1", "acc5": "top-5", "mean_per_class_recall": "mean per class"}
_EXAMPLES_PER_OUTCOME = 6
_MAX_BARS = 40
_MAX_CONFUSION_CLASSES = 40
_MAX_LABELED_CLASSES = 20


def zero_shot_table(reports: Mapping[str, ZeroShotReport]) -> Table:
    """Return accuracies with their 95% intervals: one row per report, and a last row for the first's chance level."""
    rows = {}
    for name, report in reports.items():
        rows[name] = report.accuracies
        if report.over_seeds:
            rows[f"{name}, over seeds"] = report.over_seeds
        if report.unnamed:
            rows[f"{name}, no class named"] = report.unnamed
    rows["chance"] = next(iter(reports.values())).chance
    return ["", *_COLUMNS.values()], [
        [name, *(str(accuracies[column]) for column in _COLUMNS)] for name, accuracies in rows.items()
    ]


def confusion_table(report: ZeroShotReport, *, num_rows: int = 10) -> Table:
    """Return the pairs of classes that are confused most often."""
    errors_CC = report.confusion.copy()
    np.fill_diagonal(errors_CC, 0)
    totals_C = report.confusion.sum(axis=1)
    rows = []
    for position in np.argsort(-errors_CC, axis=None, kind="stable")[:num_rows]:
        true, predicted = divmod(int(position), len(errors_CC))
        count = int(errors_CC[true, predicted])
        if count:
            names = [report.names[true], report.names[predicted]]
            rows.append([*names, format_count(count), format_percent(count / totals_C[true])])
    return ["class", "predicted as", noun(report.modality), "of the class"], rows


def zero_shot_json(report: ZeroShotReport) -> dict[str, Any]:
    """Return a report as JSON values: accuracies with intervals, chance, each class, counts, seeds and overlap.

    `num_images` counts the items of any modality, so that one reader suffices.
    """
    names = report.names
    unique = [name if names.count(name) == 1 else f"{name} ({position})" for position, name in enumerate(names)]
    return {
        **estimates_json(report.accuracies),
        "chance": estimates_json(report.chance),
        **({"over_seeds": estimates_json(report.over_seeds)} if report.over_seeds else {}),
        **({"no_class_named": estimates_json(report.unnamed)} if report.unnamed else {}),
        **({} if report.num_named is None else {"num_named_classes": report.num_named}),
        "by_class": dict(zip(unique, map(round_json, report.by_class), strict=True)),
        "acc1_by_seed": [round_json(accuracy) for accuracy in report.by_seed],
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
    cache, first = Cache(cache), next(iter(reports.values()))
    prompts = Cache(first.prompts_path)
    chance = first.chance["acc1"].value
    notes = [
        "In brackets the 95% interval; over seeds, one that holds the variance of seeds, too; for chance, the range "
        "that holds 95% of random guesses."
    ]
    if any(report.unnamed for report in reports.values()):
        notes.append("No class named: only items of classes whose name contains none of the run's prototypes.")
    accuracy = Section(
        title="Accuracy",
        notes=notes,
        table=zero_shot_table(reports),
        figures=lambda: [accuracy_bars({name: each.accuracies["acc1"] for name, each in reports.items()}, chance)],
    )
    confusions = Section(
        title="Confusions",
        notes=["Sum over all runs."],
        table=confusion_table(first),
        num_printed=0,
        figures=lambda: [_confusion_matrix(first.names, first.confusion)],
    )
    renderer, name = ItemRenderer(cache, first.modality), noun(first.modality)

    def show_items() -> list[QueryExample]:
        run = load_runs(first.run_paths[:1], device=settings.device)[0]
        return _examples(renderer, classify(cache, run, prompts, replace_fields(settings, check_overlap=False)))

    items = Section(
        title=name.capitalize(),
        notes=[f"Drawn at random: first {name} whose top class is correct, then {name} whose top class is wrong."],
        examples=show_items,
    )
    classes = Section(title="Classes", figures=lambda: [class_bars(first.names, first.by_class, chance)])
    return Presentation(
        title="Zero-shot classification",
        lines=report_lines(reports),
        warnings=[f"{name}: {report.warning}" for name, report in reports.items() if report.warning],
        sections=[accuracy, classes, confusions, items],
        record=lambda: one_or_list([_result(report, cache, prompts) for report in reports.values()]),
        renderers=[renderer],
    )


def _result(report: ZeroShotReport, cache: Cache, prompts: Cache) -> dict[str, Any]:
    """Return a report as CLIP_benchmark's `zeroshot_classification`; `acc5` needs five classes, as there."""
    metrics = {name: estimate.value for name, estimate in report.accuracies.items()}
    if len(report.names) < 5:
        del metrics["acc5"]
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
    names, examples = classified.names, []
    for position in sample_outcomes(classified.predicted[:, 0] == classified.labels, _EXAMPLES_PER_OUTCOME):
        true = int(classified.labels[position])
        results = [
            PageItem(text=names[number], is_correct=number == true)
            for number in classified.predicted[position].tolist()
        ]
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
    """Draw the accuracy of each class, best first, as an SVG element; of many classes the best and the worst."""
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
    """Draw a confusion matrix in percent of each row as an SVG element; of many classes those confused most."""
    shown: Array = np.arange(len(confusion_CC))
    if len(shown) > _MAX_CONFUSION_CLASSES:
        errors_C = confusion_CC.sum(axis=1) + confusion_CC.sum(axis=0) - 2 * confusion_CC.diagonal()
        shown = np.sort(np.argsort(-errors_C, kind="stable")[:_MAX_CONFUSION_CLASSES])
    fractions = confusion_CC[np.ix_(shown, shown)] / np.maximum(1, confusion_CC[shown].sum(axis=1))[:, None]
    side = 2.2 + 0.3 * len(shown)
    axes = open_axes(side, width=side + 1.5)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    if len(shown) <= _MAX_LABELED_CLASSES:
        for row, column in np.argwhere(fractions >= 0.005):
            color = "white" if fractions[row, column] > 0.5 else INK
            text = f"{100 * fractions[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    ticks = range(len(shown))
    axes.set_xticks(ticks, [names[number] for number in shown], rotation=90, fontsize=8)
    axes.set_yticks(ticks, [names[number] for number in shown], fontsize=8)
    label(axes, "predicted; numbers are % of the row", "true class")
    return svg(axes.figure)
