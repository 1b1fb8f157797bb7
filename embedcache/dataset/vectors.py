"""Stored rows as unit vectors, plain or projected by a run."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Inputs, Ints, blocks, normalize
from embedcache.dataset.inputs import InputFeature, Reader, open_input, to_unit_vectors
from embedcache.dataset.pairs import ANY_LANGUAGE, is_language
from embedcache.errors import DataError, SettingError, quoted
from embedcache.files import AnyPath
from embedcache.modalities import noun
from embedcache.processes import AUTO, torch_device
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.base import project
from embedcache.runs import TOWERS, Run
from embedcache.store.cache import Cache, RowReader

_BLOCK = 256
_READ_ROWS = 65_536
_CHUNK = 2048
_READ_AT_ONCE = 1024  # rows of which the tokens may be padded


class Vectors:
    """All valid items of a complete feature as float32 rows of length 1. Pickling keeps the arguments and opens again.

    Args:
        cache_path: path or URL of the cache.
        modality: modality of the items.
        feature: `encoder/feature` (the run's feature, or the only one of the modality, if None).
        run_path: run that projects the feature (the plain feature if None).
        language: language of the texts to keep (all if None or `any`).
        width: number of first components to keep, scaled to length 1 again (all if None).
        device: torch device that projects.
        on_demand: the feature is known to be complete, as it was indexed: open nothing but the commits and weights
            that `read` needs, when it needs them.

    Raises:
        SettingError: the width is larger than that of the space.
        UnknownNameError: no feature or several features have that name, or no text is in that language.
        UnfinishedError: chunks of the feature are missing.
        FingerprintError: the run was trained on another encoder's features.
        DataError: the plain feature has several vectors per item, or no item is valid.
    """

    def __init__(
        self,
        cache_path: AnyPath,
        modality: str,
        feature: str | None = None,
        run_path: AnyPath | None = None,
        language: str | None = None,
        width: int | None = None,
        device: str = AUTO,
        *,
        on_demand: bool = False,
    ) -> None:
        self._device = device
        # Only texts have a language.
        self._language = None if language == ANY_LANGUAGE or modality != "text" else language

        self.cache = Cache(cache_path)
        run = None if run_path is None else os.fspath(run_path)
        self._arguments = (str(self.cache.path), modality, feature, run, language, width, device)

        self.run_path = None if run is None else Path(run)
        self.run = None if run is None else Run.open(run, kind=TOWERS, device=device)
        self._selected: Ints | None = None

        # Weights are checked early, unless a query must start quickly.
        if self.run is not None and not on_demand:
            self.run.load()
        self.feature = _open(self.cache, modality, feature, self.run, on_demand=on_demand)

        self.full_width = self.feature.width if self.run is None else self.run.shared_width
        if width is not None and width > self.full_width:
            raise SettingError(f"width: expected at most {self.full_width}, the width of the space, got {width}")
        self.width = width or self.full_width

    @cached_property
    def device(self) -> str:
        """Torch device that projects; without a run, the device that was asked for."""
        return self._device if self.run_path is None else str(torch_device(self._device))

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self._arguments, self._selected)

    def select(self, rows: Ints) -> "Vectors":
        """Return some rows, ascending, each of which must have a direction: reading another raises a `DataError`."""
        return _open_again(self._arguments, rows)

    @property
    def modality(self) -> str:
        """Modality of the items."""
        return self.feature.modality

    @property
    def unit(self) -> str:
        """What the items are, such as `images`."""
        return noun(self.modality)

    @property
    def other_modality(self) -> str | None:
        """The other modality of the run; None without a run, or with one that has a single tower."""
        has_other = self.run is not None and len(self.run.modalities) > 1
        return self.run.other_modality(self.modality) if self.run is not None and has_other else None

    @property
    def num_chunks(self) -> int:
        """Number of chunks of the feature."""
        return self.cache.info.num_chunks(self.modality)

    @cached_property
    def rows(self) -> Ints:
        """Rows of the valid items, ascending: (N,)."""
        if self._selected is not None:
            return self._selected
        rows = np.flatnonzero(self.feature.valid)
        return rows if self._in_language is None else rows[self._in_language[rows]]

    @cached_property
    def _in_language(self) -> Bools | None:
        return None if self._language is None else is_language([self.cache], self._language)

    @cached_property
    def _is_kept(self) -> Bools | None:
        """Whether each item is of the language, or selected; None if all are."""
        if self._selected is None:
            return self._in_language
        is_kept_N = np.zeros(self.feature.num_items, bool)
        is_kept_N[self._selected] = True
        return is_kept_N

    def has(self, rows: Ints) -> Bools:
        """Return whether each item is valid, (B,) bool; see `Feature.has`."""
        has_B = self.feature.has(rows)
        if self._in_language is not None:
            has_B[has_B] = self._in_language[rows[has_B]]
        return has_B

    def chunk(self, number: int) -> tuple[Ints, Floats]:
        """Read one chunk and verify its checksums: rows (B,) and vectors (B, P); both are empty if all items failed."""
        rows, inputs = self.feature.chunk(number)
        if self._is_kept is not None:
            positions = np.flatnonzero(self._is_kept[rows])
            rows = rows[positions]
            inputs = inputs.take(positions)

        return rows, self._unit(rows, inputs)

    def blocks(self, title: str = "", progress: Progress | None = None) -> Iterator[tuple[Ints, Floats]]:
        """Iterate over all chunks in order, as one step of `progress`."""
        progress = progress or NullProgress()

        progress.start(title, len(self.rows), self.unit)
        for number in range(self.num_chunks):
            rows_B, vectors_BP = self.chunk(number)
            yield rows_B, vectors_BP
            progress.advance(len(rows_B))

        progress.finish()

    def read(self, rows: Ints, progress: Progress | None = None) -> Floats:
        """Read rows in the given order, as one step of `progress`: (B, P).

        Raises `DataError` if a row is out of range or failed.
        """
        progress = progress or NullProgress()
        progress.start("reading vectors", len(rows), self.unit)
        unit_BP = np.empty((len(rows), self.width), np.float32)

        # Tokens are padded to the longest item of a block.
        block_size = len(rows) if self.feature.has_tokens else _READ_ROWS
        for block in blocks(len(rows), max(1, block_size)):
            unit_BP[block] = self._unit(rows[block], self.feature.read(rows[block]), progress)

        progress.finish()
        return unit_BP

    def sample(self, size: int, *, seed: int = 0, progress: Progress | None = None) -> Floats:
        """Read a random sample of items, or all items if there are no more: (S, P)."""
        return self.read(np.sort(np.random.default_rng(seed).permutation(self.rows)[:size]), progress)

    def _unit(self, rows: Ints, inputs: Inputs, progress: Progress | None = None) -> Floats:
        progress = progress or NullProgress()

        if self.run is not None:
            tower = self.run.pair.tower(self.modality)
            unit_BP = project(tower, inputs, width=self.width, device=self.device, progress=progress)
        else:
            unit_BP = _normalize_blocks(inputs.values[:, : self.width])
            progress.advance(len(unit_BP))

        # Selected rows were promised to have a direction; others may be zero.
        if self._selected is not None:
            self._check_directions(rows, unit_BP)
        return unit_BP

    def _check_directions(self, rows_B: Ints, unit_BP: Floats) -> None:
        # The squared length of a unit vector rounds to 1; zero and NaN do not.
        bad = np.flatnonzero(np.rint(np.einsum("bp,bp->b", unit_BP, unit_BP)) != 1)
        if len(bad):
            item = RowReader(self.cache, self.modality, ["sample"]).take(rows_B[bad[:1]])
            key = self.cache.key(item["sample"][0].as_py())
            raise DataError(
                f"feature {self.feature.name}: expected vectors that have a cosine, got {len(bad):,} of length zero or "
                f"NaN in one chunk, first that of the sample {key!r}; copy the others with: embedcache cache cut, or "
                "remove these with: embedcache cache remove"
            )


def _open_again(arguments: tuple[Any, ...], selected: Ints | None) -> Vectors:
    vectors = Vectors(*arguments)
    vectors._selected = selected
    return vectors


def _normalize_blocks(values_BD: Array) -> Floats:
    """Normalize a few rows at a time; whole chunks would take new memory from the system for each step."""
    unit_BD = np.empty(values_BD.shape, np.float32)
    for block in blocks(len(values_BD), _BLOCK):
        unit_BD[block] = normalize(values_BD[block])
    return unit_BD


def _open(cache: Cache, modality: str, name: str | None, run: Run | None, *, on_demand: bool) -> InputFeature:
    if name is None and run is not None:
        name = run.input(modality).feature

    feature = open_input(cache, modality, name)
    if not on_demand:
        feature.require_complete()

    if run is not None:
        run.check_feature(modality, feature.name, feature.fingerprint)
    elif feature.has_tokens:
        raise DataError(
            f"feature {feature.name}: expected one vector per item, got several; choose a vector feature, or a run "
            "that projects it"
        )

    if not on_demand and not feature.valid.any():
        raise DataError(
            f"feature {feature.name}: expected encoded items, got none; see: embedcache inspect {quoted(cache.path)}"
        )

    return feature


class ItemVectors:
    """Unit vectors of some rows that a reader gathers, their tokens averaged. See `StoredVectors`.

    Args:
        read: reader of the rows.
        rows: (N,) rows, ascending.
        width: width of the vectors.
        unit: what the items are.
    """

    def __init__(self, read: Reader, rows: Ints, width: int, unit: str) -> None:
        self.rows = rows
        self.width = width
        self.unit = unit
        self._read = read

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self.rows) // _CHUNK)

    def chunk(self, number: int) -> tuple[Ints, Floats]:
        """Read one chunk: rows (B,) and vectors (B, P)."""
        rows = self.rows[number * _CHUNK : (number + 1) * _CHUNK]
        return rows, self.read(rows)

    def read(self, rows: Ints) -> Floats:
        """Read rows in the given order, a few at a time: (B, P)."""
        unit_BP = np.empty((len(rows), self.width), np.float32)
        for block in blocks(len(rows), _READ_AT_ONCE):
            unit_BP[block] = to_unit_vectors(self._read(rows[block]))
        return unit_BP
