"""Computing derived features: the inputs of a chunk, and what a rule returns for them.

Inputs are features of the same items, or of other items of the same samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save_file

from embedcache.arrays import Array, Bools, Ints, distinct
from embedcache.dataset.splits import read_split, require_split
from embedcache.derive.rules import Block, Rule, to_items
from embedcache.encoders.open import DERIVED, EncoderSpec
from embedcache.errors import DataError, ItemError, SettingError, UnfinishedError
from embedcache.files import find_files, read_file, replacing
from embedcache.locks import locked
from embedcache.provenance import digest, digest_file
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, create_group, open_group
from embedcache.store.layout import checked_fit_path, encoder_path, fit_path
from embedcache.store.producer import ChunkFeatures, Output, Verb
from embedcache.store.writer import cast_item


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Items of the first input, and the rows of every input that belong to them.

    Args:
        hashes: hash of each item, as the first input has it.
        reasons: reason why each item lacks an input; None if it has all.
        valid: positions of the items that have all inputs.
        input_rows: per input, the row of each item with all inputs.
    """

    hashes: Sequence[bytes | None]
    reasons: Sequence[str | None]
    valid: Ints
    input_rows: Sequence[Ints]

    def where(self, mask: Bools) -> "Rows":
        """Return the rows without some of the items that have all inputs; `mask` has an element per such item."""
        return replace(self, valid=self.valid[mask], input_rows=[rows[mask] for rows in self.input_rows])


class ChunkReader:
    """Reads the inputs of a derivation, chunk by chunk of the first input's modality, with checksums checked."""

    def __init__(self, cache: Cache, inputs: Sequence[Feature]) -> None:
        self.cache = cache
        self.inputs = inputs
        self.modality = inputs[0].modality
        self._commits: dict[tuple[int, int], Commit] = {}

    def require_complete(self) -> None:
        """Check that every chunk of the inputs is committed, or raise an `UnfinishedError`; keeps no commits."""
        for feature in self.inputs:
            for chunk in range(self.cache.info.num_chunks(feature.modality)):
                _read_commit(feature, chunk)

    def open_chunk(self, chunk: int) -> Rows:
        """Return the rows of one chunk of the first input's modality."""
        rows = self.cache.info.chunk_rows(self.modality, chunk)
        return self.open_rows(np.arange(rows.start, rows.stop))

    def open_first(self) -> Rows:
        """Return the first item of the first chunk that has all inputs, if there is one."""
        rows = self.open_chunk(0)
        return rows.where(np.arange(len(rows.valid)) == 0)

    def open_rows(self, rows: Ints) -> Rows:
        """Return some rows of the first input's modality, ascending."""
        self._commits.clear()
        reasons: list[str | None] = [None] * len(rows)
        found = []
        for number, feature in enumerate(self.inputs):
            input_rows = self._rows_of(feature.modality, rows)
            found.append(input_rows)
            for position, reason in enumerate(self._reasons(number, input_rows)):
                reasons[position] = reasons[position] or reason
        valid = np.flatnonzero([reason is None for reason in reasons])
        return Rows(
            hashes=self._hashes(rows),
            reasons=reasons,
            valid=valid,
            input_rows=[input_rows[valid] for input_rows in found],
        )

    def samples_of(self, rows: Rows) -> Ints:
        """Return the sample of each item that has all inputs."""
        samples: Ints = self._own_samples[rows.input_rows[0]]
        return samples

    def blocks(self, rows: Rows) -> list[Block]:
        """Read the values of each input for the items that have all inputs."""
        return [self._read(number, input_rows) for number, input_rows in enumerate(rows.input_rows)]

    def _read(self, number: int, rows: Ints) -> Block:
        """Read rows of an input, chunk by chunk."""
        feature = self.inputs[number]
        size = self.cache.info.chunk_size
        items: list[Any] = [None] * len(rows)
        for chunk in distinct(rows // size).tolist():
            stored = feature.items(self._commit(number, chunk))
            for position in np.flatnonzero(rows // size == chunk).tolist():
                items[position] = stored[rows[position] - chunk * size]
        if not feature.is_ragged:
            return Block(np.stack(items))
        return Block(np.concatenate(items), np.array([len(item) for item in items], np.int64))

    def _reasons(self, number: int, rows: Ints) -> list[str | None]:
        """Return the reason why each row lacks an input; a row of -1 is an item that its sample lacks."""
        feature, size = self.inputs[number], self.cache.info.chunk_size
        reasons: list[str | None] = []
        for row in rows.tolist():
            if row < 0:
                reasons.append(f"no {feature.modality} in its sample")
            else:
                chunk, offset = divmod(row, size)
                reasons.append(self._commit(number, chunk).failures[feature.feature][offset])
        return reasons

    def _hashes(self, rows: Ints) -> list[bytes | None]:
        located = (divmod(row, self.cache.info.chunk_size) for row in rows.tolist())
        return [self._commit(0, chunk).hashes[offset] for chunk, offset in located]

    def _commit(self, number: int, chunk: int) -> Commit:
        """Return the commit of a chunk of an input, kept until other rows are opened."""
        if (number, chunk) not in self._commits:
            self._commits[number, chunk] = _read_commit(self.inputs[number], chunk)
        return self._commits[number, chunk]

    def _rows_of(self, modality: str, rows: Ints) -> Ints:
        """Return the row of a modality in the sample of each row; -1 if the sample has none."""
        if modality == self.modality:
            return rows
        samples, own_rows = self._unique_samples(modality)
        wanted = self._own_samples[rows]
        positions = np.minimum(np.searchsorted(samples, wanted), max(len(samples) - 1, 0))
        found: Ints = np.where(samples[positions] == wanted, own_rows[positions], -1)
        return found

    @cached_property
    def _own_samples(self) -> Ints:
        return self._samples(self.modality)

    def _unique_samples(self, modality: str) -> tuple[Ints, Ints]:
        """Return the samples with an item of a modality, ascending, and the row of each one's item.

        Raises:
            DataError: a sample has several.
        """
        if modality not in self._links:
            samples = self._samples(modality)
            order = np.argsort(samples, kind="stable")
            samples = samples[order]
            is_repeated = samples[1:] == samples[:-1]
            if is_repeated.any():
                first = int(samples[1:][is_repeated][0])
                key = self.cache.key(first)
                raise DataError(
                    f"expected one {modality} per sample, got {int((samples == first).sum())} in the sample {key!r}: "
                    f"which of them belongs to its {self.modality} is not defined; make the {modality} the first "
                    "input, or use a cache with one per sample"
                )
            self._links[modality] = samples, order
        return self._links[modality]

    @cached_property
    def _links(self) -> dict[str, tuple[Ints, Ints]]:
        return {}

    def _samples(self, modality: str) -> Ints:
        samples: Array = self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
        return samples.astype(np.int64)


def _read_commit(feature: Feature, chunk: int) -> Commit:
    commit = feature.group.commit(chunk)
    if commit is None or not commit.is_complete(feature.feature):
        raise UnfinishedError(
            f"feature {feature.name} is not finished: chunk {chunk} is missing; run the same {feature.group.command} "
            "again first"
        )
    return commit


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenDerivation:
    """A derivation with its open inputs: the producer of derived features.

    Args:
        name: name of its folder in the cache.
        fingerprint: everything that decides what is computed now, to compare with that of the folder.
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
        """Compute the outputs of the items of a chunk; one that lacks an input has none, for the same reason."""
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
        """Return whether an item without a value has all inputs now: one may have been repaired since."""
        if not any(any(reasons) for reasons in commit.failures.values()):
            return False
        has_inputs = set(self.reader.open_chunk(commit.chunk).valid.tolist())
        return any(
            reason and row in has_inputs and not reason.endswith(self._own_suffix)
            for name in self.outputs
            for row, reason in enumerate(commit.failures.get(name, ()))
        )

    @property
    def _own_suffix(self) -> str:
        """End of the reasons that the rule gave, which stay, unlike those of its inputs."""
        return f" (from {self.name})"

    def apply(self, rows: Rows) -> dict[str, list[Array | ItemError]]:
        """Apply the rule to the items that have all inputs: output -> one array or error per item, as it is stored.

        Raises:
            SettingError: the rule does not return an output.
            DataError: an output has another number of items or another shape, or a value does not fit the dtype.
        """
        num_items = len(rows.valid)
        if not num_items:
            return {name: [] for name in self.outputs}
        returned = self.rule.apply(self.reader.blocks(rows), self.parameters)
        if not isinstance(returned, Mapping):
            raise SettingError(f"the rule {self.rule.name!r}: expected output -> values, got {type(returned).__name__}")
        values: dict[str, list[Array | ItemError]] = {}
        for name, output in self.outputs.items():
            if name not in returned:
                raise SettingError(
                    f"the rule {self.rule.name!r} returned {', '.join(returned) or 'nothing'}, but no output {name!r}"
                )
            full_name = f"{self.name}/{name}"
            values[name] = [
                item if isinstance(item, ItemError) else cast_item(item, output.shape, output.dtype, full_name)
                for item in to_items(full_name, returned[name], num_items)
            ]
        return values


@dataclass(frozen=True, kw_only=True)
class DerivedView:
    """A view of the inputs that derived features are computed from; they differ from the plain ones in nothing else.

    Args:
        name: name of the view, such as `babble-5dB`.
        plain_inputs: modality, name and fingerprint of the features in whose place the views are read.
    """

    name: str
    plain_inputs: Sequence[tuple[str, str, Mapping[str, Any]]]


def request_fingerprint(
    rule: Rule,
    inputs: Sequence[Feature],
    parameters: Mapping[str, Any],
    *,
    weights: str,
    view: DerivedView | None = None,
) -> dict[str, Any]:
    """Return everything that decides derived features, but for the arrays that a rule is fitted to.

    With a view, it is the fingerprint of the features without the view, and `view` with its name and its own inputs.
    """
    read = [_input_record(feature.modality, feature.name, feature.fingerprint) for feature in inputs]
    fingerprint: dict[str, Any] = {
        "family": DERIVED,
        "model": rule.name,
        "revision": None,
        "weights": weights,
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


def prepare_group(
    cache: Cache, opened: OpenDerivation, *, split_path: Path | None
) -> tuple[EncoderGroup, dict[str, Array]]:
    """Create the folder of derived features, or open it; fit the rule, unless the folder holds what it was fitted to.

    Returns:
        The folder, and the arrays of a rule that is fitted; empty for others.

    Raises:
        SettingError: the name belongs to an encoder.
        PathError: there is no file of that path for the training part.
        FingerprintError: the folder holds features of other inputs, parameters, code or training part.
        CorruptError: the fitted arrays are missing or have changed.
    """
    rule = opened.rule
    reader = opened.reader
    name = opened.name
    path = encoder_path(cache.path, reader.modality, name)
    stored = _open_stored(cache, reader.modality, name)
    if stored is not None and not stored.is_derived:
        raise SettingError(f"name: {path} holds the features of the encoder {stored.spec}; choose another name")
    create = partial(create_group, cache.path, reader.modality, name, cache.info, spec=_spec(rule))

    if rule.fit is None:
        if split_path is not None:
            raise SettingError(f"fit_split: the rule {rule.name!r} is not fitted; omit --fit-split")
        return create(fingerprint=opened.fingerprint), {}

    if split_path is not None:
        require_split(split_path)
    part = {"part": "all"} if split_path is None else {"part": "train", "split": digest_file(split_path)}
    fingerprint = {**opened.fingerprint, "fit": part}
    with locked(path):  # so that one process fits the rule for all
        stored = _open_stored(cache, reader.modality, name)
        if stored is not None and _is_started(stored, fingerprint):
            weights = stored.fingerprint["weights"]
        else:
            weights = _write_fit(path, _fit(rule, reader, fingerprint, split_path))
        group = create(fingerprint={**fingerprint, "weights": weights})
    return group, read_fit(group)


def _open_stored(cache: Cache, modality: str, name: str) -> EncoderGroup | None:
    """Open a folder of the cache, with or without chunks; None if there is none."""
    has_metadata = (encoder_path(cache.path, modality, name) / "zarr.json").is_file()
    return open_group(cache.path, modality, name, cache.info) if has_metadata else None


def _write_fit(folder: Path, arrays: Sequence[tuple[str, Array]]) -> str:
    """Write the arrays that a rule was fitted to; return the SHA-256 of the file, 64 hex digits."""
    with replacing(fit_path(folder)) as temporary:
        save_file({name: np.ascontiguousarray(values) for name, values in arrays}, temporary)
    return digest_file(fit_path(folder))


def _is_started(stored: EncoderGroup, fingerprint: Mapping[str, Any]) -> bool:
    """Return whether a folder holds chunks, or an interrupted derivation of the same features fitted its rule."""
    has_chunks = any(find_files(stored.path, "chunks/*.json"))
    is_same = {**stored.fingerprint, "weights": ""} == {**fingerprint, "weights": ""}
    return has_chunks or (is_same and fit_path(stored.path).is_file())


def _spec(rule: Rule) -> str:
    for path in rule.location.values():
        if "," in path:
            raise SettingError(f"{path}: a path with a comma is not supported; rename it or link to it")
    return EncoderSpec(DERIVED, rule.name, rule.location).absolute.text


def _fit(
    rule: Rule, reader: ChunkReader, fingerprint: Mapping[str, Any], split_path: Path | None
) -> list[tuple[str, Array]]:
    assert rule.fit is not None
    is_training = None if split_path is None else read_split(split_path, [reader.cache]).mask("train")

    def blocks() -> Iterator[list[Block]]:
        for chunk in range(reader.cache.info.num_chunks(reader.modality)):
            rows = reader.open_chunk(chunk)
            if is_training is not None:
                rows = rows.where(is_training[reader.samples_of(rows)])
            if len(rows.valid):
                yield reader.blocks(rows)

    return sorted(rule.fit(blocks(), fingerprint["preprocessing"]).items())


def read_fit(group: EncoderGroup) -> dict[str, Array]:
    """Read the arrays that a rule was fitted to.

    Raises:
        CorruptError: the file is missing or has changed.
    """
    return dict(load(read_file(checked_fit_path(group.path, group.fingerprint))))
