"""The folder of derived features: its fingerprint, and the arrays that a rule was fitted to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save_file

from embedcache.arrays import Array
from embedcache.dataset.splits import read_split, require_split
from embedcache.derive.compute import ChunkReader
from embedcache.derive.rules import Block, Rule
from embedcache.encoders.open import DERIVED, EncoderSpec
from embedcache.errors import SettingError
from embedcache.files import find_files, read_file, replacing
from embedcache.locks import locked
from embedcache.provenance import digest, digest_file
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, create_group, open_group
from embedcache.store.layout import checked_fit_path, encoder_path, fit_path


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
    cache: Cache,
    name: str,
    rule: Rule,
    reader: ChunkReader,
    fingerprint: Mapping[str, Any],
    *,
    split_path: Path | None,
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
    path = encoder_path(cache.path, reader.modality, name)
    stored = _open_stored(cache, reader.modality, name)
    if stored is not None and not stored.is_derived:
        raise SettingError(f"name: {path} holds the features of the encoder {stored.spec}; choose another name")
    create = partial(create_group, cache.path, reader.modality, name, cache.info, spec=_spec(rule))
    if rule.fit is None:
        if split_path is not None:
            raise SettingError(f"fit_split: the rule {rule.name!r} is not fitted; omit --fit-split")
        return create(fingerprint=fingerprint), {}
    if split_path is not None:
        require_split(split_path)
    part = {"part": "all"} if split_path is None else {"part": "train", "split": digest_file(split_path)}
    fingerprint = {**fingerprint, "fit": part}
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
    has_chunks = any(find_files(stored.path, "chunks/*.parquet"))
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
