"""The encoder class of all built-in families, and what runs its model: torch, or onnxruntime on the CPU.

On torch, on any device, batches that do not fit its memory are split. For onnxruntime a model is exported once, checked
against torch, and kept in the user's cache folder.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from embedcache.arrays import Array, Floats, blocks
from embedcache.axis import Axis
from embedcache.devices import announce_device, autocast, torch_device
from embedcache.encoders.base import Backend, EncoderSettings, Fingerprint, ItemShape, Modality, check_names
from embedcache.errors import ArtifactError, SettingError, one_line
from embedcache.files import replacing, user_folder, write_atomic
from embedcache.modeling.features import native_features
from embedcache.provenance import digest, digest_file
from embedcache.registry import is_installed, require

_MAX_ONNX_BYTES = 1_900_000_000  # an ONNX file is a protobuf message, which is limited to 2 GiB
_OPSET = 17
_EXPORT_ERRORS = (
    *(RuntimeError, TypeError, ValueError, IndexError, NotImplementedError),
    *(AttributeError, KeyError, AssertionError),
)
"""Errors of models that cannot be traced, or have an operator that ONNX lacks."""

_log = logging.getLogger(__name__)


class Graph(Protocol):
    """A model that maps named arrays to those of the given names; the first axis of each is the batch."""

    backend: Backend

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        """Compute the named outputs of one batch, by name, each with B rows."""


class GraphEncoder:
    """An encoder of any built-in family: prepares items on threads, and runs a model on batches.

    Args:
        modality: what it encodes.
        graph: computes the features; token features of texts are padded.
        prepare: raw items -> one model input each; called from many threads at once.
        collate: model inputs of one or more items -> inputs of the graph.
        features: name -> shape of one item, the default first; `(-1, D)` has as many rows as the model input.
        fingerprint: of the model; backend, precision and the list of native features are filled in here.
        settings: batch size, device and precision.
        axes: axis of each feature of tokens, where it is known.
    """

    def __init__(
        self,
        modality: Modality,
        graph: Graph,
        *,
        prepare: Callable[[Sequence[Any]], list[Array]],
        collate: Callable[[Sequence[Array]], Mapping[str, Array]],
        features: Mapping[str, ItemShape],
        fingerprint: Fingerprint,
        settings: EncoderSettings,
        axes: Mapping[str, Axis] | None = None,
    ) -> None:
        self.axes: Mapping[str, Axis] = axes or {}
        self.graph, self._prepare, self._collate = graph, prepare, collate
        self.modality, self.features = modality, features
        on_cpu, on_gpu = (32, 128) if modality == "image" else (64, 512)
        self.batch_size = settings.batch_size or (on_cpu if torch_device(settings.device).type == "cpu" else on_gpu)
        pooling = {name: fingerprint.pooling[name] for name in native_features(features)}
        self.fingerprint = replace(fingerprint, pooling=pooling, backend=graph.backend, precision=settings.precision)

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert raw items to model inputs, one array per item; called from many threads at once."""
        return self._prepare(items) if items else []

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Compute the named features of one batch: name -> one float32 array per item, (D,) or (T, D)."""
        check_names(names, self.features)
        if not prepared:
            return {name: [] for name in names}
        outputs = self.graph(self._collate(prepared), names)
        features: dict[str, list[Array]] = {}
        for name in names:
            features[name] = list(outputs[name])
            if self.features[name][0] == -1:
                rows = zip(outputs[name], prepared, strict=True)
                features[name] = [tokens_TD[: len(ids)] for tokens_TD, ids in rows]
        return features


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
        while True:
            size = min(num_rows, self._max_rows or num_rows)
            try:
                parts = [self._run(inputs, names, rows) for rows in blocks(num_rows, size)]
            except torch.OutOfMemoryError:
                parts = []  # the error, which keeps tensors in memory, is gone before the next attempt
            if parts:
                break
            self._halve_batch(size)
        return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _run(self, inputs: Mapping[str, Array], names: Sequence[str], rows: slice) -> dict[str, Floats]:
        with torch.inference_mode(), autocast(self._device.type, self._precision):
            outputs = self._module(**{name: self._to_device(array[rows]) for name, array in inputs.items()})
            return {name: outputs[name].float().cpu().numpy() for name in names}

    def _to_device(self, array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":  # only copies from pinned memory are asynchronous
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _halve_batch(self, num_rows: int) -> None:
        if num_rows == 1:
            raise SettingError(
                f"the memory of {self._device} is too small for one item; use precision bfloat16 or float16, a smaller "
                "model or another device"
            )
        self._max_rows = num_rows // 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        _log.warning("%s is out of memory at batch size %d; continuing with %d", self._device, num_rows, self._max_rows)


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """A torch module and what its ONNX export needs.

    Args:
        module: takes the inputs by name, in the order of `example`, and returns a dict of tensors.
        example: input name -> array to trace the module with.
        dynamic_axes: input or output name -> names of its dynamic axes, by number.
        check_inputs: inputs of other sizes along the dynamic axes; the export must agree with torch on them.
        key: JSON values that determine, together with the weights, what the module computes.
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
        except (failures.Fail, failures.InvalidGraph, failures.NotImplemented) as error:
            raise ArtifactError(f"onnxruntime cannot run {path.name}: {one_line(error)}") from error

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        """Compute the named outputs of one batch, by name, each with B rows."""
        return dict(zip(names, self._session.run(list(names), dict(inputs)), strict=True))


def build_graph(
    module: torch.nn.Module, settings: EncoderSettings, fingerprint: Fingerprint, export: OnnxExport | None = None
) -> Graph:
    """Choose a backend for a model, and prepare the model to run on it. The choice is part of the fingerprint.

    `auto` chooses onnxruntime if possible: float32 on the CPU, extra `cpu` installed, weights small enough for one
    file, and an export that agrees with torch. Otherwise it chooses torch.

    Args:
        fingerprint: family, model and weights, which name the ONNX file.
        export: how the model is exported to ONNX; None: it runs on torch only.
    """
    is_onnx = settings.backend == "onnxruntime"
    fits_onnx = torch_device(settings.device).type == "cpu" and settings.precision == "float32"
    if is_onnx and (export is None or not fits_onnx):
        given = "a model without an export" if export is None else f"{settings.precision} on {settings.device}"
        raise SettingError(
            f"backend onnxruntime: expected a model that exports to ONNX, in float32 on the device cpu, got {given}; "
            "use backend torch"
        )
    if settings.backend == "auto":
        num_bytes = sum(tensor.nbytes for tensor in module.state_dict().values())
        is_onnx = fits_onnx and num_bytes < _MAX_ONNX_BYTES and is_installed("onnx") and is_installed("onnxruntime")
    if export is None or not is_onnx:
        return TorchGraph(module, settings)
    try:
        return OnnxGraph(_export_once(export, fingerprint))
    except ArtifactError as error:
        if settings.backend == "onnxruntime":
            raise ArtifactError(f"{error}; use backend torch") from error
        _log.warning("running on torch: %s", error)
        return TorchGraph(module, settings)


def _export_once(export: OnnxExport, fingerprint: Fingerprint) -> Path:
    """Return the path of the exported graph; export and check it if it does not exist yet, or has changed.

    Raises:
        ArtifactError: the model cannot be exported, or its export computes other values than torch.
    """
    key = {
        **export.key,
        "weights": fingerprint.weights,
        "inputs": {name: str(array.dtype) for name, array in export.example.items()},
        "outputs": list(export.outputs),
        "torch": torch.__version__,
        "opset": _OPSET,
    }
    name = f"{fingerprint.family}-{fingerprint.model}"
    path = user_folder() / "onnx" / f"{name.replace('/', '--')}-{digest(key)[:32]}.onnx"
    if not is_intact(path):
        require("onnx", extra="onnx")
        with replacing(path) as temporary:
            export_graph(export, temporary)
            _check_agreement(export, OnnxGraph(temporary), name)
            graph_digest = digest_file(temporary)
        write_atomic(_digest_path(path), graph_digest.encode())
    return path


def export_graph(export: OnnxExport, path: Path) -> None:
    """Write a module as an ONNX file; ArtifactError if it has an operator that ONNX lacks, or cannot be traced."""
    from unittest.mock import patch

    arguments = tuple(torch.from_numpy(array) for array in export.example.values())
    module = _PositionalModule(export.module, list(export.example), export.outputs)
    # If an export fails, torch prints its graph to stdout, hundreds of lines, whatever its options.
    without_graph_dump = patch.object(torch._C, "_jit_onnx_log")

    # The exporter warns about its own age and about every Python branch; the comparison with torch decides instead.
    with warnings.catch_warnings(), torch.inference_mode(), without_graph_dump:
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


class _PositionalModule(torch.nn.Module):
    """A module with positional inputs and outputs, as the exporter requires."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self._module, self._inputs, self._outputs = module, inputs, outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._module(**dict(zip(self._inputs, tensors, strict=True)))
        return tuple(outputs[name] for name in self._outputs)


def is_intact(graph: Path) -> bool:
    """Return whether an exported graph exists, and has the digest that was written beside it."""
    path = _digest_path(graph)
    return graph.is_file() and path.is_file() and path.read_bytes() == digest_file(graph).encode()


def _digest_path(graph: Path) -> Path:
    return graph.with_suffix(".sha256")


def _check_agreement(export: OnnxExport, graph: OnnxGraph, name: str) -> None:
    """Check that a graph computes what its module does on the CPU, or raise an `ArtifactError`."""
    expected = TorchGraph(export.module, EncoderSettings(device="cpu"))(export.check_inputs, export.outputs)
    outputs = graph(export.check_inputs, export.outputs)
    for output in export.outputs:
        # The packaged models differ by at most 1e-5; a constant that the tracer froze wrongly differs by 1e-1 and more.
        if not np.allclose(outputs[output], expected[output], rtol=1e-3, atol=1e-3):
            raise ArtifactError(f"the ONNX export of {name} computes another {output} than torch")
