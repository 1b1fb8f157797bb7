"""A trained pair on disk: `model.safetensors`, and `config.json` written after it.

No other module knows the keys of a pair's `config.json`; those of other runs are in `embedcache.projectors.modules`.
torch is imported where weights are used, so that a config is read in milliseconds.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import Field, field_validator

from embedcache.arrays import Floats, Inputs, blocks, check_finite, normalize
from embedcache.devices import announce_device
from embedcache.errors import CorruptError, DataError, EmbedcacheError, one_line, quoted
from embedcache.files import replacing
from embedcache.progress import Progress
from embedcache.provenance import (
    DIGEST,
    FORMAT,
    Manifest,
    check_same,
    construct,
    digest_file,
    read_manifest,
    write_record,
)
from embedcache.records import read_stage
from embedcache.registry import names_from

if TYPE_CHECKING:
    from torch import nn

    from embedcache.projectors.pair import AlignedPair, AnyTower

CHANGED_CONFIG = "restore the file"
"""What to do about a `config.json` that differs from its digest."""
_PAIR = "pair"
_BLOCK = 8192
Width: TypeAlias = Annotated[int, Field(gt=0, lt=2**31)]


class TowerInput(Manifest):
    """The frozen feature, `encoder/feature`, that a tower was trained on; `spec` opens the encoder again."""

    feature: str
    spec: str
    fingerprint: Mapping[str, Any]
    width: Width


class PairConfig(Manifest):
    """The content of a run's `config.json`.

    Args:
        projector: name of the projector of both towers, or `FIRST+SECOND`.
        sides: modality -> input of its tower, of two modalities; `image` comes before `text`.
        index_digest: digest of the sample and item tables of the cache, joined by `+` for several caches.
        training: all settings of the training run that affect its result.
        file_digests: SHA-256 of the files named by the settings `split` and `selection`, if any, and of what else
            decides the result beside them, such as the items without a feature.
        split_digest: SHA-256 of `split.parquet`.
        weights_digest: SHA-256 of `model.safetensors`.
    """

    format: int = FORMAT
    kind: Literal["pair"] = "pair"
    projector: str
    shared_width: Width
    sides: Mapping[str, TowerInput]
    index_digest: str
    training: Mapping[str, Any]
    file_digests: Mapping[str, str] = {}
    split_digest: str = ""
    weights_digest: str = ""

    @field_validator("training")
    @classmethod
    def _check_groups(cls, training: Mapping[str, Any]) -> Mapping[str, Any]:
        if not all(isinstance(training.get(name, {}), Mapping) for name in _TRAINING_GROUPS):
            raise ValueError(f"expected objects as {', '.join(_TRAINING_GROUPS)}")
        return training

    @property
    def modalities(self) -> tuple[str, ...]:
        """Both modalities, in the order of the towers."""
        return tuple(self.sides)

    def tower_input(self, modality: str) -> TowerInput:
        """Return the input of the tower of one of the modalities, or raise a `DataError`."""
        if modality not in self.sides:
            raise DataError(
                f"expected a run with the modality {modality}, got one of {' and '.join(self.sides)}; choose one of "
                "these, on the command line with --modality"
            )
        return self.sides[modality]

    def other_modality(self, modality: str) -> str:
        """Return the modality that the run pairs with one of its modalities, or raise a `DataError`."""
        self.tower_input(modality)
        return next(name for name in self.sides if name != modality)


_TRAINING_GROUPS = ("loss", "machine", "model", "optimizer", "parts", "split")


def build(config: PairConfig, *, dropout: float = 0.0) -> "AlignedPair":
    """Create an untrained pair of the shapes in a config; SettingError if a projector is custom code not trusted."""
    from embedcache.projectors.pair import AlignedPair

    with names_from("the run"):
        return AlignedPair(
            config.projector,
            widths={modality: side.width for modality, side in config.sides.items()},
            shared_width=config.shared_width,
            dropout=dropout,
        )


def config_path(run_path: Path) -> Path:
    """Return the path of the file whose presence marks a run as complete."""
    return run_path / "config.json"


def split_path(run_path: Path) -> Path:
    """Return the path of the table of the samples that the run was trained on."""
    return run_path / "split.parquet"


def run_selection_path(run_path: Path, selection: str | None) -> Path | None:
    """Return the path of a run's copy of the selection that it was trained on, or None without one."""
    return None if selection is None else run_path / f"selection{Path(selection).suffix or '.txt'}"


def save_pair(run_path: Path, pair: "AlignedPair", config: PairConfig) -> None:
    """Write the weights, then the config with the digests of weights and split, which marks the run as complete."""
    model_path = run_path / "model.safetensors"
    save_weights(model_path, pair)
    digests = {"split_digest": digest_file(split_path(run_path)), "weights_digest": digest_file(model_path)}
    write_record(config_path(run_path), {**config.to_json(), **digests})


def save_weights(path: Path, module: "nn.Module") -> None:
    """Write the parameters and buffers of a module as safetensors, atomically."""
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary)


def checked_weights_path(run_path: Path, expected: str) -> Path:
    """Return the path of the weights of a run; `CorruptError` if they have another digest or are missing."""
    path = run_path / "model.safetensors"
    if not path.is_file() or digest_file(path) != expected:
        raise CorruptError(
            f"{path} is missing or not the file that config.json was written for; train again into a new folder"
        )
    return path


def read_run(run_path: Path, *, make: str = "embedcache train CACHE {}") -> dict[str, Any]:
    """Read the values of the `config.json` of any run, without its digest.

    Args:
        run_path: folder of the run.
        make: command that makes such a run, where `{}` stands for the folder.

    Raises:
        PathError: the folder is not a finished run.
        ArtifactError: it has another format.
        CorruptError: the file is not JSON, or has changed since it was written.
    """
    values = read_manifest(
        config_path(run_path),
        kind="run",
        make=lambda: make.format(quoted(run_path)),
        next_step=CHANGED_CONFIG,
    )
    values.pop(DIGEST, None)
    return values


def read_run_record(run_path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the `record.json` of a run.

    Args:
        run_path: folder of the run.
        config: values of its `config.json`.

    Raises:
        PathError: there is none.
        CorruptError: it has changed since it was written, or is that of another run or stage.
    """
    path = run_path / "record.json"
    record = read_stage(path)
    settings = record.get("settings", {})
    is_other = any(name in settings and settings[name] != config.get(name) for name in ("index_digest", "training"))
    if record["stage"] != "train" or is_other:
        raise CorruptError(f"{path}: expected the record of this run, got that of another one; restore the file")
    return record


def read_config(run_path: Path) -> PairConfig:
    """Read a run's `config.json`.

    Raises:
        PathError: the folder is not a finished run.
        ArtifactError: it has another format.
        DataError: the run is not an aligned pair.
        CorruptError: the file has changed since it was written, or fields are missing or unknown.
    """
    values = read_run(run_path)
    if not is_pair(values):
        raise DataError(
            f"{run_path}: expected an aligned pair, got a run of kind {values.get('kind')}; load it with "
            "embedcache.projectors.modules.load_module"
        )
    return construct(config_path(run_path), lambda: PairConfig.model_validate(values))


def is_pair(manifest: Mapping[str, Any]) -> bool:
    """Return whether the values of a run's `config.json` are those of an aligned pair."""
    return manifest.get("kind") == _PAIR


def load_pair(run_path: Path, *, device: str = "cpu") -> tuple["AlignedPair", PairConfig]:
    """Load a trained pair in evaluation mode.

    Raises:
        PathError: the folder is not a finished run.
        CorruptError: the weights differ from those that `config.json` was written for, or have other shapes.
        SettingError: a projector is custom code, and the run is not trusted.
    """
    from safetensors.torch import load_file

    config = read_config(run_path)
    model_path = checked_weights_path(run_path, config.weights_digest)
    with _explain_weights(model_path):
        check_shapes(lambda: build(config), model_path)
    pair = build(config)
    with _explain_weights(model_path):
        pair.load_state_dict(load_file(model_path))
    return pair.to(device).eval(), config


@contextmanager
def _explain_weights(path: Path) -> Iterator[None]:
    """Raise the error of weights of other shapes or names as a CorruptError."""
    try:
        yield
    except RuntimeError as error:
        raise CorruptError(
            f"{path}: expected the weights of the projector in config.json, got others: {one_line(error)}; "
            "restore both files, or train again into a new folder"
        ) from error


def check_shapes(build: Callable[[], "nn.Module"], path: Path) -> None:
    """Check that a module would have weights of the shapes in a file, before widths of a config exceed the memory.

    A module of custom code that cannot be built without memory is not checked here.

    Raises:
        RuntimeError: other shapes or names.
    """
    import torch
    from safetensors import safe_open

    try:
        with torch.device("meta"):
            module = build()
    except Exception as error:  # of custom code, which is built again with memory
        if isinstance(error, EmbedcacheError) or "overflowed" in str(error):  # of widths beyond any memory
            raise
        return
    with safe_open(path, "pt") as file:
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    try:
        module.to("meta").load_state_dict(shapes)
    except RuntimeError as error:
        for name, value in module.state_dict().items():
            if name in shapes and value.shape != shapes[name].shape:
                sizes = [list(each.shape) for each in (value, shapes[name])]
                raise RuntimeError(f"size mismatch of {name}: {sizes[0]}, but {sizes[1]} in {path.name}") from error
        raise


def project(
    tower: "AnyTower",
    inputs: Inputs,
    *,
    device: str = "cpu",
    width: int | None = None,
    progress: Progress | None = None,
) -> Floats:
    """Project items block by block: N items of any float dtype -> (N, P) float32, rows of length 1.

    Args:
        tower: the tower.
        inputs: the items.
        device: device of the tower.
        width: P, the first components to keep before rows are scaled to length 1; None: all.
        progress: a step that advances by the items.

    Raises:
        DataError: a value is NaN or infinite after projection.
    """
    import torch

    announce_device(device)
    out_NP = [np.empty((0, width or tower.output_width), np.float32)]
    num_tokens = inputs.values.shape[1] if inputs.values.ndim == 3 else 1
    with torch.inference_mode():
        for block in blocks(len(inputs.values), max(1, _BLOCK // num_tokens)):
            part = inputs.take(block)
            values = torch.from_numpy(np.require(part.values, np.float32, ["W"])).to(device)  # chunks are read-only
            lengths = None if part.lengths is None else torch.from_numpy(part.lengths).to(device)
            out_NP.append(tower(values, lengths)[:, :width].float().cpu().numpy())
            if progress is not None:
                progress.advance(len(out_NP[-1]))
    projected_NP = np.concatenate(out_NP)
    check_finite(projected_NP, "the projected feature")
    return normalize(projected_NP)


def check_feature(config: PairConfig, modality: str, name: str, fingerprint: Mapping[str, Any]) -> None:
    """Check that a feature comes from the encoder that the tower was trained on."""
    expected = config.tower_input(modality)
    check_same(
        f"the run's {modality} feature {expected.feature}",
        expected.fingerprint,
        fingerprint,
        next_step=f"the cache's {name} comes from another encoder: use the cache that the run was trained on",
    )


class Cost(NamedTuple):
    """Number of trained parameters, and operations of the matrix products of one pair; a multiply-add counts as two."""

    parameters: int
    flops_per_pair: int


def count_cost(config: PairConfig, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
    """Count parameters and operations without allocating the weights; an item has the shape (D,) or (T, D)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        pair = build(config).eval()
        for modality, shape in shapes.items():
            pair.tower(modality)(torch.zeros(1, *shape))
    parameters = sum(parameter.numel() for parameter in pair.parameters() if parameter.requires_grad)
    return Cost(parameters=parameters, flops_per_pair=counter.get_total_flops())
