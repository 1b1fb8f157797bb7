"""Word and character errors against jiwer; intervals over clusters."""

import doctest
from itertools import zip_longest

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import DataError
from embedcache.metrics import edits
from embedcache.metrics.edits import (
    align_tokens,
    count_character_errors,
    count_confusions,
    count_edits,
    count_word_errors,
    estimate_error_difference,
    estimate_error_rate,
)
from embedcache.metrics.intervals import bootstrap_mean, bootstrap_runs

TOKENS = st.lists(st.sampled_from("ABC"), max_size=9)
TEXTS = st.lists(
    st.tuples(st.lists(st.sampled_from(["A", "BE", "C"]), min_size=1, max_size=6), st.lists(st.sampled_from("AC"))),
    min_size=1,
    max_size=5,
)


def test_docstring_examples() -> None:
    assert doctest.testmod(edits).failed == 0


@given(TOKENS.filter(bool), TOKENS)
def test_counts_equal_jiwer(reference: list[str], hypothesis: list[str]) -> None:
    expected = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    found = count_edits(reference, hypothesis)
    assert found[:3] == (expected.substitutions, expected.deletions, expected.insertions)
    assert found.errors_L.sum() == sum(found[:3])
    assert len(found.errors_L) == len(reference)


@given(TOKENS.filter(bool), TOKENS)
def test_alignment_is_that_of_jiwer(reference: list[str], hypothesis: list[str]) -> None:
    expected: list[list[int]] = []
    for chunk in jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments[0]:
        said, heard = range(chunk.ref_start_idx, chunk.ref_end_idx), range(chunk.hyp_start_idx, chunk.hyp_end_idx)
        expected += [list(pair) for pair in zip_longest(said, heard, fillvalue=-1)]
    assert align_tokens(reference, hypothesis).tolist() == expected


@given(TOKENS, TOKENS)
def test_alignment_has_every_token_once_in_order(reference: list[str], hypothesis: list[str]) -> None:
    pairs = align_tokens(reference, hypothesis)
    assert [i for i in pairs[:, 0] if i >= 0] == list(range(len(reference)))
    assert [j for j in pairs[:, 1] if j >= 0] == list(range(len(hypothesis)))
    assert ((pairs >= 0).any(axis=1)).all()


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("A B C", "A B C", [0, 0, 0]),
        ("A B C", "A D C", [0, 1, 0]),
        ("A B C", "A C", [0, 1, 0]),
        ("A B C", "A X Y B C", [2, 0, 0]),
        ("A B C", "X A B C Y", [1, 0, 1]),
        ("A B C", "", [1, 1, 1]),
        ("", "X Y", []),
        ("A", "X Y A", [2]),
    ],
)
def test_errors_belong_to_words(reference: str, hypothesis: str, errors: list[int]) -> None:
    assert count_edits(reference.split(), hypothesis.split()).errors_L.tolist() == errors


@pytest.mark.slow
@given(TEXTS)
def test_rates_equal_jiwer(texts: list[tuple[list[str], list[str]]]) -> None:
    references, hypotheses = [" ".join(said) for said, _ in texts], ["  ".join(heard) for _, heard in texts]
    words, characters = (count(references, hypotheses) for count in (count_word_errors, count_character_errors))
    assert words.rate == pytest.approx(jiwer.wer(references, hypotheses))
    assert characters.rate == pytest.approx(jiwer.cer(references, [" ".join(text.split()) for text in hypotheses]))
    expected = jiwer.process_words(references, hypotheses)
    assert words.substitutions_N.sum() == expected.substitutions
    assert words.deletions_N.sum() == expected.deletions
    assert words.insertions_N.sum() == expected.insertions


def test_estimates_have_the_rate_as_value() -> None:
    references, hypotheses = ["SET B", "A 2"], ["SET BE", "A"]
    assert estimate_error_rate([count_word_errors(references, hypotheses)]).value == 2 / 4
    assert estimate_error_rate([count_character_errors(references, hypotheses)]).value == 3 / 8


def test_interval_resamples_utterances_by_their_lengths() -> None:
    """With clusters of different sizes the rate of a resample is a ratio of sums, not a mean of rates."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 60)
    references = [" ".join("A" * length) for length in lengths]
    hypotheses = [" ".join(rng.choice(["A", "B"], length, p=[0.7, 0.3])) for length in lengths]
    wrong = [text.count("B") for text in hypotheses]
    draws = [rng.integers(60, size=60) for _ in range(4000)]
    low, high = np.quantile([np.take(wrong, draw).sum() / lengths[draw].sum() for draw in draws], [0.025, 0.975])
    counts = [count_word_errors(references, hypotheses)]
    found = estimate_error_rate(counts)
    assert found.value == sum(wrong) / lengths.sum()
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    by_utterance = estimate_error_rate(counts, np.arange(60))
    assert by_utterance == found
    by_word = estimate_error_rate(counts, np.repeat(np.arange(60), lengths))
    assert by_word == found


def test_recordings_that_recur_widen_the_interval() -> None:
    """100 utterances of 5 words from 10 recordings, each always wrong or always right, are only 10 observations."""
    rng = np.random.default_rng(0)
    recordings = rng.integers(10, size=(100, 5))
    references = [" ".join(f"W{number}" for number in row) for row in recordings]
    hypotheses = [" ".join(f"W{number}" if number < 7 else "X" for number in row) for row in recordings]
    counts = count_word_errors(references, hypotheses)
    naive = estimate_error_rate([counts])
    honest = estimate_error_rate([counts], recordings.ravel())
    assert naive.value == honest.value == pytest.approx((recordings >= 7).mean())
    assert naive.high - naive.low < 0.1
    assert 0.4 < honest.high - honest.low < 0.7
    expected = bootstrap_mean((recordings >= 7).ravel(), recordings.ravel())
    assert honest.low == pytest.approx(expected.low, abs=0.05)


def test_paired_difference_is_narrower_than_its_parts() -> None:
    """Both systems fail on the same hard utterances; one of them fails on a few more words."""
    rng = np.random.default_rng(0)
    references = ["A B C D E"] * 200
    is_hard = rng.random(200) < 0.3
    base = ["X X X X E" if hard else reference for hard, reference in zip(is_hard, references, strict=True)]
    worse = [text if rng.random() < 0.8 else f"{text} Z" for text in base]
    counts, base_counts = (count_word_errors(references, texts) for texts in (worse, base))
    difference = estimate_error_difference([counts], [base_counts])
    assert difference.value == pytest.approx(counts.rate - base_counts.rate)
    assert 0 < difference.low < difference.value < difference.high
    assert difference.high - difference.low < 0.04
    alone = estimate_error_rate([base_counts])
    assert alone.high - alone.low > 0.08
    swapped = estimate_error_difference([base_counts], [counts])
    assert swapped.value == -difference.value


def test_several_runs_are_averaged_and_resampled() -> None:
    references = ["A B C D"] * 50
    runs = [count_word_errors(references, [text] * 50) for text in ("A B C D", "A B C X", "X X C D")]
    found = estimate_error_rate(runs)
    assert found.value == pytest.approx((0 + 0.25 + 0.5) / 3)
    assert found.low == 0
    assert found.high == pytest.approx(0.5, abs=0.01)
    assert estimate_error_difference(runs, runs).low == 0


def test_1000_resamples_are_drawn_from_seed_0() -> None:
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice(["A", "BE", "C"], count)) for count in range(1, 31)]
    hypotheses, others = ([text.replace(word, "D") for text in references] for word in ("A", "BE"))
    one, other = (count_word_errors(references, texts) for texts in (hypotheses, others))
    clusters, options = np.repeat(np.arange(30), np.arange(1, 31)), {"num_draws": 1000, "seed": 0}
    expected = bootstrap_runs(one.errors_M[None], clusters, **options)  # type: ignore[arg-type]
    assert estimate_error_rate([one]) == expected
    expected = bootstrap_runs((one.errors_M - other.errors_M)[None], clusters, **options)  # type: ignore[arg-type]
    assert estimate_error_difference([one], [other]) == expected
    characters = count_character_errors(references, hypotheses)
    clusters = np.repeat(np.arange(30), characters.lengths_N)
    expected = bootstrap_runs(characters.errors_M[None], clusters, **options)  # type: ignore[arg-type]
    assert estimate_error_rate([characters]) == expected
    for counts in (one, characters):
        assert estimate_error_rate([counts]) != estimate_error_rate([counts], seed=1)


def test_confusions_of_words() -> None:
    found = count_confusions(["SET B", "SET B NOW", "BIN D", "AT"], ["SET D", "SET B", "BIN D D", ""])
    assert found == {
        ("SET", "SET"): 2,
        ("B", "D"): 1,
        ("B", "B"): 1,
        ("NOW", ""): 1,
        ("BIN", "BIN"): 1,
        ("D", "D"): 1,
        ("", "D"): 1,
        ("AT", ""): 1,
    }


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        (["A"], ["A", "B"], "got 1 references and 2 hypotheses"),
        ([], [], "got 0 references and 0 hypotheses"),
        (["A", " "], ["A", "B"], "got an empty one, number 1"),
    ],
)
def test_unexpected_transcripts_raise(references: list[str], hypotheses: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        count_word_errors(references, hypotheses)


def test_confusions_need_pairs() -> None:
    with pytest.raises(DataError, match="got 1 references and 0 hypotheses"):
        count_confusions(["A"], [])


def test_runs_and_clusters_that_do_not_fit_raise() -> None:
    one, other = count_word_errors(["A B"], ["A B"]), count_word_errors(["A", "B"], ["A", "B"])
    with pytest.raises(DataError, match="expected runs on the same utterances"):
        estimate_error_rate([one, other])
    with pytest.raises(DataError, match="expected at least one run"):
        estimate_error_rate([])
    with pytest.raises(DataError, match="expected as many runs as of the base, 1, got 2"):
        estimate_error_difference([one, one], [one])
    with pytest.raises(DataError, match=r"one for each of 1 utterances or of 2 reference tokens, got shape \(3,\)"):
        estimate_error_rate([one], np.zeros(3))
