"""Trained runs as rules: each kind of run offers outputs by name, such as `projected` and `prob` of an aligned pair."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch

from embedcache.arrays import Array, Floats, Inputs, blocks
from embedcache.dataset.inputs import PLAIN, InputFeature, check_same_view, open_input, to_inputs, view_feature
from embedcache.dataset.prompts import check_prompts, class_vectors, read_prompts
from embedcache.derive.compute import DerivedView
from embedcache.derive.rules import Block, Output, Rule
from embedcache.devices import AUTO, torch_device
from embedcache.encoders.base import ItemShape
from embedcache.encoders.open import RUN
from embedcache.errors import PathError, SettingError
from embedcache.files import AnyPath
from embedcache.projectors.modules import ModuleConfig, ModuleInput, load_module
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import (
    PairConfig,
    TowerInput,
    check_feature,
    config_path,
    is_pair,
    load_pair,
    project,
    read_run,
)
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
        modality: modality of the features to derive; None: every modality for which the run has the output.
        view: view of the run's features of that modality; `plain` is these features.
        prompts: cache of prompts, for outputs that compare with classes.
    """

    cache: Cache
    path: Path
    output: str
    modality: str | None = None
    view: str = PLAIN
    prompts: AnyPath | None = None
    device: str = AUTO

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.=+-]+", self.view):
            raise SettingError(
                f"view: expected the name of a view as in the folders of the cache, such as babble-5dB for the folder "
                f"tiny.en@babble-5dB, got {self.view!r}"
            )


@dataclass(frozen=True, kw_only=True)
class RunRule:
    """One output of a run for the items of one modality: the features it reads, the rule and its parameters.

    `view` says which view these features are of; None: they are those that the run was trained on.
    """

    inputs: Sequence[tuple[str, str]]
    rule: Rule
    parameters: Mapping[str, Any]
    view: DerivedView | None = None


OpenRun: TypeAlias = Callable[[RunRequest], list[RunRule]]


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


def open_run(request: RunRequest) -> list[RunRule]:
    """Open one output of a trained run as rules, one per modality.

    Raises:
        PathError: the folder is not a finished run.
        UnknownNameError: the run has no such output, or is of an unknown kind.
        SettingError: the output needs prompts, or has no use for them.
        FingerprintError: the cache holds features from another encoder than the run was trained on.
    """
    manifest = read_run(request.path)
    open_output: OpenRun = _open_pair if is_pair(manifest) else _open_module
    return open_output(request)


def _open_module(request: RunRequest) -> list[RunRule]:
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
    sides = _output_sides(output_module, config, request.output)
    if request.prompts is not None or request.modality not in (None, sides[0].modality):
        name, value = ("prompts", request.prompts) if request.prompts is not None else ("modality", request.modality)
        raise SettingError(f"{name}: expected none for a run of {config.kind}, got {value}; omit --{name}")
    views = [request.view if side.modality == sides[0].modality else PLAIN for side in sides]
    opened = [_open_side(request.cache, side.modality, side, view) for side, view in zip(sides, views, strict=True)]

    def outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
        offered = output_module.output_shapes(shapes)
        if request.output not in offered:
            raise unknown_name("output", request.output, offered, where=f"of the run {request.path}")
        return {request.output: offered[request.output]}

    @torch.inference_mode()
    def apply(blocks: Sequence[Block], _: Mapping[str, Any]) -> Mapping[str, Output]:
        return output_module.compute_outputs(blocks, [request.output])

    rule = Rule(
        name=RUN,
        apply=apply,
        outputs=outputs,
        axis=getattr(module, "output_axis", None),
        weights=config.weights_digest,
        location={RUN: str(request.path)},
    )
    inputs = [(feature.modality, part) for feature in opened for part in feature.name.split("+")]
    view = _derived_view(request.view, [(side.modality, side) for side in sides])
    return [RunRule(inputs=inputs, rule=rule, parameters={"output": request.output, "kind": config.kind}, view=view)]


def _output_sides(module: OutputModule, config: ModuleConfig, output: str) -> list[ModuleInput]:
    """Return the sides that an output reads: all, unless the module says which."""
    choose: Callable[[str], Sequence[str]] | None = getattr(module, "output_sides", None)
    names = list(config.sides) if choose is None else choose(output)
    if not names or any(name not in config.sides for name in names):  # of an unknown output, which is named later
        names = list(config.sides)
    return [config.sides[name] for name in names]


def _open_side(cache: Cache, modality: str, side: ModuleInput | TowerInput, view: str) -> InputFeature:
    """Open a view of the feature that a run was trained on, after checking that it comes from the same encoder."""
    feature = open_input(cache, modality, view_feature(side.feature, view))
    check_same_view(
        f"the run's {modality} feature {side.feature}",
        side.fingerprint,
        feature.fingerprint,
        view,
        next_step=f"the cache's {feature.name} comes from another encoder: use the cache that the run was trained on",
    )
    return feature


def _derived_view(view: str, sides: Sequence[tuple[str, ModuleInput | TowerInput]]) -> DerivedView | None:
    """Return the view that derived features are of, with the features that the run was trained on; None if plain."""
    plain = [(modality, part, side.fingerprint) for modality, side in sides for part in side.feature.split("+")]
    return None if view == PLAIN else DerivedView(name=view, plain_inputs=plain)


def _open_pair(request: RunRequest) -> list[RunRule]:
    """Open an output of an aligned pair: `projected` for both modalities, `prob` for images."""
    request = replace(request, device=str(torch_device(request.device)))
    pair, config = load_pair(request.path, device=request.device)
    openers = {"projected": _open_projected, "prob": _open_prob}
    if request.output not in openers:
        raise unknown_name("output", request.output, openers, where=f"of the run {request.path}")
    if request.prompts is not None and request.output != "prob":
        raise SettingError(f"prompts: expected the output prob, got {request.output}; omit --prompts")
    both = config.modalities
    if request.modality is None:
        modalities = [name for name in both if request.cache.info.num_items.get(name)]
        modalities = modalities[:1] if request.output == "prob" else modalities
    elif request.modality in both:
        modalities = [request.modality]
    else:
        raise unknown_name("modality", request.modality, both, where=f"of the run {request.path}")
    return [openers[request.output](request, pair, config, modality) for modality in modalities]


def _open_projected(request: RunRequest, pair: AlignedPair, config: PairConfig, modality: str) -> RunRule:
    """Open the unit vectors in the shared space."""

    def apply(inputs: Sequence[Block], _: Mapping[str, Any]) -> Mapping[str, Output]:
        return {"projected": _project(pair, modality, inputs, request.device)}

    def outputs(_: Sequence[ItemShape], __: Mapping[str, Any]) -> Mapping[str, ItemShape]:
        return {"projected": (config.shared_width,)}

    rule = Rule(
        name=RUN, apply=apply, outputs=outputs, weights=config.weights_digest, location={RUN: str(request.path)}
    )
    return _tower_rule(request, config, modality, rule, {"output": "projected"})


def _open_prob(request: RunRequest, pair: AlignedPair, config: PairConfig, modality: str) -> RunRule:
    """Open the softmax over classes of the cosine similarities, at the temperature of the run.

    The classes are the means of the projected prompts, as in zero-shot classification.
    """
    if request.prompts is None:
        raise SettingError("the output prob compares with classes; name a cache of prompts with --prompts")
    prompts_cache = Cache(request.prompts)
    check_prompts(prompts_cache, config.tower_input("text").spec)
    feature = open_input(prompts_cache, "text", config.tower_input("text").feature)
    check_feature(config, "text", feature.name, feature.fingerprint)
    prompts = read_prompts(prompts_cache, feature)
    classes_CP, scale = class_vectors(prompts, pair.tower("text"), device=request.device), pair.scale.item()

    def apply(inputs: Sequence[Block], _: Mapping[str, Any]) -> Mapping[str, Output]:
        return {"prob": _softmax(scale * _project(pair, modality, inputs, request.device) @ classes_CP.T)}

    def outputs(_: Sequence[ItemShape], __: Mapping[str, Any]) -> Mapping[str, ItemShape]:
        return {"prob": (len(prompts.names),)}

    location = {RUN: str(request.path), "prompts": str(request.prompts)}
    rule = Rule(name=RUN, apply=apply, outputs=outputs, weights=config.weights_digest, location=location)
    parameters = {
        "output": "prob",
        "classes": prompts.names,
        "prompts": {"feature": feature.name, "index_digest": prompts_cache.info.index_digest},
    }
    return _tower_rule(request, config, modality, rule, parameters)


def _tower_rule(
    request: RunRequest, config: PairConfig, modality: str, rule: Rule, parameters: Mapping[str, Any]
) -> RunRule:
    """Return a rule of an aligned pair with the feature of the cache that its tower reads."""
    side = config.tower_input(modality)
    feature = _open_side(request.cache, modality, side, request.view)
    return RunRule(
        inputs=[(modality, part) for part in feature.name.split("+")],
        rule=rule,
        parameters=parameters,
        view=_derived_view(request.view, [(modality, side)]),
    )


def _project(pair: AlignedPair, modality: str, inputs: Sequence[Block], device: str) -> Floats:
    """Project B items, a few at a time, as token sequences are padded: (B, P) float32, rows of length 1."""
    items, tower = [block.items() for block in inputs], pair.tower(modality)
    rows = blocks(len(items[0]), _BLOCK)
    return np.concatenate([project(tower, _to_inputs(inputs, items, row), device=device) for row in rows])


def _to_inputs(inputs: Sequence[Block], items: Sequence[Sequence[Array]], rows: slice) -> Inputs:
    if len(inputs) == 1 and inputs[0].lengths is None:
        return Inputs(inputs[0].values[rows])
    return to_inputs([part[rows] for part in items])


def _softmax(scores_BC: Array) -> Floats:
    exponents_BC = np.exp(scores_BC - scores_BC.max(axis=1, keepdims=True))
    probabilities_BC: Floats = exponents_BC / exponents_BC.sum(axis=1, keepdims=True)
    return probabilities_BC


def reopen_run(cache: Cache, group: EncoderGroup, location: Mapping[str, str], *, device: str) -> RunRule:
    """Open the output of a run again from what a folder of derived features records."""
    request = RunRequest(
        cache=cache,
        path=Path(location[RUN]),
        output=group.fingerprint["preprocessing"]["output"],
        modality=group.modality,
        view=group.fingerprint.get("view", {}).get("name", PLAIN),
        prompts=location.get("prompts"),
        device=device,
    )
    if not config_path(request.path).is_file():
        raise PathError(f"{request.path} is not a finished run; put the run back where the feature was derived from it")
    (opened,) = open_run(request)
    return opened
