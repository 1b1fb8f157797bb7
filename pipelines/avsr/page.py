"""The page of audio-visual speech recognition: tables, curves, and mouths in time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from embedcache.sources.media import decode_audio
from embedcache.store.cache import Cache
from pipelines.avsr.ctc import WordTime
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.evaluate import recognize_utterances, time_words
from pipelines.avsr.figures import UtteranceRow, error_curves, utterance_figure
from pipelines.avsr.results import gain_table, level_name, rate_table, views_of, word_error_rate
from pipelines.avsr.steps import AUDIO, DEEP, FUSION, FUSIONS, NARROW_NOISE, VIDEO
from pipelines.avsr.utterances import open_for_run, take_utterances
from pipelines.results import Part, Results
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
    "All faces are drawn, and all speech except in set R is synthetic, so these figures do not estimate an error rate "
    "on LRS2, LRS3 or any real video. The comparison and its limits are explained in `pipelines/avsr/RESULTS.md`.",
)
SETS: Mapping[str, str] = {
    "A": "A: unseen voices and faces",
    "B": "B: another synthesizer",
    "R": "R: real recorded speech",
}
"""Test set -> its title."""

_FRAME_PX = 144
_SINGLE = (AUDIO, VIDEO)
_MODELS = (AUDIO, VIDEO, *FUSIONS)
_DECODERS = [
    *(f"{name}{decoder}" for name in (AUDIO, FUSION) for decoder in ("", ", greedy", ", λ 0.1")),
    *(f"{FUSION}, {control}" for control in ("without video", "without audio", "lips of others")),
]


def write_pages(
    folder: Path,
    results: Results,
    sets: Sequence[str],
    ablations: Sequence[str] = (),
    *,
    rows: Sequence[UtteranceRow] = (),
) -> None:
    """Write `avsr.html`, and `avsr.md` with its figures, into the folder.

    Args:
        folder: folder of the pages.
        results: results of all models, test sets and seeds.
        sets: names of `SETS` that were recognized.
        ablations: fusions besides the recommended one.
        rows: utterances to draw in time, as from `show_utterances`.
    """
    curves = [*_MODELS, *(name for name in ablations if name == NARROW_NOISE)]
    titles = {name: SETS[name] for name in sets}

    parts = [
        Part(
            "Word error rate by noise",
            ["Means over seeds; bands are 95% intervals over seeds and utterances, in set R seeds and recordings."],
            figure=error_curves(results, titles, curves, controls=[NARROW_NOISE, DEEP]),
            name="curves",
        )
    ]
    if rows:
        note = (
            "The mouth every 80 ms or a multiple of it, drawn larger than the encoder sees it; phones; sound without "
            "noise; words where CTC is certain of their letters. Wrong words are red."
        )
        parts.append(Part("Mouths and words in time", [note], figure=utterance_figure(rows), name="mouths"))

    for name in sets:
        # All models of a set have the same utterances, so the first one describes them.
        result = results.seeds(AUDIO, name)[0]
        clusters_M = next(iter(result.measures.values())).clusters_M
        note = (
            f"{result.num_examples} utterances, {len(clusters_M):,} words. Intervals are over seeds and "
            f"{len(np.unique(clusters_M))} {'recordings' if name == 'R' else 'utterances'}."
        )

        parts.append(Part(f"Set {SETS[name]}", [note], rate_table(results, _MODELS, name)))
        gains = gain_table(results, list(FUSIONS), _SINGLE, name)
        parts.append(Part(f"Set {name}: gain over one stream", ["Negative: fewer errors."], gains))

    parts.append(Part("One stream, decoders, set A", [], rate_table(results, _DECODERS, "A")))
    if ablations:
        parts.append(Part("Other fusions, set A", [], rate_table(results, [FUSION, *ablations], "A")))

    write_parts(folder / "avsr", TITLE, parts, notes=NOTES, summary=summarize(results, sets), credit=CREDIT)


def summarize(results: Results, sets: Sequence[str]) -> str:
    """Return the word error rates of both streams and of the fusion in a few sentences."""
    lines = []
    for name in sets:
        rates = []
        for model in (*_SINGLE, FUSION):
            values = [word_error_rate(results, model, name, view).value for view in views_of(results, name)]
            rates.append(f"{model} " + " / ".join(f"{100 * value:.1f}" for value in values))
        lines.append(f"Set {name}: {'; '.join(rates)}.")

    levels = ", ".join(map(level_name, views_of(results, sets[0])))
    num_seeds = len(results.seeds(FUSION, sets[0]))
    seeds_note = "one seed" if num_seeds == 1 else f"means over {num_seeds} seeds"
    return f"Word error rates in percent at {levels}, {seeds_note}. " + " ".join(lines)


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
        # Runs of different streams can have different utterances, so they are found by their keys.
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
                recognized={name: run_words[number] for name, run_words in words.items()},
            )
        )
    return rows
