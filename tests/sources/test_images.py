import io
import struct
import subprocess
import sys
import tracemalloc
from contextlib import suppress

import iscc_samples
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from embedcache.errors import ItemError
from embedcache.sources.images import decode_image
from tests.images import png_of_size
from tests.sources.files import encode, noise

ORIENTATION = 0x0112
REAL_FILES = {path.name: path.read_bytes() for path in iscc_samples.images() if path.suffix != ".psd"}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", sorted(REAL_FILES))
def test_real_files_decode_to_rgb(name: str) -> None:
    image = decode_image(REAL_FILES[name])
    assert (image.mode, image.size) == ("RGB", (200, 133))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels(decode_image(encode(noise(), kind, **options))), pixels(noise()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(11))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    """Compare with `ImageOps.exif_transpose`; 0, 9 and 10 are not valid orientations."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(noise(), kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(pixels(decode_image(data)), pixels(expected))


def test_exif_orientation_beside_a_damaged_tag() -> None:
    """`ImageOps.exif_transpose` fails on such a block, as it writes it again."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 6, "description"
    data = encode(noise(), exif=exif)
    damaged = data.replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02")  # the width, as text
    assert damaged != data
    assert np.array_equal(pixels(decode_image(damaged)), pixels(decode_image(data)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "RGB", "P"])
def test_transparent_pixels_become_white(mode: str) -> None:
    """Those of a layer, and those of a color that is named as transparent."""
    is_layer = mode.endswith("A")
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    options = {} if is_layer else {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    assert pixels(decode_image(encode(image, "PNG", **options))).min() == 255


def test_cmyk_converts_as_in_pillow() -> None:
    data = encode(noise("CMYK"))  # Pillow writes the Adobe marker and inverts, as Photoshop does
    assert b"Adobe" in data
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(pixels(decode_image(data)), pixels(expected))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled(kind: str) -> None:
    values = np.array([[0, 257 * 100, 65_535]], dtype=np.uint16)
    decoded = pixels(decode_image(encode(Image.fromarray(values), kind)))
    assert decoded[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (encode(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
        (b"", "empty"),
        (b"a caption, not an image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        (encode(noise())[:-200], "truncated"),
        (encode(Image.new("RGB", (1, 3000)), "PNG"), "narrow"),
    ],
)
def test_bytes_that_are_no_image_raise(data: bytes, word: str) -> None:
    with pytest.raises(ItemError, match=word):
        decode_image(data)


def test_huge_image_is_rejected_from_its_header() -> None:
    data = png_of_size(30_000, 30_000)
    tracemalloc.start()
    with pytest.raises(ItemError, match=r"too many pixels.*89,478,485"):
        decode_image(data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10_000_000


def test_damaged_tag_is_ignored_without_a_warning() -> None:
    data = bytearray(encode(noise(), "TIFF", software="x" * 40))
    offset = data.index(struct.pack("<HH", 305, 2))  # tag 305, type ASCII: claim more text than there is
    data[offset + 4 : offset + 8] = struct.pack("<I", 1 << 20)
    code = (
        "import sys, warnings; warnings.simplefilter('always'); from embedcache.sources.images import decode_image; "
        "print(decode_image(sys.stdin.buffer.read()).size)"
    )
    run = subprocess.run([sys.executable, "-c", code], input=bytes(data), capture_output=True, check=True)
    assert (run.stdout.decode().strip(), run.stderr) == (str(noise().size), b"")


SEEDS = [
    *REAL_FILES.values(),
    *(encode(noise(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")),
    *(encode(noise(), "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "packbits")),
    encode(noise("CMYK")),
    encode(noise("P"), "PNG"),
    encode(noise(), "GIF", save_all=True, append_images=[noise().rotate(90)]),
]


@pytest.mark.slow
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_bytes_decode_or_raise_item_error(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(0, 8))):
        near_header = data.draw(st.booleans())
        offset = data.draw(st.integers(0, min(len(damaged), 300 if near_header else 10**6) - 1))
        damaged[offset] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    with suppress(ItemError):
        assert decode_image(bytes(damaged[:cut])).mode == "RGB"
