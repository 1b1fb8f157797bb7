"""Items for a run of one likelihood: those of a cache, or raw ones, read by the frozen encoders of its features.

A feature that was derived by rules from those of encoders is computed again from what the run recorded of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from safetensors.numpy import load_file

from embedcache.arrays import Array, blocks
from embedcache.dataset.inputs import to_inputs
from embedcache.dataset.raw_items import ItemLike, item_name, list_items, prepare_item
from embedcache.derive.rules import Block, Rule, open_rule, to_items
from embedcache.encoders.base import Encoder
from embedcache.encoders.open import DERIVED, IMPORTED, RUN, EncoderSpec, feature_names, reopen_encoder
from embedcache.errors import CorruptError, DataError, ItemError
from embedcache.extract.views import reopen_recorded_view
from embedcache.modalities import noun
from embedcache.networks.saved import ModuleInput
from embedcache.networks.shared import Tokens
from embedcache.provenance import check_same, digest, digest_file
from embedcache.registry import names_from
from embedcache.store.cache import Cache
from embedcache.train.batches import to_device
from embedcache.train.examples import open_media
from embedcache.train.likelihood_batches import read_tokens
from embedcache.train.modules import fitted_name

ItemsLike: TypeAlias = ItemLike | Sequence[ItemLike] | Cache
"""One item, N items, or all items of a cache that have the feature of the run, in the order of their rows."""
Batches: TypeAlias = Iterator[tuple[slice, Mapping[str, Tokens]]]
"""Positions and tokens of each batch."""

_BLOCK_ROWS = 64


class OpenItems(NamedTuple):
    """Items, and their tokens batch by batch.

    Args:
        num_items: number of items.
        name_of: name of the item at a position.
        batches: positions and tokens; can be read once.
    """

    num_items: int
    name_of: Callable[[int], str]
    batches: Batches


def open_cache(cache: Cache, side: ModuleInput, *, device: str) -> OpenItems:
    """Open the items of a cache that have the feature of a run.

    Raises:
        UnknownNameError: the cache has no such feature.
        FingerprintError: its feature is not what the run was trained on.
    """
    media = open_media(cache, side.modality, side.feature, in_memory=False)
    next_step = "use a cache with the feature of the encoder that the run was trained on"
    check_same(f"{side.feature} of {cache.path}", media.feature.fingerprint, side.fingerprint, next_step=next_step)
    rows_N = np.flatnonzero(media.feature.valid)
    owners_N = cache.items(side.modality, columns=["sample"])["sample"].to_numpy()[rows_N]
    keys = cache.column("key")
    batches = ((part, read_tokens(media, rows_N[part], device=device)) for part in blocks(len(rows_N), _BLOCK_ROWS))
    return OpenItems(len(rows_N), lambda number: str(keys[int(owners_N[number])].as_py()), batches)


class ItemReader:
    """Computes the feature of a side of a run for raw items. Encoders and rules are opened at once, and checked.

    Raises:
        DataError: the feature was imported, or derived by a run or from another modality.
        FingerprintError: an encoder, view or rule is not the one that the run was trained on.
        CorruptError: the arrays that a rule was fitted to are not those of the run.
    """

    def __init__(self, side: ModuleInput, run_path: Path, *, device: str) -> None:
        self._modality, self._device = side.modality, device
        self._encoders = _open_encoders(side, device)
        self._compute = _open_feature(side, run_path)

    def open(self, items: ItemLike | Sequence[ItemLike]) -> OpenItems:
        """Open items, which are read batch by batch; DataError if they are no items."""
        given = list_items(items)

        def name_of(number: int) -> str:
            return item_name(given[number], self._modality, number)

        size = min(opened.encoder.batch_size for opened in self._encoders.values())
        batches = (
            (part, self._read(given[part], [name_of(number) for number in range(part.start, part.stop)]))
            for part in blocks(len(given), size)
        )
        return OpenItems(len(given), name_of, batches)

    def _read(self, items: Sequence[ItemLike], names: Sequence[str]) -> Mapping[str, Tokens]:
        encoders = list(self._encoders.values())
        prepared = [prepare_item(item, name, encoders) for item, name in zip(items, names, strict=True)]
        encoded = {
            key: opened.encoder.encode([arrays[number] for arrays in prepared], opened.names)
            for number, (key, opened) in enumerate(self._encoders.items())
        }
        values, lengths = to_inputs(self._compute(encoded, names))
        values = values[:, None] if values.ndim == 2 else values
        lengths_B = None if lengths is None else to_device(lengths, self._device)
        return {self._modality: Tokens(to_device(values, self._device), lengths_B)}


@dataclass(frozen=True, kw_only=True)
class _OpenEncoder:
    """A frozen encoder, the view that it was used with, and the features that are needed of it."""

    encoder: Encoder
    view: Callable[[Any], Any]
    names: Sequence[str]


_Encoded: TypeAlias = Mapping[str, Mapping[str, Sequence[Array]]]
"""Encoder and view -> feature -> one array per item."""
_Compute: TypeAlias = Callable[[_Encoded, Sequence[str]], list[Sequence[Array]]]
"""Computes each feature of a side from what was encoded of items with these names."""


def _open_encoders(side: ModuleInput, device: str) -> dict[str, _OpenEncoder]:
    """Open each encoder, in each of its views, that a feature comes from."""
    found: dict[str, list[ModuleInput]] = {}
    for origin in _origins(side):
        found.setdefault(_key(origin), []).append(origin)
    opened = {}
    for key, origins in found.items():
        first, feature = origins[0], "+".join(dict.fromkeys(origin.feature for origin in origins))
        encoder = reopen_encoder(
            first.spec,
            modality=first.modality,  # type: ignore[arg-type]  # a modality by its name
            feature=feature,
            fingerprint=first.fingerprint,
            device=device,
        )
        view = reopen_recorded_view(feature, first.fingerprint)
        opened[key] = _OpenEncoder(encoder=encoder, view=view, names=feature_names(feature))
    return opened


def _key(side: ModuleInput) -> str:
    return f"{side.spec} {digest(side.fingerprint)}"


def _origins(side: ModuleInput) -> Iterator[ModuleInput]:
    """Iterate over the features of encoders that a feature comes from, which is one of them unless it is derived."""
    family = side.fingerprint["family"]
    reason = "imported" if family == IMPORTED else ""
    if family == DERIVED and not side.inputs:
        reason = f"derived by the rule {side.fingerprint['model']} without a record of how"
    elif family == DERIVED and side.fingerprint["model"] == RUN:
        reason = "derived by a run"
    elif any(item.modality != side.modality for item in side.inputs):
        reason = f"derived from features of {', '.join(noun(item.modality) for item in side.inputs)}"
    if reason:
        raise DataError(
            f"{side.feature}: expected a feature that raw {noun(side.modality)} can be read as, got one that was "
            f"{reason}; pass a Cache of these {noun(side.modality)} that holds this feature instead"
        )
    if family != DERIVED:
        yield side
    for item in side.inputs:
        yield from _origins(item)


def _open_feature(side: ModuleInput, run_path: Path) -> _Compute:
    """Return a function that computes the features of a side."""
    outputs = feature_names(side.feature)
    if side.fingerprint["family"] != DERIVED:
        key = _key(side)
        return lambda encoded, _: [encoded[key][output] for output in outputs]
    rule, parameters = _reopen_rule(side, run_path)
    inputs = [_open_feature(item, run_path) for item in side.inputs]

    def apply_rule(encoded: _Encoded, names: Sequence[str]) -> list[Sequence[Array]]:
        """Return each output of all items; `names` are those of the items, for errors."""
        returned = rule.apply([_to_block(compute(encoded, names)[0]) for compute in inputs], parameters)
        found: list[Sequence[Array]] = []
        for output in outputs:
            items = to_items(side.feature, returned[output], len(names))
            for name, item in zip(names, items, strict=True):
                if isinstance(item, ItemError):
                    raise DataError(f"{name}: {item}")
            found.append([item for item in items if not isinstance(item, ItemError)])
        return found

    return apply_rule


def _to_block(items: Sequence[Array]) -> Block:
    if len({item.shape for item in items}) == 1:
        return Block(np.stack(items))
    return Block(np.concatenate(items), np.array([len(item) for item in items], np.int64))


def _reopen_rule(side: ModuleInput, run_path: Path) -> tuple[Rule, dict[str, Any]]:
    """Return the rule of a derived feature, and its parameters with the arrays that it was fitted to."""
    stored = side.fingerprint
    with names_from(run_path):
        rule = open_rule(EncoderSpec.parse(side.spec).model)
    parameters = dict(stored["preprocessing"])
    found = {**stored, "model": rule.name, "weights": rule.weights or stored["weights"], "code": rule.code}
    check_same(
        f"the derived feature {side.feature}",
        {"code": None, **stored},
        found,
        next_step="restore the rule, or derive and train again",
    )
    if "fit" in stored:
        path = run_path / fitted_name(stored)
        if not path.is_file() or digest_file(path) != stored["weights"]:
            raise CorruptError(
                f"{path} is missing or not the file that {side.feature} was derived with; restore it, or train again "
                "into a new folder"
            )
        parameters |= load_file(path)
    return rule, parameters
