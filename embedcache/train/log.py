"""What a run writes while it trains: JSON lines, and TensorBoard events where asked."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedcache.registry import require
from embedcache.train.distributed import process_number


class RunLog:
    """Writes `losses.jsonl` of a run; of several processes, the first alone writes.

    Args:
        run_path: the run.
        num_bytes: of an earlier try's lines to keep; what stands behind them is cut off.
        step: the first step that will be written.
        tensorboard: write event files into `tensorboard` too.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, run_path: Path, *, num_bytes: int, step: int, tensorboard: bool) -> None:
        self._file = self._events = None
        if process_number():
            return
        self._file = (run_path / "losses.jsonl").open("ab")
        self._file.truncate(min(num_bytes, self._file.seek(0, os.SEEK_END)))
        if tensorboard:
            require_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_path / "tensorboard"), purge_step=step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Write what one training step gave."""
        self._write({"step": step, **values}, step, values)

    def validation(self, step: int, epoch: int, recalls: Mapping[str, float]) -> None:
        """Write the recalls after an epoch."""
        self._write({"epoch": epoch, "validation": recalls}, step, recalls)

    def num_bytes(self) -> int:
        """Bring all lines to the disk, and count their bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def _write(self, line: Mapping[str, Any], step: int, scalars: Mapping[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)


def require_tensorboard() -> None:
    """Refuse to write events without the package.

    Raises:
        MissingExtraError: it is not installed; the message holds the pip line.
    """
    require("tensorboard", extra="tensorboard")
