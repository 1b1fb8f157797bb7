"""Models on onnxruntime, on the CPU: exported once, checked against torch, and kept in the user's cache folder."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.arrays import Array, Floats
from embedcache.devices import announce_device
from embedcache.encoders.base import Backend
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.torch_backend import TorchGraph
from embedcache.errors import ArtifactError, CorruptError
from embedcache.files import replacing, user_folder, write_atomic
from embedcache.provenance import digest, digest_file
from embedcache.registry import require

_OPSET = 17
_EXPORT_ERRORS = (
    *(RuntimeError, TypeError, ValueError, IndexError, NotImplementedError),
    *(AttributeError, KeyError, AssertionError),
)
"""Errors of models that cannot be traced, or have an operator that ONNX lacks."""


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """A torch module and what its ONNX export needs.

    Args:
        module: takes the inputs by name, in the order of `example`, and returns a dict of tensors.
        example: input name -> array to trace the module with.
        dynamic_axes: input or output name -> names of its dynamic axes, by number.
        check_inputs: inputs of other sizes along the dynamic axes; the export must agree with torch on them.
        key: JSON values that determine the graph together with the weights; `name` starts the file name.
    """

    module: torch.nn.Module
    example: Mapping[str, Array]
    outputs: Sequence[str]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    check_inputs: Mapping[str, Array] = field(default_factory=dict)
    key: Mapping[str, Any] = field(default_factory=dict)


class OnnxGraph:
    """An ONNX file, opened by onnxruntime on the CPU."""

    backend: Backend = "onnxruntime"

    def __init__(self, path: Path) -> None:
        self.path = path
        announce_device("cpu")
        runtime = require("onnxruntime", extra="onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        # Spinning idle threads take cores from the decoding threads: 8% fewer images/s, 12% fewer texts/s.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        failures = runtime.capi.onnxruntime_pybind11_state
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (
            *(failures.InvalidProtobuf, failures.InvalidArgument, failures.Fail),
            *(failures.InvalidGraph, failures.NoSuchFile),
        ) as error:
            raise CorruptError(f"cannot read {path} as ONNX; delete it and run the command again") from error
        except failures.NotImplemented as error:
            raise ArtifactError(f"onnxruntime lacks an operator of {path.name}") from error

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        """Compute the named outputs of one batch, by name, each with B rows."""
        return dict(zip(names, self._session.run(list(names), dict(inputs)), strict=True))


def export_once(export: OnnxExport, weights: str) -> Path:
    """Return the path of the exported graph; export and check it if it does not exist yet, or has changed.

    Args:
        weights: digest of the weights.

    Raises:
        ArtifactError: the model cannot be exported, or its export computes other values than torch.
    """
    key = {
        **export.key,
        "weights": weights,
        "inputs": {name: str(array.dtype) for name, array in export.example.items()},
        "outputs": list(export.outputs),
        "torch": torch.__version__,
        "opset": _OPSET,
    }
    name = str(key["name"]).replace("/", "--")
    path = user_folder() / "onnx" / f"{name}-{digest(key)[:32]}.onnx"
    if not is_intact(path):
        require("onnx", extra="onnx")
        export.module.eval()
        with replacing(path) as temporary:
            export_graph(export, temporary)
            _check_agreement(export, OnnxGraph(temporary))
            found = digest_file(temporary)
        write_atomic(_digest_path(path), found.encode())
    return path


def export_graph(export: OnnxExport, path: Path) -> None:
    """Write a module as an ONNX file; ArtifactError if it has an operator that ONNX lacks, or cannot be traced."""
    arguments = tuple(torch.from_numpy(array) for array in export.example.values())
    module = _PositionalModule(export.module, list(export.example), export.outputs)
    # The exporter warns about its own age and about every Python branch; the comparison with torch decides instead.
    with warnings.catch_warnings(), torch.inference_mode(), _no_graph_dump():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                module.eval(),  # the exporter restores the earlier mode
                arguments,
                str(path),
                input_names=list(export.example),
                output_names=list(export.outputs),
                dynamic_axes=dict(export.dynamic_axes),
                opset_version=_OPSET,
                dynamo=False,
            )
        except _EXPORT_ERRORS as error:
            first_line = str(error).partition("\n")[0]
            raise ArtifactError(f"cannot export the model to ONNX: {first_line}") from error


@contextmanager
def _no_graph_dump() -> Iterator[None]:
    """Keep torch from printing its graph to stdout, hundreds of lines, if an export fails; none of its options does."""
    print_graph = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = print_graph


class _PositionalModule(torch.nn.Module):
    """A module with positional inputs and outputs, as the exporter requires."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self._module, self._inputs, self._outputs = module, inputs, outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._module(**dict(zip(self._inputs, tensors, strict=True)))
        return tuple(outputs[name] for name in self._outputs)


def is_intact(graph: Path) -> bool:
    """Return whether an exported graph exists, and has the digest that was written beside it; both count as used."""
    path = _digest_path(graph)
    if not (graph.is_file() and path.is_file() and path.read_bytes() == digest_file(graph).encode()):
        return False
    for used in (graph, path):
        with suppress(OSError):
            os.utime(used)  # so that those that nothing uses can be deleted
    return True


def _digest_path(graph: Path) -> Path:
    return graph.with_suffix(".sha256")


def _check_agreement(export: OnnxExport, graph: OnnxGraph) -> None:
    """Check that a graph computes what its module does on the CPU, or raise an `ArtifactError`."""
    expected = TorchGraph(export.module, EncoderSettings(device="cpu"))(export.check_inputs, export.outputs)
    outputs = graph(export.check_inputs, export.outputs)
    for name in export.outputs:
        # The packaged models differ by at most 1e-5; a constant that the tracer froze wrongly differs by 1e-1 and more.
        if not np.allclose(outputs[name], expected[name], rtol=1e-3, atol=1e-3):
            raise ArtifactError(f"the ONNX export of {export.key['name']} computes another {name} than torch")
