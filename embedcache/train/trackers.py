"""Trackers: where the curves of a run go besides `losses.jsonl`: TensorBoard, and Weights & Biases."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from embedcache.errors import SettingError, one_line
from embedcache.registry import require, unknown_name

_log = logging.getLogger(__name__)


class _Tracker(NamedTuple):
    log: Callable[[int, Mapping[str, float]], object]
    finish: Callable[[bool], object]


def _open_tensorboard(path: Path, run_id: str, first_step: int, config: Mapping[str, Any]) -> _Tracker:
    """Write event files into the folder `tensorboard` of the run; those of steps that are repeated are hidden."""
    del run_id, config
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(path / "tensorboard"), purge_step=first_step)

    def log(step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return _Tracker(log, lambda failed: writer.close())  # noqa: ARG005


def _open_wandb(path: Path, run_id: str, first_step: int, config: Mapping[str, Any]) -> _Tracker:
    """Make a run in the project WANDB_PROJECT, or `embedcache`; steps that are repeated are ignored there."""
    del first_step
    wandb = require("wandb", package="wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "embedcache",
        id=run_id,
        name=str(path),
        config=dict(config),
        resume="allow",
        reinit="create_new",  # a run that the caller has open stays open
        settings=wandb.Settings(console="off"),  # prints are not copied
    )
    return _Tracker(lambda step, scalars: run.log(dict(scalars), step=step), lambda failed: run.finish(int(failed)))


_OPENERS = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist, and that their libraries are installed.

    Raises:
        UnknownNameError: there is no tracker of a name.
        MissingExtraError: its library is not installed.
    """
    for name in names:
        if name not in _OPENERS:
            raise unknown_name("tracker", name, _OPENERS)
        require(name, package=name)


class Trackers:
    """Several trackers of a run as one. One that fails during training is dropped, with a warning.

    Args:
        names: their names.
        path: folder of the run, as the user named it.
        run_id: random text that stays the same when the run resumes.
        first_step: step that is logged next; above 0, the run resumes.
        config: the settings of the run.

    Raises:
        SettingError: one cannot start, such as without a login.
    """

    def __init__(
        self, names: Sequence[str], path: Path, *, run_id: str, first_step: int, config: Mapping[str, Any]
    ) -> None:
        self._trackers: dict[str, _Tracker] = {}
        for name in names:
            try:
                with redirect_stdout(sys.stderr):  # standard output is for results
                    self._trackers[name] = _OPENERS[name](path, run_id, first_step, config)
            except Exception as error:
                raise SettingError(
                    f"report_to: {name} cannot start: {one_line(error)}; check it, or omit it"
                ) from error

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of a step: loss and learning rate after each, validation metrics after an epoch."""
        self._call(lambda tracker: tracker.log(step, scalars))

    def finish(self, *, failed: bool) -> None:
        """End the run in every tracker, or this process's work on it."""
        self._call(lambda tracker: tracker.finish(failed))

    def _call(self, method: Callable[[_Tracker], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                with redirect_stdout(sys.stderr):
                    method(tracker)
            except Exception as error:  # noqa: BLE001 - of another library; hours of training are worth more
                del self._trackers[name]
                _log.warning("%s stopped recording: %s; losses.jsonl has all values", name, one_line(error))
