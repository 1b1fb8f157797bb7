"""Speech of tones and moving bars, whose letters have known times, and runs of small networks on real encoders."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import nll_loss

from embedcache.encoders.open import open_encoder
from embedcache.runs import Run, RunInfo, RunInput
from embedcache.sources.media import Video
from pipelines.avsr.network import KIND, Frames, SpeechNetwork, stack_frames
from pipelines.avsr.transcripts import BLANK, SYMBOLS
from tests.media_files import encode_video
from tests.media_toy import MEDIA

GAP, SPACE = ".", " "
"""Labels of frames between letters, a low tone and a wide bar, and between words, silence."""
TONES_HZ = {"A": 300, "B": 600, "C": 1200, "D": 2400, GAP: 100}
RATE_HZ, FRAME_S, FRAME_SAMPLES = 25, 0.04, 640
TOY = {"audio": (MEDIA, "open_media/frames")}
PIXELS = {"video": ("frames:pipelines.avsr.pixels:open_pixels:12x8", "12x8/pixels")}
TRAINING: Mapping[str, Any] = {"ctc_weight": 0.2, "longest_s": 60.0, "augmentation": {"missing": {}}}
SIZES: Mapping[str, Any] = {"width": 32, "num_layers": 1, "decoder_layers": 1, "num_heads": 2, "feed_forward": 32}


class Speech(NamedTuple):
    """A text as it is said.

    Args:
        samples: (n,) float32.
        frames: (T, H, W, 3) uint8 at 25 per second.
        labels: letter, `GAP` or `SPACE` of each frame.
        words: word, start and end in seconds.
    """

    samples: np.ndarray
    frames: np.ndarray
    labels: str
    words: Sequence[tuple[str, float, float]]


def say(text: str, rng: np.random.Generator, *, pause: int = 8) -> Speech:
    """Say words of the letters A to D: six frames per letter, two between letters.

    Args:
        pause: frames between words.
    """
    labels, words = SPACE * int(rng.integers(5, 12)), []
    for word in text.split():
        start = len(labels)
        labels += (GAP * 2).join(letter * 6 for letter in word)
        words.append((word, start * FRAME_S, len(labels) * FRAME_S))
        labels += SPACE * pause
    labels = labels[:-pause] + SPACE * int(rng.integers(5, 12))
    samples, frames = rng.normal(0, 0.003, len(labels) * FRAME_SAMPLES), np.full((len(labels), 16, 24, 3), 16, np.uint8)
    for number, label in enumerate(labels):
        if label in TONES_HZ:
            times = np.arange(number * FRAME_SAMPLES, (number + 1) * FRAME_SAMPLES)
            samples[times] += 0.5 * np.sin(2 * np.pi * TONES_HZ[label] * times / 16_000)
            left = 6 * list(TONES_HZ).index(label)
            frames[number, 4:12, left : left + 6] = 220
            frames[number, 12:, :] = 220 if label == GAP else 16
    return Speech(samples.astype(np.float32), frames, labels, words)


def random_text(rng: np.random.Generator, num_words: int) -> str:
    """Return words of two letters."""
    return " ".join("".join(rng.choice(list("ABCD"), 2)) for _ in range(num_words))


def write_clips(folder: Path, count: int) -> None:
    """Write clips of two speakers in the layout of LRS3, with one to three words each."""
    rng = np.random.default_rng(count)
    for number in range(count):
        text = random_text(rng, 1 + number % 3)
        speech, clip = say(text, rng), folder / ("anna", "bert")[number % 2] / f"{number // 2 + 1:05}.mp4"
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.write_bytes(encode_video(speech.frames, samples=speech.samples))
        clip.with_suffix(".txt").write_text(f"Text:  {text}\nConf:  4\n")


def save_run(
    path: Path,
    sides: Mapping[str, tuple[str, str]],
    *,
    module: SpeechNetwork | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Save a run of a network, by default with random weights, on encoders of the given specs and features."""
    inputs, streams = {}, {}
    for name, (spec, feature) in sides.items():
        encoder = open_encoder(spec, modality=name)  # type: ignore[arg-type]
        short = feature.rpartition("/")[2]
        width = encoder.features[short][-1]
        rate_hz = encoder.axes[short].rate_hz  # type: ignore[attr-defined]
        streams[name] = {"width": width, "stack": round(rate_hz / RATE_HZ)}
        inputs[name] = RunInput(
            modality=name, feature=feature, spec=spec, fingerprint=encoder.fingerprint.to_json(), width=width
        )
    arguments = {"streams": streams, "fusion_layers": len(sides) - 1, **SIZES}
    if module is None:
        torch.manual_seed(0)
        module = SpeechNetwork(**arguments)
    info = RunInfo(kind=KIND, arguments=arguments, inputs=inputs, settings={**TRAINING, **(training or {})})
    return Run.create(path, info).finish(module.eval(), {}).path


@cache
def train_network() -> SpeechNetwork:
    """Train a network of both streams on `TOY` and `PIXELS`, on the label of each frame: a second instead of the
    minutes that CTC needs to find them. Not to be changed.
    """
    rng = np.random.default_rng(0)
    said = [say(random_text(rng, 1 + number % 4), rng, pause=6 + 3 * (number % 5)) for number in range(10)]
    audio, video = open_encoder(TOY["audio"][0], modality="audio"), open_encoder(PIXELS["video"][0], modality="video")
    sounds = audio.encode(audio.prepare([speech.samples for speech in said]), ["frames"])["frames"]
    videos = [Video(frames_THW3=speech.frames, rate_hz=RATE_HZ) for speech in said]
    lips = video.encode(video.prepare(videos), ["pixels"])["pixels"]
    streams = {"audio": _pad([stack_frames(sound, 2) for sound in sounds]), "video": _pad(lips)}
    numbers = {GAP: BLANK, **{label: SYMBOLS.index(label) for label in f"{SPACE}ABCD"}}
    labels_BT = torch.full(streams["video"].values_BTD.shape[:2], -100)
    for row, speech in zip(labels_BT, said, strict=True):
        row[: len(speech.labels)] = torch.tensor([numbers[label] for label in speech.labels])
    torch.manual_seed(0)
    widths = {"audio": {"width": 2, "stack": 2}, "video": {"width": 96, "stack": 1}}
    network = SpeechNetwork(streams=widths, fusion_layers=1, **SIZES, dropout=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3)
    for _ in range(120):
        log_probs_BTC = network.ctc_log_probs(network.encode(streams))
        optimizer.zero_grad()
        nll_loss(log_probs_BTC.flatten(0, 1), labels_BT.flatten(), ignore_index=-100).backward()
        optimizer.step()
    return network


def _pad(items: Sequence[np.ndarray]) -> Frames:
    lengths = np.array([len(item) for item in items])
    padded = np.zeros((len(items), lengths.max(), items[0].shape[1]), np.float32)
    for row, item in zip(padded, items, strict=True):
        row[: len(item)] = item
    return Frames(torch.from_numpy(padded), torch.from_numpy(lengths))
