"""Models on torch, on any device: batches that do not fit its memory are split."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from embedcache.arrays import Array, Floats
from embedcache.devices import announce_device, autocast, torch_device
from embedcache.encoders.base import Backend
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import SettingError

_log = logging.getLogger(__name__)


class TorchGraph:
    """A torch module on its device.

    A batch that does not fit the device's memory is split in halves, and later batches are split alike.
    """

    backend: Backend = "torch"

    def __init__(self, module: torch.nn.Module, settings: EncoderSettings) -> None:
        self._device = torch_device(settings.device)
        announce_device(self._device)
        self._module = module.eval().to(self._device)
        self._precision = settings.precision
        self._max_rows: int | None = None
        if self._device.type == "cuda" and settings.precision not in ("float16", "bfloat16"):
            torch.backends.cudnn.allow_tf32 = False  # TF32 convolutions keep 10 bits of a float32
        if settings.compile:
            self._module.compile()

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        """Run one batch; outputs are float32 at any precision."""
        num_rows = len(next(iter(inputs.values())))
        parts: list[dict[str, Floats]] = []
        start = 0
        while start < num_rows:
            rows = slice(start, min(start + (self._max_rows or num_rows), num_rows))
            part = self._try({name: array[rows] for name, array in inputs.items()}, names)
            if part is None:
                self._halve_batch(rows.stop - rows.start)
            else:
                parts.append(part)
                start = rows.stop
        return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _try(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats] | None:
        try:
            with torch.inference_mode(), autocast(self._device.type, self._precision):
                outputs = self._module(**{name: self._to_device(array) for name, array in inputs.items()})
                return {name: outputs[name].float().cpu().numpy() for name in names}
        except torch.OutOfMemoryError:
            return None

    def _to_device(self, array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":  # only copies from pinned memory are asynchronous
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _halve_batch(self, num_rows: int) -> None:
        if num_rows == 1:
            raise out_of_memory(self._device)
        self._max_rows = num_rows // 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        _log.warning("%s is out of memory at batch size %d; continuing with %d", self._device, num_rows, self._max_rows)


def out_of_memory(device: torch.device) -> SettingError:
    """Create the error for a device whose memory does not hold the forward pass of one item."""
    return SettingError(
        f"the memory of {device} is too small for one item; use precision bfloat16 or float16, a smaller model or "
        "another device"
    )
