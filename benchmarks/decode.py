"""JPEG decoders: time from bytes to the 224 pixels of EfficientNet-Lite0, and how far each moves the embedding.

Pictures: foolbox's ImageNet photographs and the one of iscc-samples, enlarged with Lanczos to each size and written as
JPEG of quality 90, 4:2:0. Enlarged pictures have less detail than a camera's, so their files are small for their pixels
and decode somewhat faster. Time is CPU time of one thread, which other processes on the machine disturb least.
Packages that are not installed are left out with a line: simplejpeg, PyTurboJPEG (1.x with libturbojpeg 2, 2.x with 3).
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from embedcache.arrays import Floats
from embedcache.cli.console import say, show_table
from embedcache.encoders.contract import Encoder
from embedcache.encoders.lite import CROP_PADDING_PX
from embedcache.encoders.open import open_encoder
from embedcache.sources.media import decode_image

Decoder: TypeAlias = Callable[[bytes], Image.Image]

MEGAPIXELS = (0.5, 1.0, 3.0, 6.0, 12.0)
QUALITY = 90
REPEATS = 3
NEEDED_PX = 224 + CROP_PADDING_PX
"""The shorter side below which the centre square of Lite0 would be enlarged."""
PEER = "Pillow, as embedcache decodes"


def main() -> None:
    """Print CPU milliseconds an image, and the distance of the embeddings."""
    torch.set_num_threads(1)
    encoder = open_encoder("lite:efficientnet-lite0", modality="image")
    decoders = dict(_decoders())
    pictures = _pictures()
    times: dict[str, list[float]] = {name: [] for name in decoders}
    drifts: dict[str, list[Floats]] = {name: [] for name in decoders}
    for megapixels in MEGAPIXELS:
        jpegs = [_jpeg(picture, megapixels) for picture in pictures]
        say(f"{megapixels} MP: {len(jpegs)} pictures, {np.mean([len(data) for data in jpegs]) / 1000:,.0f} kB each")
        ours = _features(encoder, decoders[PEER], jpegs)
        for name, decoder in decoders.items():
            times[name].append(_milliseconds(encoder, decoder, jpegs))
            drifts[name].append(1 - _cosines(ours, _features(encoder, decoder, jpegs)))
    _show_times(times)
    _show_drifts(drifts)


def _decoders() -> Iterator[tuple[str, Decoder]]:
    """Give each decoder that is installed, ours first."""
    yield PEER, decode_image
    yield f"Pillow, draft to {NEEDED_PX} px", lambda data: _draft(data, NEEDED_PX)
    yield f"Pillow, draft to {2 * NEEDED_PX} px", lambda data: _draft(data, 2 * NEEDED_PX)
    for find in (_torchvision, _simplejpeg, _turbojpeg):
        try:
            yield from find().items()
        except (ImportError, RuntimeError) as error:
            say(f"left out: {find.__name__.removeprefix('_')}: {str(error).splitlines()[0]}")


def _draft(data: bytes, side_px: int) -> Image.Image:
    """Decode at the largest reduction by 2, 4 or 8 that leaves both sides at least `side_px`."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (side_px, side_px))
    return image.convert("RGB")


def _torchvision() -> Mapping[str, Decoder]:
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(data: bytes) -> Image.Image:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return Image.fromarray(decode_jpeg(raw, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy())

    decode(_jpeg(Image.new("RGB", (8, 8)), 0.001))  # builds without libjpeg raise only here
    return {"torchvision": decode}


def _simplejpeg() -> Mapping[str, Decoder]:
    from simplejpeg import decode_jpeg

    def reduced(data: bytes, side_px: int) -> Image.Image:
        return Image.fromarray(decode_jpeg(data, min_height=side_px, min_width=side_px, min_factor=2))

    return {
        "simplejpeg": lambda data: Image.fromarray(decode_jpeg(data)),
        "simplejpeg, fast DCT and upsampling": lambda data: Image.fromarray(
            decode_jpeg(data, fastdct=True, fastupsample=True)
        ),
        f"simplejpeg, reduced to {NEEDED_PX} px": lambda data: reduced(data, NEEDED_PX),
        f"simplejpeg, reduced to {2 * NEEDED_PX} px": lambda data: reduced(data, 2 * NEEDED_PX),
    }


def _turbojpeg() -> Mapping[str, Decoder]:
    from turbojpeg import TJPF_RGB, TurboJPEG

    turbo = TurboJPEG()
    return {"PyTurboJPEG": lambda data: Image.fromarray(turbo.decode(data, pixel_format=TJPF_RGB))}


def _pictures() -> list[Image.Image]:
    """Open 20 photographs of 512 x 512 pixels or more and one of 200 x 133."""
    photographs = sorted(p for p in (files("foolbox") / "data").iterdir() if p.name.startswith("imagenet_"))
    sample = files("iscc_samples") / "files" / "image" / "demo.jpg"
    return [Image.open(io.BytesIO(path.read_bytes())).convert("RGB") for path in (*photographs, sample)]


def _jpeg(picture: Image.Image, megapixels: float) -> bytes:
    scale = (megapixels * 1e6 / (picture.width * picture.height)) ** 0.5
    size = (round(picture.width * scale), round(picture.height * scale))
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


def _milliseconds(encoder: Encoder, decoder: Decoder, jpegs: Sequence[bytes]) -> float:
    """Time bytes to model input: the median over the pictures of the fastest of several tries."""

    def once(data: bytes) -> float:
        started = time.thread_time()
        encoder.prepare([decoder(data)])
        return (time.thread_time() - started) * 1000

    return statistics.median(min(once(data) for _ in range(REPEATS)) for data in jpegs)


def _features(encoder: Encoder, decoder: Decoder, jpegs: Sequence[bytes]) -> Floats:
    prepared = [encoder.prepare([decoder(data)])[0] for data in jpegs]
    return np.stack(encoder.encode(prepared, ["patch_mean"])["patch_mean"])


def _cosines(a_ND: Floats, b_ND: Floats) -> Floats:
    """Give the cosine of each row of one with the same row of the other, in float64: (N,)."""
    a_ND, b_ND = (
        m.astype(np.float64) / np.linalg.norm(m.astype(np.float64), axis=1, keepdims=True) for m in (a_ND, b_ND)
    )
    return np.einsum("nd,nd->n", a_ND, b_ND)


def _show_times(times: Mapping[str, Sequence[float]]) -> None:
    rows = [[name, *(f"{ms:.1f}" for ms in row), f"{times[PEER][-1] / row[-1]:.2f}"] for name, row in times.items()]
    show_table(["CPU ms an image", *_sizes(), f"times as fast at {MEGAPIXELS[-1]} MP"], rows)


def _show_drifts(drifts: Mapping[str, Sequence[Floats]]) -> None:
    rows = [
        [name, *(f"{np.max(row):.0e} / {np.median(row):.0e}" for row in by_size)] for name, by_size in drifts.items()
    ]
    show_table(["1 - cosine, worst / median", *_sizes()], rows)


def _sizes() -> list[str]:
    return [f"{megapixels} MP" for megapixels in MEGAPIXELS]
