"""Runs of untrained recognizers that write the letters of `tests.train.speech_cases` at random."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedcache.networks.attention import DecoderLayer
from embedcache.networks.saved import ModuleConfig, load_module, read_module_config, save_module
from embedcache.networks.speech import SpeechNetwork, pad_transcripts
from embedcache.networks.transcripts import BLANK, END, SYMBOLS
from embedcache.train.modules import describe_input
from embedcache.train.speech import encode_utterances
from embedcache.train.utterances import Utterances
from tests.train.speech_cases import LETTERS, MODEL, make_cache, utterances

STACKS = {"audio": 2, "video": 1}


def save_run(
    path: Path,
    cache: Path,
    *names: str,
    seed: int = 0,
    starts: Mapping[str, Path] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run on the features of a cache; of two streams, with the encoders of `starts`."""
    data = utterances(cache, *names)
    streams = {name: {"width": stream.feature.width, "stack": STACKS[name]} for name, stream in data.streams.items()}
    torch.manual_seed(seed)
    arguments = {"streams": streams, **MODEL, "fusion_layers": len(names) - 1}
    network = SpeechNetwork(**arguments)
    for name, run in (starts or {}).items():
        module, _ = load_module(run)
        assert isinstance(module, SpeechNetwork)
        network.encoders[name].load_state_dict(module.encoders[name].state_dict())
    _let_letters_vary(network, data)
    config = ModuleConfig(
        kind="speech",
        arguments=arguments,
        sides={name: describe_input(stream.feature) for name, stream in data.streams.items()},
        training={"seed": seed, "ctc_weight": 0.2, **(training or {})},
        init_runs={name: read_module_config(run).weights_digest for name, run in (starts or {}).items()},
        index_digest="of other utterances",
    )
    path.mkdir()
    save_module(path, network, config)
    return path


def make_runs(folder: Path) -> Path:
    """Write a cache `test` of 20 utterances, and runs `audio-0`, `audio-1`, `video-0` and `fusion`."""
    cache = make_cache(folder / "test", 20, first=200, is_recorded=True)
    for name, seed in (("audio", 0), ("audio", 1), ("video", 0)):
        save_run(folder / f"{name}-{seed}", cache, name, seed=seed)
    starts = {name: folder / f"{name}-0" for name in ("audio", "video")}
    training = {"augmentation": {"missing": {"audio": 0.3, "video": 0.2}}}
    save_run(folder / "fusion", cache, "audio", "video", starts=starts, training=training)
    return folder


@torch.no_grad()
def _let_letters_vary(network: SpeechNetwork, data: Utterances) -> None:
    """Make the letters, and what ends a word or a transcript, equally probable on average, and nothing else."""
    for layer in network.attention.layers:
        assert isinstance(layer, DecoderLayer)
        layer.frame_key_value.weight *= 8  # frames count more than positions
    (encoded,) = encode_utterances(network, data)
    symbols, _ = pad_transcripts(data.symbols)
    logits = {
        BLANK: (network.ctc, network.ctc_log_probs(encoded)[encoded.is_valid_BT]),
        END: (network.attention.readout, network.attention(torch.from_numpy(symbols), *encoded).flatten(0, 1)),
    }
    for symbol, (readout, logits_NC) in logits.items():
        last = readout.linears[-1]
        assert isinstance(last, nn.Linear)
        used = [symbol, SYMBOLS.index(" "), *map(SYMBOLS.index, LETTERS)]
        bias = last.bias[used] - logits_NC[:, used].mean(dim=0)
        last.weight *= 50
        last.bias[:] = -1000.0
        last.bias[used] = 50 * bias
