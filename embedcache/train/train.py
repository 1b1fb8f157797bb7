"""Two cached features in, an aligned pair of projectors out."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from embedcache.artifact import check_same, claim_folder, digest_file, read_json, run_record
from embedcache.cache.cache import Cache
from embedcache.cache.feature import Feature
from embedcache.cache.pairs import Pairs, pair_items
from embedcache.cache.split import PARTS, Split, write_split
from embedcache.disk import disk_errors
from embedcache.encoders.graph import torch_device
from embedcache.errors import DataError
from embedcache.progress import Progress, Silent
from embedcache.projectors.contract import PROJECTORS, split_names
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, Side, build, config_path, read_config, save_pair, split_path
from embedcache.train.batches import Batches, reader
from embedcache.train.loop import fit, seeded
from embedcache.train.losses.contract import LOSSES
from embedcache.train.recalls import Validation
from embedcache.train.settings import TrainSettings
from embedcache.train.split import make_split
from embedcache.train.start import start

_FILES = ("split.parquet", "losses.jsonl", "record.json", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training run gave.

    Args:
        reused: the run was there already, made with the same settings from the same features.
        num_samples: part -> samples with both features.
        num_parameters: trainable, the temperature included.
        best_epoch: whose weights were kept; 0 is the start.
        recalls: on validation, at that epoch.
    """

    reused: bool
    num_samples: dict[str, int]
    num_parameters: int
    best_epoch: int
    recalls: dict[str, float]

    def line(self, run_path: Path) -> str:
        """Say it in one line."""
        counts = ", ".join(f"{count:,} {part}" for part, count in self.num_samples.items())
        kept = f"best epoch {self.best_epoch}" if self.best_epoch else "no epoch beat the start, which was kept"
        recalls = ", ".join(f"{name} {value:.3f}" for name, value in self.recalls.items())
        start = f"{run_path} is there already, made with the same settings" if self.reused else f"{run_path}: trained"
        return f"{start}: {self.num_parameters:,} parameters; samples: {counts}; {kept}; validation {recalls}"


def train(
    cache_path: Path | str,
    run_path: Path | str,
    *,
    image: str | None = None,
    text: str | None = None,
    settings: TrainSettings | None = None,
    progress: Progress | None = None,
) -> TrainReport:
    """Train projectors on two features of a cache.

    The run folder gets `split.parquet`, `losses.jsonl`, `record.json`, `model.safetensors` and, last, `config.json`.
    A finished run with the same settings is left as it is. Memory: the features, or `memory_gb`.

    Args:
        cache_path: the cache.
        run_path: a folder for the run.
        image: image feature, `encoder/feature`; None where there is only one.
        text: text feature, alike.
        settings: of the run.
        progress: told about pairs.

    Raises:
        UnknownNameError: a feature, projector, loss, language or split of that name does not exist.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the folder holds a finished run made with other settings.
        PathError: the folder holds other things.
        SettingError: a device that is not there, or near-duplicates leave nothing to hold out.
        DataError: too few samples, features of several tokens, or a loss that is no number.
    """
    cache, run_path = Cache(cache_path), Path(run_path)
    settings, progress = settings or TrainSettings(), progress or Silent()
    for name in split_names(settings.model.projector):
        PROJECTORS.load(name)
    LOSSES.load(settings.loss)
    torch_device(settings.device)
    image_feature, text_feature = cache.feature("image", image), cache.feature("text", text)
    config = _config(cache, image_feature, text_feature, settings)
    if config_path(run_path).is_file():
        return _reuse(run_path, config)
    claim_folder(run_path, kind="a run", sign="split.parquet", ours=_FILES)
    about = {
        "cache": str(cache_path),
        "image": image_feature.name,
        "text": text_feature.name,
        **config.training,
    }
    with run_record(run_path / "record.json", "train", about) as outcome, disk_errors(run_path):
        pair, report = _train(cache, run_path, image_feature, text_feature, config, settings, progress)
        outcome.update(asdict(report))
    save_pair(run_path, pair, config)
    return report


def _config(cache: Cache, image: Feature, text: Feature, settings: TrainSettings) -> PairConfig:
    return PairConfig(
        projector=settings.model.projector,
        shared_width=settings.model.shared_width,
        image=_side(image),
        text=_side(text),
        spine=cache.info.spine,
        training=settings.to_json(),
    )


def _side(feature: Feature) -> Side:
    if len(feature.item_shape) > 1:
        raise DataError(
            f"feature {feature.name} has several vectors an item; "
            "train on a vector feature such as cls, patch_mean or mean"
        )
    return Side(
        feature=feature.name,
        spec=feature.group.spec,
        fingerprint=feature.fingerprint,
        width=feature.item_shape[0],
    )


def _reuse(run_path: Path, config: PairConfig) -> TrainReport:
    found = read_config(run_path)
    asked = replace(config, weights=found.weights, split=_asked_split(config) or found.split)
    next_step = "give the path of a new folder, or ask for the same"
    check_same(f"run {run_path}", asdict(found), asdict(asked), next_step=next_step)
    outcome = read_json(run_path / "record.json")["outcome"]
    return TrainReport(**{**outcome, "reused": True})


def _asked_split(config: PairConfig) -> str | None:
    path = Path(config.training["split"]["kind"])
    return digest_file(path) if path.is_file() else None


def _train(
    cache: Cache,
    run_path: Path,
    image: Feature,
    text: Feature,
    config: PairConfig,
    settings: TrainSettings,
    progress: Progress,
) -> tuple[AlignedPair, TrainReport]:
    pairs = pair_items(cache, image, text, language=settings.language)
    split = make_split(cache, pairs, image, text, settings.split)
    write_split(split_path(run_path), split)
    parts = {part: _part(pairs, split, part, settings) for part in ("train", "val")}
    memory_bytes = settings.memory_gb * 1e9 / 2
    read_image, read_text = (reader(feature, memory_bytes=memory_bytes) for feature in (image, text))
    with seeded(settings.seed, settings.device):
        pair = build(config, dropout=settings.model.dropout).to(settings.device)
    start(pair, parts["train"], read_image, read_text, settings.model)
    batches = Batches(parts["train"], batch_size=settings.optimizer.batch_size, seed=settings.seed)
    validation = Validation(parts["val"], read_image, read_text, device=settings.device)
    progress.start("training", settings.optimizer.epochs * len(parts["train"].samples), "pairs")
    outcome = fit(
        pair,
        batches,
        image=read_image,
        text=read_text,
        validation=validation,
        settings=settings,
        log_path=run_path / "losses.jsonl",
        progress=progress,
    )
    progress.finish()
    report = TrainReport(
        reused=False,
        num_samples=_count(split),
        num_parameters=sum(parameter.numel() for parameter in pair.parameters()),
        **outcome,
    )
    return pair, report


def _count(split: Split) -> dict[str, int]:
    counts: dict[str, int] = {part: split.parts.count(part) for part in PARTS}
    left_out = split.parts.count("")
    return {**counts, "left out": left_out} if left_out else counts


def _part(pairs: Pairs, split: Split, part: str, settings: TrainSettings) -> Pairs:
    part_pairs = pairs.of(split.rows(part))
    if settings.shuffle_pairs:
        return _shuffle(part_pairs, settings.seed)
    return part_pairs


def _shuffle(pairs: Pairs, seed: int) -> Pairs:
    """Give every sample's captions to another sample: what is left to learn is chance."""
    samples = pairs.samples
    shuffled = np.random.default_rng(seed).permutation(samples)
    text = replace(pairs.text, samples=shuffled[np.searchsorted(samples, pairs.text.samples)])
    return Pairs(image=pairs.image, text=text)
