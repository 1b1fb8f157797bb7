"""Derivation: compute features from other features of a cache, chunk by chunk, with a rule or a trained run.

`verify` computes them again: damaged chunks, and some rows to compare.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embedcache.axis import Axis
from embedcache.dataset.inputs import PLAIN
from embedcache.derive.compute import ChunkReader, OpenDerivation, prepare_group, with_fit
from embedcache.derive.rules import Rule, open_rule
from embedcache.derive.runs import DerivedView, RunRequest, open_run, reopen_run
from embedcache.derive.settings import DTYPES, DeriveSettings
from embedcache.devices import AUTO
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import SettingError, UnknownNameError
from embedcache.files import AnyPath, remove_partials
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import DERIVED, RUN, digest
from embedcache.records import new_record_path, record_stage
from embedcache.registry import names_from
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, open_group
from embedcache.store.producer import FillReport, Output, fill


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """A description of derived features.

    Args:
        name: name of their folder in the cache, beside those of encoders.
        inputs: modality and name, `encoder/feature`, of each feature that the rule reads. The derived features have an
            item per item of the first input; other modalities contribute the item of the same sample.
        rule: a rule, its name, or `module:attribute`; see `embedcache.derive.rules`.
        parameters: parameters of the rule, as JSON values.
        dtype: dtype on disk of the outputs.
        fit_split: a run's `split.parquet`; a rule that is fitted reads its training part. None: all items.
        view: the view that the inputs are of, which is added to the name of the folder: `NAME@VIEW`.
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
        for each in self.inputs:
            is_pair = isinstance(each, tuple | list) and [isinstance(part, str) for part in each] == [True, True]
            if not is_pair:
                expected = "pairs of a modality and a feature, such as ('image', 'dinov2-base/cls')"
                raise SettingError(f"inputs: expected {expected}, got {each!r}")
        if not self.name or EncoderSpec("", self.name).folder != self.name:
            raise SettingError(f"name: expected a name of letters, digits and . = + - _, got {self.name!r}")
        if not isinstance(self.rule, str | Rule):
            raise SettingError(f"rule: expected a Rule or the name of one, got {self.rule!r}")
        if not isinstance(self.parameters, Mapping):
            raise SettingError(f"parameters: expected a mapping of names and values, got {self.parameters!r}")
        if self.dtype not in DTYPES:
            raise SettingError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")


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
    opened = _open(cache, derivation)
    opened.reader.require_complete()
    group, opened = prepare_group(opened, split_path=derivation.fit_split)
    with record_stage(new_record_path(cache.path, "derive"), "derive", group.fingerprint) as outcome:
        report = fill(group, opened, progress=progress)
        if report.computed:
            outcome["features"] = vars(report)
    return report


def _open(cache: Cache, derivation: Derivation) -> OpenDerivation:
    """Open the rule and the inputs of a derivation."""
    rule = open_rule(derivation.rule)
    inputs = [cache.feature(modality, name) for modality, name in derivation.inputs]
    for feature in inputs:
        if (feature.group.name, feature.modality) == (derivation.folder, inputs[0].modality):
            raise SettingError(f"name: {derivation.folder!r} holds the input {feature.name}; choose another name")

    parameters = rule.check_parameters(derivation.parameters)
    outputs: dict[str, Output] = {}
    for name, shape in rule.outputs([feature.item_shape for feature in inputs], parameters).items():
        axis = _choose_axis(rule, name, inputs) if len(shape) > 1 else None
        outputs[name] = Output(tuple(shape), derivation.dtype, axis)
    return OpenDerivation(
        name=derivation.folder,
        fingerprint=_fingerprint(rule, inputs, parameters, derivation.view),
        rule=rule,
        reader=ChunkReader(cache, inputs),
        parameters=parameters,
        outputs=outputs,
    )


def _choose_axis(rule: Rule, output: str, inputs: Sequence[Feature]) -> Axis | None:
    if rule.axis is not None:
        return rule.axis(output, [feature.axis for feature in inputs])
    return inputs[0].axis if rule.keeps_axis else None


def _fingerprint(
    rule: Rule, inputs: Sequence[Feature], parameters: Mapping[str, Any], view: DerivedView | None
) -> dict[str, Any]:
    """Return everything that decides derived features, but for the arrays that a rule is fitted to.

    With a view, it is the fingerprint of the features without the view, and `view` with its name and its own inputs.
    """
    read = [_input_record(feature.modality, feature.name, feature.fingerprint) for feature in inputs]
    fingerprint: dict[str, Any] = {
        "family": DERIVED,
        "model": rule.name,
        "revision": None,
        "weights": rule.weights,
        "preprocessing": dict(parameters),
        "pooling": {},
        "backend": None,
        "precision": None,
        "inputs": read if view is None else [_input_record(*plain) for plain in view.plain_inputs],
    }
    if rule.code is not None:
        fingerprint["code"] = rule.code
    if view is not None:
        fingerprint["view"] = {"name": view.name, "inputs": read}
    return fingerprint


def _input_record(modality: str, name: str, fingerprint: Mapping[str, Any]) -> dict[str, str]:
    return {"modality": modality, "feature": name, "fingerprint": digest(fingerprint)}


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
    run = Path(run)
    cache = Cache(cache)
    progress = to_progress(progress)
    name = name or f"{run.resolve().name}-{output}"
    views = [view] if isinstance(view, str) else view
    requests = [
        RunRequest(cache=cache, path=run, output=output, modality=modality, view=view, prompts=prompts, device=device)
        for view in views
    ]
    derivations = [
        Derivation(name=name, dtype=dtype, **opened._asdict()) for request in requests for opened in open_run(request)
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
    spec = EncoderSpec.parse(group.spec)
    name = group.name.partition("@")[0]
    if spec.model == RUN:
        derivation = Derivation(name=name, **reopen_run(cache, group, spec.options, device=device)._asdict())
    else:
        rule = _reopen_rule(group, spec.model)
        parameters = group.fingerprint["preprocessing"]
        derivation = Derivation(name=name, inputs=group.inputs, rule=rule, parameters=parameters)

    opened = with_fit(_open(cache, derivation), group)
    fingerprint = dict(opened.fingerprint)
    if opened.rule.fit is not None:
        fingerprint |= {name: group.fingerprint[name] for name in ("fit", "weights")}
    outputs = {name: Output.of(Feature(group, name)) for name in features}
    return replace(opened, fingerprint=fingerprint, outputs=outputs)


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
