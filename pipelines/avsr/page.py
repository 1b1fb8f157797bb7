"""The page of audio-visual speech recognition: tables, curves, confused letters and mouths in time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from embedcache.sources.media import decode_audio
from embedcache.store.cache import Cache
from pipelines.avsr.ctc import WordTime
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.evaluate import recognize_utterances, time_words
from pipelines.avsr.figures import UtteranceRow, confusion_figure, error_curves, level_name, snr_db, utterance_figure
from pipelines.avsr.results import Results, crossing_db, gain_table, rate_table, seed_table
from pipelines.avsr.utterances import open_for_run, take_utterances
from pipelines.results import Part
from pipelines.results import write_pages as write_parts
from pipelines.worlds.talking import draw_record, read_manifest
from pipelines.worlds.talking_mouth import Phone

TITLE = "Audio-visual speech recognition on cached features"
CREDIT = (
    "Recorded letters and digits of set R: Allison Smith, from Asterisk's core sounds (Debian package "
    "asterisk-core-sounds-en-g722), CC BY-SA 3.0; the utterances joined from them are under the same license. "
    "Letters of the development set: KLettres (klettres-data), GPL-2 or later. Synthetic speech: espeak-ng "
    "(GPL-3 or later) and flite (BSD-like license). Phones of recordings: pocketsphinx. Words: the vocabulary "
    "of the GRID corpus."
)
NOTES = (
    'Speech is recognized from sound, from lips and from both, as in "Leveraging Unimodal Self-Supervised '
    'Learning for Multimodal Audio-Visual Speech Recognition" (ACL 2022): the encoders of both streams are '
    "frozen and their features are computed once; small networks are trained on them, one per stream, and then "
    "a fusion of both that starts from these complete runs with their encoders frozen. Noise is added to the "
    "sound before encoding, as views.",
    "What is synthetic: all faces, and all speech but that of set R. Mouths are drawn from the phones that the "
    "speech was made of. They are therefore cleaner, and more in time with the sound, than those of real "
    "videos; nobody turns away or covers the mouth. The words are five of 51 in random order, so no grammar "
    "helps. In set R the sound is real: letters and digits that one speaker recorded one by one, joined to "
    "utterances; an aligner finds their phones, and the mouths are drawn from those.",
    "What cannot be concluded: nothing here estimates an error rate on LRS2, LRS3 or any real video, and no "
    "figure of the paper is repeated. How much lips help depends on how clear they were drawn. Whisper, the "
    "encoder of the sound, was trained with transcripts: it is frozen, but not self-supervised. The encoder of "
    "the lips is fitted without labels, to whitened principal components of stacked frames. Set R has one "
    "speaker.",
)
SETS: Mapping[str, str] = {
    "A": "A: unseen voices and faces",
    "B": "B: another synthesizer",
    "R": "R: real recorded speech",
}
"""Test set -> its title."""

_HALFWAY_DB = 0.0  # of the levels at which confused letters are shown: halfway between clean and hopeless
_FRAME_PX = 144


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the page shows, by the names of models in the results.

    Args:
        models: models of the tables, in this order; those without results in a set are left out of its table.
        curves: models of the curves.
        controls: models of the curves that are drawn thin.
        single: models of one stream: on sound, and on lips.
        fusion: the recommended model.
        confused: models whose confused letters are shown, on set R.
        ablations: title -> models of further tables.
    """

    models: Sequence[str]
    curves: Sequence[str]
    controls: Sequence[str]
    single: tuple[str, str]
    fusion: str
    confused: Sequence[str]
    ablations: Mapping[str, Sequence[str]]


def write_pages(
    folder: Path, results: Results, layout: Layout, *, rows: Sequence[UtteranceRow] = (), notes: Sequence[str] = ()
) -> None:
    """Write `avsr.html`, and `avsr.md` with its figures, into the folder.

    Args:
        folder: folder of the pages.
        results: results of all models, test sets and seeds.
        layout: what is shown.
        rows: utterances to draw in time, as by `show_utterances`.
        notes: further notes at the beginning, such as what was tried without success.
    """
    sets = [name for name in SETS if any(results.has(model, name) for model in layout.models)]
    parts = [
        *_figure_parts(results, layout, sets, rows),
        *_error_parts(results, layout, sets),
    ]
    summary = summarize(results, layout, sets)
    write_parts(folder / "avsr", TITLE, parts, notes=[*NOTES, *notes], summary=summary, credit=CREDIT)


def summarize(results: Results, layout: Layout, sets: Sequence[str]) -> str:
    """Return the word error rates of both streams and of the recommended models in a few sentences."""
    lines = []
    for name in sets:
        views = results.views(name)
        shown = [*layout.single, layout.fusion]
        rates = [
            f"{model} " + " / ".join(f"{100 * results.mean(model, name, view):.1f}" for view in views)
            for model in shown
            if results.has(model, name)
        ]
        lines.append(f"Set {name}: {'; '.join(rates)}.")
    seeds = {
        result.seed
        for model in layout.models
        for name in sets
        if results.has(model, name)
        for result in results.seeds(model, name)
    }
    levels = ", ".join(map(level_name, results.views(sets[0])))
    averaged = "one seed" if len(seeds) == 1 else f"means over {len(seeds)} seeds"
    return f"Word error rates in percent at {levels}, {averaged}. " + " ".join(lines)


def _figure_parts(
    results: Results, layout: Layout, sets: Sequence[str], rows: Sequence[UtteranceRow]
) -> Iterator[Part]:
    """Iterate over the sections with figures: error curves, mouths in time if there are rows, and confused letters."""
    panels = {SETS[name]: results.rates(layout.curves, name) for name in sets}
    yield Part(
        "Word error rate by noise",
        ["Means over seeds; bands are 95% intervals over seeds and utterances, in set R over seeds and recordings."],
        figure=error_curves(panels, controls=layout.controls),
        name="curves",
    )
    if rows:
        note = (
            "The mouth every 80 ms or a multiple of it, drawn larger than the encoder sees it; phones; sound without "
            "noise; words where CTC is certain of their letters. Wrong words are red."
        )
        yield Part("Mouths and words in time", [note], figure=utterance_figure(rows), name="mouths")
    test_set = "R" if "R" in sets else sets[0]  # R has the most letters
    view = min(results.views(test_set), key=lambda view: abs(snr_db(view) - _HALFWAY_DB))
    if confusions := _confusions(results, layout, test_set, view):
        note = (
            f"Percent of each letter in set {test_set} at {level_name(view)}, all seeds. Letters whose "
            "names sound alike are side by side: B and D, or M and N, differ by what the lips do."
        )
        yield Part("Letters confused with and without lips", [note], figure=confusions, name="letters")


def _confusions(results: Results, layout: Layout, test_set: str, view: str) -> Figure | None:
    panels = {
        model: [(result.references, result.hypotheses[view]) for result in results.seeds(model, test_set)]
        for model in layout.confused
        if results.has(model, test_set)
    }
    return confusion_figure(panels) if panels else None


def _error_parts(results: Results, layout: Layout, sets: Sequence[str]) -> Iterator[Part]:
    """Iterate over the sections with error rates: of each test set, of ablations, of each seed, of characters."""
    fusions = [model for model in layout.models if model not in layout.single]
    for name in sets:
        found = next(results.seeds(model, name)[0] for model in layout.models if results.has(model, name))
        count = len(np.unique(found.clusters_M))
        notes = [
            f"{len(found.references)} utterances, {len(found.clusters_M):,} words. Intervals are over seeds and "
            f"{count} {found.cluster_noun}."
        ]
        crossing = crossing_db(results, *layout.single, name)
        if crossing is not None:
            notes.append(f"Below {crossing:.1f} dB, {layout.single[1]} makes fewer errors than {layout.single[0]}.")
        yield Part(f"Set {SETS[name]}", notes, rate_table(results, layout.models, name))
        gains = gain_table(results, fusions, layout.single, name)
        yield Part(f"Set {name}: gain over one stream", ["Negative: fewer errors."], gains)
    for title, models in layout.ablations.items():
        for name in sets:
            if any(results.has(model, name) for model in models):
                yield Part(f"{title}, set {name}", [], rate_table(results, models, name))
    for name in sets:
        rates = seed_table(results, layout.models, name)
        yield Part(f"Set {name}: each seed", ["The seeds in their order."], rates)
    for name in sets:
        rates = rate_table(results, layout.curves, name, unit="characters")
        yield Part(f"Set {name}: characters", [], rates)


def show_utterances(
    set_folder: Path, cache_path: Path, runs: Mapping[str, Path], keys: Sequence[str], view: str, decoding: Decoding
) -> list[UtteranceRow]:
    """Return utterances of a talking-mouth world with their phones, and the words that runs recognize in them.

    Args:
        set_folder: folder of the test set.
        cache_path: its cache.
        runs: name -> run.
        keys: keys of the utterances.
        view: view of the sound that is recognized.
        decoding: the decoder.
    """
    words: dict[str, list[list[WordTime]]] = {}
    for name, run_path in runs.items():
        utterances = open_for_run(Cache(cache_path), run_path, views=[view])
        places = {key: number for number, key in enumerate(utterances.keys)}
        part = take_utterances(utterances, np.array([places[key] for key in keys]))
        texts = recognize_utterances(run_path, part, [view], decoding=decoding)[view]
        words[name] = time_words(run_path, part, texts, view)

    records = {record["key"]: record for record in read_manifest(set_folder)}
    rows = []
    for number, key in enumerate(keys):
        record = records[key]
        rows.append(
            UtteranceRow(
                title=f"set {record['set']}, voice {record['voice']}, {level_name(view)}",
                frames=draw_record(record, record["faces"][0], width=_FRAME_PX),
                samples_N=decode_audio((set_folder / record["audio"]).read_bytes()),
                phones=[Phone(*phone) for phone in record["phones"]],
                words=[WordTime(*word[:3]) for word in record["words"]],
                found={name: of_run[number] for name, of_run in words.items()},
            )
        )
    return rows
