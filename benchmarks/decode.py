"""JPEG decoders: time from bytes to EfficientNet-Lite0's 224-pixel input, and the change of the embedding.

The images are foolbox's ImageNet photographs and the one of iscc-samples, enlarged with Lanczos to each size, and
mosaics of 48 photographs of 512 x 512 pixels, which have as much detail as a camera image of that size. They are saved
as JPEG of quality 90, 4:2:0. Time is the CPU time of one thread, which other processes on the machine disturb least.
Packages that are not installed are skipped with a message: simplejpeg, PyTurboJPEG (1.x for libturbojpeg 2, 2.x for 3).

"same crop": the center square has the same position as in the full image, to a fraction of a pixel of the reduced one.
"""

import io
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from itertools import islice
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from embedcache.arrays import Array, Floats
from embedcache.cli.console import print_line, print_table
from embedcache.encoders.base import Encoder
from embedcache.encoders.image_features import LITE_CROP_PADDING_PX, lite_crop
from embedcache.encoders.open import open_encoder
from embedcache.sources.images import decode_image

Prepare: TypeAlias = Callable[[bytes], Array]
"""The bytes of a JPEG -> (3, 224, 224) uint8, as Lite0 takes it."""

MODEL_PX = 224
SIDES_PX = (256, 512, 1024)
"""Reduced decoding keeps the shorter side at least this long. Lite0's crop needs 256 of it."""
MEGAPIXELS = (0.5, 1.0, 3.0, 6.0, 12.0)
MOSAIC_TILES, TILE_PX = (8, 6), 512
QUALITY = 90
BLOCKS = 4
"""Of 16 MiB each."""
REPEATS = 3
PEER = "Pillow, as embedcache decodes"


def main(*, quick: bool) -> None:
    """Print CPU milliseconds per image, and the distance of the embeddings."""
    torch.set_num_threads(1)
    encoder = open_encoder("lite:efficientnet-lite0", modality="image")
    decoders = dict(_decoders())
    times: dict[str, list[float]] = {name: [] for name in decoders}
    drifts: dict[str, list[Floats]] = {name: [] for name in decoders}
    sizes = []
    for size, jpegs in islice(_jpegs(), 2 if quick else None):
        sizes.append(size)
        print_line(f"{size}: {len(jpegs)} images, {np.mean([len(data) for data in jpegs]) / 1000:,.0f} kB each")
        ours = _features(encoder, decoders[PEER], jpegs)
        for name, prepare in decoders.items():
            Image.core.set_blocks_max(0)  # Pillow's default; one of the decoders sets another
            times[name].append(_milliseconds(prepare, jpegs))
            drifts[name].append(1 - _cosines(ours, _features(encoder, prepare, jpegs)))
    _show_times(times, sizes)
    _show_drifts(drifts, sizes)


def _decoders() -> Iterator[tuple[str, Prepare]]:
    """Yield each installed decoder, embedcache's first."""
    yield PEER, _full(decode_image)
    yield f"the same, {BLOCKS} blocks of memory kept", _with_blocks(_full(decode_image))
    yield f"Pillow, draft to {SIDES_PX[0]} px", _full(partial(_draft, side_px=SIDES_PX[0]))
    for side_px in SIDES_PX:
        yield f"Pillow, draft to {side_px} px, same crop", _same_crop(partial(_draft, side_px=side_px))
    for find in (_torchvision, _simplejpeg, _turbojpeg):
        try:
            yield from find().items()
        except (ImportError, RuntimeError) as error:
            print_line(f"skipped: {find.__name__.removeprefix('_')}: {str(error).splitlines()[0]}")


def _full(decode: Callable[[bytes], Image.Image]) -> Prepare:
    return lambda data: lite_crop(decode(data), MODEL_PX)


def _with_blocks(prepare: Prepare) -> Prepare:
    """Prepare while Pillow keeps freed memory, as with PILLOW_BLOCKS_MAX in the environment."""

    def prepare_with_blocks(data: bytes) -> Array:
        Image.core.set_blocks_max(BLOCKS)
        return prepare(data)

    return prepare_with_blocks


def _same_crop(decode: Callable[[bytes], Image.Image]) -> Prepare:
    """Prepare an image that is decoded at a reduced size, some eighths of its own."""

    def prepare(data: bytes) -> Array:
        image = decode(data)
        width, height = Image.open(io.BytesIO(data)).size
        scale = round(8 * image.width / width) / 8
        square = image.resize((MODEL_PX, MODEL_PX), Image.Resampling.BICUBIC, box=_center_box(width, height, scale))
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    return prepare


def _center_box(width: int, height: int, scale: float) -> tuple[float, float, float, float]:
    """Return the square that `lite_crop` takes from the full image, in pixels of the reduced one."""
    side = int(min(width, height) * MODEL_PX / (MODEL_PX + LITE_CROP_PADDING_PX))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    return left * scale, top * scale, (left + side) * scale, (top + side) * scale


def _draft(data: bytes, *, side_px: int) -> Image.Image:
    """Decode at the largest reduction by 2, 4 or 8 that leaves both sides at least `side_px`."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (side_px, side_px))
    return image.convert("RGB")


def _torchvision() -> Mapping[str, Prepare]:
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(data: bytes) -> Image.Image:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return Image.fromarray(decode_jpeg(raw, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy())

    decode(_encode(Image.new("RGB", (8, 8))))  # builds without libjpeg raise only here
    return {"torchvision": _full(decode)}


def _simplejpeg() -> Mapping[str, Prepare]:
    from simplejpeg import decode_jpeg

    def decode(data: bytes, **options: bool | int) -> Image.Image:
        return Image.fromarray(decode_jpeg(data, **options))

    side_px = SIDES_PX[-1]
    reduced = partial(decode, min_height=side_px, min_width=side_px, min_factor=2)
    return {
        "simplejpeg": _full(decode),
        "simplejpeg, fast DCT and upsampling": _full(partial(decode, fastdct=True, fastupsample=True)),
        f"simplejpeg, reduced to {side_px} px, same crop": _same_crop(reduced),
    }


def _turbojpeg() -> Mapping[str, Prepare]:
    from turbojpeg import TJPF_RGB, TurboJPEG

    turbo = TurboJPEG()
    return {"PyTurboJPEG": _full(lambda data: Image.fromarray(turbo.decode(data, pixel_format=TJPF_RGB)))}


def _jpegs() -> Iterator[tuple[str, list[bytes]]]:
    """Yield each image size with its JPEG files."""
    images = _images()
    for megapixels in MEGAPIXELS:
        yield f"{megapixels:g} MP", [_encode(_enlarged(image, megapixels)) for image in images]
    tiles = [image for image in images if min(image.size) >= TILE_PX]
    rng = np.random.default_rng(0)
    mosaics = (_mosaic([tiles[n] for n in rng.integers(0, len(tiles), math.prod(MOSAIC_TILES))]) for _ in images)
    yield "12.6 MP mosaic", [_encode(mosaic) for mosaic in mosaics]


def _images() -> list[Image.Image]:
    """Open 20 photographs of 512 x 512 pixels or more and one of 200 x 133."""
    photographs = sorted(p for p in (files("foolbox") / "data").iterdir() if p.name.startswith("imagenet_"))
    sample = files("iscc_samples") / "files" / "image" / "demo.jpg"
    return [Image.open(io.BytesIO(path.read_bytes())).convert("RGB") for path in (*photographs, sample)]


def _enlarged(image: Image.Image, megapixels: float) -> Image.Image:
    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _mosaic(images: Sequence[Image.Image]) -> Image.Image:
    columns, rows = MOSAIC_TILES
    mosaic = Image.new("RGB", (columns * TILE_PX, rows * TILE_PX))
    for position, image in enumerate(images):
        tile = image.crop((0, 0, TILE_PX, TILE_PX))
        mosaic.paste(tile, (position % columns * TILE_PX, position // columns * TILE_PX))
    return mosaic


def _encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


def _milliseconds(prepare: Prepare, jpegs: Sequence[bytes]) -> float:
    """Return milliseconds from bytes to model input: the median over images of the fastest repeat."""

    def once(data: bytes) -> float:
        started = time.thread_time()
        prepare(data)
        return (time.thread_time() - started) * 1000

    return statistics.median(min(once(data) for _ in range(REPEATS)) for data in jpegs)


def _features(encoder: Encoder, prepare: Prepare, jpegs: Sequence[bytes]) -> Floats:
    return np.stack(encoder.encode([prepare(data) for data in jpegs], ["patch_mean"])["patch_mean"])


def _cosines(a_ND: Floats, b_ND: Floats) -> Floats:
    """Compute the cosine between corresponding rows of two arrays, in float64: (N,)."""
    a_ND, b_ND = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (a_ND.astype(float), b_ND.astype(float)))
    return np.einsum("nd,nd->n", a_ND, b_ND)


def _show_times(times: Mapping[str, Sequence[float]], sizes: Sequence[str]) -> None:
    rows = [[name, *(f"{ms:.1f}" for ms in row), f"{times[PEER][-1] / row[-1]:.2f}"] for name, row in times.items()]
    print_table(["CPU ms per image", *sizes, f"speedup, {sizes[-1]}"], rows)


def _show_drifts(drifts: Mapping[str, Sequence[Floats]], sizes: Sequence[str]) -> None:
    rows = [
        [name, *(f"{max(np.max(row), 0):.0e} / {max(np.median(row), 0):.0e}" for row in by_size)]
        for name, by_size in drifts.items()
    ]
    print_table(["1 - cosine, worst / median", *sizes], rows)
