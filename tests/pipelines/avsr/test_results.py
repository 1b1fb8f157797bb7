"""Results of speech recognition over seeds, and the page that shows them."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pipelines.avsr.ctc import WordTime
from pipelines.avsr.edits import count_word_errors
from pipelines.avsr.figures import UtteranceRow, level_name
from pipelines.avsr.page import Layout, write_pages
from pipelines.avsr.results import Result, Results, crossing_db, gain_table, rate_table, seed_table
from pipelines.worlds.talking_mouth import Phone
from tests.media_files import tone

VIEWS = ["plain", *(f"babble{level}dB" for level in (10, 5, 0, -5, -10))]
LETTERS = np.array(list("BDEPTVMNFS"))
RATES = {"audio": (5, 13, 22, 50, 86, 98), "video": (35,) * 6, "fusion": (3, 6, 10, 17, 30, 31)}
"""Percent of wrong words per level."""


@cache
def make_result(model: str, rates: tuple[float, ...], test_set: str, seed: int) -> Result:
    """A result in which that percentage of the words is wrong at each level, in the order of the utterances."""
    words = np.random.default_rng(0).choice(LETTERS, (40, 5))
    references = [" ".join(row) for row in words]
    hypotheses = {}
    for view, rate in zip(VIEWS, rates, strict=True):
        heard = words.ravel().copy()
        heard[: round(rate / 100 * heard.size)] = "X"
        hypotheses[view] = [" ".join(row) for row in heard.reshape(words.shape)]
    return Result(
        model=model,
        test_set=test_set,
        seed=seed,
        weights="",
        cluster_noun="recordings",
        clusters_M=np.searchsorted(np.sort(LETTERS), words.ravel()),
        references=references,
        words={view: count_word_errors(references, texts) for view, texts in hypotheses.items()},
        hypotheses=hypotheses,
    )


@pytest.fixture
def results() -> Results:
    """Results of two seeds in the sets A and R; the second seed is 1 point worse."""
    return Results(
        make_result(model, tuple(value + seed for value in values), test_set, seed)
        for model, values in RATES.items()
        for test_set in ("A", "R")
        for seed in (1, 0)
    )


def test_tables_are_means_over_seeds_by_the_level_of_noise(results: Results) -> None:
    columns, rows = rate_table(results, RATES, "A")
    assert columns == ["WER in %", "clean", "10 dB", "5 dB", "0 dB", "-5 dB", "-10 dB"]
    assert [cell.split()[0] for cell in rows[0][1:]] == ["5.5", "13.5", "22.5", "50.5", "86.5", "98.5"]
    assert seed_table(results, ["fusion"], "A")[1][0][:3] == ["fusion", "0, 1", "3.0 / 4.0"]
    _, rows = gain_table(results, ["fusion"], ["audio", "video"], "A")
    gains = [float(cell.split()[0]) for cell in rows[0][1:]]
    assert gains == pytest.approx([-2, -7, -12, -18, -5, -4], abs=0.01)
    assert crossing_db(results, "audio", "video", "A") == pytest.approx(5 - 5 * (35 - 22) / (50 - 22))
    assert [level_name(view) for view in ("plain", "babble-test-5dB")] == ["clean", "-5 dB"]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    result = make_result("fusion", RATES["fusion"], "A", 0)
    (tmp_path / "results").mkdir()
    result.write(tmp_path / "results" / "a.json")
    (read,) = Results.read([tmp_path]).seeds("fusion", "A")
    np.testing.assert_array_equal(read.words[VIEWS[3]], result.words[VIEWS[3]])
    assert read.hypotheses == result.hypotheses


@pytest.mark.slow
def test_pages_show_tables_curves_letters_and_mouths(results: Results, tmp_path: Path) -> None:
    row = UtteranceRow(
        title="set R",
        frames=np.zeros((25, 4, 6), np.uint8),
        samples_N=tone(1.0),
        phones=[Phone("B", 0.1, 0.3)],
        words=[WordTime("B", 0.1, 0.4), WordTime("D", 0.5, 0.8)],
        found={"fusion": [WordTime("B", 0.1, 0.4)], "audio": []},
    )
    layout = Layout(
        models=("audio", "video", "fusion"),
        curves=("audio", "fusion"),
        controls=(),
        single=("audio", "video"),
        fusion="fusion",
        confused=("audio", "fusion"),
        ablations={"Decoders": ("fusion", "missing")},
    )
    write_pages(tmp_path, results, layout, rows=[row])
    page, text = (tmp_path / "avsr.html").read_text(), (tmp_path / "avsr.md").read_text()
    assert page.count("<svg") == 3
    for part in ("CC BY-SA 3.0", "nothing here estimates an error rate on LRS2", "Decoders"):
        assert part in page
        assert part in text
    assert "| audio | 5.5 [" in text
    assert "Set A: audio 5.5 / 13.5 / 22.5 / 50.5 / 86.5 / 98.5; video" in text
