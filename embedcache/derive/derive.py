"""Derivation: compute features from other features of a cache, chunk by chunk, with a rule or a trained run.

Inputs are features of the same items, or of other items of the same samples. `verify` recomputes damaged chunks of
derived features, and some rows to compare.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save_file

from embedcache.arrays import Array, Ints, distinct
from embedcache.dataset.inputs import PLAIN
from embedcache.dataset.splits import read_split, require_split
from embedcache.derive.rules import (
    Block,
    Derivation,
    DerivedView,
    Rule,
    RunRequest,
    open_rule,
    open_run,
    reopen_run,
    to_items,
)
from embedcache.derive.settings import DeriveSettings
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import DataError, ItemError, SettingError, UnfinishedError
from embedcache.files import AnyPath, locked, read_file, remove_partials, replacing
from embedcache.processes import AUTO
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import DERIVED, RUN, digest, digest_file, new_record_path, record_stage
from embedcache.registry import names_from
from embedcache.store.cache import Cache
from embedcache.store.commits import PENDING, Commit
from embedcache.store.feature import EncoderGroup, Feature, create_group, find_group, open_group
from embedcache.store.layout import Axis, checked_fit_path, encoder_path, fit_path
from embedcache.store.producer import FillReport, Output, Verb, fill
from embedcache.store.writer import ChunkFeatures, cast_item


def derive(cache: AnyPath, derivation: Derivation, *, progress: AnyProgress = None) -> FillReport:
    """Compute features from other features of a cache, and store them in the same cache.

    Committed chunks are not computed again. So an interrupted derivation resumes where it stopped, several processes
    share the chunks, and after `extract --extend` only new rows are computed. An item that lacks an input has no
    derived feature, for the same reason; items whose input was repaired in the meantime are computed now. Memory: one
    chunk of the inputs and outputs, and 16 bytes per item if the inputs have several modalities.

    Raises:
        UnknownNameError: there is no such feature, rule or parameter.
        SettingError: the inputs do not fit the rule, or the name belongs to an encoder.
        UnfinishedError: chunks of an input are missing.
        FingerprintError: the folder of that name has features of other inputs, parameters or code; the message names
            each difference with both values.
        DataError: a sample has several items of another modality, or a value does not fit the declared output.

    Example:
        >>> pooled = embedcache.Derivation(name="pooled", inputs=[("image", "open_toy/patches")], rule="mean")
        >>> report = embedcache.derive_features("cache", pooled)
        >>> report.computed > 0, embedcache.Cache("cache").feature("image", "pooled/mean").item_shape
        (True, (3,))
    """
    progress = to_progress(progress)
    cache = Cache(cache)
    remove_partials(cache.path)

    opened = _open(cache, derivation)
    opened.reader.require_complete()
    group, opened = _prepare_group(opened, split_path=derivation.fit_split)

    with record_stage(new_record_path(cache.path, "derive"), "derive", group.fingerprint) as outcome:
        report = fill(group, opened, progress=progress)
        if report.computed:
            outcome["features"] = vars(report)

    return report


def _open(cache: Cache, derivation: Derivation) -> "OpenDerivation":
    """Open the rule and the inputs of a derivation."""
    rule = open_rule(derivation.rule)
    inputs = [cache.feature(modality, name) for modality, name in derivation.inputs]

    # The output would be written into the folder that it is read from.
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
    """Return everything that decides derived features, except for the arrays that a rule is fitted to.

    With a view, it is the fingerprint of the features without the view, and `view` with its name and its own inputs.
    """
    input_records = [_input_record(feature.modality, feature.name, feature.fingerprint) for feature in inputs]

    # Features of a view belong next to the features of the same encoder without the view.
    view_record = None
    if view is not None:
        view_record = {"name": view.name, "inputs": input_records}
        input_records = [_input_record(*plain) for plain in view.plain_inputs]

    fingerprint: dict[str, Any] = {
        "family": DERIVED,
        "model": rule.name,
        "revision": None,
        "weights": rule.weights,
        "preprocessing": dict(parameters),
        "pooling": {},
        "backend": None,
        "precision": None,
        "inputs": input_records,
    }
    if rule.code is not None:
        fingerprint["code"] = rule.code
    if view_record is not None:
        fingerprint["view"] = view_record
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
    dtype: str = "float16",
    device: str = AUTO,
    progress: AnyProgress = None,
) -> list[FillReport]:
    """Store an output of a trained run as features of a cache.

    Args:
        cache: cache with the features that the run reads.
        run: folder of the run.
        output: name of the output; an aligned pair has `projected`, unit vectors in the shared space.
        name: name of the folder in the cache; `RUN-OUTPUT` if None.
        modality: modality to derive features of; every modality for which the run has the output if None.
        view: a view of the run's features of that modality, such as `babble-5dB`, or several, each into the folder
            `NAME@VIEW`; `plain` is the features that the run was trained on.
        dtype: dtype on disk.
        device: torch device of the run.
        progress: shows the number of items.

    Returns:
        One report per view and modality.

    Raises:
        EmbedcacheError: see `derive` and `embedcache.derive.rules.open_run`.

    Example:
        >>> reports = embedcache.derive_from_run("cache", "run", name="aligned")
        >>> len(reports), embedcache.Cache("cache").feature("text", "aligned/projected").item_shape
        (2, (16,))
    """
    run = Path(run)
    cache = Cache(cache)
    progress = to_progress(progress)
    name = name or f"{run.resolve().name}-{output}"

    views = [view] if isinstance(view, str) else view
    derivations: list[Derivation] = []
    for view_name in views:
        request = RunRequest(
            cache=cache,
            path=run,
            output=output,
            name=name,
            modality=modality,
            view=view_name,
            dtype=dtype,
            device=device,
        )
        derivations += open_run(request)
    return [derive(cache, derivation, progress=progress) for derivation in derivations]


def derive_with_settings(
    cache_path: AnyPath, settings: DeriveSettings, *, progress: Progress | None = None
) -> list[FillReport]:
    """Derive the features that the settings of the command line describe.

    Raises:
        EmbedcacheError: see `derive` and `derive_from_run`.
    """
    if settings.run is not None:
        return derive_from_run(
            cache_path,
            settings.run,
            settings.run_output or "projected",
            name=settings.name,
            modality=settings.modality,
            view=settings.views or (PLAIN,),
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
) -> "OpenDerivation":
    """Reopen the rule and inputs of derived features, to compute some of them again.

    Raises:
        SettingError: the rule or the run is custom code, and the cache is not trusted.
        UnknownNameError: the rule or an input no longer exists.
        PathError: the run no longer exists.
        CorruptError: the arrays that the rule was fitted to have changed.
    """
    spec = EncoderSpec.parse(group.spec)
    name = group.name.partition("@")[0]

    if spec.model == RUN:
        derivation = reopen_run(cache, group, spec.options, device=device)
    else:
        with names_from(f"{group.name}: the cache"):
            rule = open_rule(spec.model)
        parameters = group.fingerprint["preprocessing"]
        derivation = Derivation(name=name, inputs=group.inputs, rule=rule, parameters=parameters)

    # The request is compared with the stored group, so it needs the record of the fit, not only its arrays.
    opened = _with_fit(_open(cache, derivation), group)
    fingerprint = dict(opened.fingerprint)
    if opened.rule.fit is not None:
        for field in ("fit", "weights"):
            fingerprint[field] = group.fingerprint[field]
    outputs = {name: Output.of(Feature(group, name)) for name in features}
    return replace(opened, fingerprint=fingerprint, outputs=outputs)


def derivation_depth(cache: Cache, group: EncoderGroup) -> int:
    """Return how many derivations lie between the features of a folder and an encoder. It is 0 for an encoder."""
    if not group.is_derived:
        return 0

    # A folder counts once, however many of its features are inputs.
    input_folders = {(modality, feature.rpartition("/")[0]) for modality, feature in group.inputs}
    depth = 0
    for modality, folder in input_folders:
        input_group = open_group(cache.path, modality, folder, cache.info)
        depth = max(depth, derivation_depth(cache, input_group))
    return 1 + depth


class Rows(NamedTuple):
    """Items of the first input, and the rows of every input that belong to them.

    Args:
        hashes: hash of each item, as the first input has it.
        reasons: reason why each item lacks an input. It is None if the item has all inputs.
        valid: positions of the items that have all inputs.
        input_rows: per input, the row of each item with all inputs.
    """

    hashes: Sequence[bytes | None]
    reasons: Sequence[str | None]
    valid: Ints
    input_rows: Sequence[Ints]


class ChunkReader:
    """Reader of the inputs of a derivation, chunk by chunk of the first input's modality, with checksums checked."""

    def __init__(self, cache: Cache, inputs: Sequence[Feature]) -> None:
        self.cache = cache
        self.inputs = inputs
        self.modality = inputs[0].modality
        self._commits: dict[tuple[Feature, int], Commit] = {}
        self._rows_by_sample: dict[str, Ints] = {}

    def require_complete(self) -> None:
        """Check that every chunk of the inputs is committed, or raise an `UnfinishedError`. No commits are cached."""
        for feature in self.inputs:
            for chunk in range(self.cache.info.num_chunks(feature.modality)):
                _read_commit(feature, chunk)

    def rows_of(self, chunk: int) -> Ints:
        """Return the rows of a chunk of the first input's modality."""
        rows = self.cache.info.chunk_rows(self.modality, chunk)
        return np.arange(rows.start, rows.stop)

    def open_rows(self, rows: Ints) -> Rows:
        """Return some rows of the first input's modality, ascending."""
        self._commits.clear()
        reasons: list[str | None] = [None] * len(rows)
        input_rows = [self._rows_of(feature.modality, rows) for feature in self.inputs]

        # The first input that an item lacks gives the reason.
        for feature, feature_rows in zip(self.inputs, input_rows, strict=True):
            for position, row in enumerate(feature_rows.tolist()):
                reasons[position] = reasons[position] or self._reason(feature, row)

        # The first input identifies the items.
        hashes = []
        for row in rows.tolist():
            chunk, offset = divmod(row, self.cache.info.chunk_size)
            hashes.append(self._commit(self.inputs[0], chunk).hashes[offset])

        valid = np.flatnonzero([reason is None for reason in reasons])
        return Rows(hashes, reasons, valid, [feature_rows[valid] for feature_rows in input_rows])

    def blocks(self, rows: Rows) -> list[Block]:
        """Read the values of each input for the items that have all inputs."""
        return list(map(self._read, self.inputs, rows.input_rows))

    def _read(self, feature: Feature, rows: Ints) -> Block:
        """Read rows of an input, chunk by chunk."""
        chunks, offsets = np.divmod(rows, self.cache.info.chunk_size)
        items: list[Any] = [None] * len(rows)

        for chunk in distinct(chunks).tolist():
            stored = feature.items(self._commit(feature, chunk))
            for position in np.flatnonzero(chunks == chunk).tolist():
                items[position] = stored[offsets[position]]

        if not feature.is_ragged:
            return Block(np.stack(items))
        return Block(np.concatenate(items), np.array(list(map(len, items)), np.int64))

    def _reason(self, feature: Feature, row: int) -> str | None:
        """Return the reason why an item lacks an input; a row of -1 is an item that its sample lacks."""
        if row < 0:
            return f"no {feature.modality} in its sample"
        chunk, offset = divmod(row, self.cache.info.chunk_size)
        return self._commit(feature, chunk).failures[feature.feature][offset]

    def _commit(self, feature: Feature, chunk: int) -> Commit:
        """Return the commit of a chunk of an input, kept until other rows are opened."""
        if (feature, chunk) not in self._commits:
            self._commits[feature, chunk] = _read_commit(feature, chunk)
        return self._commits[feature, chunk]

    def _rows_of(self, modality: str, rows: Ints) -> Ints:
        """Return the row of a modality in the sample of each row; -1 if the sample has none."""
        if modality == self.modality:
            return rows
        if modality not in self._rows_by_sample:
            self._rows_by_sample[modality] = self._find_rows_by_sample(modality)
        modality_rows: Ints = self._rows_by_sample[modality][self.samples[rows]]
        return modality_rows

    def _find_rows_by_sample(self, modality: str) -> Ints:
        """Return the row of each sample's only item of a modality, (S,) int64, -1 if it has none.

        Raises:
            DataError: a sample has several.
        """
        samples = _read_samples(self.cache, modality)
        counts_S = np.bincount(samples, minlength=len(self.cache))

        if counts_S.max() > 1:
            sample = int(np.argmax(counts_S > 1))
            got = f"{counts_S[sample]} in the sample {self.cache.key(sample)!r}"
            raise DataError(f"expected one {modality} per sample, got {got}; make the {modality} the first input")

        rows_S = np.full(len(self.cache), -1, np.int64)
        rows_S[samples] = np.arange(len(samples))
        return rows_S

    @cached_property
    def samples(self) -> Ints:
        """Sample of each item of the first input's modality."""
        return _read_samples(self.cache, self.modality)


def _read_samples(cache: Cache, modality: str) -> Ints:
    samples: Array = cache.items(modality, columns=["sample"])["sample"].to_numpy()
    return samples.astype(np.int64)


def _read_commit(feature: Feature, chunk: int) -> Commit:
    commit = feature.group.commit(chunk)
    if commit is None or not commit.is_complete(feature.feature):
        step = f"run the same {feature.group.command} again first"
        raise UnfinishedError(f"feature {feature.name} is not finished: chunk {chunk} is missing; {step}")
    return commit


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenDerivation:
    """A derivation with its open inputs: the producer of derived features.

    Args:
        name: name of its folder in the cache.
        fingerprint: everything that decides the requested features, to compare with the fingerprint of the folder.
        reader: reads the inputs of a chunk.
        parameters: parameters of the rule with its fitted arrays.
    """

    name: str
    fingerprint: Mapping[str, Any]
    rule: Rule
    reader: ChunkReader
    parameters: Mapping[str, Any]
    outputs: Mapping[str, Output]
    verb: Verb = "derived"

    def compute(self, rows: slice) -> ChunkFeatures:
        """Compute the outputs of the items of a chunk. An item without an input has no output, for the same reason."""
        inputs = self.reader.open_rows(np.arange(rows.start, rows.stop))
        items: dict[str, list[Array | None]] = {}
        failures: dict[str, list[str | None]] = {}

        for name, values in self.apply(inputs).items():
            items[name] = [None] * len(inputs.reasons)
            failures[name] = list(inputs.reasons)
            for row, value in zip(inputs.valid.tolist(), values, strict=True):
                if isinstance(value, ItemError):
                    failures[name][row] = f"{value}{self._own_suffix}"
                else:
                    items[name][row] = value

        return ChunkFeatures(items, inputs.hashes, failures)

    def retries(self, commit: Commit) -> bool:
        """Return whether an item that failed has an input whose reason changed, such as to none at all."""
        failures = [commit.failures[name] for name in self.outputs if name in commit.failures]
        if not any(map(any, failures)):
            return False

        input_reasons = self.reader.open_rows(self.reader.rows_of(commit.chunk)).reasons
        for reasons in failures:
            for reason, input_reason in zip(reasons, input_reasons, strict=True):
                if reason in (None, PENDING):
                    continue
                # A reason of the rule itself means that no input failed then.
                earlier_input_reason = None if reason.endswith(self._own_suffix) else reason
                if earlier_input_reason != input_reason:
                    return True
        return False

    @property
    def _own_suffix(self) -> str:
        """End of reasons that the rule gave. Reasons of its inputs do not have it."""
        return f" (from {self.name})"

    def apply(self, rows: Rows) -> dict[str, list[Array | ItemError]]:
        """Apply the rule to the items that have all inputs: output -> one array or error per item, as stored.

        Raises:
            SettingError: the rule lacks an output.
            DataError: an output has another number of items or another shape, or a value does not fit the dtype.
        """
        num_items = len(rows.valid)
        if not num_items:
            return {name: [] for name in self.outputs}

        returned = self.rule.apply(self.reader.blocks(rows), self.parameters)
        values: dict[str, list[Array | ItemError]] = {}

        for name, output in self.outputs.items():
            if not isinstance(returned, Mapping) or name not in returned:
                got = list(returned) if isinstance(returned, Mapping) else type(returned).__name__
                raise SettingError(f"the rule {self.rule.name!r}: expected the output {name!r}, got {got}")

            full_name = f"{self.name}/{name}"
            values[name] = [
                item if isinstance(item, ItemError) else cast_item(item, output.shape, output.dtype, full_name)
                for item in to_items(full_name, returned[name], num_items)
            ]

        return values


def _prepare_group(opened: OpenDerivation, *, split_path: Path | None) -> tuple[EncoderGroup, OpenDerivation]:
    """Create the folder of derived features, or open it; fit the rule, unless the folder has its fitted arrays.

    Returns:
        The folder, and the derivation with the arrays that its rule was fitted to.

    Raises:
        SettingError: the name belongs to an encoder.
        PathError: there is no file of that path for the training part.
        FingerprintError: the folder has features of other inputs, parameters, code or training part.
        CorruptError: the fitted arrays are missing or have changed.
    """
    cache = opened.reader.cache
    place = (cache.path, opened.reader.modality, opened.name)
    path = encoder_path(*place)

    stored = find_group(*place, cache.info)
    if stored is not None and not stored.is_derived:
        raise SettingError(f"name: {path} holds the features of the encoder {stored.spec}; choose another name")

    spec = _spec(opened.rule)

    if opened.rule.fit is None:
        if split_path is not None:
            raise SettingError(f"fit_split: the rule {opened.rule.name!r} is not fitted; omit --fit-split")
        # One item is tried before anything is written.
        opened.apply(opened.reader.open_rows(np.arange(1)))
        return create_group(*place, cache.info, spec=spec, fingerprint=opened.fingerprint), opened

    if split_path is not None:
        require_split(split_path)
    part = {"part": "all"} if split_path is None else {"part": "train", "split": digest_file(split_path)}
    fingerprint = {**opened.fingerprint, "fit": part}

    with locked(path):  # so that one process fits the rule for all
        weights = _find_fit(cache, place, fingerprint)
        if weights is None:
            arrays = _fit(opened, split_path)
            with replacing(fit_path(path)) as temporary:
                save_file(arrays, temporary)
            weights = digest_file(fit_path(path))

        group = create_group(*place, cache.info, spec=spec, fingerprint={**fingerprint, "weights": weights})
    return group, _with_fit(opened, group)


def _find_fit(cache: Cache, place: tuple[Path, str, str], fingerprint: Mapping[str, Any]) -> str | None:
    """Return the digest of the arrays that a folder was fitted to, to compare with a new request.

    Returns None if the folder has neither chunks nor the arrays of an interrupted derivation of the same features.
    """
    stored = find_group(*place, cache.info)
    if stored is None:
        return None

    is_same = {**stored.fingerprint, "weights": ""} == {**fingerprint, "weights": ""}
    if stored.has_commits or (is_same and fit_path(stored.path).is_file()):
        return str(stored.fingerprint["weights"])
    return None


def _spec(rule: Rule) -> str:

    # A comma separates the options of a spec.
    for path in rule.location.values():
        if "," in path:
            raise SettingError(f"{path}: a path with a comma is not supported; rename it or link to it")
    return EncoderSpec(DERIVED, rule.name, rule.location).absolute.text


def _fit(opened: OpenDerivation, split_path: Path | None) -> dict[str, Array]:
    reader = opened.reader
    is_training = None if split_path is None else read_split(split_path, [reader.cache]).mask("train")

    def blocks() -> Iterator[list[Block]]:
        for chunk in range(reader.cache.info.num_chunks(reader.modality)):
            rows = reader.rows_of(chunk)
            if is_training is not None:
                rows = rows[is_training[reader.samples[rows]]]
            inputs = reader.open_rows(rows)
            if len(inputs.valid):
                yield reader.blocks(inputs)

    assert opened.rule.fit is not None
    arrays = opened.rule.fit(blocks(), opened.parameters)
    return {name: np.ascontiguousarray(values) for name, values in sorted(arrays.items())}


def _with_fit(opened: OpenDerivation, group: EncoderGroup) -> "OpenDerivation":
    """Return a derivation with the arrays that its rule was fitted to, if it is.

    Raises:
        CorruptError: the file is missing or has changed.
    """
    if opened.rule.fit is None:
        return opened
    fitted = load(read_file(checked_fit_path(group.path, group.fingerprint)))
    return replace(opened, parameters={**opened.parameters, **fitted})
