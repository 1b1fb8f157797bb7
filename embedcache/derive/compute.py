"""Computing derived features: a rule with its open inputs and its folder, the chunks it lacks, and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from embedcache.arrays import Array
from embedcache.derive.chunks import ChunkReader, Rows
from embedcache.derive.rules import Rule, to_items
from embedcache.encoders.base import ItemShape
from embedcache.errors import ItemError, SettingError
from embedcache.locks import Leases
from embedcache.modalities import noun
from embedcache.progress import Progress
from embedcache.store.group import EncoderGroup
from embedcache.store.writer import cast_item, commit_chunk

OutputSpec: TypeAlias = tuple[ItemShape, str]
"""Shape of one item and dtype on disk."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenDerivation:
    """A derivation with its open inputs and its folder in the cache.

    Args:
        group: its folder in the cache.
        fingerprint: everything that decides what is computed now, to compare with that of the folder.
        reader: reads the inputs of a chunk.
        parameters: parameters of the rule with its fitted arrays.
        outputs: output -> item shape and dtype.
    """

    group: EncoderGroup
    fingerprint: Mapping[str, Any]
    rule: Rule
    reader: ChunkReader
    parameters: Mapping[str, Any]
    outputs: Mapping[str, OutputSpec]

    def check_unchanged(self) -> None:
        """Check that what is computed now is what the folder holds, or raise a `FingerprintError`."""
        self.group.check_same(self.fingerprint)

    def run(self, chunks: Sequence[int], progress: Progress) -> list[int]:
        """Compute what chunks lack, first those that no other process works on; return those computed here."""
        missing = [chunk for chunk in chunks if self._missing(chunk)]
        if not missing:
            return []
        leases, computed = Leases(self.group.path / "chunks"), set[int]()
        num_items = self.group.info.count_items(self.group.modality, missing)
        progress.start(f"deriving {self.group.name}", num_items, noun(self.group.modality))
        for is_last_pass in (False, True):
            for chunk in missing:
                if chunk in computed or (is_last_pass and not self._missing(chunk)):
                    continue
                if not leases.acquire(chunk, wait=is_last_pass):
                    continue
                try:
                    if self._compute_chunk(chunk):
                        computed.add(chunk)
                        progress.advance(self.group.info.count_items(self.group.modality, [chunk]))
                finally:
                    leases.release(chunk)
        progress.finish()
        return sorted(computed)

    def compute(self, rows: Rows, features: Sequence[str]) -> dict[str, list[Array | ItemError]]:
        """Compute features of the items that have all inputs, one array or error per item, in the dtype on disk."""
        outputs = {name: self.outputs[name] for name in features}
        return apply_rule(self.rule, self.reader, rows, self.parameters, outputs, self.group.name)

    def _missing(self, chunk: int) -> dict[str, bool]:
        """Return the outputs that a chunk lacks -> whether rows that failed are written again."""
        commit = self.group.commit(chunk)
        missing = {name: False for name in self.outputs if not self.group.has(commit, name)}
        if commit is None or not any(any(reasons) for reasons in commit.failures.values()):
            return missing
        now_valid = set(self.reader.open_chunk(chunk).valid.tolist())
        for name in self.outputs:
            reasons = enumerate(commit.failures.get(name, ()))
            if any(reason and row in now_valid and not self._is_own(reason) for row, reason in reasons):
                missing[name] = True
        return missing

    def _is_own(self, reason: str) -> bool:
        """Return whether the rule gave a reason, which then stays; that of an input may have been repaired."""
        return reason.endswith(self._own_suffix)

    @property
    def _own_suffix(self) -> str:
        """End of the reasons that the rule gave, unlike those of its inputs."""
        return f" (from {self.group.name})"

    def _compute_chunk(self, chunk: int) -> bool:
        """Compute and commit a chunk, unless another process did; return whether it was computed."""
        missing = self._missing(chunk)
        if not missing:
            return False
        rows = self.reader.open_chunk(chunk)
        computed = self.compute(rows, list(missing))
        items: dict[str, list[Array | None]] = {}
        failures: dict[str, list[str | None]] = {}
        for name, values in computed.items():
            items[name], failures[name] = [None] * len(rows.reasons), list(rows.reasons)
            for row, value in zip(rows.valid.tolist(), values, strict=True):
                if isinstance(value, ItemError):
                    failures[name][row] = f"{value}{self._own_suffix}"
                else:
                    items[name][row] = value
        is_retried = any(missing.values())
        commit_chunk(self.group, chunk, items, rows.hashes, failures, overwrite_failed=is_retried)
        return True


def apply_rule(
    rule: Rule,
    reader: ChunkReader,
    rows: Rows,
    parameters: Mapping[str, Any],
    outputs: Mapping[str, OutputSpec],
    group_name: str,
) -> dict[str, list[Array | ItemError]]:
    """Apply a rule to the items that have all inputs: output -> one array or error per item, in the dtype on disk.

    Raises:
        SettingError: the rule does not return an output.
        DataError: an output has another number of items or another shape, or a value does not fit the dtype.
    """
    num_items = len(rows.valid)
    if not num_items:
        return {name: [] for name in outputs}
    returned = rule.apply(reader.blocks(rows), parameters)
    values: dict[str, list[Array | ItemError]] = {}
    for name, (shape, dtype) in outputs.items():
        if name not in returned:
            raise SettingError(
                f"the rule {rule.name!r} returned {', '.join(returned) or 'nothing'}, but no output {name!r}"
            )
        full_name = f"{group_name}/{name}"
        values[name] = [
            item if isinstance(item, ItemError) else cast_item(item, shape, dtype, full_name)
            for item in to_items(full_name, returned[name], num_items)
        ]
    return values
