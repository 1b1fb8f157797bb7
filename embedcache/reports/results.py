"""Metrics of runs in the JSON files of CLIP_benchmark, so that its `build` joins ours and its own in one table.

`embedcache.reports.probe` writes those of probes, which know no run.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedcache.errors import SettingError
from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.evaluate.zero_shot import ZeroShotReport
from embedcache.modalities import MODALITIES
from embedcache.outputs import write_report_json
from embedcache.reports.retrieval import retrieval_json
from embedcache.reports.zero_shot import zero_shot_json
from embedcache.store.cache import Cache

MODEL = "embedcache"
"""Name of the model in a result, and of its type among CLIP_benchmark's model types."""

_METRICS = {
    "zeroshot_classification": "acc1|acc5|mean_per_class_recall",
    "zeroshot_retrieval": rf"({'|'.join(MODALITIES)})_retrieval_recall@\d+",
}
"""Task -> regular expression of CLIP_benchmark's metric names, which has those of images and texts only."""


def clip_benchmark_result(
    task: str,
    metrics: Mapping[str, float],
    *,
    dataset: Path | str,
    runs: Sequence[Path | str],
    language: str | None,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """Return one result with CLIP_benchmark's keys; its dataset is named by the last part of the path.

    `metrics` are fractions from 0 to 1 by the names of `_METRICS`, or else a SettingError; `runs` are the run, or the
    seeds that were averaged; `details` are our own JSON values.
    """
    for name in metrics:
        if not re.fullmatch(_METRICS[task], name):
            raise SettingError(f"metric of {task}: expected CLIP_benchmark's {_METRICS[task]}, got {name!r}")
    return {
        "dataset": Path(dataset).name,
        "model": MODEL,
        "pretrained": ",".join(map(str, runs)),
        "task": task,
        "metrics": dict(metrics),
        "language": language,
        "details": dict(details),
    }


def retrieval_result(report: RetrievalReport, *, cache: Path | str, runs: Sequence[Path | str]) -> dict[str, Any]:
    """Return a retrieval report of a run, or of seeds that were averaged, as CLIP_benchmark's `zeroshot_retrieval`.

    `image_retrieval_recall@K` is the fraction of texts with their image among the top K, `text_retrieval_recall@K`
    that of images with any of their texts there. Two things differ: equal texts and copies of an image are positives
    of each other here and not there; among equal similarities we rank the wrong ones first, CLIP_benchmark any.
    """
    first, second = report.num_items
    retrieved = dict(zip(report.directions, (second, first), strict=True))
    metrics = {
        f"{retrieved[direction]}_retrieval_recall@{name.removeprefix('r@')}": estimate.value
        for direction, recalls in report.recalls.items()
        for name, estimate in recalls.items()
    }
    return clip_benchmark_result(
        "zeroshot_retrieval",
        metrics,
        dataset=cache,
        runs=runs,
        language=report.language,
        details=retrieval_json(report),
    )


def zero_shot_result(
    report: ZeroShotReport, *, cache: Path | str, prompts: Path | str, runs: Sequence[Path | str]
) -> dict[str, Any]:
    """Return a zero-shot report as CLIP_benchmark's `zeroshot_classification`; `acc5` needs five classes, as there."""
    metrics = {name: estimate.value for name, estimate in report.accuracies.items()}
    if len(report.names) < 5:
        del metrics["acc5"]
    languages = set(Cache(prompts).items("text", columns=["language"])["language"].to_pylist())
    return clip_benchmark_result(
        "zeroshot_classification",
        metrics,
        dataset=cache,
        runs=runs,
        language=languages.pop() if len(languages) == 1 else None,
        details={"prompts": str(prompts), **zero_shot_json(report)},
    )


def result_files(
    path: Path,
    task: str,
    dataset: Path | str,
    recipes: Sequence[Sequence[Path]],
    languages: Sequence[str] = (),
) -> list[Path]:
    """Return the files that results are written to: a `.json` file itself, or one file per result in a folder.

    Files in a folder are named by the cache, the runs, the language and the task.

    Args:
        path: the file, or the folder.
        task: CLIP_benchmark's name of the task.
        dataset: the cache.
        recipes: the runs of each recipe.
        languages: languages in which each recipe is evaluated; empty: one that is not named.

    Raises:
        SettingError: two results have the same file.
    """
    if path.suffix == ".json":
        return [path]
    files: list[Path] = []
    for paths in recipes:
        for language in languages or ("",):
            words = [Path(dataset).name, "+".join(map(str, paths)), language, task]
            name = "_".join(re.sub(r"[^\w.=+-]+", "-", word).strip("-.") for word in words if word)
            file = path / f"{name}.json"
            if file in files:  # as of the runs a/run and a-run
                raise SettingError(f"output: expected results with files of their own, got two in {file}; name one run")
            files.append(file)
    return files


def write_results(files: Sequence[Path], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write results for `clip_benchmark build`, which makes one row of each file.

    A single file holds the first result, and the others in its `details.others`; several hold one result each.
    """
    if len(files) > 1:
        for path, result in zip(files, results.values(), strict=True):
            write_report_json(path, result)
        return
    (_, first), *others = results.items()
    details = {**first["details"], "others": dict(others)} if others else first["details"]
    write_report_json(files[0], {**first, "details": details})
