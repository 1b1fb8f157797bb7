"""Sweeps: many training runs on one cache, the best configurations retrained and evaluated, and a report."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from embedcache.dataset.inputs import NamedFeatures
from embedcache.files import AnyPath, locked, writing
from embedcache.progress import AnyProgress, to_progress
from embedcache.provenance import write_record
from embedcache.registry import require
from embedcache.reports.render import write_page
from embedcache.settings import merge_settings
from embedcache.sweep.report import SweepReport, present_sweep, sweep_json
from embedcache.sweep.settings import SweepSettings
from embedcache.train.data import Paths, TrainData, open_data

if TYPE_CHECKING:
    from embedcache.options import SweepOptions
    from embedcache.sweep.space import Space


def sweep(
    caches: Paths,
    study: AnyPath,
    space: AnyPath,
    *,
    feature: NamedFeatures = None,
    settings: SweepSettings | None = None,
    progress: AnyProgress = None,
    **options: Unpack["SweepOptions"],
) -> SweepReport:
    """Train with many settings, retrain the best ones with several seeds, and report.

    Configurations are selected on validation and reported on test. Features are read once for all trials of a process.
    Several processes map them. The same call resumes an interrupted study, and extends it if more trials are requested.
    Several processes with one study share its trials.

    Args:
        space: TOML file with fixed and swept settings.
        feature: features of two modalities, as in `train`.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: shows one note per trial.

    Raises:
        MissingExtraError: Optuna or scikit-learn is not installed.
        SettingError: the space contains an invalid setting, or no trial is complete.
        FingerprintError: the folder's study has another space, other features, another sampler or pruner.
        PathError: the folder contains other files, or the storage cannot be opened.
        UnfinishedError: a feature has missing chunks, or all workers died.

    Example:
        >>> print(Path("space.toml").read_text())
        [fixed]
        split = "key"
        epochs = 1
        [space]
        lr = [0.001, 0.01]
        >>> settings = embedcache.SweepSettings(sampler="grid", top_configs=1, seeds_per_config=1)
        >>> report = embedcache.sweep_projectors("cache", "study", "space.toml", settings=settings)
        >>> report.counts()
        {'complete': 2, 'pruned': 0, 'failed': 0}
        >>> report.winner.params["lr"] in (0.001, 0.01)
        True
    """
    # scikit-learn is needed only at the end, to measure importance.
    for library in ("optuna", "sklearn"):
        require(library, extra="sweep")
    from embedcache.sweep.space import read_space
    from embedcache.sweep.study import check_storage, make_grid_points, manifest_path, open_study
    from embedcache.sweep.trials import StudyJob, collect_report, draw_study, run_workers, work

    settings = merge_settings(SweepSettings, settings, options)
    folder = Path(study)
    progress = to_progress(progress)

    # An infinite grid or a wrong URL is rejected before the study is created, which would keep it.
    search_space = read_space(Path(space))
    make_grid_points(search_space, settings)
    if settings.storage is not None and not manifest_path(folder).is_file():
        check_storage(settings.storage)

    memory = search_space.settings({}).machine.memory
    data = open_data(caches, feature, memory_bytes=memory, progress=progress)
    search_space = _with_block_rows(search_space, data)
    with writing(folder):
        manifest = open_study(folder, data, search_space, settings, progress=progress)
        paths = tuple(str(cache.path) for cache in data.caches)
        job = StudyJob(caches=paths, path=folder, study=manifest, space=search_space, settings=settings)

        with closing(job.trials()) as trials:
            if settings.workers > 1:
                run_workers(job, progress)
                data = job.mapped_data()
            work(job, data, trials, progress)
            report = collect_report(job, data, trials)
            figures = draw_study(trials.optuna)

        # Other processes may finish the same study.
        with locked(folder):
            write_record(report.json_path, sweep_json(report))
            write_page(report.page_path, present_sweep(report, figures))
    return report


def _with_block_rows(space: "Space", data: TrainData) -> "Space":
    """Fix the size of shuffled blocks by the size of the features only.

    Otherwise training would choose it by whether they are mapped, which depends on the number of workers.
    """
    if "block_rows" in {**space.fixed, **space.ranges}:
        return space
    return replace(space, fixed={**space.fixed, "block_rows": data.block_rows})
