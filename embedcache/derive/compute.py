"""Computing derived features: the inputs of a chunk, and what a rule returns for them.

Inputs are features of the same items, or of other items of the same samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save_file

from embedcache.arrays import Array, Bools, Ints, distinct
from embedcache.dataset.splits import read_split, require_split
from embedcache.derive.rules import Block, Rule, to_items
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import DataError, ItemError, SettingError, UnfinishedError
from embedcache.files import read_file, replacing
from embedcache.locks import locked
from embedcache.provenance import DERIVED, digest_file
from embedcache.store.cache import Cache
from embedcache.store.commits import PENDING, Commit
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
        self._commits: dict[tuple[Feature, int], Commit] = {}
        self._rows_by_sample: dict[str, Ints] = {}

    def require_complete(self) -> None:
        """Check that every chunk of the inputs is committed, or raise an `UnfinishedError`; keeps no commits."""
        for feature in self.inputs:
            for chunk in range(self.cache.info.num_chunks(feature.modality)):
                _read_commit(feature, chunk)

    def open_chunk(self, chunk: int) -> Rows:
        """Return the rows of one chunk of the first input's modality."""
        rows = self.cache.info.chunk_rows(self.modality, chunk)
        return self.open_rows(np.arange(rows.start, rows.stop))

    def open_rows(self, rows: Ints) -> Rows:
        """Return some rows of the first input's modality, ascending."""
        self._commits.clear()
        reasons: list[str | None] = [None] * len(rows)
        input_rows = [self._rows_of(feature.modality, rows) for feature in self.inputs]
        for feature, rows_of_input in zip(self.inputs, input_rows, strict=True):
            for position, row in enumerate(rows_of_input.tolist()):
                reasons[position] = reasons[position] or self._reason(feature, row)

        size = self.cache.info.chunk_size
        hashes = [self._commit(self.inputs[0], row // size).hashes[row % size] for row in rows.tolist()]
        valid = np.flatnonzero([reason is None for reason in reasons])
        return Rows(hashes=hashes, reasons=reasons, valid=valid, input_rows=[each[valid] for each in input_rows])

    def samples_of(self, rows: Rows) -> Ints:
        """Return the sample of each item that has all inputs."""
        samples: Ints = self._samples[rows.input_rows[0]]
        return samples

    def blocks(self, rows: Rows) -> list[Block]:
        """Read the values of each input for the items that have all inputs."""
        return [self._read(feature, own_rows) for feature, own_rows in zip(self.inputs, rows.input_rows, strict=True)]

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
        return Block(np.concatenate(items), np.array([len(item) for item in items], np.int64))

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
        found: Ints = self._rows_by_sample[modality][self._samples[rows]]
        return found

    def _find_rows_by_sample(self, modality: str) -> Ints:
        """Return the row of each sample's only item of a modality, (S,) int64, -1 if it has none.

        Raises:
            DataError: a sample has several.
        """
        samples = _read_samples(self.cache, modality)
        counts_S = np.bincount(samples, minlength=len(self.cache))
        if counts_S.max() > 1:
            sample = int(np.argmax(counts_S > 1))
            raise DataError(
                f"expected one {modality} per sample, got {counts_S[sample]} in the sample {self.cache.key(sample)!r}: "
                f"which of them belongs to its {self.modality} is not defined; make the {modality} the first input, "
                "or use a cache with one per sample"
            )
        rows_S = np.full(len(self.cache), -1, np.int64)
        rows_S[samples] = np.arange(len(samples))
        return rows_S

    @cached_property
    def _samples(self) -> Ints:
        return _read_samples(self.cache, self.modality)


def _read_samples(cache: Cache, modality: str) -> Ints:
    samples: Array = cache.items(modality, columns=["sample"])["sample"].to_numpy()
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
        """Return whether the reason of an input has changed for an item that failed, such as to none at all."""
        reasons = [commit.failures[name] for name in self.outputs if name in commit.failures]
        if not any(map(any, reasons)):
            return False
        now = self.reader.open_chunk(commit.chunk).reasons
        return any(
            reason not in (None, PENDING) and (None if reason.endswith(self._own_suffix) else reason) != reason_now
            for of_output in reasons
            for reason, reason_now in zip(of_output, now, strict=True)
        )

    @property
    def _own_suffix(self) -> str:
        """End of the reasons that the rule gave, unlike those of its inputs."""
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


def prepare_group(opened: OpenDerivation, *, split_path: Path | None) -> tuple[EncoderGroup, OpenDerivation]:
    """Create the folder of derived features, or open it; fit the rule, unless the folder holds what it was fitted to.

    Returns:
        The folder, and the derivation with the arrays that its rule was fitted to.

    Raises:
        SettingError: the name belongs to an encoder.
        PathError: there is no file of that path for the training part.
        FingerprintError: the folder holds features of other inputs, parameters, code or training part.
        CorruptError: the fitted arrays are missing or have changed.
    """
    cache = opened.reader.cache
    place = (cache.path, opened.reader.modality, opened.name)
    path = encoder_path(*place)
    has_metadata = (path / "zarr.json").is_file()
    if has_metadata:
        stored = open_group(*place, cache.info)
        if not stored.is_derived:
            raise SettingError(f"name: {path} holds the features of the encoder {stored.spec}; choose another name")
    spec = _spec(opened.rule)

    if opened.rule.fit is None:
        if split_path is not None:
            raise SettingError(f"fit_split: the rule {opened.rule.name!r} is not fitted; omit --fit-split")
        opened.apply(_first(opened.reader))  # before anything is written
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
    return group, with_fit(opened, group)


def _first(reader: ChunkReader) -> Rows:
    """Return the first item of the first chunk that has all inputs, if there is one."""
    rows = reader.open_chunk(0)
    return rows.where(np.arange(len(rows.valid)) == 0)


def _find_fit(cache: Cache, place: tuple[Path, str, str], fingerprint: Mapping[str, Any]) -> str | None:
    """Return the digest of the arrays that a folder was fitted to, to which a new request is compared.

    None if it has neither chunks nor arrays that an interrupted derivation of the same features was fitted to.
    """
    path = encoder_path(*place)
    if not (path / "zarr.json").is_file():
        return None
    stored = open_group(*place, cache.info)
    is_same = {**stored.fingerprint, "weights": ""} == {**fingerprint, "weights": ""}
    if stored.has_commits or (is_same and fit_path(path).is_file()):
        return str(stored.fingerprint["weights"])
    return None


def _spec(rule: Rule) -> str:
    for path in rule.location.values():
        if "," in path:
            raise SettingError(f"{path}: a path with a comma is not supported; rename it or link to it")
    return EncoderSpec(DERIVED, rule.name, rule.location).absolute.text


def _fit(opened: OpenDerivation, split_path: Path | None) -> dict[str, Array]:
    reader = opened.reader
    is_training = None if split_path is None else read_split(split_path, [reader.cache]).mask("train")

    def blocks() -> Iterator[list[Block]]:
        for chunk in range(reader.cache.info.num_chunks(reader.modality)):
            rows = reader.open_chunk(chunk)
            if is_training is not None:
                rows = rows.where(is_training[reader.samples_of(rows)])
            if len(rows.valid):
                yield reader.blocks(rows)

    assert opened.rule.fit is not None
    arrays = opened.rule.fit(blocks(), opened.parameters)
    return {name: np.ascontiguousarray(values) for name, values in sorted(arrays.items())}


def with_fit(opened: OpenDerivation, group: EncoderGroup) -> OpenDerivation:
    """Return a derivation with the arrays that its rule was fitted to, if it is.

    Raises:
        CorruptError: the file is missing or has changed.
    """
    if opened.rule.fit is None:
        return opened
    fitted = load(read_file(checked_fit_path(group.path, group.fingerprint)))
    return replace(opened, parameters={**opened.parameters, **fitted})
