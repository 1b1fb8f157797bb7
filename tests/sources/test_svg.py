"""SVG files, rendered by resvg."""

import base64
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedcache.errors import EmbedcacheError, ItemError, MissingExtraError, SettingError, SourceError
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import search
from embedcache.sources import SourceSettings, open_source
from embedcache.sources import svg as svg_module
from embedcache.sources.images import decode_image
from embedcache.sources.svg import draw_png
from embedcache.store.cache import Cache
from tests.cli.run import embedcache, succeed
from tests.sources.files import jpeg, reopen, write, write_tar

resvg: Any = pytest.importorskip("resvg_py")

OPEN = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:x="http://www.w3.org/1999/xlink" viewBox="0 0 20 10">'
HALF = f'<?xml version="1.0"?>\n<!-- drawn -->{OPEN}<rect width="10" height="10" fill="red"/></svg>'.encode()
SVG = SourceSettings(svg=True)


def drawn(inside: str) -> bytes:
    return f"{OPEN}{inside}</svg>".encode()


def renderers() -> list[int]:
    """Return the numbers of the processes that draw for this one."""
    found = list(svg_module._slots(os.getpid()).queue)
    return [renderer._process.pid for renderer in found if renderer is not None]


def test_drawings_are_those_of_one_process() -> None:
    texts = [drawn(f'<circle cx="{x}" cy="5" r="{x / 7}"/><text>é</text>').decode() for x in range(1, 20)]
    with ThreadPoolExecutor(3) as executor:
        assert list(executor.map(lambda text: draw_png(svg_string=text), texts)) == [
            resvg.svg_to_bytes(svg_string=text) for text in texts
        ]
    for damaged in (HALF[:-8].decode(), "\ud800"):
        with pytest.raises(ValueError, match=r".") as expected:
            resvg.svg_to_bytes(svg_string=damaged)
        with pytest.raises(ValueError, match=r".") as error:
            draw_png(svg_string=damaged)
        assert str(error.value) == str(expected.value)


def test_other_threads_run_while_one_draws() -> None:
    with ThreadPoolExecutor(1) as executor:
        drawing = executor.submit(draw_png, svg_string=HALF.decode(), width=4000)
        ticks = 0
        while wait([drawing], timeout=0.001).not_done:
            ticks += 1
    assert ticks > 5


@pytest.mark.slow
def test_killed_renderer_is_replaced() -> None:
    png = draw_png(svg_string=HALF.decode())
    for number in renderers():
        os.kill(number, signal.SIGKILL)
    with pytest.raises(EmbedcacheError, match="ended with status -9; run the same command") as error:
        decode_image(HALF)
    assert not isinstance(error.value, ItemError)  # which would be stored as the reason of a failed row
    assert draw_png(svg_string=HALF.decode()) == png


NESTED = "".join(
    f'<pattern id="p{n + 1}" width="1" height="1"><rect width="9" height="9" fill="url(#p{n})"/></pattern>'
    for n in range(5000)
)
HUGE = '<filter id="f" x="-1" y="0" width="3.4e38" height="0.00001"><feOffset dx="3.4e38"/></filter>'


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        (f'{NESTED}<rect width="5" height="5" fill="url(#p5000)"/>', r"the renderer crashed \(SIGSEGV\)"),
        (
            f'{HUGE}<rect width="3.4e38" height="0.00001" x="-1" stroke="red" filter="url(#f)"/>',
            "the renderer panicked",
        ),
    ],
)
def test_svg_that_ends_its_renderer_is_an_invalid_item(
    inside: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ItemError, match=f"damaged SVG: {reason}"):
        decode_image(drawn(inside))
    assert capfd.readouterr() == ("", "")
    assert decode_image(HALF).size == (1024, 512)


FORK = """
import os, signal, sys
from embedcache.sources import svg

def draw():
    drawing = svg.draw_png(svg_string=sys.argv[1])
    print([found._process.pid for found in svg._slots(os.getpid()).queue if found], drawing.hex(), flush=True)

draw()
forked = os.fork()
draw()
if forked:
    os.waitpid(forked, 0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_renderers_belong_to_one_process_and_end_with_it() -> None:
    command = [sys.executable, "-c", FORK, HALF.decode()]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # they hold its stderr
    assert (ended.returncode, ended.stderr) == (-signal.SIGKILL, "")
    numbers, drawings = zip(*(line.rsplit(" ", 1) for line in ended.stdout.splitlines()), strict=True)
    assert (len(numbers), len(set(numbers)), len(set(drawings))) == (3, 2, 1)


def test_short_side_and_background() -> None:
    for color, right in (("white", (255, 255, 255)), ("#000080", (0, 0, 128))):
        image = decode_image(HALF, background=color)
        assert (image.size, image.mode) == ((1024, 512), "RGB")
        assert [image.getpixel(place) for place in ((100, 100), (900, 100))] == [(255, 0, 0), right]
    assert decode_image(b"\xef\xbb\xbf" + HALF).tobytes() == decode_image(HALF).tobytes()


@pytest.mark.parametrize("family", ["", 'font-family="Helvetica, serif"'])
def test_text_is_drawn_in_one_font(family: str) -> None:
    text = f'<text x="2" y="8" font-size="8" {family}>Hi</text>'
    assert decode_image(drawn(text)).tobytes() == decode_image(drawn(text.replace(family, ""))).tobytes()
    assert np.asarray(decode_image(drawn(text))).min() == 0


@pytest.mark.parametrize(("size", "line"), [("20pt", "10pt"), ("2cm", "10mm"), ("1in", "48")])
def test_lengths_have_units(size: str, line: str) -> None:
    box = f'<rect width="{line}" height="{size}" fill="red"/>'
    image = decode_image(f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}">{box}</svg>'.encode())
    assert image.size == (512, 512)
    assert [image.getpixel((x, 250)) for x in (200, 300)] == [(255, 0, 0), (255, 255, 255)]


def test_embedded_image_is_drawn() -> None:
    data = base64.b64encode(jpeg("blue")).decode()
    image = decode_image(drawn(f'<image x:href="data:image/jpeg;base64,{data}" width="20" height="10"/>'))
    assert np.asarray(image)[256, 512, 2] > 200


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (HALF[:-8], "damaged SVG: "),
        (drawn("<g>" * 100_000 + "</g>" * 100_000), "SVG too deep: more than 200 nested elements"),
        (drawn('<use x:href="#a"/>' * 10_001), "SVG too complex: more than 10,000 copied elements"),
        (drawn('<image href="/etc/secret.png" width="5" height="5"/>'), "SVG with an image that is not"),
        (
            drawn('<image x:href="data:image/svg+xml,%3Csvg/%3E" width="5" height="5"/>'),
            "SVG with an image that is not",
        ),
        (b'<!DOCTYPE svg [<!ENTITY a "b">]>' + HALF[22:], "SVG with the XML entity 'a'"),
        (HALF.replace(b'0 0 20 10"', b'0 0 20 10" width="2000" height="1"'), "too narrow: 2000 x 1 pixels"),
        (b"<html><body>no</body></html>", "not an image"),
    ],
)
def test_bad_svg_is_a_reason(data: bytes, words: str) -> None:
    with pytest.raises(ItemError, match=words):
        decode_image(data)


def test_svg_of_strangers_is_no_image() -> None:
    with pytest.raises(ItemError, match="not an image"):
        decode_image(HALF, reads_svg=False)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ItemError, match=r"SVG: .*pip install 'embedcache\[svg\]'"):
        decode_image(HALF)
    with pytest.raises(MissingExtraError, match=r"embedcache\[svg\]"):
        open_source(write(tmp_path, {"a.svg": HALF}), settings=SVG)


def test_folder_takes_svg_files_if_told(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "icons", {"a.svg": HALF, "a.txt": "half red", "b/c.SVG": HALF, "d.wav": b"", "d.svg": HALF}
    )
    plain = open_source(folder)
    assert plain.describe()["settings"] == {}
    assert [sample.key for sample in plain.samples()] == ["d"]
    source = reopen(open_source(folder, settings=SVG).describe())
    samples = {sample.key: sample for sample in source.samples()}
    assert list(samples) == ["a", "b/c", "d"]
    assert samples["a"].texts[0].text == "half red"
    assert [item.path for item in samples["d"].files["audio"]] == ["d.wav"]
    assert decode_image(source.read(samples["b/c"].images[0])).size == (1024, 512)
    with pytest.raises(SourceError, match="its .svg files are taken with --svg"):
        open_source(write(tmp_path / "only", {"a.svg": HALF}))
    assert open_source(tmp_path / "only", settings=SVG).describe()["type"] == "folder"
    with pytest.raises(SettingError, match="does not support the setting 'svg'"):
        open_source(write(tmp_path / "t", {"t.csv": "caption\nx"}), settings=SVG)


def test_shards_take_svg_files_if_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.svg", HALF), ("a.txt", "half"), ("b.jpg", jpeg())])
    assert [len(sample.images) for sample in open_source(tmp_path / "0.tar").samples()] == [0, 1]
    source = reopen(open_source(tmp_path / "0.tar", settings=SVG).describe())
    assert [len(sample.images) for sample in source.samples()] == [1, 1]


@pytest.mark.slow
def test_background_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    half = Image.new("RGBA", (20, 10), "red")
    half.paste((0, 0, 0, 0), (10, 0, 20, 10))
    write(tmp_path / "icons", {"a.svg": HALF, "c.jpg": jpeg("blue")})
    half.save(tmp_path / "icons" / "b.png")
    words = ("extract", "icons", "--svg", "--image-encoder", "tests.toy:open_toy")
    first, *rest = words
    succeed(first, rest[0], "white", *rest[1:], cwd=tmp_path)
    succeed(first, rest[0], "black", *rest[1:], "--background", "black", cwd=tmp_path)
    white, black = (Cache(tmp_path / name).feature("image", "open_toy/cls") for name in ("white", "black"))
    assert white.fingerprint["preprocessing"] == {"grid": 4}
    assert black.fingerprint["preprocessing"] == {"grid": 4, "background": "#000000"}
    vectors = {feature: np.asarray(feature.load(), np.float32) for feature in (white, black)}
    np.testing.assert_allclose(vectors[white][0], vectors[white][1], atol=0.02)  # the drawing and the painting
    assert (vectors[white][:2] - vectors[black][:2]).max() > 0.9
    np.testing.assert_array_equal(vectors[white][2], vectors[black][2])
    assert "cosine to the stored feature: mean 1.000000" in succeed(
        "verify", "black", "--reencode", "100%", cwd=tmp_path
    )
    refused = embedcache(first, rest[0], "black", *rest[1:], cwd=tmp_path)
    assert "preprocessing.background: stored '#000000', requested" in refused.stderr
    refused = embedcache(first, rest[0], "other", *rest[1:], "--background", "blak", cwd=tmp_path)
    assert (
        refused.stderr == "error: --background: expected an opaque color such as white, black or #7f7f7f, got 'blak'\n"
    )
    build_index(Cache(tmp_path / "black"), tmp_path / "index")
    (hits,) = search(tmp_path / "index", Queries(images=[tmp_path / "icons" / "b.png"]), k=1)
    assert hits[0].score == pytest.approx(1, abs=1e-4)  # on white it would be below 0.9
