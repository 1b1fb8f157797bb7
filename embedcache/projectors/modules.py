"""A trained module on disk: `model.safetensors`, and `config.json` written after it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from embedcache.devices import announce_device
from embedcache.errors import ArtifactError, DataError, one_line
from embedcache.projectors.saved import (
    check_shapes,
    checked_weights_path,
    config_path,
    is_pair,
    read_run,
    save_weights,
)
from embedcache.provenance import FORMAT, Manifest, construct, digest_file, write_record
from embedcache.registry import Registry, names_from, trust_code

NETWORKS = Registry("network", {}, group="embedcache.networks")
"""Modules by the names that installed packages declare. One of your own needs no entry: `module:attribute`."""


class ModuleInput(Manifest):
    """The stored feature, `encoder/feature`, that a module was trained on; `spec` opens the encoder again."""

    modality: str
    feature: str
    spec: str
    fingerprint: Mapping[str, Any]
    width: int


class ModuleConfig(Manifest):
    """The content of a run's `config.json`.

    Args:
        kind: name in `NETWORKS`, or `module:attribute`, of what builds the module.
        arguments: keyword arguments of `kind`, JSON values.
        sides: name of an input, such as its modality -> the feature.
        training: all settings that affect the result.
        trainable: parts that were trained; None: all.
        init_runs: part -> SHA-256 of the weights that it started from.
        index_digest: digest of the sample and item tables of the cache, joined by `+` for several caches.
        file_digests: SHA-256 of the files that settings name, by setting.
        weights_digest: SHA-256 of `model.safetensors`.
    """

    kind: str
    arguments: Mapping[str, Any]
    sides: Mapping[str, ModuleInput]
    training: Mapping[str, Any] = {}
    trainable: Sequence[str] | None = None
    init_runs: Mapping[str, str] = {}
    index_digest: str = ""
    file_digests: Mapping[str, str] = {}
    weights_digest: str = ""
    format: int = FORMAT


def build_module(config: ModuleConfig) -> nn.Module:
    """Create an untrained module of the kind and the arguments of a config."""
    module: nn.Module = NETWORKS.load(config.kind)(**config.arguments)
    return module


def save_module(run_path: Path, module: nn.Module, config: ModuleConfig) -> None:
    """Write the weights, then the config with their digest, which marks the run as complete."""
    trust_code(config.kind)
    model_path = run_path / "model.safetensors"
    save_weights(model_path, module)
    write_record(config_path(run_path), {**config.to_json(), "weights_digest": digest_file(model_path)})


def read_module_config(run_path: Path, *, kind: str | None = None) -> ModuleConfig:
    """Read the `config.json` of a run of a module.

    Args:
        run_path: folder of the run.
        kind: kind that the module must have, in the words of the config; None: any.

    Raises:
        PathError: the folder is not a finished run.
        ArtifactError: it has another format.
        DataError: the run is an aligned pair, or of another kind.
        CorruptError: the file has changed since it was written, or fields are missing or unknown.
    """
    values = read_run(run_path, make="train_task, see docs/howto/own_task.md")
    if is_pair(values):
        raise DataError(
            f"{run_path}: expected the run of a module, got an aligned pair; evaluate it with: embedcache evaluate "
            "retrieval"
        )
    config = construct(config_path(run_path), lambda: ModuleConfig.model_validate(values))
    if kind is not None and config.kind != kind:
        raise DataError(f"{run_path}: expected a run of kind {kind}, got one of kind {config.kind}")
    return config


def load_module(run_path: Path, *, kind: str | None = None, device: str = "cpu") -> tuple[nn.Module, ModuleConfig]:
    """Load a trained module in evaluation mode.

    Args:
        run_path: folder of the run.
        kind: kind that it must have, as of `read_module_config`.
        device: torch device.

    Raises:
        PathError: the folder is not a finished run.
        DataError: the run is an aligned pair, or of another kind.
        UnknownNameError: its kind is not installed here.
        SettingError: its kind is custom code, and the run is not trusted.
        ArtifactError: the network of this kind has changed since the run: other arguments, or weights of other shapes.
        CorruptError: the weights differ from those that `config.json` was written for.
    """
    config = read_module_config(run_path, kind=kind)
    model_path = checked_weights_path(run_path, config.weights_digest)
    try:
        with names_from(run_path):
            check_shapes(lambda: build_module(config), model_path)
            module = build_module(config)
        module.load_state_dict(load_file(model_path))
    except (TypeError, RuntimeError) as error:
        raise ArtifactError(
            f"{run_path}: expected the network {config.kind} that this run was trained with, got another one: "
            f"{one_line(error)}; load it with the version that wrote it, or train again into a new folder"
        ) from error
    announce_device(device)
    return module.to(device).eval(), config
