"""The encoder class of all built-in families, and the choice of what runs its model: torch or onnxruntime."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from embedcache.arrays import Array, Floats
from embedcache.axis import Axis
from embedcache.devices import torch_device
from embedcache.encoders.base import Backend, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.image_features import native_features
from embedcache.encoders.onnx_backend import OnnxExport, OnnxGraph, export_once
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.torch_backend import TorchGraph
from embedcache.errors import ArtifactError, CorruptError, SettingError
from embedcache.registry import is_installed

_MAX_ONNX_BYTES = 1_900_000_000  # an ONNX file is a protobuf message, which is limited to 2 GiB
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
        lengths = [len(ids) for ids in prepared]
        return {
            name: list(outputs[name])
            if self.features[name][0] != -1
            else [tokens_TD[:length] for tokens_TD, length in zip(outputs[name], lengths, strict=True)]
            for name in names
        }


def build_graph(export: OnnxExport, settings: EncoderSettings, weights: str) -> Graph:
    """Choose a backend for a model that exports to ONNX, and prepare the model to run on it.

    `auto` chooses onnxruntime if possible: float32 on the CPU, extra `cpu` installed, weights small enough for one
    file, and an export that agrees with torch. Otherwise it chooses torch. The choice is part of the fingerprint.
    """
    is_chosen = suits_onnx(settings) and _num_bytes(export.module) < _MAX_ONNX_BYTES
    if settings.backend == "torch" or (settings.backend == "auto" and not is_chosen):
        return TorchGraph(export.module, settings)
    _check_onnx_settings(settings)
    try:
        return OnnxGraph(export_once(export, weights))
    except ArtifactError as error:
        if settings.backend == "onnxruntime":
            next_step = "" if isinstance(error, CorruptError) else "; use backend torch"
            raise type(error)(f"{error}{next_step}") from error
        _log.warning("running on torch: %s", error)
        return TorchGraph(export.module, settings)


def torch_graph(module: torch.nn.Module, settings: EncoderSettings, family: str) -> TorchGraph:
    """Prepare a model without an ONNX export to run on torch."""
    if settings.backend == "onnxruntime":
        raise SettingError(
            f"backend: expected auto or torch for the encoder family {family!r}, which runs on torch only, "
            "got onnxruntime"
        )
    return TorchGraph(module, settings)


def suits_onnx(settings: EncoderSettings) -> bool:
    """Return whether models run on onnxruntime with `auto`: it is installed, on the CPU in float32."""
    has_runtime = is_installed("onnx") and is_installed("onnxruntime")
    return has_runtime and torch_device(settings.device).type == "cpu" and settings.precision == "float32"


def _num_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _check_onnx_settings(settings: EncoderSettings) -> None:
    """Check that onnxruntime runs on the device and at the precision of the settings."""
    if torch_device(settings.device).type != "cpu":
        raise SettingError(f"backend onnxruntime: expected device cpu, got {settings.device!r}; use backend torch")
    if settings.precision != "float32":
        raise SettingError(
            f"backend onnxruntime: expected precision float32, got {settings.precision}; use backend torch"
        )
