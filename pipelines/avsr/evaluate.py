"""Recognize the utterances of a cache with a run, in views of their sound, and compute when it heard each word."""

from collections.abc import Sequence
from pathlib import Path

import torch

from embedcache.arrays import Ints
from embedcache.errors import DataError
from embedcache.processes import AUTO, torch_device
from pipelines.avsr.ctc import WordTime, word_times
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.network import check_decoder, load_network, recognize, to_text
from pipelines.avsr.train import encode_utterances
from pipelines.avsr.transcripts import encode_transcript
from pipelines.avsr.utterances import Utterances


def recognize_utterances(
    run_path: Path | str,
    utterances: Utterances,
    views: Sequence[str],
    *,
    decoding: Decoding | None = None,
    videos_of: Ints | None = None,
    device: str = AUTO,
) -> dict[str, list[str]]:
    """Recognize utterances with a run, in views of their sound. The batch size does not change the result.

    Memory: the features of a batch, and the features that `utterances` has loaded.

    Args:
        run_path: a run of `train_speech`.
        utterances: utterances with the streams to use, as from `open_for_run`. Streams that they lack are missing.
        views: views of the sound. Without sound, all views are the same.
        decoding: the decoder.
        videos_of: (N,) utterance whose lips each one gets, as from `shuffle_videos`. If None, its own lips.
        device: torch device.

    Returns:
        View -> text of each utterance.

    Raises:
        SettingError: a stream is missing in a run of one stream, or the decoder was not trained.
        DataError: the run is not a speech recognizer, or streams of an utterance differ in length.
    """
    decoding = decoding or Decoding()
    device = str(torch_device(device, needs_float64=True))
    network, run = load_network(run_path, device=device)
    check_decoder(run.info.settings, decoding)

    # Views change only the sound, so a run on lips decodes once for all of them.
    decoded_views = views if "audio" in utterances.streams else views[:1]
    texts: dict[str, list[str]] = {}

    for view in decoded_views:
        texts[view] = []
        for encoded in encode_utterances(
            network, utterances, views={"audio": view}, videos_of=videos_of, device=device
        ):
            texts[view] += [to_text(best.symbols) for best in recognize(network, encoded, decoding)]

    return {view: texts.get(view, texts[decoded_views[0]]) for view in views}


@torch.no_grad()
def time_words(
    run_path: Path | str, utterances: Utterances, texts: Sequence[str], view: str, *, device: str = AUTO
) -> list[list[WordTime]]:
    """Compute by CTC when the words that a run recognized were said.

    Args:
        run_path: a run of `train_speech`.
        utterances: the utterances.
        texts: text that was recognized in each utterance.
        view: view of the sound in which it was recognized.
        device: torch device.

    Returns:
        The words of each utterance; an empty list if they have more letters than frames.
    """
    device = str(torch_device(device, needs_float64=True))
    network, _ = load_network(run_path, device=device)

    # After stacking, all streams have one frame rate.
    first = next(iter(utterances.streams))
    rate_hz = utterances.streams[first].rate_hz / network.stacks[first]

    words: list[list[WordTime]] = []
    for encoded in encode_utterances(network, utterances, views={"audio": view}, device=device):
        lengths = encoded.is_valid_BT.sum(dim=1).tolist()
        for log_probs_TC, length in zip(network.ctc_log_probs(encoded), lengths, strict=True):
            try:
                words.append(word_times(log_probs_TC[:length], encode_transcript(texts[len(words)]), rate_hz))
            except DataError:
                words.append([])
    return words
