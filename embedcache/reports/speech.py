"""Speech recognition as tables, JSON and one page: error rates by noise, confused letters, words in time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from embedcache.arrays import Array, Ints
from embedcache.errors import EmbedcacheError
from embedcache.evaluate.speech import SpeechReport, compare_speech, estimate_errors, time_words
from embedcache.evaluate.utterances import open_for_run
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import Section, Table, interval_json, round_json, svg, write_report
from embedcache.reports.speech_figures import (
    LETTERS,
    UtteranceRow,
    confusion_figure,
    error_curves,
    parse_level,
    split_by_noise,
    utterance_figure,
    view_names,
)
from embedcache.sources.base import FileItem, Source
from embedcache.sources.media import AUDIO_RATE_HZ
from embedcache.sources.open import source_credit
from embedcache.sources.reopen import reopen_source
from embedcache.sources.sound import decode_audio
from embedcache.sources.video import decode_video
from embedcache.store.cache import Cache
from embedcache.train.utterances import Utterances

Reports: TypeAlias = Mapping[str, Sequence[SpeechReport]]
"""Model -> a report per seed."""

_NUM_SHOWN, _NUM_TEXTS = 3, 12
_FRAME_PX = 120
_FEWEST_LETTERS = 5


def format_rate(rate: Estimate) -> str:
    """Return an error rate in percent with its 95% interval, such as `12.3 [10.1, 14.5]`."""
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def error_table(reports: Reports, *, unit: str = "words") -> Table:
    """Return error rates in percent with intervals: one row per model, one column per view of the sound.

    Args:
        reports: model -> a report per seed.
        unit: `words` or `characters`.
    """
    views = _views(reports)
    rows = [
        [
            name,
            *(format_rate(estimate_errors(seeds, view, unit=unit)) if view in seeds[0].views else "" for view in views),
        ]
        for name, seeds in reports.items()
    ]
    return ["WER in %" if unit == "words" else "CER in %", *view_names(views).values()], rows


def difference_table(reports: Reports) -> Table:
    """Return how much higher the word error rate of each model is than the first one's, in points with intervals.

    Models on other utterances, or with another number of seeds, are left out.
    """
    views, (base_name, *others) = _views(reports), reports
    base = reports[base_name]
    rows = []
    for name in others:
        seeds = reports[name]
        if len(seeds) == len(base) and all(list(report.keys) == list(base[0].keys) for report in seeds):
            found = compare_speech(seeds, base)
            rows.append([name, *(format_difference(found[view]) if view in found else "" for view in views)])
    return [f"points above {base_name}", *view_names(views).values()], rows


def format_difference(difference: Estimate) -> str:
    """Return a difference of error rates in points with its 95% interval, such as `-2.1 [-3.0, -1.2]`."""
    return f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def speech_json(reports: Reports, dataset: str) -> dict[str, Any]:
    """Return reports as JSON values: rates, counts of errors and hypotheses of each model, seed by seed."""
    return {
        "dataset": dataset,
        "task": "speech_recognition",
        "models": [_model_json(*item) for item in reports.items()],
    }


def _model_json(name: str, seeds: Sequence[SpeechReport]) -> dict[str, Any]:
    first = seeds[0]
    return {
        "model": name,
        "runs": [str(report.run_path) for report in seeds],
        "seeds": [report.config.training.get("seed") for report in seeds],
        "streams": list(first.streams),
        "decoding": asdict(first.decoding),
        "is_shuffled": first.is_shuffled,
        "num_utterances": len(first.keys),
        "num_words": len(first.clusters.numbers_M),
        "num_left_out": first.num_left_out,
        "intervals_over": first.clusters.noun,
        "num_clusters": len(np.unique(first.clusters.numbers_M)),
        "warnings": _warnings({name: seeds}),
        "views": {view: _view_json(seeds, view) for view in first.views},
        "keys": list(first.keys),
        "references": list(first.references),
    }


def _view_json(seeds: Sequence[SpeechReport], view: str) -> dict[str, Any]:
    rates = {"wer": estimate_errors(seeds, view), "cer": estimate_errors(seeds, view, unit="characters")}
    counts = [report.views[view].words for report in seeds]
    return {
        **{name: round_json(rate.value) for name, rate in rates.items()},
        "intervals": {name: interval_json(rate) for name, rate in rates.items()},
        "substitutions": [int(count.substitutions_N.sum()) for count in counts],
        "deletions": [int(count.deletions_N.sum()) for count in counts],
        "insertions": [int(count.insertions_N.sum()) for count in counts],
        "hypotheses": [list(report.views[view].hypotheses) for report in seeds],
    }


def write_speech_page(path: Path, cache: Cache, reports: Reports) -> None:
    """Write a page with error rates by level, confused letters, utterances in time and transcripts.

    Utterances are read again as by `read_rows`.
    """
    first = next(iter(reports.values()))[0]
    shown, missing = _shown_section(cache, reports)
    write_report(
        path,
        title=f"Speech recognition on {cache.path.name}",
        summary=f"{first.line()}.",
        warnings=[*_warnings(reports), *missing],
        sections=[*_rate_sections(reports), *_confusion_sections(reports), *shown, _transcript_section(reports)],
        credit=source_credit(cache.info.source),
    )


def _rate_sections(reports: Reports) -> Iterator[Section]:
    rates = {name: {view: estimate_errors(seeds, view) for view in seeds[0].views} for name, seeds in reports.items()}
    views = _views(reports)
    figures = []
    if sum(parse_level(view) is not None for view in views) > 1:
        controls = [name for name, seeds in reports.items() if seeds[0].is_shuffled]
        figures.append(svg(error_curves(split_by_noise(rates), controls=controls)))
    notes = [
        "Word error rate: substituted, deleted and inserted words per word of the reference. Seeds of a recipe are "
        "averaged, and resampled with the words.",
        *(f"{name}: {seeds[0].line()}." for name, seeds in reports.items()),
    ]
    yield Section(title="Word error rate", notes=notes, table=error_table(reports), figures=figures)
    columns, rows = difference_table(reports)
    if rows:
        note = "Paired: both on the same resamples. Negative: fewer errors."
        yield Section(title="Differences", notes=[note], table=(columns, rows))
    yield Section(title="Character error rate", table=error_table(reports, unit="characters"))


def _confusion_sections(reports: Reports) -> Iterator[Section]:
    """Show which letters were confused in the noisiest view, if the references have enough of them."""
    own = {name: seeds for name, seeds in reports.items() if not seeds[0].is_shuffled}
    words = {word for seeds in own.values() for text in seeds[0].references for word in text.split()}
    if len(words & set("".join(LETTERS))) < _FEWEST_LETTERS:
        return
    view = noisy_view(_views(own))
    panels = {
        name: [(report.references, report.views[view].hypotheses) for report in seeds]
        for name, seeds in list(own.items())[:4]
        if view in seeds[0].views
    }
    note = f"Percent of each letter, {view_names(_views(own))[view]}. Groups of letters whose names sound alike."
    yield Section(title="Confused letters", notes=[note], figures=[svg(confusion_figure(panels))])


def noisy_view(views: Sequence[str]) -> str:
    """Return the view whose signal-to-noise ratio is nearest to 0 dB, else the first one."""
    levels = {view: parse_level(view) for view in views}
    return min(views, key=lambda view: np.inf if (level := levels[view]) is None else abs(level.snr_db))


def _shown_section(cache: Cache, reports: Reports) -> tuple[list[Section], list[str]]:
    """Return a section with some utterances in time, or the reason why there is none."""
    own = {name: seeds[0] for name, seeds in reports.items() if not seeds[0].is_shuffled}
    first, view = next(iter(own.values())), noisy_view(_views(reports))
    numbers: Ints = np.unique(np.linspace(0, len(first.keys) - 1, _NUM_SHOWN).astype(np.int64))
    try:
        rows = read_rows(cache, [first.keys[number] for number in numbers])
        title = view_names(_views(reports))[view]
        for name, report in own.items():
            opened = open_for_run(cache, report.run_path, views=[view], streams=report.streams)
            rows = add_words(rows, name, report, opened, view)
    except EmbedcacheError as error:
        return [], [f"utterances cannot be shown: {error}"]
    note = f"Words are where CTC is certain of their letters, {title}; red ones are wrong."
    figure = svg(utterance_figure(rows))
    return [Section(title="Utterances in time", notes=[note], figures=[figure])], []


def read_rows(cache: Cache, keys: Sequence[str]) -> list[UtteranceRow]:
    """Read the sound and the first video of utterances again from the source of a cache, with the given keys.

    Raises:
        EmbedcacheError: the source or an item cannot be read, or is elsewhere; see `reopen_source`.
    """
    source = reopen_source(cache.info.source, cache.info.index_digest)
    samples = {key: number for number, key in enumerate(cache.column("key").to_pylist())}
    tables = {modality: cache.items(modality) for modality in ("text", "audio", "video")}
    rows = []
    for key in keys:
        items = {
            modality: table.filter(np.asarray(table["sample"]) == samples[key]).slice(0, 1).to_pylist()
            for modality, table in tables.items()
        }
        row = UtteranceRow(title=key, reference=items["text"][0]["text"].upper() if items["text"] else "")
        if items["audio"]:
            row = replace(row, samples_N=_decode(source, items["audio"][0], decode_audio), audio_rate_hz=AUDIO_RATE_HZ)
        if items["video"]:
            video = _decode(source, items["video"][0], decode_video)
            row = replace(row, frames=_shrink(video.frames_THW3), rate_hz=video.rate_hz)
        rows.append(row)
    return rows


def add_words(
    rows: Sequence[UtteranceRow], name: str, report: SpeechReport, utterances: Utterances, view: str
) -> list[UtteranceRow]:
    """Return rows, which have keys as titles, with what a run recognized in one view of the sound."""
    words = time_words(report, utterances, [row.title for row in rows], view)
    return [replace(row, found={**row.found, name: found}) for row, found in zip(rows, words, strict=True)]


def _decode(source: Source, values: Mapping[str, Any], decode: Any) -> Any:
    item = FileItem(**{name: value for name, value in values.items() if name != "sample"})
    return decode(source.read(item), item.start_s, item.stop_s)


def _shrink(frames_THW3: Array) -> Array:
    """Return frames of at most 120 pixels, as a page does not show more."""
    if max(frames_THW3.shape[1:3]) <= _FRAME_PX:
        return frames_THW3
    images = [Image.fromarray(frame) for frame in frames_THW3]
    for image in images:
        image.thumbnail((_FRAME_PX, _FRAME_PX))
    return np.stack([np.asarray(image) for image in images])


def _transcript_section(reports: Reports) -> Section:
    own = {name: seeds[0] for name, seeds in reports.items()}
    first, view = next(iter(own.values())), noisy_view(_views(reports))
    rows = []
    for number in np.unique(np.linspace(0, len(first.keys) - 1, _NUM_TEXTS).astype(np.int64)):
        key = first.keys[number]
        texts = [
            report.views[view].hypotheses[list(report.keys).index(key)]
            if view in report.views and key in report.keys
            else ""
            for report in own.values()
        ]
        rows.append([key, first.references[number], *texts])
    title = view_names(_views(reports))[view]
    return Section(title=f"Transcripts, {title}", table=(["", "said", *own], rows))


def _views(reports: Reports) -> list[str]:
    return list(dict.fromkeys(view for seeds in reports.values() for view in seeds[0].views))


def _warnings(reports: Reports) -> list[str]:
    return list(dict.fromkeys(line for seeds in reports.values() for report in seeds for line in report.warnings()))
