"""A torch module exported once to ONNX, kept in the user's cache folder, and run with onnxruntime on the CPU.

What runs a model: torch on any device, or onnxruntime on the CPU. Both look alike to an encoder.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch

from embedcache.arrays import Array, Floats
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import ArtifactError, CorruptError, SettingError
from embedcache.files import replacing
from embedcache.provenance import digest
from embedcache.registry import require

_OPSET = 17
_ERRORS_ONLY = 3


class OnnxGraph:
    """An ONNX file, ready to run.

    Args:
        path: the file.

    Raises:
        CorruptError: it is not one that onnxruntime can read.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        runtime = require("onnxruntime", extra="cpu")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = _ERRORS_ONLY
        # Idle threads that spin take the cores from the threads that decode: 8 % fewer images/s, 12 % fewer texts/s.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        failures = runtime.capi.onnxruntime_pybind11_state
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (failures.InvalidProtobuf, failures.Fail, failures.InvalidGraph, failures.NoSuchFile) as error:
            raise CorruptError(f"{path} can't be read as ONNX; delete it and run again") from error

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        """Run one batch; what is not named is not computed."""
        return dict(zip(names, self._session.run(list(names), dict(inputs)), strict=True))


def onnx_folder() -> Path:
    """The folder of exported models: `embedcache/onnx` below XDG_CACHE_HOME, or below ~/.cache."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "embedcache" / "onnx"


def export_once(
    module: torch.nn.Module,
    *,
    example: Mapping[str, Array],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    what: Mapping[str, Any],
    check: Callable[[OnnxGraph], None],
) -> Path:
    """Export a module unless the same export is there already.

    Args:
        module: in eval mode on the CPU; takes the inputs in the order of `example`, gives a dict of tensors.
        example: input name -> an array to trace it with.
        outputs: which of the module's outputs to export, all with the batch as their first axis.
        axes: input or output name -> names of its axes that may change, by number.
        what: JSON values that decide the graph, weights' hash included; `name` starts the file's name.
        check: called with the new graph before it takes its place; raises if it is wrong.

    Raises:
        ArtifactError: the module can't be traced.
    """
    name = str(what["name"]).replace("/", "--")
    path = onnx_folder() / f"{name}-{digest({**what, **_exporter()})[:32]}.onnx"
    if not path.is_file():
        require("onnx", extra="cpu")
        with replacing(path) as temporary:
            export_graph(temporary, module, example=example, outputs=outputs, axes=axes)
            check(OnnxGraph(temporary))
    return path


class _Ordered(torch.nn.Module):
    """Inputs and outputs by position, as the exporter wants them."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self._module, self._inputs, self._outputs = module, inputs, outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._module(**dict(zip(self._inputs, tensors, strict=True)))
        return tuple(outputs[name] for name in self._outputs)


def _exporter() -> dict[str, Any]:
    return {"torch": torch.__version__, "opset": _OPSET}


def export_graph(
    path: Path,
    module: torch.nn.Module,
    *,
    example: Mapping[str, Array],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
) -> None:
    """Write a module as an ONNX file; the arguments are those of `export_once`.

    Raises:
        ArtifactError: the module can't be traced.
    """
    arguments = tuple(torch.from_numpy(array) for array in example.values())
    # The exporter warns that it is the older one, and of every Python branch it follows; `check` is the judge.
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                _Ordered(module, list(example), outputs).eval(),  # afterwards the exporter puts back the mode it found
                arguments,
                str(path),
                input_names=list(example),
                output_names=list(outputs),
                dynamic_axes=dict(axes),
                opset_version=_OPSET,
                dynamo=False,
            )
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            first_line = str(error).partition("\n")[0]
            raise ArtifactError(f"{type(module).__name__} does not export to ONNX: {first_line}") from error


Backend: TypeAlias = Literal["torch", "onnxruntime"]

MAX_ONNX_BYTES = 1_900_000_000
"""One ONNX file is a protobuf message, which ends at 2 GiB."""

_log = logging.getLogger(__name__)


class Graph(Protocol):
    """Arrays in, named arrays out."""

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        """Run one batch; every input and output has the batch as its first axis."""
        ...


class TorchGraph:
    """A torch module, moved to its device once.

    A batch that does not fit the device's memory is run in halves, and so are those after it.

    Args:
        module: takes the inputs by name and gives a dict of tensors.
        settings: device, precision, and whether to compile.
    """

    def __init__(self, module: torch.nn.Module, settings: EncoderSettings) -> None:
        self._device = torch_device(settings.device)
        self._module = module.eval().to(self._device)
        self._is_bfloat16 = settings.precision == "bfloat16"
        self._max_rows: int | None = None
        if self._device.type == "cuda" and not self._is_bfloat16:
            torch.backends.cudnn.allow_tf32 = False  # else float32 convolutions keep 10 bits
        if settings.compile:
            self._module.compile()

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        """Run one batch; the outputs are float32 whatever the precision.

        Raises:
            SettingError: the device's memory is too small for a single item.
        """
        num_rows = len(next(iter(inputs.values())))
        parts: list[dict[str, Floats]] = []
        start = 0
        while start < num_rows:
            rows = slice(start, min(start + (self._max_rows or num_rows), num_rows))
            part = self._try({name: array[rows] for name, array in inputs.items()}, names)
            if part is None:
                self._halve(rows.stop - rows.start)
            else:
                parts.append(part)
                start = rows.stop
        return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _try(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats] | None:
        half = torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._is_bfloat16)
        try:
            with torch.inference_mode(), half:
                outputs = self._module(**{name: self._to_device(array) for name, array in inputs.items()})
                return {name: outputs[name].float().cpu().numpy() for name in names}
        except torch.OutOfMemoryError:
            return None

    def _to_device(self, array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":  # copies from pinned memory need not wait for one another
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _halve(self, num_rows: int) -> None:
        if num_rows == 1:
            raise SettingError(
                f"the memory of {self._device} is too small for one item; "
                "use precision bfloat16, a smaller model or another device"
            )
        self._max_rows = num_rows // 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        _log.warning("%s is out of memory at a batch of %d, going on with %d", self._device, num_rows, self._max_rows)


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A torch module that can also run on onnxruntime.

    Args:
        module: takes the inputs in the order of `example` and gives a dict of tensors.
        example: input name -> an array to trace it with.
        other: the same with other sizes on the axes that may change; the export must agree with torch on it.
        outputs: the names of what it gives.
        axes: input or output name -> names of its axes that may change.
        what: JSON values that, with the weights' hash, decide the graph; `name` starts the file's name.
    """

    module: torch.nn.Module
    example: Mapping[str, Array]
    other: Mapping[str, Array]
    outputs: Sequence[str]
    axes: Mapping[str, Mapping[int, str]]
    what: Mapping[str, Any]


def make_graph(exportable: Exportable, settings: EncoderSettings, weights: str) -> tuple[Graph, Backend]:
    """Choose what runs a model that exports to ONNX.

    `auto` is onnxruntime where it can be: float32 on the CPU, the cpu extra installed, weights small enough for
    one file and an export that agrees with torch. Else it is torch. The choice is part of the fingerprint.

    Raises:
        SettingError: onnxruntime was asked for with another device or precision.
        ArtifactError: onnxruntime was asked for and the model does not export.
    """
    if settings.backend == "torch" or (settings.backend == "auto" and not _suits_onnx(exportable.module, settings)):
        return TorchGraph(exportable.module, settings), "torch"
    _check_onnx(settings)
    try:
        return _onnx_graph(exportable, weights), "onnxruntime"
    except ArtifactError as error:
        if settings.backend == "onnxruntime":
            raise
        _log.warning("running on torch: %s", error)
        return TorchGraph(exportable.module, settings), "torch"


def torch_graph(module: torch.nn.Module, settings: EncoderSettings, family: str) -> TorchGraph:
    """Run a model of a family that has no ONNX export.

    Raises:
        SettingError: onnxruntime was asked for.
    """
    if settings.backend == "onnxruntime":
        raise SettingError(
            f"the encoder family {family!r} runs on torch only, asked for the backend onnxruntime; "
            "use backend auto or torch"
        )
    return TorchGraph(module, settings)


def batch_size(settings: EncoderSettings, *, cpu: int, other: int) -> int:
    """Choose how many items one batch has: what was asked for, else what suits the device."""
    return settings.batch_size or (cpu if torch_device(settings.device).type == "cpu" else other)


def torch_device(name: str) -> torch.device:
    """Get a device that is there.

    Raises:
        SettingError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        first_line = str(error).partition("\n")[0]
        raise SettingError(f"no device {name!r} here ({first_line}); there are: {', '.join(there)}") from error
    return device


def _suits_onnx(module: torch.nn.Module, settings: EncoderSettings) -> bool:
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    is_installed = find_spec("onnx") is not None and find_spec("onnxruntime") is not None
    is_cpu = torch_device(settings.device).type == "cpu"
    return is_installed and is_cpu and settings.precision == "float32" and num_bytes < MAX_ONNX_BYTES


def _check_onnx(settings: EncoderSettings) -> None:
    if torch_device(settings.device).type != "cpu":
        raise SettingError(f"onnxruntime runs on the CPU here, asked for {settings.device!r}; use backend torch")
    if settings.precision != "float32":
        raise SettingError(f"onnxruntime runs in float32, asked for {settings.precision}; use backend torch")


def _onnx_graph(exportable: Exportable, weights: str) -> OnnxGraph:
    path = export_once(
        exportable.module.eval(),
        example=exportable.example,
        outputs=exportable.outputs,
        axes=exportable.axes,
        what={
            **exportable.what,
            "weights": weights,
            "inputs": {name: str(array.dtype) for name, array in exportable.example.items()},
            "outputs": list(exportable.outputs),
        },
        check=lambda graph: _check_agrees(exportable, graph),
    )
    return OnnxGraph(path)


def _check_agrees(exportable: Exportable, graph: OnnxGraph) -> None:
    expected = TorchGraph(exportable.module, EncoderSettings())(exportable.other, exportable.outputs)
    found = graph(exportable.other, exportable.outputs)
    for name in exportable.outputs:
        # Measured on the packaged models: 1e-5 and less; a constant wrongly frozen by the tracer gives 1e-1 and more.
        if not np.allclose(found[name], expected[name], rtol=1e-3, atol=1e-3):
            raise ArtifactError(f"the ONNX export of {exportable.what['name']} gives another {name} than torch")
