"""Train the module of any task, into a run folder."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from embedcache.dataset.inputs import InputFeature
from embedcache.metrics.ranking import metric_label
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.modules import ModuleConfig, ModuleInput, read_module_config, save_module
from embedcache.projectors.saved import config_path
from embedcache.provenance import Manifest
from embedcache.settings import replace_fields
from embedcache.train.checkpoint import name_device, reuse_run, train_run
from embedcache.train.distributed import process_group
from embedcache.train.parts import find_sources, load_parts, parse_trainable, source_digests
from embedcache.train.settings import FitSettings
from embedcache.train.trackers import check_trackers
from embedcache.train.trainer import OnEpoch, Task, Trainer, seeded


class ModuleReport(Manifest):
    """Result of `train_task`.

    Args:
        path: folder of the run.
        reused: whether the run existed already, with the same config.
        num_parameters: trained parameters.
        best_epoch: epoch whose weights were kept; 0 is the initialization.
        measures: validation metrics at that epoch.
        samples_per_s: training samples per second, since the run started or resumed.
        wait_fraction: fraction of the training time spent waiting for data.
    """

    path: Path = Field(exclude=True)
    reused: bool
    num_parameters: int
    best_epoch: int
    measures: dict[str, float]
    samples_per_s: float
    wait_fraction: float

    def line(self) -> str:
        """Summarize the report in one line."""
        outcome = f"best epoch {self.best_epoch}" if self.best_epoch else "the initialization was best and was kept"
        measures = ", ".join(f"{metric_label(name)} {value:.3f}" for name, value in self.measures.items())
        state = "reused, trained earlier with the same settings" if self.reused else "trained"
        return f"{self.path}: {state}: {self.num_parameters:,} parameters; {outcome}; validation {measures}"


def train_task(
    make_task: Callable[[str], Task],
    run_path: Path | str,
    config: ModuleConfig,
    settings: FitSettings,
    *,
    progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
) -> ModuleReport:
    """Train a task into a run folder, as `train` does for a pair: resumed if interrupted, reused if finished.

    Args:
        make_task: builds the task for a device, under the seed of the run; not called for a finished run.
        run_path: folder of the run.
        config: kind, arguments and sides of the module; settings, start runs and digests are filled in here. What
            else decides the result, such as a label column, belongs in `config.training`.
        settings: optimizer, machine, seed, start runs and trainable parts.
        progress: progress in training samples.
        on_epoch: called after each validation.

    Raises:
        FingerprintError: the folder holds a run with another config.
        PathError: the folder holds other files, or a start run does not exist.
        DataError: a start run lacks weights of a part, or a loss is NaN or infinite.
        UnknownNameError: the task has no part of a name.
    """
    run_path, progress = Path(run_path), progress or NullProgress()
    check_trackers(settings.machine.report_to)
    machine = name_device(settings.machine, run_path, needs_float64=True)  # some decode when they are measured
    with process_group(machine.device) as device:
        settings = replace_fields(settings, machine=replace_fields(machine, device=device))
        config = replace_fields(
            config,
            training={**config.training, **settings.to_json()},
            trainable=None if settings.parts.trainable is None else settings.parts.trainable.split("+"),
            init_runs=source_digests(settings.parts.init_from),
        )
        if config_path(run_path).is_file():
            stored = read_module_config(run_path)
            expected = replace_fields(config, weights_digest=stored.weights_digest)
            return reuse_run(
                run_path,
                stored.to_json(),
                expected.to_json(),
                lambda values: ModuleReport(path=run_path, **{**values, "reused": True}),
            )

        return train_run(
            run_path,
            config.to_json(),
            lambda: _fit(make_task, run_path, settings, progress, on_epoch),
            lambda task: save_module(run_path, task.module, config),
            recorded=config.to_json(),
        )


def describe_input(feature: InputFeature) -> ModuleInput:
    """Return the entry of an input feature in the config of a run."""
    return ModuleInput(
        modality=feature.modality,
        feature=feature.name,
        spec=feature.spec,
        fingerprint=feature.fingerprint,
        width=feature.width,
    )


def _fit(
    make_task: Callable[[str], Task],
    run_path: Path,
    settings: FitSettings,
    progress: Progress,
    on_epoch: OnEpoch | None,
) -> tuple[Task, ModuleReport]:
    with seeded(settings.seed, settings.machine.device):
        task = make_task(settings.machine.device)
    task.module.to(settings.machine.device)
    load_parts(task.module, task.parts, find_sources(settings.parts.init_from, task.parts))
    result = Trainer(
        task=task,
        optimizer=settings.optimizer,
        machine=settings.machine,
        seed=settings.seed,
        run_path=run_path,
        progress=progress,
        trainable=parse_trainable(settings.parts.trainable, task.parts),
        on_epoch=on_epoch,
    ).fit()
    trained = (parameter for parameter in task.module.parameters() if parameter.requires_grad)
    report: dict[str, Any] = asdict(result)
    return task, ModuleReport(
        path=run_path, reused=False, num_parameters=sum(value.numel() for value in trained), **report
    )
