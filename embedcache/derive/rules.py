"""Rules: pure functions that compute one feature from others, item by item.

A rule receives one `Block` per input and its parameters, and returns the values of each output. The values of an item
may depend only on that item's inputs and the parameters, so that any process can compute any chunk again.

Trained runs are rules too: an aligned pair has the output `projected`, other modules name their outputs.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import torch

from embedcache.arrays import Array, Floats, Inputs, Ints, blocks, normalize
from embedcache.dataset.inputs import PLAIN, check_same_view, open_input, to_inputs, view_feature
from embedcache.derive.settings import DTYPES
from embedcache.encoders.base import ItemShape
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import DataError, ItemError, SettingError
from embedcache.modeling.heads import AnyTower
from embedcache.processes import torch_device
from embedcache.projectors.base import Moments, project
from embedcache.provenance import RUN, canonical_json, digest
from embedcache.registry import Registry, unknown_name
from embedcache.runs import PAIR, TOWERS, Run, RunInput
from embedcache.store.cache import Cache
from embedcache.store.feature import EncoderGroup
from embedcache.store.layout import Axis

_BLOCK = 256


class Block(NamedTuple):
    """The values of one feature for B items.

    Args:
        values: (B, D) or (B, T, D) in the dtype on disk; with `lengths`, the tokens of all items, one after another.
        lengths: (B,) number of tokens of each item if it varies, else None.
    """

    values: Array
    lengths: Ints | None = None

    def items(self) -> list[Array]:
        """Return one (D,) or (T, D) array per item."""
        if self.lengths is None:
            return list(self.values)
        return np.split(self.values, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []

    def rows(self) -> Array:
        """Return all vectors of all items, (M, D) float32."""
        return np.asarray(self.values.reshape(-1, self.values.shape[-1]), np.float32)

    def with_rows(self, rows_MD: Array) -> "Block":
        """Return a block of the same items whose vectors are replaced by others, of any width."""
        return Block(rows_MD.reshape(*self.values.shape[:-1], rows_MD.shape[-1]), self.lengths)


Output: TypeAlias = "Block | Array | Sequence[Array | ItemError]"
"""Values of one output for B items: an array, a block, or one array per item; an `ItemError` says why one is absent."""

RuleFunction: TypeAlias = Callable[[Sequence[Block], Mapping[str, Any]], Mapping[str, Output]]
"""Maps one block per input and the parameters to the values of each output."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule, and its properties that must be known before it runs.

    Args:
        name: name in `RULES`, `module:attribute`, or `run`; part of the fingerprint.
        apply: computes the outputs of B items; a rule with `fit` also gets the fitted arrays as parameters.
        outputs: item shapes of the inputs and parameters -> output -> shape of one item, (D,), (T, D) or (-1, D);
            raises if the inputs do not fit.
        parameters: parameter -> default. If None, any parameter is accepted.
        fit: one pass over the inputs of the training part -> arrays that `apply` needs.
        keeps_axis: whether token outputs have the tokens of the first input, and therefore its axis.
        axis: output and the axes of the inputs -> axis of its tokens. If None, `keeps_axis` decides.
        weights: digest of the values that the rule computes with, such as the weights of a run.
        location: option -> path from which the rule is opened again; not part of the fingerprint.
    """

    name: str
    apply: RuleFunction
    outputs: Callable[[Sequence[ItemShape], Mapping[str, Any]], Mapping[str, ItemShape]]
    parameters: Mapping[str, Any] | None = None
    fit: Callable[[Iterator[Sequence[Block]], Mapping[str, Any]], dict[str, Array]] | None = None
    keeps_axis: bool = False
    axis: Callable[[str, Sequence[Axis | None]], Axis | None] | None = None
    weights: str = ""
    location: Mapping[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str | None:
        """Digest of the source code of the function, if it is not part of embedcache and its source can be read."""
        if getattr(self.apply, "__module__", "").startswith("embedcache."):
            return None
        try:
            return digest(inspect.getsource(self.apply))
        except (OSError, TypeError):
            return None

    def check_parameters(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters with defaults, as they read back from JSON.

        Raises:
            UnknownNameError: the rule has no parameter of that name.
            SettingError: a value is not JSON, or of another type than the default.
        """
        defaults = parameters if self.parameters is None else self.parameters
        values = dict(defaults)
        for name, parameter in parameters.items():
            if name not in defaults:
                raise unknown_name("parameter", name, defaults, where=f"of the rule {self.name!r}")

            default = defaults[name]
            value = parameter.item() if isinstance(parameter, np.generic) else parameter
            # An integer is a valid float; a bool, which Python counts as an integer, is not.
            if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
                label = f"parameter {name} of the rule {self.name!r}"
                raise SettingError(f"{label}: expected a value such as {default!r}, got {value!r}")
            values[name] = float(value) if isinstance(default, float) else value

        try:
            checked: dict[str, Any] = json.loads(canonical_json(values))
        except (TypeError, ValueError) as error:
            raise SettingError(f"parameters of the rule {self.name!r}: expected JSON values: {error}") from error
        return checked


RULES = Registry(
    "rule",
    {
        "concat": "embedcache.derive.rules:CONCAT",
        "mean": "embedcache.derive.rules:MEAN",
        "pca": "embedcache.derive.rules:PCA",
        "standardize": "embedcache.derive.rules:STANDARDIZE",
    },
    group="embedcache.rules",
    has_objects=True,
)
"""Each is a `Rule`."""


class DerivedView(NamedTuple):
    """A view of the inputs that derived features are computed from. Only the inputs differ from the plain features.

    Args:
        name: name of the view, such as `babble-5dB`.
        plain_inputs: modality, name and fingerprint of the features in whose place the views are read.
    """

    name: str
    plain_inputs: Sequence[tuple[str, str, Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """A description of derived features, for `derive_features`.

    Args:
        name: name of their folder in the cache, next to the folders of encoders.
        inputs: modality and name, `encoder/feature`, of each feature that the rule reads. The derived features have an
            item per item of the first input; other modalities contribute the item of the same sample.
        rule: a rule, its name, or `module:attribute`; see `RULES`.
        parameters: parameters of the rule, as JSON values.
        dtype: dtype on disk of the outputs.
        fit_split: a run's `split.parquet`. A rule that is fitted reads its training part, or all items if None.
        view: view of the inputs, which is added to the name of the folder: `NAME@VIEW`.

    Example:
        >>> inputs = [("image", "dinov2/cls"), ("image", "dinov2/patch_mean")]
        >>> derivation = embedcache.Derivation(name="both", inputs=inputs, rule="concat")
        >>> derivation.folder
        'both'
    """

    name: str
    inputs: Sequence[tuple[str, str]]
    rule: str | Rule
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float16"
    fit_split: Path | None = None
    view: DerivedView | None = None

    @property
    def folder(self) -> str:
        """Name of the folder in the cache."""
        return self.name if self.view is None else f"{self.name}@{self.view.name}"

    def __post_init__(self) -> None:
        if not self.inputs:
            raise SettingError("inputs: expected at least one feature to derive from, got none")
        if not self.name or EncoderSpec("", self.name).folder != self.name:
            raise SettingError(f"name: expected a name of letters, digits and . = + - _, got {self.name!r}")
        if self.dtype not in DTYPES:
            raise SettingError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")


def open_rule(rule: str | Rule) -> Rule:
    """Return a rule by its name in `RULES` or `module:attribute`.

    Raises:
        UnknownNameError: there is no such rule, or its module cannot be imported.
        SettingError: the attribute is not a `Rule`.
    """
    opened = rule if isinstance(rule, Rule) else RULES.load(rule)
    if not isinstance(opened, Rule):
        raise SettingError(f"{rule}: expected a Rule, got {type(opened).__name__}")
    return opened


def to_items(name: str, output: Output, num_items: int) -> list[Array | ItemError]:
    """Return one array or error per item from the output of a rule.

    Raises:
        DataError: the output does not have one value per item.
    """
    try:
        items = output.items() if isinstance(output, Block) else list(output)
    except TypeError:
        raise DataError(f"output {name}: expected a value per item, got {type(output).__name__}") from None
    if len(items) != num_items:
        raise DataError(f"output {name}: expected values for {num_items} items, got {len(items)}")

    return [item if isinstance(item, ItemError) else np.asarray(item) for item in items]


def _one_input(rule: str, shapes: Sequence[ItemShape]) -> ItemShape:
    if len(shapes) != 1:
        raise SettingError(f"the rule {rule!r} takes 1 input, got {len(shapes)}")
    return shapes[0]


def _mean_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    shape = _one_input("mean", shapes)
    if len(shape) == 1:
        raise SettingError(f"the rule 'mean' takes a feature of tokens, got vectors of width {shape[0]}")
    return {"mean": shape[-1:]}


def _mean(inputs: Sequence[Block], _: Mapping[str, Any]) -> Mapping[str, Output]:
    (block,) = inputs
    if block.lengths is None:
        return {"mean": np.asarray(block.values, np.float32).mean(axis=1)}

    # The mean of no tokens would be NaN.
    means: list[Array | ItemError] = []
    for tokens_TD in block.items():
        means.append(tokens_TD.mean(axis=0, dtype=np.float32) if len(tokens_TD) else _NO_TOKENS)
    return {"mean": means}


_NO_TOKENS = ItemError("no tokens")

MEAN = Rule(name="mean", apply=_mean, outputs=_mean_outputs, parameters={})
"""Mean of the tokens of each item."""


def _concat_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    width = 0
    for shape in shapes:
        if len(shape) > 1:
            raise SettingError(
                "the rule 'concat' takes features of one vector per item; derive their means with 'mean'"
            )
        width += shape[0]
    return {"vector": (width,)}


def _concat(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    # Without normalization, the feature with the longest vectors would dominate cosines.
    parts = [normalize(block.values) if parameters["normalize"] else block.rows() for block in inputs]
    return {"vector": np.concatenate(parts, axis=1)}


CONCAT = Rule(name="concat", apply=_concat, outputs=_concat_outputs, parameters={"normalize": True})
"""The vectors of several features one after another, each scaled to length 1 unless `normalize` is false."""


def _pca_outputs(shapes: Sequence[ItemShape], parameters: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    shape = _one_input("pca", shapes)
    width = parameters["width"]
    if not 1 <= width <= shape[-1]:
        raise SettingError(f"parameter width of the rule 'pca': expected 1 to {shape[-1]}, got {width}")
    return {"pca": (*shape[:-1], width)}


def _fit_pca(blocks: Iterator[Sequence[Block]], parameters: Mapping[str, Any]) -> dict[str, Array]:
    moments = _sum_moments(blocks)
    center_D, components_DE = principal_components(moments, parameters["width"], whiten=parameters["whiten"])
    return {"center": center_D, "components": components_DE}


def principal_components(moments: Moments, width: int, *, whiten: bool) -> tuple[Floats, Floats]:
    """Return the mean, (D,) float32, and the first principal components of vectors, (D, E) float32.

    The largest entry of each component is positive; with `whiten`, each component of the vectors has variance 1.

    Args:
        moments: moments of the vectors.
        width: E, at most D.
        whiten: divide each component by its standard deviation.

    Raises:
        DataError: the vectors have fewer directions than are whitened.
    """
    covariance_DD = moments.covariances().first
    variances, vectors = np.linalg.eigh(covariance_DD)

    # eigh sorts variances in ascending order, and leaves the sign of a component to chance.
    variances = variances[::-1][:width]
    components = vectors[:, ::-1][:, :width]
    components = components * np.sign(components[np.abs(components).argmax(axis=0), np.arange(width)])

    if whiten:
        smallest = _smallest_variance(covariance_DD)
        if variances[-1] <= smallest:
            rank = int((variances > smallest).sum())
            next_step = f"use width={rank} or more items" if rank else "all vectors are equal, so use other items"
            raise DataError(f"whitening to {width} components: the data have {rank}; {next_step}")
        components = components / np.sqrt(variances)

    return moments.first_mean.astype(np.float32), components.astype(np.float32)


def _apply_pca(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    (block,) = inputs
    return {"pca": block.with_rows((block.rows() - parameters["center"]) @ parameters["components"])}


PCA = Rule(
    name="pca",
    apply=_apply_pca,
    outputs=_pca_outputs,
    parameters={"width": 64, "whiten": False},
    fit=_fit_pca,
    keeps_axis=True,
)
"""The first `width` principal components of each vector or token; with `whiten`, each has variance 1."""


def _standardize_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    return {"standardized": _one_input("standardize", shapes)}


def _fit_standardize(blocks: Iterator[Sequence[Block]], _: Mapping[str, Any]) -> dict[str, Array]:
    moments = _sum_moments(blocks)
    covariance_DD = moments.covariances().first
    variances = covariance_DD.diagonal()

    # Rounding of a constant column must not be scaled up to variance 1.
    is_constant = variances <= _smallest_variance(covariance_DD)
    scale = np.where(is_constant, 1.0, np.sqrt(np.where(is_constant, 1.0, variances)))

    return {"center": moments.first_mean.astype(np.float32), "scale": scale.astype(np.float32)}


def _apply_standardize(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    (block,) = inputs
    return {"standardized": block.with_rows((block.rows() - parameters["center"]) / parameters["scale"])}


STANDARDIZE = Rule(
    name="standardize",
    apply=_apply_standardize,
    outputs=_standardize_outputs,
    parameters={},
    fit=_fit_standardize,
    keeps_axis=True,
)
"""Each column of each vector or token with mean 0 and variance 1 over the training part; constant columns become 0."""


def _sum_moments(blocks: Iterator[Sequence[Block]]) -> Moments:
    """Sum the moments of all vectors of one feature."""
    moments: Moments | None = None
    for (block,) in blocks:
        rows_MD = block.rows()
        moments = moments or Moments(rows_MD.shape[1])
        moments.add(rows_MD)

    if moments is None or moments.num_rows < 2:
        raise DataError("expected at least 2 vectors in the training part to fit a rule, got fewer")
    return moments


def _smallest_variance(covariance_DD: Array) -> float:
    """Return the variance below which a direction is rounding: float16 resolves about 1e-3 of a value."""
    return float(np.trace(covariance_DD)) / len(covariance_DD) * 1e-9


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A run and one of its outputs to derive.

    Args:
        cache: the cache whose features the run reads.
        path: folder of the run.
        output: name of the output.
        name: name of the derived features' folder in the cache.
        modality: modality of the features to derive; every modality for which the run has the output if None.
        view: view of the run's features of that modality; `plain` is these features.
        dtype: dtype on disk.
    """

    cache: Cache
    path: Path
    output: str
    name: str
    modality: str | None
    view: str
    device: str
    dtype: str = "float16"


class OutputModule(Protocol):
    """A trained module with outputs that can be derived; a `torch.nn.Module` of a run that `train_task` wrote.

    It is in evaluation mode. By default an output reads the features of all sides of the run's config, in their order.
    A method `output_sides(name)` may return the names of the sides that an output reads instead. The derived features
    belong to the modality of the first side.

    A method `output_axis(name, axes)` may return the `embedcache.store.layout.Axis` of the tokens of an output, or
    None, given the axes of its inputs.
    """

    def output_shapes(self, shapes: Sequence[ItemShape]) -> Mapping[str, ItemShape]:
        """Return output -> shape of one item, (D,), (T, D) or (-1, D), for inputs of some shapes."""
        ...

    def compute_outputs(self, inputs: Sequence[Block], names: Sequence[str]) -> Mapping[str, Output]:
        """Compute some outputs for B items, without gradients; an item depends on no other item."""
        ...


def open_run(request: RunRequest) -> list[Derivation]:
    """Open one output of a trained run as derivations, one per modality.

    Raises:
        PathError: the folder is not a finished run.
        UnknownNameError: the run has no such output, or is of an unknown kind.
        SettingError: the run has no outputs, or none for the modality.
        FingerprintError: the cache has features from another encoder than the run was trained on.
    """
    run = Run.open(request.path)

    # The device depends on the kind of run, which only the opened run tells.
    device = str(torch_device(request.device, needs_float64=run.info.kind != PAIR))
    run = Run.open(request.path, device=device)
    return _open_pair(request, run) if run.info.kind in TOWERS else [_open_module(request, run)]


def _open_module(request: RunRequest, run: Run) -> Derivation:
    """Open an output of a run of a module, which names its outputs.

    Raises:
        SettingError: the module is not an `OutputModule`, or the output is of another modality.
    """
    module = run.module
    if not (hasattr(module, "output_shapes") and hasattr(module, "compute_outputs")):
        raise SettingError(f"{request.path}: the module {run.info.kind} offers no outputs, as OutputModule does")

    output_module = cast(OutputModule, module)
    sides = [(side.modality, side) for side in _output_sides(output_module, run, request.output)]

    if request.modality not in (None, sides[0][0]):
        raise SettingError(f"modality: expected none for a run of {run.info.kind}, got {request.modality}")

    def find_shape(shapes: Sequence[ItemShape]) -> ItemShape:
        offered = output_module.output_shapes(shapes)
        if request.output not in offered:
            raise unknown_name("output", request.output, offered, where=f"of the run {request.path}")
        return offered[request.output]

    @torch.inference_mode()
    def compute(blocks: Sequence[Block]) -> Mapping[str, Output]:
        return output_module.compute_outputs(blocks, [request.output])

    axis = getattr(module, "output_axis", None)
    return _make_derivation(request, run, sides, compute, find_shape, {"kind": run.info.kind}, axis=axis)


def _output_sides(module: OutputModule, run: Run, output: str) -> list[RunInput]:
    """Return the sides that an output reads: all, unless the module names some."""
    choose: Callable[[str], Sequence[str]] | None = getattr(module, "output_sides", None)
    inputs = run.info.inputs
    names = list(inputs) if choose is None else choose(output)

    # The names of an unknown output mean nothing. It is reported when its shape is looked up.
    if not names or not set(names) <= set(inputs):
        names = list(inputs)
    return [inputs[name] for name in names]


def _make_derivation(
    request: RunRequest,
    run: Run,
    sides: Sequence[tuple[str, RunInput]],
    compute: Callable[[Sequence[Block]], Mapping[str, Output]],
    find_shape: Callable[[Sequence[ItemShape]], ItemShape],
    parameters: Mapping[str, Any],
    *,
    axis: Callable[[str, Sequence[Axis | None]], Axis | None] | None = None,
) -> Derivation:
    """Return the derivation of an output from features of the cache; the first side may be read through a view.

    Raises:
        FingerprintError: the cache has features from another encoder than the run was trained on.
    """
    inputs: list[tuple[str, str]] = []
    plain_inputs: list[tuple[str, str, Mapping[str, Any]]] = []
    for modality, side in sides:
        view = request.view if modality == sides[0][0] else PLAIN
        feature = open_input(request.cache, modality, view_feature(side.feature, view))
        next_step = f"the cache's {feature.name} comes from another encoder: use the cache that the run was trained on"
        label = f"the run's {modality} feature {side.feature}"
        check_same_view(label, side.fingerprint, feature.fingerprint, view, next_step=next_step)

        # A joined feature, `a/cls+a/patches`, is read as its parts.
        for part in feature.name.split("+"):
            inputs.append((modality, part))
        for part in side.feature.split("+"):
            plain_inputs.append((modality, part, side.fingerprint))

    rule = Rule(
        name=RUN,
        apply=lambda blocks, _: compute(blocks),
        outputs=lambda shapes, _: {request.output: find_shape(shapes)},
        axis=axis,
        weights=run.info.weights,
        location={RUN: str(request.path)},
    )
    derived_view = None if request.view == PLAIN else DerivedView(request.view, plain_inputs)
    return Derivation(
        name=request.name,
        inputs=inputs,
        rule=rule,
        parameters={"output": request.output, **parameters},
        dtype=request.dtype,
        view=derived_view,
    )


def _open_pair(request: RunRequest, run: Run) -> list[Derivation]:
    """Open the unit vectors of an aligned pair in the shared space, for one modality or both."""
    run.load()
    if request.output != "projected":
        raise unknown_name("output", request.output, ["projected"], where=f"of the run {request.path}")

    # Without a choice, modalities that the cache lacks are left out.
    if request.modality is None:
        modalities = list(filter(request.cache.info.num_items.get, run.modalities))
    elif request.modality in run.modalities:
        modalities = [request.modality]
    else:
        raise unknown_name("modality", request.modality, run.modalities, where=f"of the run {request.path}")

    derivations = []
    for modality in modalities:
        sides = [(modality, run.input(modality))]
        compute = partial(_project, run.pair.tower(modality), run.device)
        derivations.append(_make_derivation(request, run, sides, compute, lambda _: (run.shared_width,), {}))
    return derivations


def _project(tower: AnyTower, device: str, inputs: Sequence[Block]) -> Mapping[str, Output]:
    """Project B items, a few at a time, as token sequences are padded: (B, P) float32, rows of length 1."""
    items = [block.items() for block in inputs]
    vectors = []
    for rows in blocks(len(items[0]), _BLOCK):
        batch = _to_inputs(inputs, items, rows)
        vectors.append(project(tower, batch, device=device))
    return {"projected": np.concatenate(vectors)}


def _to_inputs(inputs: Sequence[Block], items: Sequence[Sequence[Array]], rows: slice) -> Inputs:
    if len(inputs) == 1 and inputs[0].lengths is None:
        return Inputs(inputs[0].values[rows])
    return to_inputs([part[rows] for part in items])


def reopen_run(cache: Cache, group: EncoderGroup, location: Mapping[str, str], *, device: str) -> Derivation:
    """Reopen the output of a run from the record of a folder of derived features."""
    request = RunRequest(
        cache=cache,
        path=Path(location[RUN]),
        output=group.fingerprint["preprocessing"]["output"],
        name=group.name.partition("@")[0],
        modality=group.modality,
        view=group.fingerprint.get("view", {}).get("name", PLAIN),
        device=device,
    )
    (opened,) = open_run(request)
    return opened
