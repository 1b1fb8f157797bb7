"""Export the text tower for sentence-transformers: transformer, pooling, and the projector as dense layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders import sentence_transformers as encoders
from embedcache.encoders.open import EncoderSpec, feature_names
from embedcache.encoders.weights import find_model_folder, quiet_transformers
from embedcache.export.base import TEXTS, ExportNotes, ExportRun, check_plain, unsupported
from embedcache.export.dense import DenseChain, dense_chain
from embedcache.export.towers import SENTENCE_OPTIONS
from embedcache.registry import require

_FORMAT = "sentence-transformers"
_NEXT_STEP = (
    "train with --projector linear, identity, sharelock, openclip-linear or openclip-mlp on a vector feature, or use "
    "embedcache export safetensors, which supports the projectors of any run"
)
_CODE = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")  # this folder, or OWNER/NAME on the hub
vectors = model.encode(["a red image", "two dogs on a hill"])
print(vectors.shape)
"""


def write_sentence_transformers(run: ExportRun, folder: Path) -> ExportNotes:
    """Write a folder that `SentenceTransformer` opens, and check it with that library."""
    library = require("sentence_transformers", extra=_FORMAT)
    check_plain(run.config.tower_input("text"), _FORMAT)
    with quiet_transformers():
        encoder = _encoder_modules(run, library)  # before the projector: another one does not help an encoder
        chain = dense_chain(run.pair.tower("text"), _FORMAT, _NEXT_STEP)
        modules = [*encoder, *_projector_modules(chain, library)]
        model = library.SentenceTransformer(modules=modules, device="cpu")
        with torch.inference_mode():
            model.save(str(folder), create_model_card=False)
        exported = library.SentenceTransformer(str(folder), device="cpu")
    vectors = exported.encode(list(TEXTS), show_progress_bar=False)
    return ExportNotes(
        library=_FORMAT,
        task="sentence-similarity",
        code=_CODE,
        shorten="model.encode(…, truncate_dim={width}, normalize_embeddings=True)",
        requirements=("sentence-transformers",),
        differences=run.check_parity(_FORMAT, {"text": vectors}),
        notes=("The text tower only; `embedcache export transformers` includes both.",),
        encoders=("text",),
    )


def _encoder_modules(run: ExportRun, library: Any) -> list[Any]:
    """Return the text encoder's modules, up to the run's feature."""
    spec = EncoderSpec.parse(run.config.tower_input("text").spec)
    name = "+".join(feature_names(run.config.tower_input("text").feature))
    max_tokens = int(run.config.tower_input("text").fingerprint["preprocessing"].get("max_tokens", 0))
    if spec.family == "st":
        return _sentence_modules(spec, name, max_tokens, library)
    if spec.family == "hf" and name in ("mean", "cls"):
        parts = library.sentence_transformer.modules
        transformer = parts.Transformer(str(find_model_folder(spec).path), max_seq_length=max_tokens)
        return [transformer, parts.Pooling(transformer.get_embedding_dimension(), pooling_mode=name)]
    feature = run.config.tower_input("text").feature
    raise unsupported(
        _FORMAT,
        f"its text feature is {feature}: expected the pooled one of st, or mean or cls of hf",
    )


def _sentence_modules(spec: EncoderSpec, name: str, max_tokens: int, library: Any) -> list[Any]:
    for option in SENTENCE_OPTIONS:
        if option in spec.options:
            raise unsupported(_FORMAT, f"its text encoder has the option {option}")
    folder = encoders.find_folder(spec).path
    model = library.SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = max_tokens
    if name == "pooled":  # of a model that the library runs as a whole
        return list(model)
    modules = encoders.read_modules(folder)
    library_modules = [module for module in model if type(module).__name__ != "Normalize"]
    pooled = "_".join(modules.pools)
    default = "dense" if modules.dense else pooled
    if name == default:
        return library_modules
    if name == pooled:
        return [module for module in library_modules if type(module).__name__ != "Dense"]
    raise unsupported(_FORMAT, f"its text feature is {name!r}: expected {default!r}, the library's pooling")


def _projector_modules(chain: DenseChain, library: Any) -> Iterator[Any]:
    parts = library.sentence_transformer.modules
    if chain.has_unit_input and chain.layers:
        yield parts.Normalize()
    for layer in chain.layers:
        yield parts.Dense(
            layer.weight_PD.shape[1],
            layer.weight_PD.shape[0],
            bias=layer.bias_P is not None,
            activation_function=layer.activation,
            init_weight=layer.weight_PD,
            init_bias=layer.bias_P,
        )
    yield parts.Normalize()
