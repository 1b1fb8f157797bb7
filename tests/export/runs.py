"""Runs on tiny encoders, with random weights everywhere so that every part of a projector matters."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from embedcache.encoders.base import EncoderSettings, Modality
from embedcache.encoders.open import feature_names, open_encoder
from embedcache.modeling.heads import RawTower, Tower
from embedcache.projectors.base import HasAnchors
from embedcache.projectors.pair import AlignedPair
from embedcache.runs import PAIR, Run, RunInfo, RunInput


@cache
def tower_input(modality: Modality, spec: str, feature: str) -> RunInput:
    """Describe a feature of an encoder, which is opened once."""
    names = feature_names(feature)
    settings = EncoderSettings(features=names, backend="torch")
    encoder = open_encoder(spec, modality=modality, settings=settings)
    name = "+".join(f"encoder/{part}" for part in names)
    width = encoder.features[names[0]][-1]
    fingerprint = encoder.fingerprint.to_json()
    return RunInput(modality=modality, feature=name, spec=spec, fingerprint=fingerprint, width=width)


def make_run(
    path: Path, image: tuple[str, str], text: tuple[str, str], projector: str = "mlp", *, width: int = 16, seed: int = 0
) -> Path:
    """Write a run whose weights are all random, including means and norms."""
    inputs = {"image": tower_input("image", *image), "text": tower_input("text", *text)}
    torch.manual_seed(seed)
    widths = {name: item.width for name, item in inputs.items()}
    pair = AlignedPair(projector, widths=widths, shared_width=width)
    with torch.no_grad():
        for tower in (pair.tower("image"), pair.tower("text")):
            _randomize(tower)
        pair.log_scale.fill_(2.5)
    settings = {"loss": {"name": "multi_positive"}, "optimizer": {"epochs": 3}, "split": {"kind": "key"}, "seed": 0}
    arguments = {"projector": projector, "widths": widths, "shared_width": width}
    info = RunInfo(kind=PAIR, arguments=arguments, inputs=inputs, settings=settings, index_digest="rows")
    return Run.create(path, info).finish(pair, {}).path


def make_run_of(path: Path, specs: Mapping[str, str], image: str, text: str, projector: str = "mlp") -> Path:
    """Write a run on `NAME/FEATURE` of images and of texts, whose encoders have short names."""
    sides = [(specs[name], feature) for name, _, feature in (image.partition("/"), text.partition("/"))]
    return make_run(path, *sides, projector, width=32 if "identity" in projector else 16)


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
