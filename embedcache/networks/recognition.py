"""Recognition: what a network finds in encoded utterances, by any of the decoders."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import ctc_loss

from embedcache.arrays import Ints
from embedcache.errors import SettingError
from embedcache.networks.ctc import decode_ctc
from embedcache.networks.decoding import Hypothesis, decode_attention, decode_hybrid
from embedcache.networks.settings import DecodingSettings
from embedcache.networks.speech import EncodedSpeech, SpeechNetwork
from embedcache.networks.transcripts import BLANK, END, SYMBOLS, decode_symbols


@torch.no_grad()
def recognize(
    network: SpeechNetwork, encoded: EncodedSpeech, decoding: DecodingSettings | None = None
) -> list[Hypothesis]:
    """Return the best hypothesis of each of B encoded utterances.

    The score of the best path of CTC is the log-probability of its transcript, summed over all paths.
    """
    decoding = decoding or DecodingSettings()
    lengths_B = encoded.is_valid_BT.sum(dim=1)
    if decoding.decoder == "ctc":
        log_probs_BTC = network.ctc_log_probs(encoded)
        found = decode_ctc(log_probs_BTC, lengths_B)
        scores = _score_ctc(log_probs_BTC, lengths_B, found)
        return [Hypothesis(symbols, score, score, None) for symbols, score in zip(found, scores, strict=True)]
    steps = network.attention.steps(*encoded)
    if decoding.decoder == "attention":
        return decode_attention(steps, lengths_B, num_symbols=len(SYMBOLS))
    return decode_hybrid(
        network.ctc_log_probs(encoded), lengths_B, steps, ctc_weight=decoding.ctc_weight, beam=decoding.beam
    )


def to_text(symbols: Ints) -> str:
    """Return the symbols of a hypothesis as text, with one space between words and none at the ends."""
    return " ".join(decode_symbols(symbols).split())


def check_decoder(training: Mapping[str, Any], decoding: DecodingSettings, *, run: str = "the run") -> None:
    """Check that the heads which a decoder needs had a weight in the loss.

    Args:
        training: the entry `training` of the run's config; a run that does not say has trained both.
        decoding: the decoder.
        run: what the message calls the run.

    Raises:
        SettingError: one had none.
    """
    trained_weight = training.get("ctc_weight", 0.5)
    needs_ctc = decoding.decoder == "ctc" or (decoding.decoder == "hybrid" and decoding.ctc_weight > 0)
    needs_attention = decoding.decoder == "attention" or (decoding.decoder == "hybrid" and decoding.ctc_weight < 1)
    for head, is_needed, is_trained in (
        ("ctc", needs_ctc, trained_weight > 0),
        ("attention", needs_attention, trained_weight < 1),
    ):
        if is_needed and not is_trained:
            other = "attention" if head == "ctc" else "ctc"
            raise SettingError(
                f"decoder: {run} was trained with ctc_weight {trained_weight:g}, so its {head} part is untrained: "
                f"expected {other}, got {decoding.decoder}"
            )


def _score_ctc(log_probs_BTC: Tensor, lengths_B: Tensor, transcripts: Sequence[Ints]) -> list[float]:
    """Return the log-probability of each transcript; what CTC gives to END counts as blank, as in decoding."""
    folded_BTC = log_probs_BTC.double().clone()
    folded_BTC[..., BLANK] = torch.logaddexp(folded_BTC[..., BLANK], folded_BTC[..., END])
    losses_B = ctc_loss(
        folded_BTC.transpose(0, 1),
        torch.from_numpy(np.concatenate(transcripts)).to(folded_BTC.device),
        lengths_B,
        torch.tensor([len(symbols) for symbols in transcripts], device=folded_BTC.device),
        blank=BLANK,
        reduction="none",
    )
    return [-loss for loss in losses_B.tolist()]
