"""Trained runs as rules: an aligned pair offers the output `projected`, other modules have outputs of their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from embedcache.arrays import Array, Inputs, blocks
from embedcache.dataset.inputs import PLAIN, check_same_view, open_input, to_inputs, view_feature
from embedcache.derive.rules import Block, Derivation, DerivedView, Output, Rule
from embedcache.encoders.base import ItemShape
from embedcache.errors import SettingError
from embedcache.modeling.heads import AnyTower
from embedcache.processes import torch_device
from embedcache.projectors.base import project
from embedcache.provenance import RUN
from embedcache.registry import unknown_name
from embedcache.runs import PAIR, Run, RunInput
from embedcache.store.cache import Cache
from embedcache.store.feature import EncoderGroup
from embedcache.store.layout import Axis

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

    It is in evaluation mode. The inputs are the features of the sides that an output reads: those of the run's config,
    in their order, unless the module has a method `output_sides(name)` that returns the names of the sides which an
    output reads. The derived features belong to the modality of the first of them.

    A method `output_axis(name, axes)` may return the `embedcache.store.layout.Axis` of the tokens of an output, or
    None, given those of its inputs.
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
        FingerprintError: the cache holds features from another encoder than the run was trained on.
    """
    run = Run.open(request.path)
    device = str(torch_device(request.device, needs_float64=run.info.kind != PAIR))
    run = Run.open(request.path, device=device)
    return _open_pair(request, run) if run.info.kind == PAIR else [_open_module(request, run)]


def _open_module(request: RunRequest, run: Run) -> Derivation:
    """Open an output of a run of a module, which says what it offers.

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
    """Return the sides that an output reads: all, unless the module says which."""
    choose: Callable[[str], Sequence[str]] | None = getattr(module, "output_sides", None)
    inputs = run.info.inputs
    names = list(inputs) if choose is None else choose(output)
    if not names or any(name not in inputs for name in names):  # of an unknown output, which is named later
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
    if request.modality is None:
        modalities = [name for name in run.modalities if request.cache.info.num_items.get(name)]
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
    rows = blocks(len(items[0]), _BLOCK)
    vectors_BP = np.concatenate([project(tower, _to_inputs(inputs, items, row), device=device) for row in rows])
    return {"projected": vectors_BP}


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
        device=device,
    )
    (opened,) = open_run(request)
    return opened
