"""Speech recognition: word and character error rates of runs, per view of the sound, with intervals and controls."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from embedcache.arrays import Ints, distinct
from embedcache.dataset.inputs import PLAIN, check_same_view
from embedcache.devices import AUTO, torch_device
from embedcache.errors import DataError, FingerprintError, SettingError, pluralize
from embedcache.evaluate.runs import group_modules_by_recipe, read_part
from embedcache.evaluate.settings import SpeechSettings
from embedcache.evaluate.utterances import (
    WordClusters,
    clusters_of_characters,
    open_for_run,
    read_speech_config,
    shuffle_videos,
    take_utterances,
    word_clusters,
)
from embedcache.metrics.edits import (
    ErrorCounts,
    count_character_errors,
    count_word_errors,
    estimate_error_difference,
    estimate_error_rate,
)
from embedcache.metrics.intervals import Estimate
from embedcache.networks.ctc import WordTime, word_times
from embedcache.networks.saved import ModuleConfig, load_module
from embedcache.networks.settings import DecodingSettings
from embedcache.networks.speech import EncodedSpeech, SpeechNetwork, check_decoder, recognize, to_text
from embedcache.networks.transcripts import encode_transcript
from embedcache.progress import NullProgress, Progress
from embedcache.store.cache import Cache
from embedcache.train.speech import encode_utterances
from embedcache.train.utterances import Utterances

SHUFFLED = "lips of other utterances"

_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Transcripts:
    """Recognized transcripts of all utterances in one view of their sound, and their errors.

    Args:
        hypotheses: recognized transcript of each utterance.
        words: errors of the words.
        characters: errors of the characters.
    """

    hypotheses: Sequence[str]
    words: ErrorCounts
    characters: ErrorCounts


@dataclass(frozen=True, kw_only=True)
class SpeechReport:
    """Results of one run on utterances.

    Args:
        run_path: folder of the run.
        config: its config.
        streams: streams that were used.
        decoding: the decoder.
        keys: keys of the N utterances.
        references: their true transcripts.
        clusters: cluster of each word, see `word_clusters`.
        views: view of the sound -> recognized transcripts. Without sound they are all the same.
        num_left_out: utterances without a transcript or a feature.
        is_shuffled: whether each utterance had the lips of another one.
        was_seen: whether the run was trained or validated on these utterances.
    """

    run_path: Path
    config: ModuleConfig
    streams: tuple[str, ...]
    decoding: DecodingSettings
    keys: Sequence[str]
    references: Sequence[str]
    clusters: WordClusters
    views: Mapping[str, Transcripts]
    num_left_out: int = 0
    is_shuffled: bool = False
    was_seen: bool = False

    def line(self) -> str:
        """Summarize what was measured in one line."""
        numbers_M = self.clusters.numbers_M
        left_out = f"; {pluralize(self.num_left_out, 'utterance')} left out" if self.num_left_out else ""
        return (
            f"{pluralize(len(self.keys), 'utterance')}, {pluralize(len(numbers_M), 'word')}{left_out}; "
            f"{' and '.join(self.streams)}; "
            f"{self.decoding.line()}; 95% intervals over {len(distinct(numbers_M)):,} {self.clusters.noun}"
        )

    def warnings(self) -> list[str]:
        """Return one line for each reason to doubt the results."""
        lines = []
        if self.was_seen:
            lines.append(f"{self.run_path.name} was trained or validated on these utterances")
        chances = (self.config.training.get("augmentation") or {}).get("missing") or {}
        untrained = [name for name in self.config.sides if name not in self.streams and not chances.get(name)]
        if untrained:
            lines.append(
                f"{self.run_path.name} was trained without modality dropout of the {untrained[0]}, so its results "
                "without it are arbitrary"
            )
        return [f"WARNING: {line}" for line in lines]


def evaluate_speech(
    run_path: Path | str,
    utterances: Utterances,
    *,
    views: Sequence[str] = (PLAIN,),
    streams: Sequence[str] | None = None,
    decoding: DecodingSettings | None = None,
    videos_of: Ints | None = None,
    is_encoded: bool = False,
    batch_size: int = _BATCH_SIZE,
    device: str = AUTO,
    progress: Progress | None = None,
) -> SpeechReport:
    """Recognize utterances with a run, and count the errors. The results do not depend on the batch size.

    Memory: the features of a batch, and those that `utterances` has loaded.

    Args:
        run_path: a run of `train_speech`.
        utterances: utterances with the features that the run was trained on, in all views.
        views: views of the sound.
        streams: streams to use; None: all of the run. Others are missing.
        decoding: the decoder.
        videos_of: (N,) utterance whose lips each one gets, as by `shuffle_videos`; None: its own.
        is_encoded: the features are states that were derived from the run, or from the runs that it starts from.
        batch_size: utterances at a time.
        device: torch device.
        progress: progress in utterances and views.

    Raises:
        SettingError: the run has no such stream, or its decoder was not trained.
        UnknownNameError: a view was not opened.
        FingerprintError: the features come from another encoder than the run was trained on.
        DataError: the run is no speech recognizer, or streams of an utterance differ in length.
    """
    progress, decoding = progress or NullProgress(), decoding or DecodingSettings()
    place = str(torch_device(device, needs_float64=True))
    config = read_speech_config(run_path, streams or ())
    check_decoder(config.training, decoding, run=str(run_path))
    network = _load_network(run_path, place)
    used = tuple(streams or network.streams)
    _check_streams(run_path, network, utterances, used)
    for name in used:
        _check_feature(name, utterances, config, is_encoded=is_encoded)
    decoded = views if "audio" in used else views[:1]
    progress.start("recognize", len(utterances) * len(decoded), "utterances")
    transcripts: dict[str, Transcripts] = {}
    references = [to_text(symbols) for symbols in utterances.symbols]
    for view in decoded:
        batches = encode_utterances(
            network,
            utterances,
            views={"audio": view} if "audio" in used else None,
            streams=used,
            videos_of=videos_of,
            is_encoded=is_encoded,
            batch_size=batch_size,
            device=place,
        )
        transcripts[view] = count_errors(references, _recognize_batches(network, batches, decoding, progress))
    progress.finish()
    return SpeechReport(
        run_path=Path(run_path),
        config=config,
        streams=used,
        decoding=decoding,
        keys=utterances.keys,
        references=references,
        clusters=word_clusters(utterances),
        views={view: transcripts.get(view, transcripts[decoded[0]]) for view in views},
        num_left_out=0,
        is_shuffled=videos_of is not None,
        was_seen=any(map(utterances.cache.info.has_rows_of, config.index_digest.split("+"))),
    )


def _recognize_batches(
    network: SpeechNetwork, batches: Iterable[EncodedSpeech], decoding: DecodingSettings, progress: Progress
) -> list[str]:
    """Return the recognized text of each utterance."""
    hypotheses: list[str] = []
    for encoded in batches:
        hypotheses += [to_text(best.symbols) for best in recognize(network, encoded, decoding)]
        progress.advance(len(encoded.frames_BTP))
    return hypotheses


@torch.no_grad()
def time_words(
    report: SpeechReport, utterances: Utterances, keys: Sequence[str], view: str, *, device: str = AUTO
) -> list[list[WordTime]]:
    """Compute when the words that a run recognized were said, by its CTC.

    Args:
        report: what it recognized.
        utterances: utterances with the features that the run was trained on.
        keys: keys of some of them, which the report has, too.
        view: view of the sound.
        device: torch device.

    Returns:
        The words of each of these utterances; none where they have more letters than frames.
    """
    device = str(torch_device(device, needs_float64=True))
    network, first = _load_network(report.run_path, device), report.streams[0]
    rate_hz = utterances.streams[first].rate_hz / network.stacks[first]
    views = {"audio": view} if "audio" in report.streams else None
    texts = dict(zip(report.keys, report.views[view].hypotheses, strict=True))
    places = {key: number for number, key in enumerate(utterances.keys)}
    part = take_utterances(utterances, np.array([places[key] for key in keys]))
    found: list[list[WordTime]] = []
    for encoded in encode_utterances(network, part, views=views, streams=report.streams, device=device):
        lengths = encoded.is_valid_BT.sum(dim=1).tolist()
        for log_probs_TC, length in zip(network.ctc_log_probs(encoded), lengths, strict=True):
            try:
                found.append(word_times(log_probs_TC[:length], encode_transcript(texts[keys[len(found)]]), rate_hz))
            except DataError:
                found.append([])
    return found


def count_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Transcripts:
    """Count the errors of words and of characters."""
    return Transcripts(
        hypotheses=hypotheses,
        words=count_word_errors(references, hypotheses),
        characters=count_character_errors(references, hypotheses),
    )


def compare_runs(
    cache_path: Path | str,
    run_paths: Sequence[Path | str],
    settings: SpeechSettings | None = None,
    *,
    device: str = AUTO,
    progress: Progress | None = None,
) -> dict[str, list[SpeechReport]]:
    """Evaluate runs on a cache: name of a recipe -> a report per seed; with `shuffle_videos` also of the controls.

    Args:
        cache_path: a cache with transcripts, and the features that the runs were trained on.
        run_paths: runs of `train_speech`.

    Raises:
        SettingError: no run, two of one recipe with the same seed, or none has a stream of that name.
        DataError: there is no such part; or as in `evaluate_speech`, which lists other errors, too.
        UnknownNameError: the cache has no feature or view of a name.
    """
    settings = settings or SpeechSettings()
    if not run_paths:
        raise SettingError("expected at least one run to evaluate, got none")
    cache = Cache(cache_path)
    samples = read_part(cache, settings.part).samples
    recipes = group_modules_by_recipe(run_paths, "speech")
    for path in run_paths:
        config = read_speech_config(path, settings.streams)
        check_decoder(config.training, settings.decoding, run=str(path))
    reports: dict[str, list[SpeechReport]] = {}
    for name, paths in recipes.items():
        for path in paths:
            used = settings.streams or tuple(read_speech_config(path).sides)
            utterances = open_for_run(cache, path, views=settings.views, streams=used, samples=samples)
            controls: list[Ints | None] = [None]
            if settings.shuffle_videos and "video" in used:
                controls.append(shuffle_videos(utterances, seed=settings.seed))
            for videos_of in controls:
                report = evaluate_speech(
                    path,
                    utterances,
                    views=settings.views,
                    streams=used,
                    decoding=settings.decoding,
                    videos_of=videos_of,
                    device=device,
                    progress=progress,
                )
                report = replace(report, num_left_out=len(samples) - len(utterances))
                title = name if videos_of is None else f"{name}, {SHUFFLED}"
                reports.setdefault(title, []).append(report)
    return reports


def estimate_errors(
    reports: Sequence[SpeechReport], view: str, *, unit: str = "words", num_draws: int = 1000, seed: int = 0
) -> Estimate:
    """Compute the mean error rate of seeds of one recipe with a 95% interval over clusters, and over seeds.

    Args:
        reports: reports on the same utterances.
        view: view of the sound.
        unit: `words` or `characters`.
        num_draws: number of resamples.
        seed: random seed of the resampling.
    """
    runs = [getattr(report.views[view], unit) for report in reports]
    clusters_M, references = reports[0].clusters.numbers_M, reports[0].references
    clusters = clusters_M if unit == "words" else clusters_of_characters(clusters_M, references)
    return estimate_error_rate(runs, clusters, num_draws=num_draws, seed=seed)


def compare_speech(
    reports: Sequence[SpeechReport], base: Sequence[SpeechReport], *, num_draws: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Compute how much higher the word error rate of a recipe is than another's, with the interval of the pairs.

    Args:
        reports: reports of a recipe, one per seed.
        base: as many reports of another recipe on the same utterances.
        num_draws: number of resamples.
        seed: random seed of the resampling.

    Returns:
        View that both have -> difference; negative: `reports` have fewer errors.

    Raises:
        DataError: they are not on the same utterances.
    """
    if any(list(report.keys) != list(base[0].keys) for report in (*reports, *base)):
        raise DataError("expected reports on the same utterances, got others; compare runs on one cache and part")
    return {
        view: estimate_error_difference(
            [report.views[view].words for report in reports],
            [report.views[view].words for report in base],
            base[0].clusters.numbers_M,
            num_draws=num_draws,
            seed=seed,
        )
        for view in base[0].views
        if all(view in report.views for report in (*reports, *base))
    }


def _load_network(run_path: Path | str, device: str) -> SpeechNetwork:
    network, _ = load_module(Path(run_path), kind="speech", device=device)
    assert isinstance(network, SpeechNetwork)
    return network


def _check_streams(run_path: Path | str, network: SpeechNetwork, utterances: Utterances, used: Sequence[str]) -> None:
    missing = [name for name in used if name not in utterances.streams]
    if missing:
        raise DataError(f"{run_path}: expected utterances with {missing[0]}, got {' and '.join(utterances.streams)}")
    if network.fusion is None and len(used) < len(network.streams):
        raise SettingError(f"streams: {run_path}: expected {' and '.join(network.streams)}, got {' and '.join(used)}")


def _check_feature(name: str, utterances: Utterances, config: ModuleConfig, *, is_encoded: bool) -> None:
    """Check that a stream has the run's feature, in whichever view, or states of its encoder."""
    stream = utterances.streams[name]
    feature = stream.feature
    if not is_encoded:
        check_same_view(
            f"the run's {name} feature {config.sides[name].feature}",
            config.sides[name].fingerprint,
            feature.fingerprint,
            next(iter(stream.readers)),
            next_step=f"{feature.name} comes from another encoder: use the features that the run was trained on",
        )
    elif feature.fingerprint.get("weights") not in {config.weights_digest, config.init_runs.get(name)}:
        raise FingerprintError(
            f"the {name} encoder: expected states that were derived from the run or the one that it starts from, got "
            f"{feature.name} of another one; derive them again"
        )
