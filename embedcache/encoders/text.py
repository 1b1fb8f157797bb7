"""Text encoders: a tokenizer, run on threads, and a model per padded batch.

transformers takes longer to import, and to load a model, than a search takes in all. So beside the exported graph of an
encoder lies what else it needs, under the digest of its fingerprint: a cached feature names that, and a query is then
encoded by the library tokenizers and onnxruntime alone.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.arrays import Array, Ints
from embedcache.encoders.backends import Graph, GraphEncoder, OnnxExport, OnnxGraph, build_graph, is_intact
from embedcache.encoders.base import EncoderSettings, Fingerprint, ItemShape
from embedcache.encoders.weights import load_part
from embedcache.errors import ArtifactError, PathError, SettingError
from embedcache.files import user_folder
from embedcache.modeling.features import native_features, requested_layers
from embedcache.provenance import digest, read_record, write_record

_IDS, _MASK = "input_ids", "attention_mask"
_NO_LIMIT = 1_000_000  # tokenizers without a limit of their own state 1e30


def build_text_encoder(
    module: torch.nn.Module,
    tokenizer: "Tokenizer",
    fingerprint: Fingerprint,
    settings: EncoderSettings,
    *,
    config: Mapping[str, Any] | None = None,
) -> GraphEncoder:
    """Create an encoder from a loaded model.

    Args:
        module: maps token ids and mask to a dict of tensors: its native features, and the same names with the prefix
            `layerN.` for each requested block; `tokens` are (B, T, D).
        tokenizer: converts texts to token ids.
        fingerprint: of the model; a preprocessing that is empty is filled in here, and the rest as in `GraphEncoder`.
        settings: how it runs.
        config: JSON values that determine the ONNX graph together with the weights. If None, the model runs on torch
            only.
    """
    example = _example_batch((5, 9), tokenizer.pad_id)
    with torch.inference_mode():
        outputs = module.eval()(**{name: torch.from_numpy(array) for name, array in example.items()})
    shapes: dict[str, ItemShape] = {
        name: (*((-1,) if output.ndim == 3 else ()), output.shape[-1]) for name, output in outputs.items()
    }
    requested = [name for name in settings.features if name in shapes]
    features = {name: shapes[name] for name in [*native_features(shapes), *requested]}

    export = None
    if config is not None:
        dynamic_axes = {name: {0: "batch", 1: "tokens"} for name in (_IDS, _MASK, *features)}
        for name, shape in features.items():
            if len(shape) == 1:
                del dynamic_axes[name][1]
        export = OnnxExport(
            module=module,
            example=example,
            check_inputs=_example_batch((7, 1, 14), tokenizer.pad_id),
            outputs=tuple(features),
            dynamic_axes=dynamic_axes,
            key={"config": config},
        )
    graph = build_graph(module, settings, fingerprint, export)
    fingerprint = replace(fingerprint, preprocessing=fingerprint.preprocessing or tokenizer.preprocessing)
    encoder = _with_tokenizer(graph, tokenizer, features, fingerprint, settings)
    _store(encoder, tokenizer)
    return encoder


def _with_tokenizer(
    graph: Graph,
    tokenizer: "Tokenizer",
    features: Mapping[str, ItemShape],
    fingerprint: Fingerprint,
    settings: EncoderSettings,
) -> GraphEncoder:
    return GraphEncoder(
        "text",
        graph,
        prepare=tokenizer,
        collate=lambda prepared: pad(prepared, tokenizer.pad_id),
        features=features,
        fingerprint=fingerprint,
        settings=settings,
    )


def _store(encoder: GraphEncoder, tokenizer: "Tokenizer") -> None:
    """Write what `open_stored` reads, if a graph and a tokenizer are all that an encoder needs.

    A disk that cannot be written is no error: the model is then loaded each time.
    """
    if tokenizer.state is None or not isinstance(encoder.graph, OnnxGraph):
        return
    record = {
        "graph": encoder.graph.path.name,
        "features": [[name, list(shape)] for name, shape in encoder.features.items()],
        "pad_id": tokenizer.pad_id,
        "tokenizer": tokenizer.state,
    }
    path = _stored_path(encoder.fingerprint.to_json(), tuple(encoder.features))
    with suppress(ArtifactError, PathError):
        # Fingerprints do not cover tokenizers: of two models that share one, neither may answer for the other.
        if read_record(path, next_step=f"delete {path}").get("tokenizer") != tokenizer.state:
            record = {}
    with suppress(OSError):
        write_record(path, record)


def open_stored(fingerprint: Mapping[str, Any], settings: EncoderSettings) -> GraphEncoder | None:
    """Open the encoder with a fingerprint from its exported graph, without transformers.

    Returns None if it has none here, or the files are damaged: then the model has to be loaded.
    """
    path = _stored_path(fingerprint, settings.features)
    try:
        record = read_record(path, next_step=f"delete {path}")
        graph = path.with_name(record["graph"])
    except (ArtifactError, PathError, KeyError):
        return None
    if not is_intact(graph):
        return None
    import tokenizers

    preprocessing = fingerprint["preprocessing"]
    tokenizer = Tokenizer(
        encode=_encode_on_threads(tokenizers.Tokenizer.from_str(record["tokenizer"])),
        max_tokens=preprocessing["max_tokens"],
        pad_id=record["pad_id"],
        prefix=preprocessing["prefix"],
        is_lower=preprocessing["lower"],
    )
    features = {name: tuple(shape) for name, shape in record["features"]}
    return _with_tokenizer(OnnxGraph(graph), tokenizer, features, Fingerprint(**fingerprint), settings)


def _stored_path(fingerprint: Mapping[str, Any], features: Sequence[str]) -> Path:
    """Return the path of the record of an encoder with a fingerprint that offers the states after some blocks."""
    key = {"fingerprint": fingerprint, "features": sorted(name for name in features if requested_layers([name]))}
    return user_folder() / "onnx" / f"{digest(key)[:32]}.json"


def _example_batch(lengths: tuple[int, ...], pad_id: int) -> dict[str, Ints]:
    return pad([np.arange(2, length + 2, dtype=np.int64) for length in lengths], pad_id)


def pad(ids: Sequence[Array], pad_id: int) -> dict[str, Ints]:
    """Pad token ids of one or more texts on the right, and create their mask: both (B, T) int64."""
    lengths = np.array([len(row) for row in ids])
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, pad_id, dtype=np.int64)
    padded[mask] = np.concatenate(ids)
    return {_IDS: padded, _MASK: mask.astype(np.int64)}


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Tokenizer of a model: converts texts to token ids.

    Args:
        encode: texts -> token ids, special tokens included, truncated to `max_tokens`.
        max_tokens: maximum input length, special tokens included.
        pad_id: token that fills up shorter texts.
        prefix: prepended to each text.
        is_lower: whether texts are lowercased first.
        state: JSON text from which the library tokenizers makes the tokenizer again; None if it cannot.
    """

    encode: Callable[[list[str]], list[list[int]]]
    max_tokens: int
    pad_id: int
    prefix: str = ""
    is_lower: bool = False
    state: str | None = None

    def __call__(self, texts: Sequence[str]) -> list[Ints]:
        """Return the token ids of each text: (T,) int64."""
        prefixed = [self.prefix + text for text in texts]
        rows = self.encode([text.lower() for text in prefixed] if self.is_lower else prefixed)
        return [np.array(ids, dtype=np.int64) for ids in rows]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Entry `preprocessing` of a fingerprint."""
        return {"max_tokens": self.max_tokens, "prefix": self.prefix, "lower": self.is_lower}


def open_tokenizer(
    folder: Path,
    *,
    max_tokens: int | None,
    model: torch.nn.Module,
    published: int | None = None,
    prefix: str = "",
    is_lower: bool = False,
) -> Tokenizer:
    """Open the transformers tokenizer in a model folder, safe to call from many threads.

    `max_tokens` defaults to the smaller of the model's limit and the published one, which is the tokenizer's if None.
    See `Tokenizer` for the rest.
    """
    from transformers import AutoTokenizer

    tokenizer = load_part(AutoTokenizer, folder, "tokenizer", "add the model's tokenizer files")
    limit = _input_limit(max_tokens, published or tokenizer.model_max_length, model, folder)
    if not tokenizer.is_fast:
        raise SettingError(f"{folder} has a slow tokenizer: expected a tokenizer.json; choose another model")
    # Truncation is state of the tokenizer, so it is set once here and never from a thread.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(limit, direction=tokenizer.truncation_side)
    state = None
    with suppress(Exception):  # the library's own type, of a tokenizer with a part in Python
        state = backend.to_str()
    return Tokenizer(
        encode=_encode_on_threads(backend),
        max_tokens=limit,
        pad_id=tokenizer.pad_token_id or 0,
        prefix=prefix,
        is_lower=is_lower,
        state=state,
    )


def _encode_on_threads(backend: Any) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def _input_limit(requested: int | None, published: int | None, model: torch.nn.Module, folder: Path) -> int:
    """Return the maximum length of a text, given the requested one and the one that the model's files state."""
    positions = _num_positions(model)
    if requested is not None and positions is not None and requested > positions:
        raise SettingError(
            f"max_tokens: expected at most {positions}, the limit of the model in {folder}, got {requested}"
        )
    limits = [limit for limit in (published, positions) if limit and limit < _NO_LIMIT]
    if requested is None and not limits:
        raise SettingError(f"the model in {folder} states no maximum text length; add an option such as max_tokens=512")
    return requested or int(min(limits))


def _num_positions(model: torch.nn.Module) -> int | None:
    """Return the number of tokens that a model's position table has room for; None if it has no table."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its relatives count positions from padding_idx + 1.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
