"""Trained runs as rules: each kind of run offers outputs by name, such as `projected` and `prob` of an aligned pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch

from embedcache.arrays import Array, Floats, Inputs, blocks
from embedcache.axis import Axis
from embedcache.dataset.inputs import PLAIN, check_same_view, open_input, to_inputs, view_feature
from embedcache.dataset.prompts import check_prompts, class_vectors, read_prompts
from embedcache.derive.rules import Block, Derivation, DerivedView, Output, Rule
from embedcache.devices import torch_device
from embedcache.encoders.base import ItemShape
from embedcache.errors import SettingError
from embedcache.files import AnyPath
from embedcache.projectors.modules import ModuleConfig, ModuleInput, load_module
from embedcache.projectors.pair import AlignedPair, AnyTower
from embedcache.projectors.saved import (
    PairConfig,
    TowerInput,
    check_feature,
    is_pair,
    load_pair,
    project,
    read_run,
)
from embedcache.provenance import RUN
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache
from embedcache.store.group import EncoderGroup

_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A run and the output of it to derive.

    Args:
        cache: the cache whose features the run reads.
        path: folder of the run.
        output: name of the output.
        name: name of the derived features' folder in the cache.
        modality: modality of the features to derive; None: every modality for which the run has the output.
        view: view of the run's features of that modality; `plain` is these features.
        prompts: cache of prompts, for outputs that compare with classes.
        dtype: dtype on disk.
    """

    cache: Cache
    path: Path
    output: str
    name: str
    modality: str | None
    view: str
    prompts: AnyPath | None
    device: str
    dtype: str = "float16"


class OutputModule(Protocol):
    """A trained module with outputs that can be derived; a `torch.nn.Module` of a run that `train_task` wrote.

    It is in evaluation mode. The inputs are the features of the sides that an output reads: those of the run's config,
    in their order, unless the module has a method `output_sides(name)` that returns the names of the sides which an
    output reads. The derived features belong to the modality of the first of them.

    A method `output_axis(name, axes)` may return the `embedcache.axis.Axis` of the tokens of an output, or None, given
    those of its inputs.
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
        SettingError: the output needs prompts, or has no use for them.
        FingerprintError: the cache holds features from another encoder than the run was trained on.
    """
    return _open_pair(request) if is_pair(read_run(request.path)) else [_open_module(request)]


def _open_module(request: RunRequest) -> Derivation:
    """Open an output of a run of a module, which says what it offers.

    Raises:
        SettingError: the module is not an `OutputModule`, or a setting is for aligned pairs only.
    """
    module, config = load_module(request.path, device=str(torch_device(request.device, needs_float64=True)))
    if not (hasattr(module, "output_shapes") and hasattr(module, "compute_outputs")):
        raise SettingError(
            f"{request.path}: the module {config.kind} offers no outputs; give it the methods of OutputModule in "
            "embedcache/derive/runs.py"
        )
    output_module = cast(OutputModule, module)
    sides = [(side.modality, side) for side in _output_sides(output_module, config, request.output)]
    for name, value, expected in (
        ("prompts", request.prompts, (None,)),
        ("modality", request.modality, (None, sides[0][0])),
    ):
        if value not in expected:
            raise SettingError(f"{name}: expected none for a run of {config.kind}, got {value}; omit --{name}")

    def find_shape(shapes: Sequence[ItemShape]) -> ItemShape:
        offered = output_module.output_shapes(shapes)
        if request.output not in offered:
            raise unknown_name("output", request.output, offered, where=f"of the run {request.path}")
        return offered[request.output]

    @torch.inference_mode()
    def compute(blocks: Sequence[Block]) -> Mapping[str, Output]:
        return output_module.compute_outputs(blocks, [request.output])

    axis = getattr(module, "output_axis", None)
    return _make_derivation(request, config, sides, compute, find_shape, {"kind": config.kind}, axis=axis)


def _output_sides(module: OutputModule, config: ModuleConfig, output: str) -> list[ModuleInput]:
    """Return the sides that an output reads: all, unless the module says which."""
    choose: Callable[[str], Sequence[str]] | None = getattr(module, "output_sides", None)
    names = list(config.sides) if choose is None else choose(output)
    if not names or any(name not in config.sides for name in names):  # of an unknown output, which is named later
        names = list(config.sides)
    return [config.sides[name] for name in names]


def _make_derivation(
    request: RunRequest,
    config: ModuleConfig | PairConfig,
    sides: Sequence[tuple[str, ModuleInput | TowerInput]],
    compute: Callable[[Sequence[Block]], Mapping[str, Output]],
    find_shape: Callable[[Sequence[ItemShape]], ItemShape],
    parameters: Mapping[str, Any],
    *,
    axis: Callable[[str, Sequence[Axis | None]], Axis | None] | None = None,
    location: Mapping[str, str] | None = None,
) -> Derivation:
    """Return the derivation of an output from features of the cache, a view of those of the first side.

    Raises:
        FingerprintError: the cache holds features from another encoder than the run was trained on.
    """
    inputs: list[tuple[str, str]] = []
    plain_inputs: list[tuple[str, str, Mapping[str, Any]]] = []
    for modality, side in sides:
        view = request.view if modality == sides[0][0] else PLAIN
        feature = open_input(request.cache, modality, view_feature(side.feature, view))
        next_step = f"the cache's {feature.name} comes from another encoder: use the cache that the run was trained on"
        what = f"the run's {modality} feature {side.feature}"
        check_same_view(what, side.fingerprint, feature.fingerprint, view, next_step=next_step)
        inputs += [(modality, part) for part in feature.name.split("+")]
        plain_inputs += [(modality, part, side.fingerprint) for part in side.feature.split("+")]

    rule = Rule(
        name=RUN,
        apply=lambda blocks, _: compute(blocks),
        outputs=lambda shapes, _: {request.output: find_shape(shapes)},
        axis=axis,
        weights=config.weights_digest,
        location={RUN: str(request.path), **(location or {})},
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


def _open_pair(request: RunRequest) -> list[Derivation]:
    """Open an output of an aligned pair: `projected` for both modalities, `prob` for images.

    Raises:
        SettingError: prompts are missing, or of no use.
    """
    device = str(torch_device(request.device))
    pair, config = load_pair(request.path, device=device)
    if request.output not in ("projected", "prob"):
        raise unknown_name("output", request.output, ("projected", "prob"), where=f"of the run {request.path}")
    if request.output == "prob" and request.prompts is None:
        raise SettingError("the output prob compares with classes; name a cache of prompts with --prompts")
    if request.output != "prob" and request.prompts is not None:
        raise SettingError(f"prompts: expected the output prob, got {request.output}; omit --prompts")
    if request.modality is None:
        modalities = [name for name in config.modalities if request.cache.info.num_items.get(name)]
        modalities = modalities[:1] if request.output == "prob" else modalities
    elif request.modality in config.modalities:
        modalities = [request.modality]
    else:
        raise unknown_name("modality", request.modality, config.modalities, where=f"of the run {request.path}")

    classes = None if request.prompts is None else _read_classes(request.prompts, pair, config, device)
    return [_open_tower(request, pair, config, modality, classes, device) for modality in modalities]


class _Classes(NamedTuple):
    """Classes of prompts: (C, P) unit vectors in the shared space, and what the fingerprint says of them."""

    vectors_CP: Floats
    parameters: Mapping[str, Any]


def _read_classes(prompts_path: AnyPath, pair: AlignedPair, config: PairConfig, device: str) -> _Classes:
    """Project the prompts of classes; a class is the mean of its projected prompts, as in zero-shot classification."""
    cache = Cache(prompts_path)
    check_prompts(cache, config.tower_input("text").spec)
    feature = open_input(cache, "text", config.tower_input("text").feature)
    check_feature(config, "text", feature.name, feature.fingerprint)
    prompts = read_prompts(cache, feature)
    record = {"feature": feature.name, "index_digest": cache.info.index_digest}
    vectors_CP = class_vectors(prompts, pair.tower("text"), device=device)
    return _Classes(vectors_CP, {"classes": prompts.names, "prompts": record})


def _open_tower(
    request: RunRequest, pair: AlignedPair, config: PairConfig, modality: str, classes: _Classes | None, device: str
) -> Derivation:
    """Open the unit vectors in the shared space, or the softmax of their scaled cosines to classes."""
    tower = pair.tower(modality)
    scale = pair.scale.item()

    def compute(blocks: Sequence[Block]) -> Mapping[str, Output]:
        vectors_BP = _project(tower, blocks, device)
        if classes is None:
            return {"projected": vectors_BP}
        scores_BC = torch.from_numpy(scale * vectors_BP @ classes.vectors_CP.T)
        return {"prob": scores_BC.softmax(dim=1).numpy()}

    width = config.shared_width if classes is None else len(classes.vectors_CP)
    parameters = {} if classes is None else classes.parameters
    location = {} if classes is None else {"prompts": str(request.prompts)}
    sides = [(modality, config.tower_input(modality))]
    return _make_derivation(request, config, sides, compute, lambda _: (width,), parameters, location=location)


def _project(tower: AnyTower, inputs: Sequence[Block], device: str) -> Floats:
    """Project B items, a few at a time, as token sequences are padded: (B, P) float32, rows of length 1."""
    items = [block.items() for block in inputs]
    rows = blocks(len(items[0]), _BLOCK)
    return np.concatenate([project(tower, _to_inputs(inputs, items, row), device=device) for row in rows])


def _to_inputs(inputs: Sequence[Block], items: Sequence[Sequence[Array]], rows: slice) -> Inputs:
    if len(inputs) == 1 and inputs[0].lengths is None:
        return Inputs(inputs[0].values[rows])
    return to_inputs([part[rows] for part in items])


def reopen_run(cache: Cache, group: EncoderGroup, location: Mapping[str, str], *, device: str) -> Derivation:
    """Open the output of a run again from what a folder of derived features records."""
    request = RunRequest(
        cache=cache,
        path=Path(location[RUN]),
        output=group.fingerprint["preprocessing"]["output"],
        name=group.name.partition("@")[0],
        modality=group.modality,
        view=group.fingerprint.get("view", {}).get("name", PLAIN),
        prompts=location.get("prompts"),
        device=device,
    )
    (opened,) = open_run(request)
    return opened
