"""Figures of runs in the files that CLIP_benchmark writes, so that its `build` puts ours and its own into one table.

Those of probes know no run: `evaluate/probe_report.py` writes them alike."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from embedcache.errors import SettingError
from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.evaluate.zero_shot import ZeroShotReport
from embedcache.files import make_folder
from embedcache.provenance import write_json
from embedcache.reports.retrieval import retrieval_json
from embedcache.reports.zero_shot import zero_shot_json
from embedcache.store.cache import Cache

MODEL = "embedcache"
"""What stands for the model in a result, and for its kind among CLIP_benchmark's model types."""

Task: TypeAlias = Literal["zeroshot_classification", "zeroshot_retrieval"]

METRICS: Mapping[Task, str] = {
    "zeroshot_classification": "acc1|acc5|mean_per_class_recall",
    "zeroshot_retrieval": r"(image|text)_retrieval_recall@\d+",
}
"""Task -> a pattern of the names that CLIP_benchmark gives its metrics."""

_RETRIEVED = {"t2i": "image", "i2t": "text"}
_NUM_TOP = 5


def clip_benchmark_result(
    task: Task,
    metrics: Mapping[str, float],
    *,
    dataset: Path | str,
    runs: Sequence[Path | str],
    language: str | None,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """Give one result with CLIP_benchmark's fields, and `details`, which is ours.

    Args:
        task: by CLIP_benchmark's name.
        metrics: shares from 0 to 1 by CLIP_benchmark's names, see `METRICS`.
        dataset: path of what was evaluated on; its last part names it.
        runs: the run, or the seeds that were averaged.
        language: of class names and templates, or of captions.
        details: JSON values: counts, chance, intervals.

    Returns:
        `dataset`, `model`, `pretrained` (the runs with commas between), `task`, `metrics`, `language`, `details`.

    Raises:
        SettingError: a metric that the task does not have.
    """
    for name in metrics:
        if not re.fullmatch(METRICS[task], name):
            raise SettingError(f"{name!r} is no metric of {task}: CLIP_benchmark has {METRICS[task]}")
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
    """Give a retrieval report as CLIP_benchmark's `zeroshot_retrieval`.

    `image_retrieval_recall@K` is the share of texts with their image among the first K, `text_retrieval_recall@K`
    that of images with any of their texts there. Two things differ: equal texts and copies of an image belong together
    here and not there; among equal similarities we count the wrong ones first, CLIP_benchmark takes any.

    Args:
        report: of the runs.
        cache: what was evaluated on.
        runs: the run, or the seeds that were averaged.
    """
    metrics = {
        f"{_RETRIEVED[way]}_retrieval_recall@{name.removeprefix('r@')}": estimate.value
        for way, recalls in report.recalls.items()
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
    """Give a zero-shot report as CLIP_benchmark's `zeroshot_classification`; `acc5` from five classes on, as there.

    Args:
        report: of the runs.
        cache: the images.
        prompts: the cache of the classes' prompts, which knows their language.
        runs: the run, or the seeds that were averaged.
    """
    metrics = {name: estimate.value for name, estimate in report.accuracies.items()}
    if len(report.names) < _NUM_TOP:
        del metrics["acc5"]
    languages = set(Cache(prompts).items("text")["language"].to_pylist())
    return clip_benchmark_result(
        "zeroshot_classification",
        metrics,
        dataset=cache,
        runs=runs,
        language=languages.pop() if len(languages) == 1 else None,
        details={"prompts": str(prompts), **zero_shot_json(report)},
    )


def write_results(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write results for `clip_benchmark build`, which takes files and folders and makes a row of each file.

    Args:
        path: a `.json` file, for the first result, with the others in its `details.others`; or a folder, for a file
            each.
        results: name -> result, at least one.
    """
    if path.suffix == ".json":
        (_, first), *others = results.items()
        details = {**first["details"], "others": dict(others)} if others else first["details"]
        write_json(path, {**first, "details": details})
        return
    make_folder(path)
    for number, (name, result) in enumerate(results.items()):
        plain = re.sub(r"[^\w.=+-]+", "-", name)
        write_json(path / f"{number:02}-{plain}.json", result)
