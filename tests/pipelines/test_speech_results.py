"""Results of speech recognition over seeds, what is required of a fusion, and the page that shows them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import DataError
from embedcache.metrics.edits import count_word_errors
from embedcache.metrics.intervals import Estimate
from embedcache.networks.ctc import WordTime
from embedcache.reports.speech_figures import UtteranceRow
from pipelines.speech.page import Layout, write_pages
from pipelines.speech.results import (
    Result,
    Results,
    Roles,
    crossing_db,
    gain_table,
    rate_table,
    requirement_table,
    seed_table,
)
from tests.media_files import tone

LEVELS = {"clean": np.inf, "10 dB": 10, "5 dB": 5, "0 dB": 0, "-5 dB": -5, "-10 dB": -10}
VIEWS = ["plain", *(f"babble{level:g}dB" for level in LEVELS.values() if np.isfinite(level))]
LETTERS = np.array(list("BDEPTVMNFS"))
NUM = 40
RATES = {  # percent of wrong words per level
    "audio": (5, 13, 22, 50, 86, 98),
    "video": (35,) * 6,
    "deep video": (32,) * 6,
    "fusion": (3, 6, 10, 17, 30, 31),
    "greedy": (4, 6, 10, 18, 31, 32),
    "without video": (6, 14, 24, 52, 86, 97),
    "without audio": (36,) * 6,
    "shuffled": (20, 30, 45, 70, 92, 99),
}
ROLES = Roles(
    fusion="fusion",
    audio="audio",
    video="video",
    deep_video="deep video",
    without_video="without video",
    without_audio="without audio",
    shuffled="shuffled",
    greedy=("greedy",),
)


@cache
def make_result(model: str, rates: tuple[float, ...], *, test_set: str = "A", seed: int = 0) -> Result:
    """A result in which that percentage of the words is wrong at each level, in the order of the utterances."""
    words = np.random.default_rng(0).choice(LETTERS, (NUM, 5))
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
        words={view: count_word_errors(references, found) for view, found in hypotheses.items()},
        hypotheses=hypotheses,
    )


def make_results(*, models: Sequence[str] = tuple(RATES), **changed: tuple[float, ...]) -> Results:
    """Results of two seeds in the sets A and R; the second seed is 1 point worse."""
    rates = {**RATES, **{name.replace("_", " "): values for name, values in changed.items()}}
    rates = {model: rates[model] for model in models}
    return Results(
        make_result(model, tuple(min(100, value + seed) for value in values), test_set=test_set, seed=seed)
        for model, values in rates.items()
        for test_set in ("A", "R")
        for seed in (1, 0)
    )


def requirements(results: Results) -> dict[tuple[str, str], tuple[str, str]]:
    _, rows = requirement_table(results, ROLES, known=["A"], unlike=["R"])
    return {(text, test_set): (worst, holds) for text, test_set, worst, holds in rows}


def test_result_is_read_as_written(tmp_path: Path) -> None:
    result = make_result("audio", RATES["audio"])
    assert result.characters["plain"].errors_M.sum() == 10  # computed before it is written
    result.write(tmp_path / "A" / "audio-0.json")
    found = Results.read(tmp_path).seeds("audio", "A")[0]
    assert (found.references, found.hypotheses) == (result.references, result.hypotheses)
    for name in ("errors_M", "lengths_N", "substitutions_N", "deletions_N", "insertions_N"):
        for view in VIEWS:
            np.testing.assert_array_equal(getattr(found.words[view], name), getattr(result.words[view], name))
    np.testing.assert_array_equal(found.clusters_M, result.clusters_M)


@pytest.mark.slow
def test_rate_is_the_mean_of_the_seeds() -> None:
    results = make_results()
    assert results.rate("audio", "A", VIEWS[3]).value == pytest.approx(0.505)
    assert results.mean("audio", "A", VIEWS[3]) == pytest.approx(0.505)
    assert results.rate("audio", "A", VIEWS[3], unit="characters").value < 0.5  # spaces are right
    columns, rows = rate_table(results, ["audio", "missing", "fusion"], "A")
    assert columns == ["WER in %", *LEVELS]
    assert [row[0] for row in rows] == ["audio", "fusion"]
    assert rows[0][4].startswith("50.5 [")
    assert seed_table(results, ["audio"], "A")[1][0][1:3] == ["0, 1", "5.0 / 6.0"]


@pytest.mark.slow
def test_interval_resamples_recordings_and_seeds() -> None:
    results = make_results(models=["audio"])
    errors = np.stack([result.words[VIEWS[3]].errors_M for result in results.seeds("audio", "A")])
    clusters = results.seeds("audio", "A")[0].clusters_M
    rng, draws = np.random.default_rng(5), []
    for _ in range(4000):
        recordings = rng.integers(len(LETTERS), size=len(LETTERS))
        rows = np.concatenate([np.flatnonzero(clusters == number) for number in recordings])
        draws.append(errors[rng.integers(2, size=2)][:, rows].mean())
    rate = results.rate("audio", "A", VIEWS[3])
    assert [rate.low, rate.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


@pytest.mark.slow
def test_differences_are_paired_by_seed() -> None:
    results = make_results()
    gap = results.difference("fusion", "audio", "A", VIEWS[3])
    assert gap.value == pytest.approx(-0.33)
    assert isinstance(gap, Estimate)
    lone = Results([make_result("fusion", RATES["fusion"], seed=7), make_result("audio", RATES["audio"], seed=8)])
    with pytest.raises(DataError, match="of the same seeds"):
        lone.difference("fusion", "audio", "A", "plain")
    with pytest.raises(DataError, match="expected a result of audio, fusion in set A, got 'lips'"):
        lone.seeds("lips", "A")


def test_gain_is_over_the_better_stream_at_each_level() -> None:
    _, rows = gain_table(make_results(), ["fusion"], ["audio", "deep video"], "A")
    gains = [float(cell.split()[0]) for cell in rows[0][1:]]
    assert gains == pytest.approx([-2, -7, -12, -15, -2, -1], abs=0.01)


def test_crossing_is_between_the_levels_where_lips_become_better() -> None:
    crossing = crossing_db(make_results(), "audio", "video", "A")
    assert crossing == pytest.approx(5 - 5 * (35 - 22) / (50 - 22))
    assert crossing_db(make_results(video=(99,) * 6), "audio", "video", "A") is None


def test_requirements_name_the_level_that_fulfills_them_least() -> None:
    found = requirements(make_results())
    assert found["at most 1 point above the better stream", "A"][1] == "yes"
    assert found["at most 1 point above the better stream", "A"][0].startswith("-10 dB: -1.0")
    worst, holds = found["5 points below the better stream at 10, 5, 0 dB", "A"]
    assert (worst.split(":")[0], holds) == ("10 dB", "yes")
    assert found["at most 1.5% without noise", "A"][0].startswith("clean: 3.5 [")
    assert found["at most 1.5% without noise", "A"][1] == "no"
    assert found["given sound alone, at most 3 points above audio", "A"][1] == "yes"
    assert found["given lips alone, at most 3 points above video", "A"][1] == "yes"
    assert found["lips of other utterances: not below audio", "A"][1] == "yes"
    assert found["at most greedy", "A"][1] == "yes"
    assert found["below audio from 5 dB down", "R"][1] == "yes"
    assert found["at most 1 point above audio without noise and at 10 dB", "R"][1] == "yes"
    assert {test_set for _, test_set in found} == {"A", "R"}


@pytest.mark.parametrize(
    ("model", "rates", "broken"),
    [
        ("fusion", (7, 6, 10, 17, 30, 31), "at most 1 point above the better stream"),
        ("fusion", (3, 9, 10, 17, 30, 31), "5 points below the better stream at 10, 5, 0 dB"),
        ("fusion", (3, 6, 10, 17, 30, 33), "31% at the lowest level"),
        ("without_video", (9, 14, 24, 52, 86, 97), "given sound alone, at most 3 points above audio"),
        ("without_audio", (39,) * 6, "given lips alone, at most 3 points above video"),
        ("shuffled", (20, 30, 10, 70, 92, 99), "lips of other utterances: not below audio"),
        ("greedy", (4, 6, 9, 18, 31, 32), "at most greedy"),
        ("fusion", (3, 6, 10, 17, 30, 99), "below audio from 5 dB down"),
        ("fusion", (3, 15, 10, 17, 30, 31), "at most 1 point above audio without noise and at 10 dB"),
    ],
)
def test_a_broken_requirement_is_shown(model: str, rates: tuple[float, ...], broken: str) -> None:
    found = requirements(make_results(**{model: rates}))
    assert [holds for (text, _), (_, holds) in found.items() if broken in text] == ["no"]


@pytest.mark.slow
def test_pages_show_tables_curves_letters_and_mouths(tmp_path: Path) -> None:
    row = UtteranceRow(
        title="set R",
        frames=np.zeros((25, 4, 6), np.uint8),
        samples_N=tone(1.0),
        reference="B D",
        found={"fusion": [WordTime("B", 0.1, 0.4)]},
    )
    layout = Layout(
        models=("audio", "video", "fusion", "shuffled"),
        curves=("audio", "fusion", "shuffled"),
        controls=("shuffled",),
        roles=(Roles(fusion="fusion", audio="audio", video="video"),),
        single=("audio", "video"),
        confused=("audio", "fusion"),
        ablations={"Decoders": ("fusion", "missing")},
    )
    write_pages(
        tmp_path, make_results(models=layout.models), layout, rows=[row], notes=["Tried without success: nothing."]
    )
    page, text = (tmp_path / "avsr.html").read_text(), (tmp_path / "avsr.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        "avsr.html",
        "avsr.md",
        "avsr-curves.svg",
        "avsr-letters.jpg",
        "avsr-mouths.jpg",
    }
    assert page.count("<svg") == 3
    for part in ("CC BY-SA 3.0", "nothing here estimates an error rate on LRS2", "Tried without success", "Decoders"):
        assert part in page
        assert part in text
    assert "| at most 1.5% without noise | A | clean: 3.5 [" in text
    assert "| audio | 5.5 [" in text
    assert "means over 2 seeds. Set A" in text
    assert "Set A: audio 5.5 / 13.5 / 22.5 / 50.5 / 86.5 / 98.5; video" in text
