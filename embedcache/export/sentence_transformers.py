"""Export the text tower for sentence-transformers: transformer, pooling, and the projector as dense layers."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from embedcache.encoders import sentence_transformers as encoders
from embedcache.encoders.open import EncoderSpec, feature_names
from embedcache.encoders.weights import find_model_folder, quiet_transformers
from embedcache.export.base import TEXTS, ExportNotes, check_modalities, check_plain, compare_examples, unsupported
from embedcache.modeling import heads
from embedcache.registry import require
from embedcache.runs import Run

_FORMAT = "sentence-transformers"
_NEXT_STEP = (
    "train with --projector linear, identity, sharelock, openclip-linear or openclip-mlp on a vector feature, or use "
    "embedcache export onnx for the projectors alone"
)
_UNSUPPORTED_OPTIONS = ("prompt", "prompt_name", "truncate_dim")


def write_sentence_transformers(run: Run, folder: Path) -> ExportNotes:
    """Write a folder that `SentenceTransformer` opens, and check it with that library."""
    library = require("sentence_transformers", extra=_FORMAT)
    check_modalities(run, ("text",), _FORMAT)
    check_plain(run.input("text"), _FORMAT)

    with quiet_transformers():
        # Checked before the projector: another projector does not make an encoder supported.
        encoder = _encoder_modules(run, library)
        modules = [*encoder, *_tower_modules(run, library)]
        model = library.SentenceTransformer(modules=modules, device="cpu")
        with torch.inference_mode():
            model.save(str(folder), create_model_card=False)
        exported = library.SentenceTransformer(str(folder), device="cpu")
    vectors = exported.encode(list(TEXTS), show_progress_bar=False)

    return ExportNotes(
        library=_FORMAT,
        task="sentence-similarity",
        requirements=("sentence-transformers>=6",),
        differences=compare_examples(run, _FORMAT, {"text": vectors}),
        encoders=("text",),
    )


def _encoder_modules(run: Run, library: Any) -> list[Any]:
    """Return the text encoder's modules, up to the run's feature."""
    side = run.input("text")
    spec = EncoderSpec.parse(side.spec)
    name = "+".join(feature_names(side.feature))
    max_tokens = int(side.fingerprint["preprocessing"].get("max_tokens", 0))
    if spec.family == "st":
        return _sentence_modules(spec, name, max_tokens, library)

    if spec.family == "hf" and name in ("mean", "cls"):
        parts = library.sentence_transformer.modules
        transformer = parts.Transformer(str(find_model_folder(spec).path), max_seq_length=max_tokens)
        return [transformer, parts.Pooling(transformer.get_embedding_dimension(), pooling_mode=name)]

    reason = f"its text feature is {side.feature}: expected the pooled one of st, or mean or cls of hf"
    raise unsupported(_FORMAT, reason)


def _sentence_modules(spec: EncoderSpec, name: str, max_tokens: int, library: Any) -> list[Any]:
    for option in _UNSUPPORTED_OPTIONS:
        if option in spec.options:
            raise unsupported(_FORMAT, f"its text encoder has the option {option}")

    folder = encoders.find_folder(spec).path
    model = library.SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = max_tokens

    # The tower decides whether its input is normalized.
    modules = encoders.read_modules(folder)
    library_modules = [module for module in model if type(module).__name__ != "Normalize"]

    pooled = next(iter(modules.pools))
    default = "dense" if modules.heads else pooled
    if name == default:
        return library_modules
    if name == pooled:
        return [module for module in library_modules if type(module).__name__ != "Dense"]
    raise unsupported(_FORMAT, f"its text feature is {name!r}: expected {default!r}, the library's pooling")


@torch.no_grad()
def _tower_modules(run: Run, library: Any) -> Iterator[Any]:
    """Yield the library's modules that compute the same as a tower, up to rounding.

    Raises:
        SettingError: the projector is not a chain of dense layers.
    """
    parts = library.sentence_transformer.modules
    tower = run.pair.tower("text")
    layers = _dense_layers(tower.projector, tower.input_width)

    # Centering, or the division by the vectors' length, moves into the first layer.
    first, _ = layers[0]
    if isinstance(tower, heads.RawTower):
        first.weight /= tower.length
    else:
        assert isinstance(tower, heads.Tower)
        yield parts.Normalize()
        shift_P = -first.weight @ tower.mean
        first.bias = nn.Parameter(shift_P if first.bias is None else first.bias + shift_P)

    for linear, activation in layers:
        yield parts.Dense(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            activation_function=activation,
            init_weight=linear.weight,
            init_bias=linear.bias,
        )
    yield parts.Normalize()


def _dense_layers(projector: nn.Module, width: int) -> list[tuple[nn.Linear, nn.Module]]:
    """Return copies of the linear layers of a projector, each with its activation."""
    modules: list[nn.Module]
    if isinstance(projector, heads.IdentityProjector):
        identity = nn.Linear(width, width, bias=False)
        nn.init.eye_(identity.weight)
        modules = [identity]
    elif isinstance(projector, heads.LinearProjector):
        modules = [projector.linear]
    elif isinstance(projector, heads.ShareLockProjector | heads.OpenClipHead):
        modules = list(projector.layers)
    else:
        reason = f"{type(projector).__name__} is not a chain of dense layers on one vector"
        raise unsupported(_FORMAT, reason, _NEXT_STEP)

    layers: list[tuple[nn.Linear, nn.Module]] = []
    for module in copy.deepcopy(modules):
        if isinstance(module, nn.Linear):
            layers.append((module, nn.Identity()))
        # At inference, batch normalization is linear.
        elif isinstance(module, nn.BatchNorm1d):
            layers[-1] = (fuse_linear_bn_eval(layers[-1][0], module), nn.Identity())
        elif not isinstance(module, nn.Dropout):
            layers[-1] = (layers[-1][0], module)
    return layers
