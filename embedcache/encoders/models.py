"""Built-in encoders: items are prepared on threads, and a model runs on batches, on torch or, on the CPU, onnxruntime.

- Images are resized to uint8 on threads where a published transform can be split there, and normalized on the device.
- Texts become token ids on threads, and are padded per batch.
- On torch, batches that do not fit the device's memory are split. For onnxruntime a model is exported once, checked
  against torch, and kept in the user's cache folder.
- transformers takes longer to import, and to load a model, than a whole search takes. So everything else that a text
  encoder needs is stored next to its exported graph, under the digest of its fingerprint. A cached feature names that
  digest, so only the library tokenizers and onnxruntime are needed to encode a query.
"""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image

from embedcache.arrays import Array, Floats, Ints, blocks
from embedcache.encoders.base import (
    Backend,
    EncoderSettings,
    Fingerprint,
    Head,
    ItemShape,
    Modality,
    check_names,
)
from embedcache.encoders.weights import load_part
from embedcache.errors import ArtifactError, PathError, SettingError, one_line
from embedcache.files import replacing, user_folder, write_atomic
from embedcache.modeling.features import (
    FeatureName,
    derive_features,
    native_features,
    patch_grid,
    patch_pools,
    requested_layers,
)
from embedcache.processes import announce_device, autocast, torch_device
from embedcache.provenance import digest, digest_file, read_record, write_record
from embedcache.registry import is_installed, require
from embedcache.store.layout import Axis

Transform: TypeAlias = Callable[[Image.Image], Array]
"""RGB image of any size -> (3, H, W): uint8 if the model normalizes pixels itself, else float32."""

_IMAGES = "images"

_IDS = "input_ids"
_MASK = "attention_mask"
_NO_LIMIT = 1_000_000  # tokenizers without a limit of their own state 1e30
_MAX_ONNX_BYTES = 1_900_000_000  # an ONNX file is a protobuf message, which is limited to 2 GiB
_OPSET = 17
_EXPORT_ERRORS = (
    *(RuntimeError, TypeError, ValueError, IndexError, NotImplementedError),
    *(AttributeError, KeyError, AssertionError),
)
"""Errors of models that cannot be traced, or have an operator that ONNX lacks."""

_log = logging.getLogger(__name__)


class Graph(Protocol):
    """A model that maps named arrays to named outputs; the first axis of each is the batch."""

    backend: Backend

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        """Compute the named outputs of one batch, by name, each with B rows."""


class GraphEncoder:
    """An encoder of any built-in family: prepares items on threads, and runs a model on batches.

    Args:
        modality: modality of the items.
        graph: computes the features; token features of texts are padded.
        prepare: raw items -> one model input each; called from many threads concurrently.
        collate: model inputs of one or more items -> inputs of the graph.
        features: name -> shape of one item, the default first; `(-1, D)` has as many rows as the model input.
        fingerprint: fingerprint of the model; backend, precision and the list of native features are filled in here.
        settings: batch size, device and precision.
        axes: axis of each feature of tokens, if it is known.
        read_head: reads the classifier of the model, if it may have one.
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
        read_head: Callable[[], Head] | None = None,
    ) -> None:
        self.axes: Mapping[str, Axis] = axes or {}
        self.read_head = read_head
        self.graph = graph
        self._prepare = prepare
        self._collate = collate
        self.modality = modality
        self.features = features

        on_cpu, on_gpu = (32, 128) if modality == "image" else (64, 512)
        self.batch_size = settings.batch_size or (on_cpu if torch_device(settings.device).type == "cpu" else on_gpu)

        # Derived features are left out, so that a request for another grid does not change the fingerprint.
        pooling = {name: fingerprint.pooling[name] for name in native_features(features)}
        self.fingerprint = replace(fingerprint, pooling=pooling, backend=graph.backend, precision=settings.precision)

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert raw items to model inputs, one array per item; called from many threads concurrently."""
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
            # Texts are padded in a batch; the padding is not part of an item.
            if self.features[name][0] == -1:
                for item, ids in enumerate(prepared):
                    features[name][item] = features[name][item][: len(ids)]

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
            # TF32 convolutions keep 10 bits of a float32.
            torch.backends.cudnn.allow_tf32 = False
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

        if len(parts) == 1:
            return parts[0]
        outputs: dict[str, Floats] = {}
        for name in names:
            outputs[name] = np.concatenate([part[name] for part in parts])
        return outputs

    def _run(self, inputs: Mapping[str, Array], names: Sequence[str], rows: slice) -> dict[str, Floats]:
        tensors = {name: self._to_device(array[rows]) for name, array in inputs.items()}
        with torch.inference_mode(), autocast(self._device.type, self._precision):
            outputs = self._module(**tensors)
            return {name: outputs[name].float().cpu().numpy() for name in names}

    def _to_device(self, array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":  # only copies from pinned memory are asynchronous
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _halve_batch(self, num_rows: int) -> None:
        if num_rows == 1:
            raise SettingError(f"the memory of {self._device} is too small for one item; use precision bfloat16")
        self._max_rows = num_rows // 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        _log.warning("%s is out of memory at batch size %d; continuing with %d", self._device, num_rows, self._max_rows)


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """A torch module, and the arguments of its ONNX export.

    Args:
        module: accepts the inputs by name, in the order of `example`, and returns a dict of tensors.
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
        export: arguments of the ONNX export. If None, the model runs on torch only.
    """
    is_onnx = settings.backend == "onnxruntime"
    fits_onnx = torch_device(settings.device).type == "cpu" and settings.precision == "float32"
    if is_onnx and (export is None or not fits_onnx):
        got = "a model without an export" if export is None else f"{settings.precision} on {settings.device}"
        raise SettingError(f"backend onnxruntime: expected float32 on the CPU, got {got}; use backend torch")
    if settings.backend == "auto":
        num_bytes = sum(tensor.nbytes for tensor in module.state_dict().values())
        is_onnx = fits_onnx and num_bytes < _MAX_ONNX_BYTES and is_installed("onnx") and is_installed("onnxruntime")
    if export is None or not is_onnx:
        return TorchGraph(module, settings)

    # Whoever asked for onnxruntime gets an error if the export fails; `auto` falls back to torch.
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

    # The graph gets its name only after the check, and its digest last: a kill leaves no graph that passes for whole.
    if not is_intact(path):
        require("onnx", extra="onnx")
        with replacing(path) as temporary:
            export_graph(export, temporary)
            _check_agreement(export, OnnxGraph(temporary), name)
            graph_digest = digest_file(temporary)
        write_atomic(_digest_path(path), graph_digest.encode())

    return path


def export_graph(export: OnnxExport, path: Path) -> None:
    """Write a module as an ONNX file.

    Raises:
        ArtifactError: the module has an operator that ONNX lacks, or cannot be traced.
    """
    from unittest.mock import patch

    arguments = tuple(map(torch.from_numpy, export.example.values()))
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
        self._module = module
        self._inputs = inputs
        self._outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._module(**dict(zip(self._inputs, tensors, strict=True)))
        return tuple(outputs[name] for name in self._outputs)


def is_intact(graph: Path) -> bool:
    """Return whether an exported graph exists and has the digest that was written with it."""
    path = _digest_path(graph)
    return graph.is_file() and path.is_file() and path.read_bytes() == digest_file(graph).encode()


def _digest_path(graph: Path) -> Path:
    return graph.with_suffix(".sha256")


def _check_agreement(export: OnnxExport, graph: OnnxGraph, name: str) -> None:
    """Check that a graph computes the outputs of its module on the CPU, or raise an `ArtifactError`."""
    expected = TorchGraph(export.module, EncoderSettings(device="cpu"))(export.check_inputs, export.outputs)
    outputs = graph(export.check_inputs, export.outputs)

    for output in export.outputs:
        # The packaged models differ by at most 1e-5; a constant that the tracer froze wrongly differs by 1e-1 and more.
        if not np.allclose(outputs[output], expected[output], rtol=1e-3, atol=1e-3):
            raise ArtifactError(f"the ONNX export of {name} computes another {output} than torch")


def build_image_encoder(
    module: torch.nn.Module,
    pixels: "PixelTransform",
    fingerprint: Fingerprint,
    settings: EncoderSettings,
    *,
    config: Mapping[str, Any] | None = None,
    is_whole: bool = False,
    read_head: Callable[[], Head] | None = None,
) -> GraphEncoder:
    """Create an encoder from a loaded model.

    Args:
        module: computes native features, see `ImageModel`.
        pixels: transform of images to the input of the model.
        fingerprint: fingerprint of the model; the preprocessing is filled in here, and the rest as in `GraphEncoder`.
        settings: how it runs.
        config: JSON values that determine the ONNX graph together with the weights and the preprocessing. If None, the
            model runs on torch only.
        is_whole: whether the transform shows the model the whole image, not a part of it.
        read_head: see `GraphEncoder`.
    """
    model = ImageModel(module, pixels.scale, input_size=pixels.input_size, requested=settings.features)

    export = None
    if config is not None:
        # The check compares outputs on noise, because zeros could hide a wrong constant.
        noise = np.random.default_rng(0).integers(0, 256, (2, *model.input_size), dtype=np.uint8)
        if not model.has_pixel_scale:
            noise = ((noise - 127.5) / 64).astype(np.float32)
        export = OnnxExport(
            module=model,
            example={_IMAGES: np.zeros_like(noise[:1])},
            check_inputs={_IMAGES: noise},
            outputs=tuple(model.features),
            dynamic_axes={name: {0: "batch"} for name in (_IMAGES, *model.features)},
            key={"config": config, "preprocessing": pixels.published},
        )

    return GraphEncoder(
        "image",
        build_graph(model, settings, fingerprint, export),
        prepare=lambda images: [pixels.transform(image) for image in images],
        collate=lambda prepared: {_IMAGES: np.stack(prepared)},
        features=model.features,
        fingerprint=replace(fingerprint, preprocessing=pixels.published),
        settings=settings,
        axes=model.axes(box=(0.0, 0.0, 1.0, 1.0) if is_whole else None),
        read_head=read_head,
    )


class ImageModel(torch.nn.Module):
    """An image model with pixel normalization before it and derived features after it.

    Args:
        module: maps (B, 3, H, W) float32 to a dict of (B, D) vectors and (B, T, D) tokens: its native features, and
            the same names with the prefix `layerN.` for each requested block.
        scale: normalizes a batch of prepared images.
        input_size: (3, H, W).
        requested: names of features; names that cannot be derived are left out.
    """

    features: dict[str, ItemShape]
    """Name -> shape of one item: native features in the model's order, then the requested ones."""
    has_pixel_scale: bool
    """Whether it normalizes uint8 pixels itself; otherwise it expects normalized float32 values."""

    def __init__(
        self, module: torch.nn.Module, scale: torch.nn.Module, *, input_size: Sequence[int], requested: Sequence[str]
    ) -> None:
        super().__init__()
        self.input_size = tuple(input_size)
        self.has_pixel_scale = isinstance(scale, PixelScale)
        self._module = module.eval()
        self._scale = scale

        # The shapes of derived features follow from one image of zeros, without a run of the model.
        shapes = _find_shapes(module, input_size)
        self._pools = patch_pools(requested, shapes, input_size)
        zeros = {name: torch.zeros(1, *shape) for name, shape in shapes.items()}
        features = derive_features([*native_features(shapes), *requested], zeros, self._pools)
        self.features = {name: tuple(values.shape[1:]) for name, values in features.items()}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of (B, C, H, W) images by name: (B, D), or (B, T, D) for tokens."""
        return derive_features(self.features, self._module(self._scale(images)), self._pools)

    def axes(self, *, box: tuple[float, float, float, float] | None) -> dict[str, Axis]:
        """Return the axes of the features whose tokens form a grid; `box` is the part of the image that they cover."""
        axes = {}
        for text, shape in self.features.items():
            name = FeatureName.parse(text)
            # Vectors have no axis, and clusters of patches form no grid.
            if len(shape) == 1 or name is None or name.clusters is not None:
                continue

            is_pooled = name.grid is not None
            grid = (name.grid, name.grid) if is_pooled else patch_grid(shape[0], *self.input_size[-2:])
            if grid is not None:
                axes[text] = Axis(kind="grid", rows=grid[0], columns=grid[1], box=box)
        return axes


def _find_shapes(module: torch.nn.Module, input_size: Sequence[int]) -> dict[str, ItemShape]:
    """Return the shapes of a model's outputs for one image, found by running it twice on noise.

    A `pooled` that repeats another feature is left out. So are patches that form no grid: some are special tokens.
    """
    noise = torch.rand((2, *input_size), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs: dict[str, torch.Tensor] = module(noise)
        repeated: dict[str, torch.Tensor] = module(noise)

    for name in list(outputs):
        if name.endswith("patches") and patch_grid(outputs[name].shape[1], *input_size[-2:]) is None:
            del outputs[name]
            outputs.pop(name.replace("patches", "patch_mean"), None)

    # Chunks are computed by any process, so a model whose output is random cannot be cached.
    for name, output in outputs.items():
        if not _is_close(output, repeated[name]):
            raise SettingError("expected a deterministic model, got one whose output differs between two runs")

    pooled = outputs.get("pooled")
    for name in native_features(outputs):
        if pooled is not None and name != "pooled" and _is_close(pooled, outputs[name]):
            del outputs["pooled"]
            break
    return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


def _is_close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-5)


class PixelScale(torch.nn.Module):
    """Normalize pixels in float32: (pixels / divisor - mean) / std.

    Mean and std have one value per channel; the divisor is 255 if they describe pixels in [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor, *, divisor: float = 1.0
    ) -> None:
        super().__init__()
        self._divisor = divisor
        for name, values in (("mean", mean), ("std", std)):
            per_channel = torch.as_tensor(values, dtype=torch.float32)[:, None, None]
            self.register_buffer(name, per_channel, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize (B, C, H, W) pixels: the same shape, float32."""
        pixels = images.float()
        if self._divisor != 1:
            pixels = pixels / self._divisor
        return (pixels - self.mean) / self.std


class PixelTransform(NamedTuple):
    """How images become the input of a model: a transform per image on threads, then a module on the device.

    Args:
        transform: RGB image of any size -> (3, H, W).
        scale: normalizes a batch of prepared images, (B, 3, H, W) -> the same shape in float32.
        published: settings of the published transform, as JSON values.
        input_size: (3, H, W).
    """

    transform: Transform
    scale: torch.nn.Module
    published: dict[str, Any]
    input_size: tuple[int, ...]


def split_transform(
    whole: Transform, to_pixels: Transform, scale: PixelScale, published: Mapping[str, Any]
) -> PixelTransform:
    """Split a published transform at uint8 pixels.

        whole: the published transform.
        to_pixels: its steps up to uint8 pixels.
        scale: its normalization. If `to_pixels` and `scale` do not reproduce `whole` on noise, `whole` is used.
        published: its settings.


    Raises:
        SettingError: the transform returns a different shape per image.
    """
    rng = np.random.default_rng(0)
    portrait = rng.integers(0, 256, (320, 200, 3), np.uint8)
    landscape = rng.integers(0, 256, (200, 320, 3), np.uint8)
    images = [Image.fromarray(portrait), Image.fromarray(landscape)]
    expected = list(map(whole, images))
    shapes = {array.shape for array in expected}
    if len(shapes) != 1:
        step = "set do_center_crop, or a height and width, in preprocessor_config.json"
        raise SettingError(f"the image processor returns a different shape per image, {sorted(shapes)}; {step}")

    try:
        is_exact = all(map(partial(_is_exact, scale), map(to_pixels, images), expected))
    except (TypeError, ValueError, RuntimeError):  # a transform that normalizes twice may not support skipping it
        is_exact = False

    transform, module = (to_pixels, scale) if is_exact else (whole, torch.nn.Identity())
    return PixelTransform(transform, module, plain_json(published), shapes.pop())


def _is_exact(scale: PixelScale, pixels: Array, expected: Array) -> bool:
    if pixels.dtype != np.uint8 or pixels.shape != expected.shape:
        return False

    # The order of float32 operations may differ.
    scaled = scale(torch.from_numpy(pixels)[None])[0].numpy()
    return np.allclose(scaled, expected, rtol=1e-6, atol=1e-6)


def plain_json(published: Mapping[str, Any]) -> dict[str, Any]:
    """Return a library's settings as they read back from JSON: tuples as lists, other objects as their text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(published), default=str))
    return plain


def build_text_encoder(
    module: torch.nn.Module,
    tokenizer: "Tokenizer",
    fingerprint: Fingerprint,
    settings: EncoderSettings,
    *,
    config: Mapping[str, Any] | None = None,
) -> GraphEncoder:
    """Create an encoder from a loaded model.

    Args:
        module: maps token ids and mask to a dict of tensors: its native features, and the same names with the prefix
            `layerN.` for each requested block; `tokens` are (B, T, D).
        tokenizer: converts texts to token ids.
        fingerprint: fingerprint of the model; an empty preprocessing is filled in here, the rest as in `GraphEncoder`.
        settings: how it runs.
        config: JSON values that determine the ONNX graph together with the weights. If None, the model runs on torch
            only.
    """
    example = tokenizer.example(5, 9)
    with torch.inference_mode():
        outputs = module.eval()(**{name: torch.from_numpy(array) for name, array in example.items()})

    shapes: dict[str, ItemShape] = {}
    for name, output in outputs.items():
        width = output.shape[-1]
        shapes[name] = (-1, width) if output.ndim == 3 else (width,)

    # Other features are derived, or unknown, which their request reports.
    requested = filter(shapes.__contains__, settings.features)
    features = {name: shapes[name] for name in [*native_features(shapes), *requested]}

    export = None
    if config is not None:
        # Token ids, mask and tokens vary in length; vectors vary in the batch only.
        dynamic_axes = {_IDS: {0: "batch", 1: "tokens"}, _MASK: {0: "batch", 1: "tokens"}}
        for name, shape in features.items():
            dynamic_axes[name] = {0: "batch"} if len(shape) == 1 else {0: "batch", 1: "tokens"}
        export = OnnxExport(
            module=module,
            example=example,
            check_inputs=tokenizer.example(7, 1, 14),
            outputs=tuple(features),
            dynamic_axes=dynamic_axes,
            key={"config": config},
        )

    graph = build_graph(module, settings, fingerprint, export)
    fingerprint = replace(fingerprint, preprocessing=fingerprint.preprocessing or tokenizer.preprocessing)

    encoder = GraphEncoder(
        "text",
        graph,
        prepare=tokenizer,
        collate=tokenizer.pad,
        features=features,
        fingerprint=fingerprint,
        settings=settings,
    )

    _store(encoder, tokenizer)
    return encoder


def _store(encoder: GraphEncoder, tokenizer: "Tokenizer") -> None:
    """Write the record that `open_stored` reads, if an encoder needs only a graph and a tokenizer.

    An error of the disk is ignored: the model is then loaded each time.
    """
    if tokenizer.state is None or not isinstance(encoder.graph, OnnxGraph):
        return

    record = {
        "graph": encoder.graph.path.name,
        "features": [[name, list(shape)] for name, shape in encoder.features.items()],
        "pad_id": tokenizer.pad_id,
        "tokenizer": tokenizer.state,
    }

    path = _stored_path(encoder.fingerprint.to_json(), tuple(encoder.features))
    with suppress(ArtifactError, PathError):
        # Fingerprints do not cover tokenizers: of two models that share one, neither may answer for the other.
        if read_record(path, next_step=f"delete {path}").get("tokenizer") != tokenizer.state:
            record = {}

    with suppress(OSError):
        write_record(path, record)


def open_stored(fingerprint: Mapping[str, Any], settings: EncoderSettings) -> GraphEncoder | None:
    """Open the encoder with a fingerprint from its exported graph, without transformers.

    Returns None if there is no record of it here, or the files are damaged: then the model has to be loaded.
    """
    path = _stored_path(fingerprint, settings.features)
    try:
        record = read_record(path, next_step=f"delete {path}")
        graph = path.with_name(record["graph"])
    except (ArtifactError, PathError, KeyError):
        return None

    if not is_intact(graph):
        return None
    import tokenizers

    preprocessing = fingerprint["preprocessing"]
    tokenizer = Tokenizer(
        encode=_encode_on_threads(tokenizers.Tokenizer.from_str(record["tokenizer"])),
        max_tokens=preprocessing["max_tokens"],
        pad_id=record["pad_id"],
        prefix=preprocessing["prefix"],
        is_lower=preprocessing["lower"],
    )

    features = {name: tuple(shape) for name, shape in record["features"]}
    return GraphEncoder(
        "text",
        OnnxGraph(graph),
        prepare=tokenizer,
        collate=tokenizer.pad,
        features=features,
        fingerprint=Fingerprint(**fingerprint),
        settings=settings,
    )


def _stored_path(fingerprint: Mapping[str, Any], features: Sequence[str]) -> Path:
    """Return the path of the record of an encoder with a fingerprint that offers the states after some blocks."""
    # Other features do not change the graph.
    offered_layers = sorted(name for name in features if requested_layers([name]))
    key = {"fingerprint": fingerprint, "features": offered_layers}
    return user_folder() / "onnx" / f"{digest(key)[:32]}.json"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Tokenizer of a model: converts texts to token ids.

    Args:
        encode: texts -> token ids, special tokens included, truncated to `max_tokens`.
        max_tokens: maximum input length, special tokens included.
        pad_id: token that fills up shorter texts.
        prefix: prepended to each text.
        is_lower: whether texts are lowercased first.
        state: JSON text from which the library tokenizers recreates the tokenizer; None if it cannot.
    """

    encode: Callable[[list[str]], list[list[int]]]
    max_tokens: int
    pad_id: int
    prefix: str = ""
    is_lower: bool = False
    state: str | None = None

    def pad(self, ids: Sequence[Array]) -> dict[str, Ints]:
        """Pad token ids of one or more texts on the right, and create their mask: both (B, T) int64."""
        lengths = np.array(list(map(len, ids)))
        mask = np.arange(lengths.max()) < lengths[:, None]
        padded = np.full(mask.shape, self.pad_id, dtype=np.int64)
        padded[mask] = np.concatenate(ids)
        return {_IDS: padded, _MASK: mask.astype(np.int64)}

    def example(self, *lengths: int) -> dict[str, Ints]:
        """Return a batch of texts of some lengths."""
        return self.pad([np.arange(2, length + 2, dtype=np.int64) for length in lengths])

    def __call__(self, texts: Sequence[str]) -> list[Ints]:
        """Return the token ids of each text: (T,) int64."""
        prefixed = [self.prefix + text for text in texts]
        if self.is_lower:
            prefixed = list(map(str.lower, prefixed))
        return [np.array(ids, dtype=np.int64) for ids in self.encode(prefixed)]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Entry `preprocessing` of a fingerprint."""
        return {"max_tokens": self.max_tokens, "prefix": self.prefix, "lower": self.is_lower}


def open_tokenizer(
    folder: Path,
    *,
    max_tokens: int | None,
    model: torch.nn.Module,
    published: int | None = None,
    prefix: str = "",
    is_lower: bool = False,
) -> Tokenizer:
    """Open the transformers tokenizer in a model folder, safe to call from many threads.

    `max_tokens` defaults to the smaller of the model's limit and the published one, which is the tokenizer's if None.
    See `Tokenizer` for the rest.
    """
    from transformers import AutoTokenizer

    tokenizer = load_part(AutoTokenizer, folder, "tokenizer", "add the model's tokenizer files")
    limit = _input_limit(max_tokens, published or tokenizer.model_max_length, model, folder)

    if not tokenizer.is_fast:
        raise SettingError(f"{folder} has a slow tokenizer: expected a tokenizer.json; choose another model")

    # Truncation is state of the tokenizer, so it is set once here and never from a thread.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(limit, direction=tokenizer.truncation_side)
    state = None
    with suppress(Exception):  # the library's own type, of a tokenizer with a part in Python
        state = backend.to_str()

    return Tokenizer(
        encode=_encode_on_threads(backend),
        max_tokens=limit,
        pad_id=tokenizer.pad_token_id or 0,
        prefix=prefix,
        is_lower=is_lower,
        state=state,
    )


def _encode_on_threads(backend: Any) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def _input_limit(requested: int | None, published: int | None, model: torch.nn.Module, folder: Path) -> int:
    """Return the maximum length of a text, given the requested one and the one that the model's files state."""
    positions = _num_positions(model)
    if requested is not None and positions is not None and requested > positions:
        raise SettingError(f"max_tokens: expected at most {positions}, as the model in {folder} has, got {requested}")

    if requested is not None:
        return requested

    # Tokenizers without a limit state a number that no text reaches.
    limit = min(published or _NO_LIMIT, positions or _NO_LIMIT)
    if limit >= _NO_LIMIT:
        raise SettingError(f"the model in {folder} states no maximum text length; add an option such as max_tokens=512")
    return int(limit)


def _num_positions(model: torch.nn.Module) -> int | None:
    """Return the number of tokens that a model's position table has room for; None if it has no table."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its relatives count positions from padding_idx + 1.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
