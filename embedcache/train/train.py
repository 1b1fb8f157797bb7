"""Train a pair of projectors on cached features, into a run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import blocks
from embedcache.dataset.inputs import NamedFeatures
from embedcache.dataset.negatives import HardNegatives, read_negatives
from embedcache.dataset.pairs import Pairs, choose_language
from embedcache.dataset.settings import with_split_seed
from embedcache.errors import DataError, SettingError
from embedcache.files import AnyPath, relative_location
from embedcache.metrics.ranking import metric_label
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.projectors.base import PROJECTORS, has_token_input, split_names
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import (
    PairConfig,
    build,
    config_path,
    count_cost,
    read_config,
    save_pair,
    split_path,
)
from embedcache.provenance import Manifest, digest_file
from embedcache.settings import merge_settings, replace_fields, replace_flat
from embedcache.train.batches import Loader
from embedcache.train.checkpoint import (
    check_not_extended,
    failed_digests,
    name_device,
    reuse_run,
    train_run,
)
from embedcache.train.data import (
    DrawnViews,
    Paths,
    TrainData,
    divide_pairs,
    open_data,
    parse_views,
    view_digests,
)
from embedcache.train.distributed import check_batches, process_group, process_rank
from embedcache.train.initialization import initialize
from embedcache.train.losses import check_loss
from embedcache.train.pair import PairTask, Validation, has_batch_norm, pair_parts
from embedcache.train.pair_batches import PairBatches, PairLoader
from embedcache.train.parts import find_sources, load_parts, parse_trainable, source_digests
from embedcache.train.recipes import apply_recipe
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.trackers import check_trackers
from embedcache.train.trainer import OnEpoch, Trainer, seeded

_DEFAULT_BATCH_SIZE = 1024
_CHECKED_ROWS = 65_536
_MIN_ITEMS = 2  # of a batch: others are the negatives


class TrainReport(Manifest):
    """Result of a training run.

    Args:
        reused: whether the run existed already, with the same settings and features.
        num_samples: part -> samples with both features.
        num_parameters: trained parameters, the temperature included.
        flops_per_pair: operations of a forward pass of both towers, for one item each.
        best_epoch: epoch whose weights were kept; 0 is the initialization.
        recalls: validation recall at that epoch.
        pairs_per_s: training pairs per second, since the run started or resumed.
        wait_fraction: fraction of the training time spent waiting for data.
        num_held_out: samples of the selection that the split holds out; None without a selection.
    """

    reused: bool
    num_samples: dict[str, int]
    num_parameters: int
    flops_per_pair: int
    best_epoch: int
    recalls: dict[str, float]
    pairs_per_s: float
    wait_fraction: float
    num_held_out: int | None = None

    def line(self, run_path: Path) -> str:
        """Summarize the report in one line, with what to change if the selection or the training fell short."""
        counts = ", ".join(f"{count:,} {part}" for part, count in self.num_samples.items())
        start = "the initialization was best and was kept" if self.pairs_per_s else "the initialization, as it is"
        outcome = f"best epoch {self.best_epoch}" if self.best_epoch else start
        recalls = ", ".join(f"{metric_label(name)} {value:.3f}" for name, value in self.recalls.items())
        state = "reused, trained earlier with the same settings" if self.reused else "trained"
        size = f"{self.num_parameters:,} parameters, {self.flops_per_pair / 1e6:,.1f} MFLOP per pair"
        line = f"{run_path}: {state}: {size}; samples: {counts}; {outcome}; validation {recalls}"
        return "; ".join([line, *self._advice(run_path)])

    def _advice(self, run_path: Path) -> list[str]:
        lines, path = [], split_path(run_path)
        if self.num_held_out:
            lines.append(
                f"WARNING: {self.num_held_out:,} of the selected samples are held out for validation and test; to "
                f"train on a whole budget, select it with --selection {path} and train with --split {path}"
            )
        if not self.best_epoch and self.pairs_per_s:
            lines.append(
                "WARNING: no epoch was better on validation than the initialization; with "
                f"{self.num_samples['train']:,} training samples, use a higher --dropout and a lower --lr than now "
                "(0.5 and 0.0001 suit few samples), or keep the initialization with --epochs 0"
            )
        return lines


def train(
    caches: Paths,
    run: AnyPath,
    *,
    feature: NamedFeatures = None,
    settings: TrainSettings | None = None,
    progress: AnyProgress = None,
    **options: Any,
) -> TrainReport:
    """Train projectors on features of two modalities, such as an image and a text feature, of one or several caches.

    The run folder gets `started.json`, `split.parquet`, `losses.jsonl`, `last.safetensors`, `record.json`,
    `model.safetensors` and, last, `config.json`; before that `checkpoint.pt`, from which an interrupted run resumes. A
    finished run with the same settings is reused. Memory: the features, or `memory`, and about 270 bytes per pair.
    Under torchrun all processes must call it.

    Args:
        caches: one cache, or several made by the same encoders.
        run: folder of the run.
        feature: features of two modalities as `modality=encoder/feature`, or as `encoder/feature` if only one modality
            has it; or modality -> feature. Several of one encoder are joined by `+`. A modality without a name has one
            feature; without any name they are images and texts, or the only two that the cache has features of.
        settings: settings of the run.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in training pairs.

    Raises:
        UnknownNameError: there is no feature, projector, loss, language or split of that name.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the folder holds a run with other settings or of the items before some were retried, or
            different encoders made the caches.
        PathError: the folder holds other files, or the selection or a table of hard negatives does not exist.
        SettingError: a missing device, a batch larger than the data, contradictory settings, or near-duplicates that
            leave nothing to hold out.
        DataError: too few samples, a feature that does not fit its projector, or a loss that is NaN or infinite.
        MissingExtraError: the library of a tracker is not installed.
    """
    settings = merge_settings(TrainSettings, settings, {})
    settings = replace_flat(settings, with_split_seed(options, settings))
    progress = to_progress(progress)
    for name in split_names(settings.model.projector):
        PROJECTORS.load(name)
    check_loss(settings.loss.name, settings.captions)
    check_trackers(settings.machine.report_to)
    settings = replace_fields(settings, machine=name_device(settings.machine, Path(run)))
    with process_group(settings.machine.device) as device:
        settings = replace_fields(settings, machine=replace_fields(settings.machine, device=device))
        data = open_data(caches, feature, memory_bytes=settings.machine.memory, progress=progress)
        return train_on(data, run, settings, progress=progress)


def train_on(
    data: TrainData,
    run_path: AnyPath,
    settings: TrainSettings,
    *,
    progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainReport:
    """Train on open data, as `train` does; many runs can share the data.

    `memory` was applied when the data were opened. `on_epoch` is called after each validation; an exception that it
    raises ends the training.
    """
    run_path, progress = Path(run_path), progress or NullProgress()
    settings = replace_fields(settings, language=choose_language(data.caches, data.sides, settings.language, progress))
    settings = apply_recipe(settings, data, progress)
    settings = replace_fields(settings, machine=name_device(settings.machine, run_path))
    if settings.block_rows is None:
        settings = replace_fields(settings, block_rows=data.block_rows)
    check_loss(settings.loss.name, settings.captions)
    _check_features(data, settings)
    if settings.negatives:  # a strict split may take hours: errors are found before
        read_negatives(settings.negatives_paths, data.caches)
    files = {"split": settings.split.path, "selection": settings.selection_path}
    init_digests = source_digests(settings.parts.init_from)
    config = PairConfig(
        projector=settings.model.projector,
        shared_width=settings.model.shared_width,
        sides=data.tower_inputs,
        index_digest=data.index_digest,
        training=settings.to_json(),
        file_digests={
            **{name: digest_file(path) for name, path in files.items() if path and path.is_file()},
            **{f"negatives {number}": digest_file(path) for number, path in enumerate(settings.negatives_paths)},
            **{f"init_from {part}": value for part, value in init_digests.items()},
            **view_digests(data, settings),
            **failed_digests(data, settings.views),
        },
    )
    if config_path(run_path).is_file():
        return _reuse_run(run_path, config, data)
    return train_run(
        run_path,
        config.to_json(),
        lambda: _fit(data, run_path, config, settings, progress, on_epoch),
        lambda pair: save_pair(run_path, pair, config),
        recorded={"caches": [relative_location(cache.path, run_path) for cache in data.caches], **config.to_json()},
    )


def _check_features(data: TrainData, settings: TrainSettings) -> None:
    for feature, name in zip(data.features.values(), split_names(settings.model.projector), strict=True):
        if feature.has_tokens and not has_token_input(name):
            raise DataError(
                f"{feature.name}: expected a vector feature for projector {name}, got a token feature; use a feature "
                "such as cls, patch_mean or mean, or --projector token, cls_token or token_mlp"
            )
        for option, value in (("mixup", settings.loss.mixup), ("structure", settings.loss.structure)):
            if feature.has_tokens and value:
                raise SettingError(f"{option}: expected 0 for the token feature {feature.name}, got {value}")


def _reuse_run(run_path: Path, config: PairConfig, data: TrainData) -> TrainReport:
    stored = read_config(run_path)
    next_step = "train into a new folder, or keep the run"
    check_not_extended(f"run {run_path} was trained", stored.index_digest, data.caches, next_step=next_step)
    expected = replace_fields(config, weights_digest=stored.weights_digest, split_digest=stored.split_digest)
    report = reuse_run(run_path, stored.to_json(), expected.to_json(), TrainReport.model_validate)
    return replace_fields(report, reused=True)


def _fit(
    data: TrainData,
    run_path: Path,
    config: PairConfig,
    settings: TrainSettings,
    progress: Progress,
    on_epoch: OnEpoch | None,
) -> tuple[AlignedPair, TrainReport]:
    """Train a new pair, or resume its training; return it with the weights of the best epoch."""
    divided = divide_pairs(data, run_path, settings, progress)
    training, views = divided.training, _open_views(data, settings)
    negatives = _hard_negatives(data, training, settings, progress)
    batches, device = _make_batches(training, settings, views, negatives), settings.machine.device
    pair = _build_pair(config, data, training, settings, progress)
    if any(map(has_batch_norm, pair.towers)):
        check_batches(batches.smallest, least=2)
    size = count_cost(config, {modality: feature.item_shape for modality, feature in data.features.items()})
    first, second = data.readers.values()
    load = PairLoader(views[0] or first, views[1] or second, device=device)
    task = PairTask(
        module=pair,
        loader=Loader(batches, load),
        validation=None if process_rank() else Validation(divided.validation, first, second, device=device),
        loss=settings.loss,
        precision=settings.machine.precision,
        keys=data.keys,
        forward_flops=size.flops_per_pair * batches.batch_size,
    )
    result = Trainer(
        task=task,
        optimizer=_optimizer_settings(pair, settings),
        machine=settings.machine,
        seed=settings.seed,
        run_path=run_path,
        progress=progress,
        trainable=parse_trainable(settings.parts.trainable, pair_parts(pair)),
        on_epoch=on_epoch,
    ).fit()
    return pair, TrainReport(
        reused=False,
        num_samples=divided.num_samples,
        num_parameters=sum(value.numel() for value in pair.parameters() if value.requires_grad),
        flops_per_pair=size.flops_per_pair,
        best_epoch=result.best_epoch,
        recalls=result.measures,
        pairs_per_s=result.samples_per_s,
        wait_fraction=result.wait_fraction,
        num_held_out=divided.num_held_out,
    )


def _open_views(data: TrainData, settings: TrainSettings) -> list[DrawnViews | None]:
    """Open the views of each side that epochs draw from; None: its feature alone."""
    views = parse_views(settings.views)
    return [
        data.draw_views(modality, views[modality], settings.seed) if modality in views else None
        for modality in data.sides
    ]


def _build_pair(
    config: PairConfig, data: TrainData, training: Pairs, settings: TrainSettings, progress: Progress
) -> AlignedPair:
    """Build the pair on its device: the initialization on the training pairs, parts of other runs, a temperature."""
    with seeded(settings.seed, settings.machine.device):
        pair = build(config, dropout=settings.model.dropout).to(settings.machine.device)
    parts = pair_parts(pair)
    sources = find_sources(settings.parts.init_from, parts)
    model = _model_settings(pair, settings, sources)
    initialize(pair, training, data.readers, model, seed=settings.seed, progress=progress)
    load_parts(pair, parts, sources)
    if settings.loss.temperature is not None:
        pair.set_temperature(settings.loss.temperature)
    return pair


def _model_settings(pair: AlignedPair, settings: TrainSettings, sources: Mapping[str, Path]) -> ModelSettings:
    """Return the settings of the initialization, which is random by default where another run replaces a tower."""
    if settings.model.initialization is not None or sources.keys().isdisjoint(pair.modalities):
        return settings.model
    return replace_fields(settings.model, initialization="random")


def _optimizer_settings(pair: AlignedPair, settings: TrainSettings) -> OptimizerSettings:
    """Return the settings of the optimizer; towers without parameters, such as those of asif, are not trained."""
    has_parameters = any(True for tower in pair.towers for _ in tower.parameters())
    return settings.optimizer if has_parameters else replace_fields(settings.optimizer, epochs=0)


def _hard_negatives(
    data: TrainData, training: Pairs, settings: TrainSettings, progress: Progress
) -> HardNegatives | None:
    """Read the hard negatives, and report how many training samples have some in the training part."""
    if not settings.negatives:
        return None
    negatives, samples = read_negatives(settings.negatives_paths, data.caches), training.samples
    num_some = sum(
        int(np.isin(negatives.negatives_SK[samples[block]], samples).any(axis=1).sum())
        for block in blocks(len(samples), _CHECKED_ROWS)
    )
    if not num_some:
        raise DataError(
            f"negatives {settings.negatives[0]}: expected some in the training part, got none; mine them with --run, "
            "or with --selection of that part"
        )
    progress.note(f"{num_some:,} of {len(samples):,} training samples have hard negatives in the training part")
    return negatives


def _make_batches(
    training: Pairs, settings: TrainSettings, views: Sequence[DrawnViews | None], negatives: HardNegatives | None
) -> PairBatches:
    """Divide the training pairs into batches; `SettingError` if the batch size does not fit them or the processes."""
    num_samples, batch_size = len(training.samples), settings.optimizer.batch_size
    if batch_size is not None and batch_size > num_samples:
        raise SettingError(
            f"batch_size: expected at most the {num_samples:,} training samples, got {batch_size:,}; "
            f"use --batch-size {num_samples} or less"
        )
    assert settings.block_rows is not None  # named by `train_on`
    batches = PairBatches(
        training,
        batch_size=batch_size or min(_DEFAULT_BATCH_SIZE, num_samples),
        seed=settings.seed,
        captions=settings.captions,
        block_rows=settings.block_rows,
        mixup=settings.loss.mixup,
        views=views,
        negatives=negatives,
        num_negatives=settings.num_negatives,
    )
    check_batches(batches.smallest)
    if batches.smallest < _MIN_ITEMS:
        raise SettingError(
            f"batch_size: expected at least {2 * _MIN_ITEMS} samples in each batch with mixup, which makes one item of "
            f"two, got {num_samples // batches.num_steps}; raise --batch-size, or omit --mixup"
        )
    return batches
