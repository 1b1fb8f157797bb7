"""Text encoders: a tokenizer, run on threads, and a model per padded batch.

transformers takes longer to import, and to load a model, than a search takes in all. So an encoder of a model folder
that runs on onnxruntime is described in a file beside its exported graph, and later opened by that file, as long as
the folder, the options and the libraries are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from os import utime
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from embedcache.arrays import Array, Ints
from embedcache.encoders.backends import Graph, GraphEncoder, OnnxExport, OnnxGraph, build_graph, is_intact, suits_onnx
from embedcache.encoders.base import Fingerprint, ItemShape
from embedcache.encoders.image_features import native_features, requested_layers
from embedcache.encoders.open import EncoderSpec
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.weights import ModelFolder, load_part
from embedcache.errors import ArtifactError, SettingError
from embedcache.files import user_folder
from embedcache.provenance import digest, read_record, write_record

_IDS, _MASK = "input_ids", "attention_mask"
_NO_LIMIT = 1_000_000  # tokenizers without a limit of their own state 1e30
_LIBRARIES = ("embedcache", "tokenizers", "torch", "transformers")
_OTHER_FORMATS = frozenset({".gguf", ".h5", ".md", ".msgpack", ".onnx", ".ot"})
"""Suffixes of files in a model folder that are never read."""


def build_text_encoder(
    module: torch.nn.Module,
    tokenizer: "Tokenizer",
    *,
    fingerprint: Fingerprint,
    settings: EncoderSettings,
    onnx_key: Mapping[str, Any],
) -> GraphEncoder:
    """Create an encoder from a loaded model.

    Args:
        module: maps token ids and mask to a dict of tensors: its native features, and the same names with the prefix
            `layerN.` for each requested block; `tokens` are (B, T, D).
        fingerprint: see `GraphEncoder`.
        onnx_key: JSON values that determine the ONNX graph together with the weights; `name` starts the file name.
    """
    example = _example_batch((5, 9), tokenizer.pad_id)
    with torch.inference_mode():
        outputs = module.eval()(**{name: torch.from_numpy(array) for name, array in example.items()})
    shapes: dict[str, ItemShape] = {
        name: (*((-1,) if output.ndim == 3 else ()), output.shape[-1]) for name, output in outputs.items()
    }
    requested = [name for name in settings.features if name in shapes]
    features = {name: shapes[name] for name in [*native_features(shapes), *requested]}
    export = OnnxExport(
        module=module,
        example=example,
        check_inputs=_example_batch((7, 1, 14), tokenizer.pad_id),
        outputs=tuple(features),
        dynamic_axes={
            **{name: {0: "batch", 1: "tokens"} for name in (_IDS, _MASK)},
            **{name: {0: "batch", 1: "tokens"} if shape[0] == -1 else {0: "batch"} for name, shape in features.items()},
        },
        key=onnx_key,
    )
    graph = build_graph(export, settings, fingerprint.weights)
    return _with_tokenizer(graph, tokenizer, features, fingerprint, settings)


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


def description_path(spec: EncoderSpec, folder: ModelFolder, settings: EncoderSettings) -> Path | None:
    """Return the path of the description of an encoder of a model folder; None if it would not run on onnxruntime.

    The name is a digest of the spec, of the sizes and times of all files of the model, and of the versions of the
    libraries: what was described under the same name is the same encoder.
    """
    if settings.backend == "torch" or not suits_onnx(settings):
        return None
    stamps = ((path, path.stat()) for path in _model_files(folder.path))
    key = {
        "family": spec.family,
        "model": spec.model_name,
        "revision": folder.revision,
        "options": dict(spec.options),
        "features": [name for name in settings.features if requested_layers([name])],  # all others are always there
        "files": {str(path.relative_to(folder.path)): [stamp.st_size, stamp.st_mtime_ns] for path, stamp in stamps},
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    return user_folder() / "onnx" / f"{spec.family}-{spec.folder}-{digest(key)[:32]}.json"


def open_described(description: Path | None, settings: EncoderSettings) -> GraphEncoder | None:
    """Open an encoder from its description and its exported graph, without transformers.

    Returns None if there is no description, or it or the graph is damaged: then the model has to be loaded.
    """
    try:
        if description is None or not description.is_file():
            return None
        record = read_record(description, next_step=f"delete {description}")
        graph = description.with_name(record["graph"])
        if not is_intact(graph):
            return None
    except (ArtifactError, KeyError):
        return None  # it is written again
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(record["tokenizer"].pop("state"))
    tokenizer = Tokenizer(**record["tokenizer"], encode=_encode_on_threads(backend))
    with suppress(OSError):
        utime(description)  # so that those that nothing uses can be deleted
    features = {name: tuple(shape) for name, shape in record["features"]}
    return _with_tokenizer(OnnxGraph(graph), tokenizer, features, Fingerprint(**record["fingerprint"]), settings)


def write_description(path: Path | None, encoder: GraphEncoder, tokenizer: "Tokenizer") -> None:
    """Write the description that `open_described` reads, if a graph and a tokenizer are all that the encoder needs.

    A disk that cannot be written is no error: the model is then loaded each time.

    Args:
        path: result of `description_path`; None writes nothing.
        encoder: the encoder, which was loaded with its model.
        tokenizer: its tokenizer.
    """
    if path is None or tokenizer.state is None or not isinstance(encoder.graph, OnnxGraph):
        return
    record = {
        "graph": encoder.graph.path.name,
        "features": [[name, list(shape)] for name, shape in encoder.features.items()],
        "fingerprint": encoder.fingerprint.to_json(),
        "tokenizer": {
            "max_tokens": tokenizer.max_tokens,
            "pad_id": tokenizer.pad_id,
            "prefix": tokenizer.prefix,
            "is_lower": tokenizer.is_lower,
            "state": tokenizer.state,
        },
    }
    with suppress(OSError, ArtifactError):
        write_record(path, record)


def _model_files(folder: Path) -> list[Path]:
    """Return the files of a model folder, sorted, but for hidden ones and copies of the weights in other formats."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix not in _OTHER_FORMATS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _example_batch(lengths: tuple[int, ...], pad_id: int) -> dict[str, Ints]:
    return pad([np.arange(2, length + 2, dtype=np.int64) for length in lengths], pad_id)


def pad(ids: Sequence[Array], pad_id: int) -> dict[str, Ints]:
    """Pad token ids of one or more texts on the right, and create their mask: both (B, T) int64."""
    lengths = np.array([len(row) for row in ids])
    num_tokens = int(lengths.max())
    padded = np.full((len(ids), num_tokens), pad_id, dtype=np.int64)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    mask = np.arange(num_tokens) < lengths[:, None]
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
    folder: Path, *, max_tokens: int | None, model: torch.nn.Module, prefix: str = "", is_lower: bool = False
) -> Tokenizer:
    """Open the transformers tokenizer in a model folder, safe to call from many threads.

    `max_tokens` defaults to the smaller of the tokenizer's and the model's limits; see `Tokenizer` for the rest.
    """
    from transformers import AutoTokenizer

    tokenizer = load_part(AutoTokenizer, folder, "tokenizer", "add the model's tokenizer files")
    limit = _input_limit(max_tokens, tokenizer, model, folder)
    encode, state = _encode_slowly(tokenizer, limit), None
    if tokenizer.is_fast:
        # Truncation is state of the tokenizer, so it is set once here and never from a thread.
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(limit, direction=tokenizer.truncation_side)
        encode = _encode_on_threads(backend)
        with suppress(Exception):  # the library's own type, of a tokenizer with a part in Python
            state = backend.to_str()
    return Tokenizer(
        encode=encode,
        max_tokens=limit,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        prefix=prefix,
        is_lower=is_lower,
        state=state,
    )


def num_positions(model: torch.nn.Module) -> int | None:
    """Return the number of tokens that a model's position table has room for; None if it has no table."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its relatives count positions from padding_idx + 1.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _encode_slowly(tokenizer: Any, max_tokens: int) -> Callable[[list[str]], list[list[int]]]:
    lock = Lock()

    def encode(texts: list[str]) -> list[list[int]]:
        with lock:
            rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
            return rows

    return encode


def _encode_on_threads(backend: Any) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def _input_limit(requested: int | None, tokenizer: Any, model: torch.nn.Module, folder: Path) -> int:
    positions = num_positions(model)
    if requested is not None:
        if positions is not None and requested > positions:
            raise SettingError(
                f"max_tokens: expected at most {positions}, the limit of the model in {folder}, got {requested}"
            )
        return requested
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit and limit < _NO_LIMIT]
    if not limits:
        raise SettingError(f"the model in {folder} states no maximum text length; add an option such as max_tokens=512")
    return int(min(limits))
