"""A torch module exported once to ONNX, kept in the user's cache folder, and run with onnxruntime on the CPU."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from embedcache.arrays import Array, Floats
from embedcache.artifact import digest
from embedcache.disk import replacing
from embedcache.errors import ArtifactError, CorruptError
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
