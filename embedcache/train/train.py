"""Train a module into a run folder: a pair of projectors on cached features, or the module of any task."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from pydantic import Field

from embedcache.arrays import blocks
from embedcache.dataset.inputs import InputFeature, NamedFeatures
from embedcache.dataset.pairs import Pairs, choose_language
from embedcache.dataset.selections import HardNegatives, read_negatives
from embedcache.dataset.settings import with_split_seed
from embedcache.errors import DataError, SettingError, summary
from embedcache.files import AnyPath, relative_location, write_atomic, writing
from embedcache.metrics import metric_label
from embedcache.modalities import noun
from embedcache.processes import AUTO, torch_device
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.projectors.base import bind_projector, has_token_input, split_names
from embedcache.projectors.pair import AlignedPair
from embedcache.provenance import Manifest, digest
from embedcache.runs import CHECKPOINT, MANIFEST, PAIR, PROTOTYPES, RECIPES, SPLIT, Run, RunInfo, read_info
from embedcache.settings import merge_settings, replace_fields, replace_flat
from embedcache.store.cache import Cache
from embedcache.train.batches import PairBatches
from embedcache.train.data import (
    DrawnViews,
    Paths,
    TrainData,
    describe_input,
    digest_inputs,
    divide_pairs,
    open_data,
    parse_views,
    write_run_split,
)
from embedcache.train.distributed import check_batches, process_group, process_rank, run_on_first
from embedcache.train.initialization import (
    center_on,
    find_sources,
    initialize,
    load_parts,
    parse_trainable,
    parts_of,
    source_digests,
)
from embedcache.train.losses import check_loss
from embedcache.train.pair import PairTask, Validation, has_batch_norm
from embedcache.train.prototypes import Prototypes, open_prototypes, open_unpaired
from embedcache.train.recipes import RecipeScore, count_training_pairs, list_recipes, recipe_options, with_recipe
from embedcache.train.settings import FitSettings, MachineSettings, ModelSettings, TrainSettings
from embedcache.train.trainer import OnEpoch, Task, Trainer, check_trackers, network_of, seeded

if TYPE_CHECKING:
    from embedcache.options import TrainOptions

_DEFAULT_BATCH_SIZE = 1024
_CHECKED_ROWS = 65_536
_MIN_ITEMS = 2  # of a batch: others are the negatives


class TrainReport(Manifest):
    """Result of a training run.

    Args:
        reused: whether the run existed already, with the same settings and features.
        num_samples: part -> number of samples with both features. Empty for a task other than pairs.
        num_parameters: number of trained parameters.
        best_epoch: epoch whose weights were kept. 0 is the initialization.
        score: score that epochs are compared by, at the best epoch. For pairs it is the mean of the recalls. None if
            nothing could be compared.
        measures: validation metrics at the best epoch. For pairs they are recalls.
        samples_per_s: training samples per second, since the run started or resumed.
        num_held_out: number of selected samples that the split holds out. None without a selection.
        recipes: recipes that were compared on the validation part, the simplest first. Empty without `recipe`.

    Example:
        >>> report = embedcache.train_projectors("cache", "run", split="key", epochs=2)
        >>> report.num_samples
        {'train': 39, 'val': 6, 'test': 15}
        >>> report.score == sum(report.measures.values()) / len(report.measures)
        True
    """

    reused: bool
    num_samples: Mapping[str, int] = {}
    num_parameters: int
    best_epoch: int
    score: float | None
    measures: dict[str, float]
    samples_per_s: float
    num_held_out: int | None = None
    recipes: list[RecipeScore] = Field(default_factory=list)

    __repr__ = __str__ = summary

    def line(self, run_path: Path = Path("RUN")) -> str:
        """Summarize the report in one line, with what to change if the selection or the training fell short."""
        start = "the initialization was best and was kept" if self.samples_per_s else "the initialization, as it is"
        outcome = f"best epoch {self.best_epoch}" if self.best_epoch else start
        measures = ", ".join(f"{metric_label(name)} {value:.3f}" for name, value in self.measures.items())
        state = "reused, trained earlier with the same settings" if self.reused else "trained"

        parts = [f"{run_path}: {state}: {self.num_parameters:,} parameters"]
        if self.num_samples:
            counts = ", ".join(f"{count:,} {part}" for part, count in self.num_samples.items())
            parts.append(f"samples: {counts}")
        if self.recipes:
            chosen = next(score.name for score in self.recipes if score.is_chosen)
            compared = ", ".join(f"{score.name} {score.score:.3f}" for score in self.recipes)
            parts.append(f"recipe {chosen}, the best of {compared} by validation")

        validation = f"validation {measures}" if measures else "nothing to validate on"
        return "; ".join([*parts, outcome, validation, *self._advice(run_path)])

    def _advice(self, run_path: Path) -> list[str]:
        lines = []
        if self.num_held_out:
            path = run_path / SPLIT
            lines.append(
                f"WARNING: {self.num_held_out:,} of the selected samples are held out for validation and test; to "
                f"train on a whole budget, select it with --selection {path} and train with --split {path}"
            )

        # If recipes were compared already, advice to compare them would be useless.
        if not self.best_epoch and self.samples_per_s and not self.recipes and self.num_samples:
            lines.append(
                f"WARNING: no epoch was better on validation than the initialization, which was kept, with "
                f"{self.num_samples['train']:,} training samples; --recipe auto compares closed forms and training by "
                "validation"
            )
        return lines


def train_task(
    make_task: Callable[[str], Task],
    run_path: AnyPath,
    info: RunInfo,
    settings: FitSettings | TrainSettings,
    *,
    progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainReport:
    """Train a task into a run folder: resumed if interrupted, reused if finished. Under torchrun all processes call it.

    Args:
        make_task: builds the task for a device, under the seed of the run; not called for a finished run.
        run_path: folder of the run.
        info: kind, arguments and inputs of the module; settings and digests of start runs are filled in here. What else
            decides the result, such as a label column, belongs in `info.settings`.
        settings: optimizer, machine, seed, start runs and trainable parts.
        progress: progress in steps.
        on_epoch: called after each validation; an exception that it raises ends the training.

    Raises:
        FingerprintError: the folder holds a run with other settings or inputs.
        PathError: the folder holds other files, or a start run does not exist.
        DataError: a start run lacks weights of a part, or a loss is NaN or infinite.
        UnknownNameError: the task has no part of a name.
    """
    run_path = Path(run_path)
    progress = progress or NullProgress()
    check_trackers(settings.machine.report_to)
    needs_float64 = info.kind != PAIR  # some decode when they are measured
    machine = name_device(settings.machine, run_path, needs_float64=needs_float64)
    with process_group(machine.device) as device:
        settings = replace_fields(settings, machine=replace_fields(machine, device=device))

        # The digests of start runs belong to the run, so that it is not reused after a start run changed.
        init_digests = source_digests(settings.parts.init_from)
        info = replace_fields(
            info,
            settings={**info.settings, **settings.to_json()},
            digests={**info.digests, **{f"init_from {part}": value for part, value in init_digests.items()}},
        )
        finished = Run.reuse(run_path, info)
        if finished is not None:
            return TrainReport.model_validate({**finished.info.report, "reused": True})

        run = run_on_first(lambda: Run.create(run_path, info))
        with writing(run_path):
            with seeded(settings.seed, device):
                task = make_task(device)

            # Parts of the start runs replace the initialization before the trainer reads the module.
            network = network_of(task).to(device)
            parts = parts_of(network)
            load_parts(network, parts, find_sources(settings.parts.init_from, parts))

            result = Trainer(
                task=task,
                settings=settings,
                run_path=run_path,
                progress=progress,
                trainable=parse_trainable(settings.parts.trainable, parts),
                on_epoch=on_epoch,
            ).fit()

            trained = (parameter for parameter in network.parameters() if parameter.requires_grad)
            report = TrainReport(
                reused=False,
                num_parameters=sum(value.numel() for value in trained),
                **asdict(result),
                **getattr(task, "about", {}),
            )
            if run is not None:  # the first process
                run.finish(network, report.to_json())
    return report


def name_device(machine: MachineSettings, run_path: Path, *, needs_float64: bool = False) -> MachineSettings:
    """Return the settings with the device named: `auto` is that of the run in the folder, else the fastest.

    So the same command reuses a finished run, and resumes an interrupted one, also on a machine with another GPU.

    Raises:
        SettingError: the run is not finished, and its device does not exist.
    """
    stored = read_info(run_path) if (run_path / MANIFEST).is_file() else None
    is_finished = stored is not None and stored.is_finished

    device = machine.device
    if device == AUTO and stored is not None and (is_finished or (run_path / CHECKPOINT).is_file()):
        device = str(stored.settings.get("machine", {}).get("device", AUTO))

    # The device of a finished run need not exist here, as the run is only reused.
    if not is_finished or device == AUTO:
        device = str(torch_device(device, needs_float64=needs_float64))
    return replace_fields(machine, device=device)


def train(
    caches: Paths,
    run: AnyPath,
    *,
    feature: NamedFeatures = None,
    settings: TrainSettings | None = None,
    progress: AnyProgress = None,
    **options: Unpack["TrainOptions"],
) -> TrainReport:
    """Train projectors on features of two modalities, such as an image and a text feature, of one or several caches.

    With prototypes, a cache may lack one of the modalities, such as photos without captions. The run is then the closed
    form of the prototypes, centered on the feature of the cache, and nothing is held out.

    The files of the run are `run.json`, `split.parquet`, `losses.jsonl`, `last.safetensors` and `model.safetensors`,
    and during training `checkpoint.pt`, from which an interrupted run resumes. A finished run with the same settings is
    reused. Memory: the features, or `memory`, and about 270 bytes per pair. Under torchrun all processes must call it.

    Args:
        caches: one cache, or several made by the same encoders.
        run: folder of the run.
        feature: features of two modalities as `modality=encoder/feature`, or as `encoder/feature` if only one modality
            has it, or as modality -> feature. Several features of one encoder are joined by `+`. A modality that is not
            named must have one feature. If None, images and texts, or the only two modalities with features.
        settings: settings of the run.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in steps.

    Raises:
        UnknownNameError: a feature, projector, loss, language or split is unknown.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the folder contains a run with other settings or of the items before some were retried, or
            different encoders made the caches.
        PathError: the folder contains other files, or the selection or a table of hard negatives does not exist.
        SettingError: a missing device, a batch larger than the data, contradictory settings, or near-duplicates that
            leave nothing to hold out.
        DataError: too few samples, a feature that does not fit its projector, or a loss that is NaN or infinite.
        MissingExtraError: the library of a tracker is not installed.

    Example:
        >>> report = embedcache.train_projectors("cache", "run", split="key", epochs=2)
        >>> sorted(report.measures)
        ['i2t r@1', 'i2t r@10', 'i2t r@5', 't2i r@1', 't2i r@10', 't2i r@5']
        >>> embedcache.train_projectors("cache", "run", split="key", epochs=2).reused
        True
        >>> embedcache.load("run").encode(["red bar left on blue"]).shape
        (1, 256)
    """
    settings = merge_settings(TrainSettings, settings, {})
    settings = replace_flat(settings, with_split_seed(options, settings))
    progress = to_progress(progress)

    # A cache that lacks one of the modalities has no pairs, which `open_data` would ask for.
    if settings.prototypes is not None and (unpaired := open_unpaired(caches, feature)) is not None:
        return _align_prototypes(unpaired, Path(run), settings, progress)

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
    run_path = Path(run_path)
    progress = progress or NullProgress()

    # The language and the size of blocks are named here, so that the run stores what it used.
    settings = replace_fields(settings, language=choose_language(data.caches, data.sides, settings.language, progress))
    if settings.block_rows is None:
        settings = replace_fields(settings, block_rows=data.block_rows)

    if settings.recipe is not None:
        return _compare_recipes(data, run_path, settings, progress)
    return _train_pair(data, run_path, settings, progress, on_epoch)


def _compare_recipes(data: TrainData, run_path: Path, settings: TrainSettings, progress: Progress) -> TrainReport:
    """Train with each recipe on the same split, and keep the run with the best validation score.

    Of equal scores that of the simplest recipe is kept. The runs are in the folder until then, so that a command that
    was killed goes on.
    """
    # A finished run has the settings of its chosen recipe, so it is compared with these.
    stored = read_info(run_path) if (run_path / MANIFEST).is_file() else None
    if stored is not None and stored.is_finished:
        chosen = [score for score in _read_scores(stored) if score.is_chosen]
        chosen_settings = with_recipe(settings, chosen[0].options) if chosen else settings
        return _train_pair(data, run_path, chosen_settings, progress)

    num_pairs = count_training_pairs(data, settings)
    machine = name_device(settings.machine, run_path)
    with process_group(machine.device) as device, writing(run_path):
        settings = replace_fields(settings, machine=replace_fields(machine, device=device))
        info = _describe_run(data, run_path, settings, digest_inputs(data, settings))
        info = replace_fields(info, settings=settings.to_json())
        run = run_on_first(lambda: Run.create(run_path, info))

        # All recipes follow the split of this run, so that their scores are of the same samples.
        pairs = data.pairs(settings.language)
        run_on_first(lambda: write_run_split(data, pairs, run_path, settings, progress))
        on_split = replace_fields(settings, split=replace_fields(settings.split, kind=str(run_path / SPLIT)))

        reports: list[TrainReport] = []
        scores: list[RecipeScore] = []
        for recipe in list_recipes(num_pairs, settings):
            closed_forms = [score for score in scores if score.options.get("epochs") == 0]
            options = recipe_options(recipe, num_pairs, settings, _best(closed_forms))

            path = run_path / RECIPES / recipe.name
            reports.append(_train_pair(data, path, with_recipe(on_split, options), progress))

            # A recipe has no score if validation had nothing to compare. It ranks below all others.
            score = -1.0 if reports[-1].score is None else reports[-1].score
            scores.append(RecipeScore(name=recipe.name, options=options, score=score))
            progress.note(f"recipe {recipe.name}: validation {score:.3f}")

        best = _best(scores)
        assert best is not None
        scores = [replace_fields(score, is_chosen=score is best) for score in scores]
        chosen_number = [score.is_chosen for score in scores].index(True)
        report = replace_fields(reports[chosen_number], recipes=scores)

        # This run made the split, so the digest of the file that the recipes were given does not count.
        if run is not None:  # the first process
            winner = Run.open(run_path / RECIPES / best.name)
            digests = {name: value for name, value in winner.info.digests.items() if name != "split"}
            winner_info = replace_fields(
                info,
                arguments=winner.info.arguments,
                settings={**winner.info.settings, "split": info.settings["split"]},
                digests={**info.digests, **digests},
            )
            run.finish_as(winner, winner_info, report.to_json())
    return report


def _best(scores: Sequence[RecipeScore]) -> RecipeScore | None:
    """Return the first of the highest scores."""
    return max(scores, key=lambda score: score.score, default=None)


def _check_prototypes(path: Path, data: TrainData) -> None:
    """Raise unless prototypes are other samples than those of training, whose test part they would contain."""
    prototypes = Cache(path).info
    for cache in data.caches:
        if prototypes.has_rows_of(cache.info.index_digest) or cache.info.has_rows_of(prototypes.index_digest):
            raise DataError(
                f"prototypes {path}: expected classes and their names, got samples of {cache.path}, which is trained "
                "on; make some with: embedcache extract prototypes:ENCODER PROTOTYPES"
            )


def _read_scores(info: RunInfo) -> list[RecipeScore]:
    return [RecipeScore.model_validate(values) for values in info.report.get("recipes", ())]


def _train_pair(
    data: TrainData, run_path: Path, settings: TrainSettings, progress: Progress, on_epoch: OnEpoch | None = None
) -> TrainReport:
    check_loss(settings.loss.name, settings.captions)
    _check_features(data, settings)
    if settings.negatives:  # a strict split may take hours: errors are found before
        read_negatives(settings.negatives_paths, data.caches)

    prototypes = None
    digests = digest_inputs(data, settings)
    if settings.prototypes is not None:
        _check_prototypes(settings.prototypes, data)
        prototypes = open_prototypes(settings.prototypes, data.features, settings, progress)
        digests["prototypes"] = prototypes.digest

    info = _describe_run(data, run_path, settings, digests)
    return train_task(
        lambda device: _make_task(data, run_path, info, settings, device, prototypes, progress),
        run_path,
        info,
        settings,
        progress=progress,
        on_epoch=on_epoch,
    )


def _describe_run(data: TrainData, run_path: Path, settings: TrainSettings, digests: Mapping[str, str]) -> RunInfo:
    return RunInfo(
        kind=PAIR,
        arguments=_pair_arguments(data.features, settings),
        inputs={modality: describe_input(feature) for modality, feature in data.features.items()},
        index_digest=data.index_digest,
        digests=digests,
        caches=[relative_location(cache.path, run_path) for cache in data.caches],
    )


def _pair_arguments(features: Mapping[str, InputFeature], settings: TrainSettings) -> dict[str, Any]:
    return {
        "projector": settings.model.projector,
        "widths": {modality: feature.width for modality, feature in features.items()},
        "shared_width": settings.model.shared_width,
    }


def _align_prototypes(
    unpaired: InputFeature, run_path: Path, settings: TrainSettings, progress: Progress
) -> TrainReport:
    """Write the closed form of prototypes as a run, its tower of the unpaired feature centered on that feature."""
    cache_path = unpaired.group.path.parents[1]
    if settings.optimizer.epochs or settings.recipe is not None:
        raise SettingError(
            f"epochs: expected 0, as {cache_path} has {noun(unpaired.modality)} only and no pairs to train on; use "
            "--epochs 0 without --recipe"
        )

    assert settings.prototypes is not None
    prototypes = open_prototypes(settings.prototypes, {unpaired.modality: unpaired}, settings, progress)
    features = {**prototypes.features, unpaired.modality: unpaired}

    # Items that lack the feature are not in its center, so the digests tell them.
    machine = replace_fields(settings.machine, device="cpu")
    failed = hashlib.sha256(unpaired.failed_rows.tobytes()).hexdigest()
    info = RunInfo(
        kind=PAIR,
        arguments=_pair_arguments(features, settings),
        inputs={modality: describe_input(feature) for modality, feature in features.items()},
        settings=replace_fields(settings, machine=machine).to_json(),
        digests={"prototypes": prototypes.digest, "center": digest([unpaired.group.info.index_digest, failed])},
    )
    finished = Run.reuse(run_path, info)
    if finished is not None:
        return TrainReport.model_validate({**finished.info.report, "reused": True})

    run = Run.create(run_path, info)
    with writing(run_path), seeded(settings.seed, "cpu"):
        pair = info.build()
        assert isinstance(pair, AlignedPair)
        initialize(pair, prototypes.pairs, prototypes.readers, settings.model, seed=settings.seed, progress=progress)
        center_on(pair.tower(unpaired.modality), unpaired)
        _write_names(prototypes, run_path)

        report = TrainReport(
            reused=False,
            num_samples={"prototypes": len(prototypes.pairs.samples)},
            num_parameters=sum(value.numel() for value in pair.parameters()),
            best_epoch=0,
            score=None,
            measures={},
            samples_per_s=0.0,
        )
        run.finish(pair, report.to_json())
    return report


def _write_names(prototypes: Prototypes, run_path: Path) -> None:
    names = "\n".join(prototypes.names)
    write_atomic(run_path / PROTOTYPES, f"{names}\n".encode())


def _check_features(data: TrainData, settings: TrainSettings) -> None:
    for feature, name in zip(data.features.values(), split_names(settings.model.projector), strict=True):
        bind_projector(name)
        if feature.has_tokens and not has_token_input(name):
            raise DataError(
                f"{feature.name}: expected a vector feature for projector {name}, got a token feature; use a feature "
                "such as cls, patch_mean or mean, or --projector token, cls_token or token_mlp"
            )

        for option, value in (("mixup", settings.loss.mixup), ("structure", settings.loss.structure)):
            if feature.has_tokens and value:
                raise SettingError(f"{option}: expected 0 for the token feature {feature.name}, got {value}")


def _make_task(
    data: TrainData,
    run_path: Path,
    info: RunInfo,
    settings: TrainSettings,
    device: str,
    prototypes: Prototypes | None,
    progress: Progress,
) -> PairTask:
    """Divide the pairs, and build the pair with its initialization on the training part."""
    settings = replace_fields(settings, machine=replace_fields(settings.machine, device=device))

    divided = divide_pairs(data, run_path, settings, progress)
    views = {
        modality: data.draw_views(modality, weights, settings.seed)
        for modality, weights in parse_views(settings.views).items()
    }
    negatives = _hard_negatives(data, divided.training, settings, progress)
    plan = _make_batches(divided.training, settings, [views.get(modality) for modality in data.sides], negatives)

    # A tower that normalizes over the batch needs two items of each process.
    pair = info.build(dropout=settings.model.dropout).to(device)
    assert isinstance(pair, AlignedPair)
    if any(map(has_batch_norm, pair.towers)):
        check_batches(plan.smallest, least=2)

    model = _model_settings(pair, settings)
    initialize(
        pair,
        divided.training,
        data.readers,
        model,
        seed=settings.seed,
        prototypes=prototypes,
        prototype_weight=settings.prototype_weight,
        progress=progress,
    )
    if prototypes is not None:
        run_on_first(lambda: _write_names(prototypes, run_path))

    readers = [*data.readers.values()]
    return PairTask(
        network=pair,
        plan=plan,
        readers={**data.readers, **views},
        validation=None if process_rank() else Validation(divided.validation, *readers, device=device),
        settings=settings,
        keys=data.keys,
        about={"num_samples": divided.num_samples, "num_held_out": divided.num_held_out},
    )


def _model_settings(pair: AlignedPair, settings: TrainSettings) -> ModelSettings:
    """Return the settings of the initialization, which is random by default where another run replaces a tower."""
    sources = find_sources(settings.parts.init_from, pair.parts())
    if settings.model.initialization is not None or sources.keys().isdisjoint(pair.modalities):
        return settings.model
    return replace_fields(settings.model, initialization="random")


def _hard_negatives(
    data: TrainData, training: Pairs, settings: TrainSettings, progress: Progress
) -> HardNegatives | None:
    """Read the hard negatives, and report how many training samples have some in the training part."""
    if not settings.negatives:
        return None

    negatives = read_negatives(settings.negatives_paths, data.caches)
    samples = training.samples
    # Blocks bound the memory of the check.
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
    num_samples = len(training.samples)
    batch_size = settings.optimizer.batch_size
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
