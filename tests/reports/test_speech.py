"""The report of speech recognizers: tables, JSON, figures, and the page and command that show them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from embedcache.evaluate.settings import SpeechSettings
from embedcache.evaluate.speech import SpeechReport, compare_runs, time_words
from embedcache.evaluate.utterances import open_for_run
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.metrics.intervals import Estimate
from embedcache.networks.ctc import WordTime
from embedcache.networks.settings import DecodingSettings
from embedcache.reports.speech import difference_table, error_table, noisy_view, read_rows, speech_json
from embedcache.reports.speech_figures import (
    Phone,
    UtteranceRow,
    confusion_figure,
    error_curves,
    parse_level,
    split_by_noise,
    utterance_figure,
    view_names,
)
from embedcache.sources import open_source
from embedcache.sources.base import FileItem
from embedcache.store.cache import Cache
from tests.cli.run import embedcache, succeed
from tests.edits import edit_record
from tests.evaluate.speech_runs import save_run
from tests.media_files import tone, wav
from tests.media_toy import MEDIA
from tests.train.speech_cases import SpellingSource

LEVELS = ("plain", "hiss10dB", "hiss0dB", "hiss-5dB")
Reports = Mapping[str, Sequence[SpeechReport]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cache of files, in three levels of noise, and three runs. Not to be changed."""
    folder = tmp_path_factory.mktemp("reports")
    files = SpellingSource(12)
    (folder / "files").mkdir()
    for sample in files.samples():
        path = folder / "files" / sample.key
        path.with_suffix(".txt").write_text(sample.texts[0].text + "\n")
        path.with_suffix(".wav").write_bytes(files.read(FileItem(path=f"{sample.key}.wav")))
        path.with_suffix(".mp4").write_bytes(files.read(FileItem(path=f"{sample.key}.0.mp4")))
    rng = np.random.default_rng(0)
    (folder / "hiss.wav").write_bytes(wav(np.clip(rng.normal(0, 0.1, 32_000), -1, 1)))
    views = tuple(f"noise:{level},tape={folder / 'hiss.wav'}" for level in (10, 0, -5))
    extract(
        open_source(folder / "files"),
        folder / "cache",
        encoder={"audio": [MEDIA], "video": [MEDIA]},
        settings=ExtractSettings(chunk_size=8, features=("frames",), views=views),
    )
    for name, seed in (("audio", 0), ("audio", 1), ("video", 0)):
        save_run(folder / f"{name}-{seed}", folder / "cache", name, seed=seed)
    starts = {name: folder / f"{name}-0" for name in ("audio", "video")}
    save_run(folder / "fusion", folder / "cache", "audio", "video", starts=starts)
    save_run(folder / "untrained", folder / "cache", "audio", training={"ctc_weight": 1.0})
    edit_record(shutil.copytree(folder / "audio-0", folder / "points") / "config.json", kind="points")
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> Reports:
    settings = SpeechSettings(views=LEVELS, decoding=DecodingSettings(decoder="ctc"), shuffle_videos=True)
    return compare_runs(folder / "cache", [folder / name for name in ("audio-0", "fusion", "video-0")], settings)


def test_panels_share_an_axis_that_holds_all_rates() -> None:
    low, high = Estimate(0.1, 0.05, 0.2), Estimate(0.8, 0.7, 0.9)
    for axes in error_curves({"A": {"a": {"plain": low}}, "B": {"a": {"plain": high}}}).axes:
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top >= 0.9


def test_a_model_has_one_color_in_all_panels() -> None:
    rate = {"plain": Estimate(0.1, 0.05, 0.2), "x0dB": Estimate(0.3, 0.2, 0.4)}
    first, second = error_curves({"A": {"a": rate, "b": rate}, "B": {"b": rate}}).axes
    assert second.get_lines()[0].get_color() == first.get_lines()[1].get_color() != first.get_lines()[0].get_color()


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("plain", ("", np.inf, "clean")),
        ("babble-test-5dB", ("babble-test", -5, "-5 dB")),
        ("babble-test5dB", ("babble-test", 5, "5 dB")),
        ("talker2.5dB", ("talker", 2.5, "2.5 dB")),
    ],
)
def test_level_is_read_from_the_name_of_a_view(view: str, expected: tuple[str, float, str]) -> None:
    level = parse_level(view)
    assert level is not None
    assert (level.noise, level.snr_db, level.name) == expected


def test_views_are_named_by_their_noise_where_there_are_several() -> None:
    assert parse_level("tests.train.speech_cases-quiet") is None
    assert list(view_names(["plain", "a-5dB", "a0dB"]).values()) == ["clean", "-5 dB", "0 dB"]
    assert list(view_names(["plain", "a-5dB", "b0dB"]).values()) == ["clean", "a -5 dB", "b 0 dB"]
    assert noisy_view(["plain", "a10dB", "a-5dB"]) == "a-5dB"
    assert noisy_view(["plain", "quiet"]) == "plain"


def test_tables_have_a_row_per_model_and_a_column_per_level(reports: Reports) -> None:
    columns, rows = error_table(reports)
    assert columns == ["WER in %", "clean", "10 dB", "0 dB", "-5 dB"]
    assert [row[0] for row in rows] == [
        "audio",
        "fusion",
        "fusion, lips of other utterances",
        "video",
        "video, lips of other utterances",
    ]
    assert rows[3][1] == rows[3][4]  # lips do not hear noise
    rates = {row[0]: [float(cell.split()[0]) for cell in row[1:]] for row in rows}
    expected = [reports["fusion"][0].views[view].words.rate for view in LEVELS]
    assert rates["fusion"] == pytest.approx([100 * rate for rate in expected], abs=0.05)
    _, differences = difference_table(reports)
    assert [row[0] for row in differences] == [row[0] for row in rows[1:]]
    assert float(differences[0][1].split()[0]) == pytest.approx(rates["fusion"][0] - rates["audio"][0], abs=0.11)


def test_json_has_what_the_tables_are_computed_from(reports: Reports) -> None:
    values = json.loads(json.dumps(speech_json(reports, "cache")))
    fusion = values["models"][1]
    assert (fusion["model"], fusion["num_utterances"], fusion["intervals_over"]) == ("fusion", 12, "utterances")
    view = fusion["views"]["hiss-5dB"]
    errors = sum(view[name][0] for name in ("substitutions", "deletions", "insertions"))
    assert view["wer"] == pytest.approx(errors / fusion["num_words"], abs=1e-5)
    assert len(view["hypotheses"][0]) == len(fusion["references"]) == 12
    assert fusion["decoding"] == {"decoder": "ctc", "beam": 5, "ctc_weight": 0.1}


def test_words_are_timed_within_the_utterance(folder: Path, reports: Reports) -> None:
    report = reports["fusion"][0]
    opened = open_for_run(Cache(folder / "cache"), folder / "fusion", views=["hiss0dB"])
    keys = list(report.keys)[3:6]
    texts = [report.views["hiss0dB"].hypotheses[number] for number in (3, 4, 5)]
    seconds = [row.samples_N.shape[0] / 16_000 for row in read_rows(Cache(folder / "cache"), keys)]  # type: ignore[union-attr]
    for words, text, length_s in zip(time_words(report, opened, keys, "hiss0dB"), texts, seconds, strict=True):
        assert " ".join(word.word for word in words) == text
        times = [time for word in words for time in (word.start_s, word.stop_s)]
        assert times == sorted(times)
        assert max(times) <= length_s + 0.04


def test_curves_have_a_line_per_model_and_a_panel_per_noise() -> None:
    rates = {
        "a": {"plain": Estimate(0.1, 0.05, 0.2), "x0dB": Estimate(0.3, 0.2, 0.4), "y5dB": Estimate(0.5, 0.4, 0.6)},
        "b": {"plain": Estimate(0.0, 0.0, 0.1), "x0dB": Estimate(0.2, 0.1, 0.3), "other": Estimate(1, 1, 1)},
    }
    figure = error_curves(split_by_noise(rates), controls=["b"], is_log=True)
    left, right = figure.axes
    assert [axes.get_title() for axes in (left, right)] == ["x", "y"]
    assert [[tick.get_text() for tick in axes.get_xticklabels()] for axes in (left, right)] == [
        ["clean", "0 dB"],
        ["clean", "5 dB"],
    ]
    assert [list(line.get_ydata()) for line in left.get_lines()] == [[0.1, 0.3], [0.001, 0.2]]
    assert [line.get_linestyle() for line in left.get_lines()] == ["-", "--"]
    assert list(right.get_lines()[1].get_xdata()) == [0]


def test_confusions_are_fractions_of_each_letter() -> None:
    runs = [(["B D B ONE"], ["D D B TWO"]), (["B D B ONE"], ["D  B TWO"])]
    (axes,) = confusion_figure({"model": runs}).axes
    (image,) = axes.get_images()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["B", "D"]
    np.testing.assert_allclose(np.asarray(image.get_array()), [[0.5, 0.25, 0, 0.25], [0, 1, 0, 0]])
    assert axes.get_title() == "model: 67% of 6 right"


def test_wrong_words_of_an_utterance_are_red() -> None:
    row = UtteranceRow(
        title="key",
        frames=np.zeros((25, 4, 6), np.uint8),
        samples_N=tone(1.0),
        phones=[Phone("B", 0.1, 0.2), Phone("SIL", 0.4, 0.5)],
        reference="B D",
        found={"model": [WordTime("B", 0.1, 0.3), WordTime("T", 0.5, 0.7)]},
    )
    frames, wave, drawn = utterance_figure([row]).axes
    assert len(frames.get_images()) == 12
    assert [text.get_text() for text in wave.texts] == ["B"]
    colors = {text.get_text(): text.get_color() for text in drawn.texts}
    assert colors["T"] == "#b91c1c" != colors["B"]
    assert "B D" in colors


@pytest.mark.slow
def test_page_shows_levels_utterances_and_transcripts(folder: Path) -> None:
    options = ["--view", ",".join(LEVELS), "--shuffle-videos", "--output", "wer.json", "--html", "wer.html"]
    shown = succeed("evaluate", "speech", "cache", "audio-0", "audio-1", "fusion", *options, cwd=folder)
    assert "audio: 12 utterances" in shown
    assert "points above" not in shown  # two seeds are not paired with one
    page = (folder / "wer.html").read_text()
    for text in ("Word error rate", "Utterances in time", "Transcripts, 0 dB", "signal-to-noise", "<!-- hiss -->"):
        assert text in page
    assert page.count("<svg") == 2
    assert page.count("data:image/png") == 3  # the frames of an utterance are one image
    assert "cannot be shown" not in page
    models = json.loads((folder / "wer.json").read_text())["models"]
    assert [len(model["runs"]) for model in models] == [2, 1, 1]


def test_page_without_its_source_says_so(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "cache"
    moved.symlink_to(folder / "cache")
    files = (folder / "files").rename(folder / "moved")
    try:
        succeed("evaluate", "speech", str(moved), "video-0", "--html", str(tmp_path / "page.html"), cwd=folder)
    finally:
        files.rename(folder / "files")
    page = (tmp_path / "page.html").read_text()
    assert "utterances cannot be shown" in page
    assert "Transcripts, clean" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["audio-0", "--view", "babble0dB"], "babble0dB"),
        (["audio-0", "--streams", "video"], "--streams: audio-0: expected audio, got video"),
        (["audio-0", "untrained"], "--decoder: untrained was trained with ctc_weight 1, so its attention part"),
        (["audio-0", "points"], "points: expected a run of kind speech, got one of kind points"),
        (["audio-0", "--streams", "lips"], "--streams: expected audio or video, got 'lips'"),
        (["fusion", "--beam", "0"], "beam"),
        (["missing"], "missing does not exist; make one with: train_speech, see docs/howto/speech.md"),
        (["audio-0", "--part", "val"], "expected val samples, got none"),
        (["audio-0", "--view", "plain", "--view", "plain"], "--view: expected different names"),
    ],
)
def test_error_is_one_line(folder: Path, options: list[str], message: str) -> None:
    done = embedcache("evaluate", "speech", "cache", *options, cwd=folder)
    assert done.code == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
