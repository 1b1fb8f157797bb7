"""A cache and a space in; many trials on it, the best of them measured, and a page about all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embedcache.files import disk_errors, locked
from embedcache.progress import NullProgress, Progress
from embedcache.registry import require
from embedcache.reports.sweep import Findings, find, write_figures, write_report
from embedcache.sweep.best import Best, measure_best
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space, read_space
from embedcache.sweep.study import open_study
from embedcache.sweep.trials import grid_points
from embedcache.sweep.worker import Job, best_trials, run_workers, work
from embedcache.train.data import Paths, TrainData, open_data

_NEIGHBOURS_ON_DISK = 64


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What a sweep found.

    Args:
        findings: all of it.
        page_path: the page to open.
        figures_path: the figures as JSON.
    """

    findings: Findings
    page_path: Path
    figures_path: Path

    @property
    def best(self) -> Sequence[Best]:
        """The best configurations; first comes what validation picks."""
        return self.findings.best


def sweep(
    cache_paths: Paths,
    study_path: Path | str,
    space_path: Path | str,
    *,
    image: str | None = None,
    text: str | None = None,
    settings: SweepSettings | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Train on one cache, or several, with many settings; train the best again with several seeds, and report.

    Validation picks, test only reports. The features are read once for all trials of a process; several processes map
    them. The same call goes on with a study that was stopped, and with more trials it makes it longer. Two processes
    that are given one study share its trials.

    Args:
        cache_paths: the cache, or several.
        study_path: a folder for the study.
        space_path: a TOML file: what is fixed and what is tried.
        image: image feature, `encoder/feature`; None where there is only one.
        text: text feature, alike.
        settings: of the search.
        progress: told about each trial.

    Raises:
        MissingExtraError: Optuna or scikit-learn is not installed.
        SettingError: the space holds what no setting can be, or no trial was complete.
        FingerprintError: the folder holds a study with another space, other features, another sampler or pruner.
        PathError: the folder holds other things, or the storage cannot be opened.
        UnfinishedError: a feature has missing chunks, or all workers died.
    """
    require("sklearn", extra="sweep")  # measures importance at the end, when it is late to learn that it is missing
    study_path, settings, progress = Path(study_path), settings or SweepSettings(), progress or NullProgress()
    space = read_space(Path(space_path))
    grid_points(space, settings)  # refuses a space without an end before a folder is made
    memory_gb = space.settings({}).machine.memory_gb
    data = open_data(cache_paths, image=image, text=text, memory_gb=memory_gb)
    space = _with_blocks(space, data)
    with disk_errors(study_path):
        study = open_study(study_path, data, space, settings)
        caches = tuple(str(cache.path) for cache in data.caches)
        job = Job(caches=caches, path=study_path, study=study, space=space, settings=settings)
        trials = job.trials()
        if settings.num_workers > 1:
            run_workers(job, progress)
            data = job.mapped_data()
        work(job, data, trials, progress.note)
        best, left_out = measure_best(study_path, data, space, best_trials(trials, settings), settings)
        findings = find(study_path, study, data, trials, best, left_out)
        report = SweepReport(
            findings=findings, page_path=study_path / "report.html", figures_path=study_path / "report.json"
        )
        with locked(study_path):
            write_figures(report.figures_path, findings)
            write_report(report.page_path, findings)
    return report


def _with_blocks(space: Space, data: TrainData) -> Space:
    """Fix which samples stay neighbors, by the size of the features alone.

    Else `train` would decide by whether they are mapped, and as workers map them, their number would change the result.
    """
    if "block_rows" in {**space.fixed, **space.ranges}:
        return space
    return replace(space, fixed={**space.fixed, "block_rows": _NEIGHBOURS_ON_DISK if data.is_mapped else 1})
