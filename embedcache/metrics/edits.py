"""Word and character error rates: edits between transcripts, with intervals over utterances or recordings.

Words are compared as they are: bring references and hypotheses to one case and spelling first.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Array, Ints
from embedcache.errors import DataError
from embedcache.metrics.intervals import Estimate, bootstrap_runs


class Edits(NamedTuple):
    """Edits that turn a reference of L tokens into a hypothesis.

    Args:
        substitutions: reference tokens that are another token in the hypothesis.
        deletions: reference tokens that are missing.
        insertions: tokens of the hypothesis that are not in the reference.
        errors_L: (L,) int64, errors of each reference token: 1 if it is substituted or deleted, plus the tokens that
            are inserted after it; those before the first token count for the first.
    """

    substitutions: int
    deletions: int
    insertions: int
    errors_L: Ints


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> Edits:
    """Count the edits of the minimum edit distance (Levenshtein) between two sequences of words or characters.

    Several alignments may have this distance; the edits are those of `align_tokens`.

    Example:
        >>> count_edits("SET B AT 2".split(), "SET D AT 2 NOW".split())
        Edits(substitutions=1, deletions=0, insertions=1, errors_L=array([0, 1, 0, 1]))
    """
    pairs_A2 = align_tokens(reference, hypothesis)
    is_wrong_A = np.array([_token(reference, i) != _token(hypothesis, j) for i, j in pairs_A2], bool)
    is_inserted_A, is_deleted_A = pairs_A2[:, 0] < 0, pairs_A2[:, 1] < 0
    place_A = np.maximum(np.cumsum(~is_inserted_A) - 1, 0)
    errors_L: Ints = np.bincount(place_A[is_wrong_A], minlength=len(reference))[: len(reference)]
    num_insertions, num_deletions = int(is_inserted_A.sum()), int(is_deleted_A.sum())
    return Edits(int(is_wrong_A.sum()) - num_insertions - num_deletions, num_deletions, num_insertions, errors_L)


def align_tokens(reference: Sequence[str], hypothesis: Sequence[str]) -> Ints:
    """Align two sequences of tokens with the fewest substitutions, deletions and insertions.

    Of the alignments with as few, it is the one that jiwer chooses: equal tokens at both ends are aligned, and between
    them, from the end, a deletion is preferred to a substitution, and a substitution to an insertion.

    Memory: 4 bytes per pair of a reference token and a hypothesis token between the equal ends.

    Returns:
        (A, 2) int64, numbers of a reference token and of the hypothesis token beside it, in order; -1 where there is
        none.
    """
    num_before = _num_equal(reference, hypothesis)
    num_after = _num_equal(reference[num_before:][::-1], hypothesis[num_before:][::-1])
    i, j = len(reference) - num_after, len(hypothesis) - num_after
    distance = _distances(reference[num_before:i], hypothesis[num_before:j])
    pairs = [(i + n, j + n) for n in reversed(range(num_after))]
    while i > num_before or j > num_before:
        uses_reference, uses_hypothesis = _last_edit(distance, i - num_before, j - num_before)
        i, j = i - uses_reference, j - uses_hypothesis
        pairs.append((i if uses_reference else -1, j if uses_hypothesis else -1))
    pairs += [(n, n) for n in reversed(range(num_before))]
    return np.array(pairs[::-1], np.int64).reshape(-1, 2)


def _last_edit(distance: Sequence[Array], row: int, column: int) -> tuple[bool, bool]:
    """Return whether the last edit of the alignment consumes a token of the reference, and one of the hypothesis."""
    here = distance[row][column]
    if row and here == distance[row - 1][column] + 1:  # always without tokens of the hypothesis
        return True, False
    if row and here == distance[row - 1][column - 1] + 1:
        return True, True
    is_insertion = here == distance[row][column - 1] + 1
    return not is_insertion, True


def _num_equal(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many tokens are equal from the beginning."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _distances(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Array]:
    """Compute the edit distance of each beginning of the reference to each of the hypothesis: L + 1 (L' + 1,) int32."""
    numbers = {token: number for number, token in enumerate(dict.fromkeys([*reference, *hypothesis]))}
    hypothesis_H = np.array([numbers[token] for token in hypothesis], np.int32)
    columns = np.arange(len(hypothesis) + 1, dtype=np.int32)
    distance = [columns]
    for token in reference:
        above = distance[-1]
        best = above + 1
        np.minimum(best[1:], above[:-1] + (hypothesis_H != numbers[token]), out=best[1:])
        distance.append(np.minimum.accumulate(best - columns) + columns)  # insertions: any number from the left
    return distance


def _token(tokens: Sequence[str], number: int) -> str:
    return "" if number < 0 else tokens[number]


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of N utterances with M reference tokens, one after another.

    Args:
        errors_M: (M,) int64, errors of each token as in `Edits`.
        lengths_N: (N,) int64, tokens of each reference.
        substitutions_N: (N,) int64, of each utterance; likewise `deletions_N` and `insertions_N`.
    """

    errors_M: Ints
    lengths_N: Ints
    substitutions_N: Ints
    deletions_N: Ints
    insertions_N: Ints

    @property
    def rate(self) -> float:
        """Errors per reference token; above 1 if there are many insertions."""
        return float(self.errors_M.sum() / len(self.errors_M))


def count_word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Count the word errors of many utterances; words are separated by whitespace.

    Raises:
        DataError: different numbers of utterances, none, or a reference without words.
    """
    return _count_errors([text.split() for text in references], [text.split() for text in hypotheses])


def count_character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Count the character errors of many utterances; whitespace between two words is one character.

    Raises:
        DataError: different numbers of utterances, none, or a reference without characters.
    """
    return _count_errors(
        [" ".join(text.split()) for text in references], [" ".join(text.split()) for text in hypotheses]
    )


def _count_errors(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]]) -> ErrorCounts:
    _check_counts(references, hypotheses)
    lengths_N = np.array([len(reference) for reference in references], np.int64)
    if not lengths_N.all():
        raise DataError(
            f"expected references with at least one word, got an empty one, number {lengths_N.argmin()}; leave out "
            "utterances without speech"
        )
    edits = [count_edits(*pair) for pair in zip(references, hypotheses, strict=True)]
    counts_N3 = np.array([[edit.substitutions, edit.deletions, edit.insertions] for edit in edits])
    return ErrorCounts(np.concatenate([edit.errors_L for edit in edits]), lengths_N, *counts_N3.T)


def _check_counts(references: Sequence[object], hypotheses: Sequence[object]) -> None:
    if len(references) != len(hypotheses) or not references:
        raise DataError(
            f"expected one hypothesis for each of one or more references, got {len(references)} references and "
            f"{len(hypotheses)} hypotheses"
        )


def estimate_error_rate(
    runs: Sequence[ErrorCounts], clusters: Ints | None = None, *, num_draws: int = 1000, seed: int = 0
) -> Estimate:
    """Compute the mean error rate of one or several runs on the same utterances, with a 95% interval.

    Whole clusters, and runs if there are several, are resampled. If utterances were put together from fewer recordings,
    the recordings are the clusters: words of one recording are not independent, in whichever utterance they are.

    Args:
        runs: errors of each run, such as one per seed.
        clusters: (N,) int, cluster of each utterance, such as its speaker; or (M,) int, cluster of each reference
            token, such as its recording; None: utterances are clusters.
        num_draws: number of resamples.
        seed: random seed of the resampling.

    Raises:
        DataError: runs with different references, or another number of clusters.

    Example:
        >>> words = count_word_errors(["SET B AT 2", "BIN RED"], ["SET D AT 2", "BIN RED"])
        >>> estimate_error_rate([words]).value
        0.16666666666666666
    """
    errors_RM, lengths_N = _stack(runs)
    return bootstrap_runs(errors_RM, _clusters(clusters, lengths_N), num_draws=num_draws, seed=seed)


def estimate_error_difference(
    runs: Sequence[ErrorCounts],
    base: Sequence[ErrorCounts],
    clusters: Ints | None = None,
    *,
    num_draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Compute how much higher the error rate of a system is than another's on the same utterances: negative is better.

    Both are computed on the same resamples, so the interval is that of the paired difference. Runs are paired in their
    order; other arguments are those of `estimate_error_rate`.

    Raises:
        DataError: other references or another number of runs than the base, or another number of clusters.
    """
    errors_RM, lengths_N = _stack([*runs, *base])
    if len(runs) != len(base):
        raise DataError(f"expected as many runs as of the base, {len(base)}, got {len(runs)}")
    difference_RM = errors_RM[: len(runs)] - errors_RM[len(runs) :]
    return bootstrap_runs(difference_RM, _clusters(clusters, lengths_N), num_draws=num_draws, seed=seed)


def _stack(runs: Sequence[ErrorCounts]) -> tuple[Ints, Ints]:
    """Return the errors of runs, (R, M), and the lengths of their utterances."""
    if not runs:
        raise DataError("error rate: expected at least one run, got none")
    if not all(np.array_equal(run.lengths_N, runs[0].lengths_N) for run in runs):
        raise DataError("error rate: expected runs on the same utterances, got references of different lengths")
    return np.stack([run.errors_M for run in runs]), runs[0].lengths_N


def _clusters(clusters: Ints | None, lengths_N: Ints) -> Ints:
    """Return the cluster of each token, (M,)."""
    clusters = np.arange(len(lengths_N)) if clusters is None else np.asarray(clusters)
    if clusters.shape == lengths_N.shape:
        return np.repeat(clusters, lengths_N)
    if clusters.shape != (lengths_N.sum(),):
        raise DataError(
            f"clusters: expected one for each of {len(lengths_N)} utterances or of {lengths_N.sum()} reference tokens, "
            f"got shape {clusters.shape}"
        )
    return clusters


def count_confusions(references: Sequence[str], hypotheses: Sequence[str]) -> Mapping[tuple[str, str], int]:
    """Count which word was recognized for which, correct ones included.

    Returns:
        Word of the reference and of the hypothesis beside it -> count; "" stands for none: deleted or inserted words.

    Example:
        >>> dict(count_confusions(["SET B", "BIN D"], ["SET D", "D"]))
        {('SET', 'SET'): 1, ('B', 'D'): 1, ('BIN', ''): 1, ('D', 'D'): 1}
    """
    _check_counts(references, hypotheses)
    counts: Counter[tuple[str, str]] = Counter()
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        said, heard = reference.split(), hypothesis.split()
        counts.update((_token(said, i), _token(heard, j)) for i, j in align_tokens(said, heard))
    return counts
