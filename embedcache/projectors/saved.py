"""A trained pair on disk: `model.safetensors`, and `config.json` written after it.

What a pair of projectors costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from embedcache.arrays import Floats, Inputs, blocks, check_finite, normalize
from embedcache.errors import CorruptError
from embedcache.files import replacing
from embedcache.projectors.pair import AlignedPair, AnyTower
from embedcache.provenance import check_same, digest_file, fields_of, from_record, read_manifest, to_record, write_json

FORMAT_VERSION = 1
_BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class Side:
    """Which frozen feature a tower was trained on.

    Args:
        feature: `encoder/feature` in the cache.
        spec: what opens the encoder again.
        fingerprint: all that decided the feature.
        width: D.
    """

    feature: str
    spec: str
    fingerprint: Mapping[str, Any]
    width: int


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """The content of a run's `config.json`.

    Args:
        projector: name of both towers' projector, or `IMAGE+TEXT`.
        shared_width: P.
        image: what the image tower takes.
        text: what the text tower takes.
        index_digest: identity of the rows that it was trained on: a cache's, or those of several with `+` between.
        training: every setting of the training run.
        given: SHA-256 of the files that settings name: `split` and `selection`, where they do.
        split: SHA-256 of `split.parquet`.
        weights: SHA-256 of `model.safetensors`.
        format: version of the format on disk.
    """

    projector: str
    shared_width: int
    image: Side
    text: Side
    index_digest: str
    training: Mapping[str, Any]
    given: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    weights: str = ""
    format: int = FORMAT_VERSION

    def side(self, modality: str) -> Side:
        """Get the side of `image` or `text`."""
        return {"image": self.image, "text": self.text}[modality]


def build(config: PairConfig, *, dropout: float = 0.0) -> AlignedPair:
    """Make an untrained pair of the shapes that a config names."""
    return AlignedPair(
        config.projector,
        image_width=config.image.width,
        text_width=config.text.width,
        shared_width=config.shared_width,
        dropout=dropout,
    )


def config_path(run_path: Path) -> Path:
    """Get the file whose presence says that a run is complete."""
    return run_path / "config.json"


def split_path(run_path: Path) -> Path:
    """Get the table that says which samples the run was trained on."""
    return run_path / "split.parquet"


def save_pair(run_path: Path, pair: AlignedPair, config: PairConfig) -> None:
    """Write the weights, then the config, with the digests of weights and split, that says the run is complete."""
    model_path = run_path / "model.safetensors"
    save_weights(model_path, pair)
    content = {
        **to_record(config),
        "split": digest_file(split_path(run_path)),
        "weights": digest_file(model_path),
    }
    write_json(config_path(run_path), content)


def save_weights(path: Path, pair: AlignedPair) -> None:
    """Write a pair's weights in the place of whatever is there."""
    state = {name: value.contiguous() for name, value in pair.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary)


def read_config(run_path: Path) -> PairConfig:
    """Read a run's `config.json`.

    Raises:
        PathError: the folder is no finished run.
        ArtifactError: it is of a later format.
        CorruptError: it does not hold what it should.
    """
    path = config_path(run_path)
    make = f"embedcache train CACHE {run_path}"
    values = read_manifest(path, kind="run", latest_format=FORMAT_VERSION, make=make)
    return fields_of(
        path,
        lambda: PairConfig(**{**from_record(values), "image": Side(**values["image"]), "text": Side(**values["text"])}),
    )


def load_pair(run_path: Path, *, device: str = "cpu") -> tuple[AlignedPair, PairConfig]:
    """Load a trained pair, ready to project.

    Raises:
        PathError: the folder is no finished run.
        CorruptError: the weights are not those that the config was written for.
    """
    config = read_config(run_path)
    model_path = run_path / "model.safetensors"
    if not model_path.is_file() or digest_file(model_path) != config.weights:
        raise CorruptError(
            f"{model_path} is missing or not the file that config.json was written for; train again into a new folder"
        )
    pair = build(config)
    pair.load_state_dict(load_file(model_path))
    return pair.to(device).eval(), config


@torch.inference_mode()
def project(tower: AnyTower, inputs: Inputs, *, device: str = "cpu") -> Floats:
    """Project items block by block, of any float dtype -> (N, P) float32, rows of length 1.

    Raises:
        DataError: a row is no number, in the feature or after projection.
    """
    out_NP = [np.empty((0, tower.output_width), np.float32)]
    num_tokens = inputs.values.shape[1] if inputs.values.ndim == 3 else 1
    for block in blocks(len(inputs.values), max(1, _BLOCK // num_tokens)):
        part = inputs.take(block)
        values = torch.from_numpy(np.asarray(part.values, np.float32)).to(device)
        lengths = None if part.lengths is None else torch.from_numpy(part.lengths).to(device)
        out_NP.append(tower(values, lengths).float().cpu().numpy())
    projected_NP = np.concatenate(out_NP)
    check_finite(projected_NP, "the projected feature")
    return normalize(projected_NP)


def check_feature(config: PairConfig, modality: str, name: str, fingerprint: Mapping[str, Any]) -> None:
    """Refuse to project a feature that the tower was not trained on.

    Raises:
        FingerprintError: names the field with both values.
    """
    side = config.side(modality)
    check_same(
        f"the run's {modality} feature {side.feature}",
        side.fingerprint,
        fingerprint,
        next_step=f"the cache's {name} comes from another encoder: give the cache that the run was trained on",
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of both towers.

    Args:
        parameters: trained, the temperature included.
        flops_a_pair: of matrix products, forward, for one image and one text; a multiply-add is two.
    """

    parameters: int
    flops_a_pair: int


def cost(config: PairConfig, image_shape: tuple[int, ...], text_shape: tuple[int, ...]) -> Cost:
    """Count without memory for the weights.

    Args:
        config: of the pair.
        image_shape: of one item: (D,) or (T, D).
        text_shape: alike.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        pair = build(config).eval()
        pair.image(torch.zeros(1, *image_shape))
        pair.text(torch.zeros(1, *text_shape))
    parameters = sum(parameter.numel() for parameter in pair.parameters() if parameter.requires_grad)
    return Cost(parameters=parameters, flops_a_pair=counter.get_total_flops())
