"""Export the text tower for sentence-transformers: transformer, pooling, and the projector as dense layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders import sentence_transformers as encoders
from embedcache.encoders.open import EncoderSpec, feature_names
from embedcache.encoders.weights import find_model_folder, quiet_transformers
from embedcache.export.base import TEXTS, ExportNotes, ExportRun, check_plain, unsupported
from embedcache.export.towers import SENTENCE_OPTIONS, DenseChain, dense_chain
from embedcache.provenance import read_json, write_json
from embedcache.registry import require

_FORMAT = "sentence-transformers"
_NEXT_STEP = (
    "train with --projector linear, identity, sharelock, openclip-linear or openclip-mlp on a vector feature, or use "
    "embedcache export onnx for the projectors alone"
)
_SINCE_LONG = frozenset({"Transformer", "Pooling", "Dense", "Normalize"})
"""Modules that all versions of the library have."""
_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_CODE = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")  # this folder, or OWNER/NAME on the hub
vectors = model.encode(["a red image", "two dogs on a hill"])
print(vectors.shape)
"""


def write_sentence_transformers(run: ExportRun, folder: Path) -> ExportNotes:
    """Write a folder that `SentenceTransformer` opens, and check it with that library."""
    library = require("sentence_transformers", extra=_FORMAT)
    check_plain(run.trained.input("text"), _FORMAT)
    with quiet_transformers():
        encoder = _encoder_modules(run, library)  # before the projector: another one does not help an encoder
        chain = dense_chain(run.pair.tower("text"), _FORMAT, _NEXT_STEP)
        modules = [*encoder, *_projector_modules(chain, library)]
        model = library.SentenceTransformer(modules=modules, device="cpu")
        with torch.inference_mode():
            model.save(str(folder), create_model_card=False)
        _write_as_before(folder, model)
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


def _write_as_before(folder: Path, model: Any) -> None:
    """Write the modules of a saved model as versions before 5.4 of the library did, which all versions read."""
    kinds = [type(module).__name__ for module in model]
    if not _SINCE_LONG.issuperset(kinds):
        return
    entries = read_json(folder / "modules.json")
    for entry, kind in zip(entries, kinds, strict=True):
        entry["type"] = f"sentence_transformers.models.{kind}"
        path = folder / entry["path"] / "config.json"
        if kind == "Pooling":
            write_json(path, _pooling_as_before(read_json(path)))
        elif kind == "Dense":
            write_json(path, {name: value for name, value in read_json(path).items() if not name.startswith("module_")})
    write_json(folder / "modules.json", entries)
    length = {"max_seq_length": model.max_seq_length, "do_lower_case": bool(getattr(model[0], "do_lower_case", False))}
    write_json(folder / "sentence_bert_config.json", length)


def _pooling_as_before(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a pooling module with one flag per mode; versions before 5.4 write that already."""
    if "pooling_mode" not in config:
        return config
    modes = config["pooling_mode"]
    chosen = [modes] if isinstance(modes, str) else modes
    flags = {flag: mode in chosen for mode, flag in _POOLING_FLAGS.items()}
    return {
        "word_embedding_dimension": config["embedding_dimension"],
        **flags,
        "include_prompt": config["include_prompt"],
    }


def _encoder_modules(run: ExportRun, library: Any) -> list[Any]:
    """Return the text encoder's modules, up to the run's feature."""
    spec = EncoderSpec.parse(run.trained.input("text").spec)
    name = "+".join(feature_names(run.trained.input("text").feature))
    max_tokens = int(run.trained.input("text").fingerprint["preprocessing"].get("max_tokens", 0))
    if spec.family == "st":
        return _sentence_modules(spec, name, max_tokens, library)
    if spec.family == "hf" and name in ("mean", "cls"):
        parts = library.sentence_transformer.modules
        transformer = parts.Transformer(str(find_model_folder(spec).path), max_seq_length=max_tokens)
        return [transformer, parts.Pooling(transformer.get_embedding_dimension(), pooling_mode=name)]
    feature = run.trained.input("text").feature
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
    modules = encoders.read_modules(folder)
    library_modules = [module for module in model if type(module).__name__ != "Normalize"]
    pooled = next(iter(modules.pools))
    default = "dense" if modules.heads else pooled
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
