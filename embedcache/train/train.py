"""Two cached sides in, an aligned pair of projectors out."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from embedcache.arrays import Ints
from embedcache.dataset.pairs import Pairs
from embedcache.dataset.selections import read_selection
from embedcache.dataset.splits import PARTS, Split, make_split, read_split, write_split
from embedcache.encoders.backends import torch_device
from embedcache.errors import DataError, PathError, SettingError
from embedcache.files import Leases, disk_errors
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.base import PROJECTORS, has_token_input, split_names
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import Cost, PairConfig, build, config_path, cost, read_config, save_pair, split_path
from embedcache.provenance import check_same, claim_folder, digest_file, read_json, run_record, write_json
from embedcache.train.batches import Batches
from embedcache.train.checkpoint import checkpoint_path
from embedcache.train.data import Paths, TrainData, open_data
from embedcache.train.distributed import joined_processes, num_processes, on_first, process_number
from embedcache.train.initialization import start
from embedcache.train.loader import Loader
from embedcache.train.log import require_tensorboard
from embedcache.train.losses import LOSSES
from embedcache.train.settings import TrainSettings
from embedcache.train.trainer import OnEpoch, Outcome, fit, seeded
from embedcache.train.validation import Validation

_FILES = (
    ".claims",
    "started.json",
    "split.parquet",
    "losses.jsonl",
    "checkpoint.pt",
    "last.safetensors",
    "record.json",
    "model.safetensors",
    "tensorboard",
)
_DEFAULT_BATCH_SIZE = 1024
_DEFAULT_BLOCK_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training run gave.

    Args:
        reused: the run was there already, made with the same settings from the same features.
        num_samples: part -> samples with both features.
        num_parameters: trainable, the temperature included.
        flops_a_pair: of both towers, forward, for an image and a text.
        best_epoch: whose weights were kept; 0 is the start.
        recalls: on validation, at that epoch.
        pairs_per_s: of the training, since it began or went on.
        waited_share: of the training time, spent waiting for data.
    """

    reused: bool
    num_samples: dict[str, int]
    num_parameters: int
    flops_a_pair: int
    best_epoch: int
    recalls: dict[str, float]
    pairs_per_s: float
    waited_share: float

    def line(self, run_path: Path) -> str:
        """Say it in one line."""
        counts = ", ".join(f"{count:,} {part}" for part, count in self.num_samples.items())
        kept = f"best epoch {self.best_epoch}" if self.best_epoch else "no epoch beat the start, which was kept"
        recalls = ", ".join(f"{name} {value:.3f}" for name, value in self.recalls.items())
        start = f"{run_path} is there already, made with the same settings" if self.reused else f"{run_path}: trained"
        size = f"{self.num_parameters:,} parameters, {self.flops_a_pair / 1e6:,.1f} MFLOP a pair"
        return f"{start}: {size}; samples: {counts}; {kept}; validation {recalls}"


def train(
    cache_paths: Paths,
    run_path: Path | str,
    *,
    image: str | None = None,
    text: str | None = None,
    settings: TrainSettings | None = None,
    progress: Progress | None = None,
) -> TrainReport:
    """Train projectors on two sides of a cache, or of several caches that the same encoders made.

    The run folder gets `started.json`, `split.parquet`, `losses.jsonl`, `last.safetensors`, `record.json`,
    `model.safetensors` and, last, `config.json`; until then `checkpoint.pt`, from which a killed run goes on. A
    finished run with the same settings is left as it is. Memory: the features, or `memory_gb`. Under torchrun all
    processes call it.

    Args:
        cache_paths: the cache, or several.
        run_path: a folder for the run.
        image: image feature, `encoder/feature`, or several of one encoder with `+` between; None where there is only
            one.
        text: text feature, alike.
        settings: of the run.
        progress: told about pairs.

    Raises:
        UnknownNameError: a feature, projector, loss, language or split of that name does not exist.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the folder holds a run with other settings, or the caches come from different encoders.
        PathError: the folder holds other things, or there is no such selection.
        SettingError: a device that is not there, a batch larger than the data, settings that contradict each other, or
            near-duplicates leave nothing to hold out.
        DataError: too few samples, a feature that does not fit its projector, or a loss that is no number.
        MissingExtraError: TensorBoard was asked for and is not installed.
    """
    settings = settings or TrainSettings()
    for name in split_names(settings.model.projector):
        PROJECTORS.load(name)
    LOSSES.load(settings.loss.name)
    torch_device(settings.machine.device)
    with joined_processes(settings.machine.device) as device:
        settings = replace(settings, machine=replace(settings.machine, device=device))
        data = open_data(cache_paths, image=image, text=text, memory_gb=settings.machine.memory_gb)
        return train_on(data, run_path, settings, progress=progress)


def train_on(
    data: TrainData,
    run_path: Path | str,
    settings: TrainSettings,
    *,
    progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainReport:
    """Train on data that is open already, as `train` does; many runs can share it.

    Args:
        data: what to train on.
        run_path: a folder for the run.
        settings: of the run; `memory_gb` was decided when the data was opened.
        progress: told about pairs.
        on_epoch: told about each validation; what it raises ends the training.
    """
    run_path = Path(run_path)
    settings = _resolved(data, settings)
    _check_fits(data, settings)
    config = _config(data, settings)
    if config_path(run_path).is_file():
        return _reuse(run_path, config)
    claims = on_first(lambda: _begin(run_path, config))
    about = {"caches": [str(cache.path) for cache in data.caches], **config.to_json()}
    with disk_errors(run_path):
        if claims is None:
            return _train(data, run_path, config, settings, progress or NullProgress(), on_epoch)[1]
        with run_record(run_path / "record.json", "train", about) as outcome:
            pair, report = _train(data, run_path, config, settings, progress or NullProgress(), on_epoch)
            outcome.update(asdict(report))
        save_pair(run_path, pair, config)
        checkpoint_path(run_path).unlink(missing_ok=True)
        claims.give_back(0)
    return report


def _resolved(data: TrainData, settings: TrainSettings) -> TrainSettings:
    if settings.block_rows is not None:
        return settings
    return replace(settings, block_rows=_DEFAULT_BLOCK_ROWS if data.is_mapped else 1)


def _check_fits(data: TrainData, settings: TrainSettings) -> None:
    if settings.machine.tensorboard:
        require_tensorboard()
    for side, name in zip((data.images[0], data.texts[0]), split_names(settings.model.projector), strict=True):
        if side.has_tokens and not has_token_input(name):
            raise DataError(
                f"{side.name} has several vectors an item, and the projector {name} takes one; train on a vector "
                "feature such as cls, patch_mean or mean, or with --projector token, cls_token or token_mlp"
            )
        for option, value in (("mixup", settings.loss.mixup), ("structure", settings.loss.structure)):
            if side.has_tokens and value:
                raise SettingError(f"--{option} is for vectors, and {side.name} has several vectors an item")


def _config(data: TrainData, settings: TrainSettings) -> PairConfig:
    return PairConfig(
        projector=settings.model.projector,
        shared_width=settings.model.shared_width,
        image=data.image,
        text=data.text,
        index_digest=data.index_digest,
        training=settings.to_json(),
        file_digests=_given(settings),
    )


def _given(settings: TrainSettings) -> dict[str, str]:
    """Get the digests of the files that settings name."""
    paths = {"split": settings.split.path, "selection": settings.selection_path}
    return {name: digest_file(path) for name, path in paths.items() if path and path.is_file()}


def _reuse(run_path: Path, config: PairConfig) -> TrainReport:
    found = read_config(run_path)
    asked = replace(config, weights_digest=found.weights_digest, split_digest=found.split_digest)
    next_step = "give the path of a new folder, or ask for the same"
    check_same(f"run {run_path}", found.to_json(), asked.to_json(), next_step=next_step)
    if process_number() == 0:
        checkpoint_path(run_path).unlink(missing_ok=True)
    outcome = read_json(run_path / "record.json")["outcome"]
    return TrainReport(**{**outcome, "reused": True})


def _begin(run_path: Path, config: PairConfig) -> Leases:
    """Take the folder, for a new run or for one that was stopped and was asked for with the same settings."""
    claim_folder(run_path, kind="a run", sign="started.json", ours=_FILES)
    claims = Leases(run_path)
    if not claims.take(0):
        raise PathError(f"another process trains into {run_path}; wait for it, or give the path of a new folder")
    path, asked = run_path / "started.json", config.to_json()
    if checkpoint_path(run_path).is_file():
        next_step = "ask for the same to go on, or give the path of a new folder"
        check_same(f"the unfinished run {run_path}", read_json(path), asked, next_step=next_step)
    else:
        split_path(run_path).unlink(missing_ok=True)
    write_json(path, asked)
    return claims


def _train(
    data: TrainData,
    run_path: Path,
    config: PairConfig,
    settings: TrainSettings,
    progress: Progress,
    on_epoch: OnEpoch | None,
) -> tuple[AlignedPair, TrainReport]:
    pairs = data.pairs(settings.language)
    split = _split(data, run_path, pairs, settings)
    training = _training_part(data, pairs, split, settings)
    validation = _shuffled_if_asked(pairs.of(split.rows("val")), settings)
    if not len(validation.samples):
        raise DataError(f"the validation part of {split_path(run_path)} has no sample with both sides")
    device = settings.machine.device
    with seeded(settings.seed, device):
        pair = build(config, dropout=settings.model.dropout).to(device)
    size = cost(config, data.images[0].item_shape, data.texts[0].item_shape)
    start(pair, training, data.read_image, data.read_text, settings.model, seed=settings.seed)
    outcome = fit(
        pair,
        _loader(data, training, settings),
        None if process_number() else Validation(validation, data.read_image, data.read_text, device=device),
        settings=settings,
        run_path=run_path,
        keys=data.keys,
        flops_a_pair=size.flops_per_pair,
        progress=progress,
        on_epoch=on_epoch,
    )
    return pair, _report(split, training, size, outcome)


def _split(data: TrainData, run_path: Path, pairs: Pairs, settings: TrainSettings) -> Split:
    """Make the split and write it down; a run that goes on has one."""
    path = split_path(run_path)

    def make() -> None:
        if not path.is_file():
            write_split(path, make_split(data, pairs, settings.split))

    on_first(make)
    return read_split(path, data.caches)


def _training_part(data: TrainData, pairs: Pairs, split: Split, settings: TrainSettings) -> Pairs:
    rows: Ints = split.rows("train")
    if settings.selection_path is not None:
        rows = np.intersect1d(rows, read_selection(settings.selection_path, data.caches))
    training = pairs.of(rows)
    if not len(training.samples):
        named = "" if settings.selection is None else f" that selection {settings.selection_path} names"
        raise DataError(f"the training part has no sample with both sides{named}")
    return _shuffled_if_asked(training, settings)


def _loader(data: TrainData, training: Pairs, settings: TrainSettings) -> Loader:
    num_samples, asked = len(training.samples), settings.optimizer.batch_size
    if asked is not None and asked > num_samples:
        raise SettingError(
            f"batch size is {asked:,}, and there are {num_samples:,} samples to train on; "
            f"use --batch-size {num_samples} or fewer"
        )
    num_steps = -(-num_samples // (asked or min(_DEFAULT_BATCH_SIZE, num_samples)))
    smallest = num_samples // num_steps // (2 if settings.loss.mixup else 1)
    if smallest < num_processes():
        raise SettingError(
            f"batches of {smallest} samples are too small for {num_processes()} processes; raise --batch-size, or "
            "start fewer"
        )
    batches = Batches(
        training,
        batch_size=asked or min(_DEFAULT_BATCH_SIZE, num_samples),
        seed=settings.seed,
        captions=settings.captions,
        block_rows=settings.block_rows or 1,
        mixup=settings.loss.mixup,
    )
    return Loader(batches, image=data.read_image, text=data.read_text, device=settings.machine.device)


def _report(split: Split, training: Pairs, size: Cost, outcome: Outcome) -> TrainReport:
    counts = {**_count(split), "train": len(training.samples)}
    return TrainReport(
        reused=False,
        num_samples=counts,
        num_parameters=size.parameters,
        flops_a_pair=size.flops_per_pair,
        **asdict(outcome),
    )


def _count(split: Split) -> dict[str, int]:
    counts: dict[str, int] = {part: split.parts.count(part) for part in PARTS}
    left_out = split.parts.count("")
    return {**counts, "left out": left_out} if left_out else counts


def _shuffled_if_asked(pairs: Pairs, settings: TrainSettings) -> Pairs:
    return _shuffle(pairs, settings.seed) if settings.shuffle_pairs else pairs


def _shuffle(pairs: Pairs, seed: int) -> Pairs:
    """Give every sample's captions to another sample: what is left to learn is chance."""
    samples = pairs.samples
    shuffled = np.random.default_rng(seed).permutation(samples)
    text = replace(pairs.text, samples=shuffled[np.searchsorted(samples, pairs.text.samples)])
    return Pairs(image=pairs.image, text=text)
