"""Trackers: where the curves of a run go besides `losses.jsonl`. TensorBoard, Weights & Biases, MLflow, trackio, yours.

A tracker of yours is a class that takes a `TrackedRun` and has the methods of `Tracker`, named `module:attribute`.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from embedcache.errors import EmbedcacheError, SettingError, one_line
from embedcache.registry import Registry, require

_log = logging.getLogger(__name__)

_PROJECT = "embedcache"
_MLFLOW_ID = "embedcache.run_id"
_MLFLOW_BATCH = 500
_MLFLOW_SECONDS = 5.0
_NEXT_STEPS = {
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI",
    "trackio": "check TRACKIO_DIR",
}


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """Description of a run for its trackers.

    Args:
        path: folder of the run, as the user named it.
        id: random text that stays the same when the run resumes.
        first_step: step that is logged next; above 0, the run resumes. Values of later steps may have been logged by
            the interrupted process, and are logged again: they are the same.
        config: the settings of the run as JSON values, nested.
    """

    path: Path
    id: str
    first_step: int
    config: Mapping[str, Any]


class Tracker(Protocol):
    """Receives the scalars of a run, in the first process alone."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of a step: the loss and learning rate after each, validation metrics after an epoch."""
        ...

    def finish(self, *, failed: bool) -> None:
        """End the run, or this process's work on it if training failed or was interrupted."""
        ...


TRACKERS = Registry(
    "tracker",
    {
        "tensorboard": "embedcache.train.trackers:TensorBoard",
        "wandb": "embedcache.train.trackers:WeightsAndBiases",
        "mlflow": "embedcache.train.trackers:MLflow",
        "trackio": "embedcache.train.trackers:Trackio",
    },
    group="embedcache.trackers",
    arguments=1,
)


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and that their libraries are installed; errors as of `Trackers`."""
    for name in names:
        TRACKERS.load(name)
        if name in TRACKERS.paths:
            require(name, extra=name)


class Trackers:
    """Several trackers as one. One that fails during training is dropped, with a warning.

    Args:
        names: their names, see `TRACKERS`.
        run: the run.

    Raises:
        UnknownNameError: there is no tracker of a name.
        MissingExtraError: its library is not installed.
        SettingError: it cannot start, such as without a login.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                with redirect_stdout(sys.stderr):  # standard output is for results
                    self._trackers[name] = TRACKERS.load(name)(run)
            except EmbedcacheError:
                raise
            except Exception as error:
                step = _NEXT_STEPS.get(name, "check it")
                raise SettingError(f"report_to: {name} cannot start: {one_line(error)}; {step}, or omit it") from error

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of a step."""
        self._call("log", step, scalars)

    def finish(self, *, failed: bool) -> None:
        """End the run in every tracker."""
        self._call("finish", failed=failed)

    def _call(self, method: str, *values: Any, **options: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                with redirect_stdout(sys.stderr):
                    getattr(tracker, method)(*values, **options)
            except Exception as error:  # noqa: BLE001 - of another library; hours of training are worth more
                del self._trackers[name]
                _log.warning("%s stopped recording: %s; losses.jsonl has all values", name, one_line(error))


class TensorBoard:
    """Event files in the folder `tensorboard` of the run; those of steps that are repeated are hidden."""

    def __init__(self, run: TrackedRun) -> None:
        require("tensorboard", extra="tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=run.first_step)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one event per scalar."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, *, failed: bool) -> None:  # noqa: ARG002
        """Write what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """A run in the project WANDB_PROJECT, or `embedcache`; WANDB_MODE=offline writes into the folder `wandb` here."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = require("wandb", extra="wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            id=run.id,
            name=str(run.path),
            config=dict(run.config),
            resume="allow",
            reinit="create_new",  # a run that the caller has open stays open
            settings=wandb.Settings(console="off"),  # prints are not copied
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of a step; those of a step that is repeated are ignored."""
        self._run.log(dict(scalars), step=step)

    def finish(self, *, failed: bool) -> None:
        """Upload, or write, what is left."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run in the experiment MLFLOW_EXPERIMENT_NAME, or `embedcache`, at MLFLOW_TRACKING_URI, by default mlflow.db."""

    def __init__(self, run: TrackedRun) -> None:
        require("mlflow", extra="mlflow")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([number], f"tags.`{_MLFLOW_ID}` = '{run.id}'") if run.first_step else []
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(number, tags={_MLFLOW_ID: run.id}, run_name=str(run.path)).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in _flatten(run.config.get("training", {}))]
            self._client.log_batch(self._id, params=params[:100])
        self._pending: list[Any] = []
        self._sent = time.monotonic()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of a step; they are sent together, every few seconds."""
        now = int(time.time() * 1000)
        self._pending += [self._metric(name.replace("@", "_at_"), value, now, step) for name, value in scalars.items()]
        if len(self._pending) >= _MLFLOW_BATCH or time.monotonic() - self._sent >= _MLFLOW_SECONDS:
            self._send()

    def finish(self, *, failed: bool) -> None:
        """Send what is left, and set the status of the run."""
        self._send()
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _send(self) -> None:
        if self._pending:
            self._client.log_batch(self._id, metrics=self._pending)
        self._pending, self._sent = [], time.monotonic()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested values by dotted name."""
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        pairs += _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return pairs


class Trackio:
    """A run in the project TRACKIO_PROJECT, or `embedcache`, in the database that `trackio show` opens."""

    def __init__(self, run: TrackedRun) -> None:
        self._library = require("trackio", extra="trackio")
        self._run = self._library.init(
            project=os.environ.get("TRACKIO_PROJECT") or _PROJECT,
            name=f"{run.path}-{run.id[:8]}",  # runs resume by name
            config=dict(run.config),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of a step."""
        self._run.log(dict(scalars), step=step)

    def finish(self, *, failed: bool) -> None:  # noqa: ARG002
        """Write what is left."""
        self._library.finish()  # of the module, or the run is finished again, and printed, when Python exits
