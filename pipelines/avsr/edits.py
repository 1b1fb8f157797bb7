"""Word errors of transcripts, counted for each word of the reference.

Words are compared as they are: bring references and hypotheses to one case and spelling first.
"""

from collections.abc import Sequence
from itertools import zip_longest

import jiwer
import numpy as np

from embedcache.arrays import Ints
from embedcache.errors import DataError


def align_words(references: Sequence[str], hypotheses: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return the words of each reference paired with the recognized ones; "" stands for no word.

    Raises:
        DataError: there are no references, one has no words, or the number of hypotheses differs.

    Example:
        >>> align_words(["SET B AT"], ["SET D"])
        [[('SET', 'SET'), ('B', 'D'), ('AT', '')]]
    """
    if len(references) != len(hypotheses) or not references or not all(text.strip() for text in references):
        raise DataError(
            f"expected a hypothesis for each of one or more references with words, got {len(references)} references "
            f"and {len(hypotheses)} hypotheses; leave out utterances without speech"
        )

    output = jiwer.process_words(list(references), list(hypotheses))

    word_pairs = []
    for chunks, said, heard in zip(output.alignments, output.references, output.hypotheses, strict=True):
        pairs: list[tuple[str, str]] = []

        # A chunk of substitutions has equally many words on both sides; insertions and deletions have none on one.
        for chunk in chunks:
            said_part = said[chunk.ref_start_idx : chunk.ref_end_idx]
            heard_part = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
            pairs += zip_longest(said_part, heard_part, fillvalue="")
        word_pairs.append(pairs)
    return word_pairs


def count_word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Ints:
    """Count the errors of each reference word, utterance by utterance: (M,) int64. Their mean is the WER.

    A substituted or deleted word counts one error, and one more for each word that is inserted after it. Words inserted
    before the first word count for the first word. Raises as `align_words`.

    Example:
        >>> count_word_errors(["SET B AT 2"], ["SET D AT 2 NOW"]).tolist()
        [0, 1, 0, 1]
    """
    errors: list[int] = []
    for pairs in align_words(references, hypotheses):
        first = len(errors)
        num_leading = 0
        for said, heard in pairs:
            if said:
                errors.append(int(said != heard))

            # An inserted word counts for the word before it, if there is one.
            elif len(errors) > first:
                errors[-1] += 1
            else:
                num_leading += 1

        errors[first] += num_leading
    return np.array(errors, np.int64)
