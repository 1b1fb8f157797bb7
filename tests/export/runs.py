"""Runs on tiny encoders, with random weights everywhere so that every part of a projector matters."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from embedcache.encoders.base import EncoderSettings, Modality
from embedcache.encoders.open import feature_names, open_encoder
from embedcache.errors import SettingError
from embedcache.export.export import export_run
from embedcache.projectors.base import HasAnchors
from embedcache.projectors.heads import RawTower, Tower
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, TowerInput, save_pair, split_path


@cache
def tower_input(modality: Modality, spec: str, feature: str) -> TowerInput:
    """Describe a feature of an encoder, which is opened once."""
    names = feature_names(feature)
    settings = EncoderSettings(features=names, backend="torch")
    encoder = open_encoder(spec, modality=modality, settings=settings)
    name = "+".join(f"encoder/{part}" for part in names)
    width = encoder.features[names[0]][-1]
    return TowerInput(feature=name, spec=spec, fingerprint=encoder.fingerprint.to_json(), width=width)


def make_run(
    path: Path, image: tuple[str, str], text: tuple[str, str], projector: str = "mlp", *, width: int = 16, seed: int = 0
) -> Path:
    """Write a run whose weights are all random, including means and norms."""
    path.mkdir(parents=True)
    inputs = {"image": tower_input("image", *image), "text": tower_input("text", *text)}
    torch.manual_seed(seed)
    pair = AlignedPair(
        projector, widths={"image": inputs["image"].width, "text": inputs["text"].width}, shared_width=width
    )
    with torch.no_grad():
        for tower in (pair.tower("image"), pair.tower("text")):
            _randomize(tower)
        pair.log_scale.fill_(2.5)
    split_path(path).write_bytes(b"a split")
    training = {"loss": {"name": "multi_positive"}, "optimizer": {"epochs": 3}, "split": {"kind": "key"}, "seed": 0}
    config = PairConfig(projector=projector, shared_width=width, index_digest="rows", training=training, sides=inputs)
    save_pair(path, pair, config)
    return path


def _randomize(tower: torch.nn.Module) -> None:
    for name, value in [*tower.named_parameters(), *tower.named_buffers()]:
        if name.endswith("num_batches_tracked"):
            continue
        value.copy_(torch.randn_like(value) / max(1, value.shape[-1] if value.ndim else 1) ** 0.5)
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
    if isinstance(tower, Tower):
        tower.mean.mul_(0.3)
    if isinstance(tower, RawTower):
        tower.length.fill_(3.0)
    if isinstance(tower, (Tower, RawTower)) and isinstance(tower.projector, HasAnchors):
        tower.projector.set_anchors(torch.randn_like(tower.projector.anchors))


def follow_error(format_name: str, run: Path, out: Path) -> str:
    """Export a run that a format refuses, then in the format that the error names; return the error."""
    with pytest.raises(SettingError) as caught:
        export_run(format_name, run, out)
    message = str(caught.value)
    named = re.findall(r"use embedcache export ([\w-]+)", message)
    assert named, message
    export_run(named[0], run, out)
    return message
