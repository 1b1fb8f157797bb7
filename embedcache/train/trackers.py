"""Trackers: where the curves of a run go besides `losses.jsonl`: TensorBoard, Weights & Biases, or a class of yours.

A tracker of yours is a class that takes a `TrackedRun` and has the methods of `Tracker`, named `module:attribute`.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from embedcache.errors import EmbedcacheError, SettingError, one_line
from embedcache.registry import Registry, require

_log = logging.getLogger(__name__)


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
    },
    group="embedcache.trackers",
    arguments=1,
)


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and that their libraries are installed; errors as of `Trackers`."""
    for name in names:
        TRACKERS.load(name)
        if name in TRACKERS.paths:
            require(name, package=name)


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
                raise SettingError(
                    f"report_to: {name} cannot start: {one_line(error)}; check it, or omit it"
                ) from error

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
        wandb = require("wandb", package="wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "embedcache",
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
