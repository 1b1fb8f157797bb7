"""Derivation: compute features from other features of a cache, chunk by chunk, with a rule or a trained run.

`verify` computes them again: damaged chunks, and some rows to compare.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from embedcache.axis import Axis
from embedcache.dataset.inputs import PLAIN
from embedcache.derive.compute import (
    ChunkReader,
    DerivedView,
    OpenDerivation,
    prepare_group,
    read_fit,
    request_fingerprint,
)
from embedcache.derive.rules import Rule, RuleFunction, open_rule
from embedcache.derive.runs import RunRequest, open_run, reopen_run
from embedcache.derive.settings import DTYPES, DeriveSettings
from embedcache.devices import AUTO
from embedcache.encoders.base import ItemShape
from embedcache.encoders.open import RUN, EncoderSpec
from embedcache.errors import SettingError, UnknownNameError
from embedcache.files import AnyPath, remove_partials
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.records import new_record_path, record_stage
from embedcache.registry import names_from
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, open_group
from embedcache.store.producer import FillReport, Output, fill

OutputSpec: TypeAlias = tuple[ItemShape, str]
"""Shape of one item and dtype on disk."""


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """A description of derived features.

    Args:
        name: name of their folder in the cache, beside those of encoders.
        inputs: modality and name, `encoder/feature`, of each feature that the rule reads. The derived features have an
            item per item of the first input; other modalities contribute the item of the same sample.
        rule: name of a rule, `module:attribute`, or a function; see `embedcache.derive.rules`.
        parameters: parameters of the rule, as JSON values.
        outputs: output -> item shape and dtype, for a function; a `Rule` knows its outputs.
        dtype: dtype on disk of the outputs of a `Rule`.
        model_digest: digest of what a function computes with, if it is more than its code and parameters.
        keeps_axis: whether token outputs of a function have the tokens, and the axis, of the first input.
        fit_split: a run's `split.parquet`; a rule that is fitted reads its training part. None: all items.
        view: the view that the inputs are of, which is added to the name of the folder: `NAME@VIEW`.
    """

    name: str
    inputs: Sequence[tuple[str, str]]
    rule: str | Rule | RuleFunction
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, OutputSpec] = field(default_factory=dict)
    dtype: str = "float16"
    model_digest: str = ""
    keeps_axis: bool = False
    fit_split: Path | None = None
    view: DerivedView | None = None

    @property
    def folder(self) -> str:
        """Name of the folder in the cache."""
        return self.name if self.view is None else f"{self.name}@{self.view.name}"

    def __post_init__(self) -> None:
        if not self.inputs:
            raise SettingError("inputs: expected at least one feature to derive from, got none")
        for each in itertools.filterfalse(_is_input, self.inputs):
            expected = "pairs of a modality and a feature, such as ('image', 'dinov2-base/cls')"
            raise SettingError(f"inputs: expected {expected}, got {each!r}")
        if not self.name or EncoderSpec("", self.name).folder != self.name:
            raise SettingError(f"name: expected a name of letters, digits and . = + - _, got {self.name!r}")
        if not (isinstance(self.rule, str | Rule) or callable(self.rule)):
            raise SettingError(f"rule: expected the name of a rule, a Rule or a function, got {self.rule!r}")
        if not isinstance(self.parameters, Mapping):
            raise SettingError(f"parameters: expected a mapping of names and values, got {self.parameters!r}")
        if not isinstance(self.outputs, Mapping) or not all(map(_is_output, self.outputs.values())):
            expected = 'shapes and dtypes such as {"label": ((1,), "int16")}'
            raise SettingError(f"outputs: expected {expected}, got {self.outputs!r}")
        for dtype in (self.dtype, *(dtype for _, dtype in self.outputs.values())):
            if dtype not in DTYPES:
                raise SettingError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")


def _is_input(value: Any) -> bool:
    """Return whether a value is a pair of texts."""
    return isinstance(value, tuple | list) and [isinstance(part, str) for part in value] == [True, True]


def _is_output(value: Any) -> bool:
    """Return whether a value is a shape, (D,), (T, D) or (-1, D), and a text."""
    if not (isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], str)):
        return False
    shape = value[0]
    return isinstance(shape, tuple | list) and len(shape) in (1, 2) and all(type(size) is int for size in shape)


def derive(cache: AnyPath, derivation: Derivation, *, progress: AnyProgress = None) -> FillReport:
    """Compute features from other features of a cache, and store them beside these.

    Committed chunks are not computed again, so an interrupted derivation resumes where it stopped, several processes
    share the chunks, and after `extract --extend` only new rows are computed. An item that lacks an input has no
    derived feature, for the same reason; items whose input was repaired since are computed now. Memory: one chunk of
    the inputs and outputs, and 16 bytes per item if the inputs have several modalities.

    Raises:
        UnknownNameError: there is no such feature, rule or parameter.
        SettingError: the inputs do not fit the rule, or the name belongs to an encoder.
        UnfinishedError: chunks of an input are missing.
        FingerprintError: the name holds features of other inputs, parameters or code; names each with both values.
        DataError: a sample has several items of another modality, or a value does not fit the declared output.
    """
    progress = to_progress(progress)
    if not isinstance(derivation, Derivation):
        raise SettingError(f"derivation: expected a Derivation, got {derivation!r}")
    cache = Cache(cache)
    remove_partials(cache.path)
    rule = open_rule(derivation.rule)
    inputs = [_open_input(cache, derivation, modality, name) for modality, name in derivation.inputs]
    parameters = rule.check_parameters(derivation.parameters)
    reader = ChunkReader(cache, inputs)
    weights = derivation.model_digest or rule.weights
    opened = OpenDerivation(
        name=derivation.folder,
        fingerprint=request_fingerprint(rule, inputs, parameters, weights=weights, view=derivation.view),
        rule=rule,
        reader=reader,
        parameters=parameters,
        outputs=_choose_outputs(derivation, rule, inputs, parameters),
    )
    reader.require_complete()
    if rule.fit is None:  # before anything is written
        opened.apply(reader.open_first())

    group, fitted = prepare_group(cache, opened, split_path=derivation.fit_split)
    opened = replace(opened, parameters={**parameters, **fitted})
    with record_stage(new_record_path(cache.path, "derive"), "derive", group.fingerprint) as outcome:
        report = fill(group, opened, progress=progress)
        if report.computed:
            outcome["features"] = vars(report)
    return report


def _open_input(cache: Cache, derivation: Derivation, modality: str, name: str) -> Feature:
    feature = cache.feature(modality, name)
    if feature.group.name == derivation.folder and modality == derivation.inputs[0][0]:
        raise SettingError(f"name: {derivation.folder!r} holds the input {feature.name}; choose another name")
    return feature


def _choose_outputs(
    derivation: Derivation, rule: Rule, inputs: Sequence[Feature], parameters: Mapping[str, Any]
) -> dict[str, Output]:
    if rule.outputs is None and not derivation.outputs:
        raise SettingError(
            f"outputs: the rule {rule.name!r} is a function, which does not say what it returns; expected "
            'shapes and dtypes such as {"label": ((1,), "int16")}, or a Rule instead of a function'
        )
    outputs = dict(derivation.outputs)
    if rule.outputs is not None:
        shapes = rule.outputs([feature.item_shape for feature in inputs], parameters)
        if derivation.outputs:
            raise SettingError(f"outputs: the rule {rule.name!r} has the outputs {', '.join(shapes)}; omit them")
        outputs = {name: (tuple(shape), derivation.dtype) for name, shape in shapes.items()}
    return {
        name: Output(shape, dtype, _choose_axis(derivation, rule, name, inputs) if len(shape) > 1 else None)
        for name, (shape, dtype) in outputs.items()
    }


def _choose_axis(derivation: Derivation, rule: Rule, output: str, inputs: Sequence[Feature]) -> Axis | None:
    if rule.axis is not None:
        return rule.axis(output, [feature.axis for feature in inputs])
    return inputs[0].axis if derivation.keeps_axis or rule.keeps_axis else None


def derive_from_run(
    cache: AnyPath,
    run: AnyPath,
    output: str = "projected",
    *,
    name: str | None = None,
    modality: str | None = None,
    view: str | Sequence[str] = PLAIN,
    prompts: AnyPath | None = None,
    dtype: str = "float16",
    device: str = AUTO,
    progress: AnyProgress = None,
) -> list[FillReport]:
    """Store an output of a trained run as features of a cache.

    Args:
        cache: cache with the features that the run reads.
        run: folder of the run.
        output: for an aligned pair, `projected` (unit vectors in the shared space) or `prob` (probabilities of
            classes).
        name: name of the folder in the cache; None: `RUN-OUTPUT`.
        modality: modality to derive features of; None: every modality for which the run has the output.
        view: a view of the run's features of that modality, such as `babble-5dB`, or several, each into the folder
            `NAME@VIEW`; `plain` is the features that the run was trained on.
        prompts: cache of prompts that define the classes of `prob`.
        dtype: dtype on disk.
        device: torch device of the run.
        progress: shows the number of items.

    Returns:
        One report per view and modality; errors are those of `derive` and `embedcache.derive.runs.open_run`.
    """
    run, cache = Path(run), Cache(cache)
    progress = to_progress(progress)
    requests = [
        RunRequest(cache=cache, path=run, output=output, modality=modality, view=view, prompts=prompts, device=device)
        for view in ([view] if isinstance(view, str) else view)
    ]
    name = name or f"{run.resolve().name}-{output}"
    derivations = [
        Derivation(
            name=name,
            inputs=opened.inputs,
            rule=opened.rule,
            parameters=opened.parameters,
            dtype=dtype,
            view=opened.view,
        )
        for request in requests
        for opened in open_run(request)
    ]
    return [derive(cache, derivation, progress=progress) for derivation in derivations]


def derive_with_settings(
    cache_path: AnyPath, settings: DeriveSettings, *, progress: Progress | None = None
) -> list[FillReport]:
    """Derive what the settings of the command line describe; errors are those of `derive` and `derive_from_run`."""
    if settings.run is not None:
        return derive_from_run(
            cache_path,
            settings.run,
            settings.run_output,
            name=settings.name,
            modality=settings.modality,
            view=settings.views or (PLAIN,),
            prompts=settings.prompts,
            dtype=settings.dtype,
            device=settings.device,
            progress=progress,
        )
    assert settings.rule is not None  # one of the two is given
    derivation = Derivation(
        name=settings.name or settings.rule.rpartition(":")[2],
        inputs=settings.input_features,
        rule=settings.rule,
        parameters=settings.parameter_values,
        dtype=settings.dtype,
        fit_split=settings.fit_split,
    )
    return [derive(cache_path, derivation, progress=progress)]


def reopen_derivation(
    cache: Cache, group: EncoderGroup, features: Sequence[str], *, device: str = AUTO
) -> OpenDerivation:
    """Open the rule and inputs of derived features again, to compute some of them as they were.

    Raises:
        SettingError: the rule or the run is custom code, and the cache is not trusted.
        UnknownNameError: the rule or an input no longer exists.
        PathError: the run no longer exists.
        CorruptError: the arrays that the rule was fitted to have changed.
    """
    spec, stored = EncoderSpec.parse(group.spec), group.fingerprint
    parameters, inputs = stored["preprocessing"], [cache.feature(*entry) for entry in group.inputs]
    view = None
    if spec.model == RUN:
        opened_run = reopen_run(cache, group, spec.options, device=device)
        parameters, rule, view = opened_run.parameters, opened_run.rule, opened_run.view
    else:
        rule = _reopen_rule(group, spec.model)
    reader = ChunkReader(cache, inputs)
    weights = rule.weights or stored["weights"]
    request = request_fingerprint(rule, inputs, parameters, weights=weights, view=view)
    fitted = read_fit(group) if rule.fit is not None else {}
    return OpenDerivation(
        name=group.name,
        fingerprint={**request, **({"fit": stored["fit"]} if "fit" in stored else {})},
        rule=rule,
        reader=reader,
        parameters={**parameters, **fitted},
        outputs={name: Output.of(Feature(group, name)) for name in features},
    )


def _reopen_rule(group: EncoderGroup, name: str) -> Rule:
    try:
        with names_from(f"{group.name}: the cache"):
            return open_rule(name)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{group.name}: the rule {name!r} that computed it cannot be imported; make its module importable, or "
            f"derive it again under another name: {error}"
        ) from error


def derivation_depth(cache: Cache, group: EncoderGroup) -> int:
    """Return how many derivations lie between the features of a folder and those of encoders; 0 for an encoder."""
    names = {(modality, feature.rpartition("/")[0]) for modality, feature in group.inputs}
    below = [derivation_depth(cache, open_group(cache.path, *name, cache.info)) for name in names]
    return 1 + max(below, default=0) if group.is_derived else 0
