"""Render SVG files through resvg (extra `svg`). What a stranger's file could do to this machine is refused before.

All text is drawn in DejaVu Sans, which comes with matplotlib, so that every machine draws the same.
"""

import atexit
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any
from xml.parsers import expat

from PIL import Image

from embedcache.errors import EmbedcacheError, ItemError, MissingExtraError
from embedcache.processes import num_cores
from embedcache.registry import require

SHORT_SIDE_PX = 512
"""Size of the shorter side of what is rendered: above the input sizes of most encoders."""
_PIXELS_PER_INCH = 96
"""That of CSS; without it resvg_py takes lengths in points, millimeters and inches for 0."""

_MAX_BYTES = 2**24
_MAX_DEPTH = 200  # the renderer recurses: a file of 100,000 nested groups ends the process
_MAX_USES = 10_000  # each copies what it refers to, which may refer to others
_CRASHES = ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE")
"""Signals that end the renderer for the SVG it draws: endless recursion, or one allocation beyond all memory."""


def is_svg(data: bytes) -> bool:
    """Return whether a file looks like XML with an SVG element, from its first bytes."""
    start = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"<") and b"<svg" in start


def render_svg(data: bytes, *, max_pixels: int, max_ratio: float) -> Image.Image:
    """Render an SVG so that its shorter side has `SHORT_SIDE_PX`: RGBA, transparent where nothing is drawn.

    Raises:
        ItemError: it cannot be parsed or rendered; it is too large, narrow, or nested; it refers to another file; or
            the extra is not installed.
    """
    check_svg(data)
    try:
        require("resvg_py", extra="svg")
    except MissingExtraError as error:
        raise ItemError(f"SVG: {error}") from None
    text = data.decode("utf-8", errors="replace")
    width, height = _render(text, {}).size
    if max(width, height) > max_ratio * min(width, height):
        raise ItemError(f"too narrow: {width} x {height} pixels, more than {max_ratio:.0f} to 1")
    if max(width, height) * SHORT_SIDE_PX**2 > max_pixels * min(width, height):
        raise ItemError(f"too many pixels: {width} x {height} with {SHORT_SIDE_PX} on the shorter side")
    return _render(text, {"width" if width <= height else "height": SHORT_SIDE_PX})


def _render(text: str, size: dict[str, int]) -> Image.Image:
    try:
        png = draw_png(svg_string=text, dpi=_PIXELS_PER_INCH, **size, **_fonts())
        return Image.open(io.BytesIO(png), formats=("PNG",))
    except (ValueError, OSError) as error:
        raise ItemError(f"damaged SVG: {error}") from None


def draw_png(**options: Any) -> bytes:
    """Draw an SVG as a PNG with the arguments of `resvg_py.svg_to_bytes`, in a process beside this one.

    resvg_py holds the lock of Python's interpreter while it draws, so that threads would draw one after the other and
    hold up everything else. Each thread that draws has a process of its own, at most one per core, which is kept until
    this process ends. Memory: 14 MB per process, and what it draws.

    Raises:
        ValueError: the SVG cannot be parsed or drawn, or the renderer crashed.
        EmbedcacheError: the process was killed, as where the machine has too little memory.
    """
    slots = _slots(os.getpid())
    renderer = slots.get()
    try:
        renderer = renderer or _Renderer()
        kind, answer = renderer.draw(options)
    except BaseException:  # the answer may still come
        if renderer is not None:
            renderer.close()
            renderer = None
        raise
    finally:
        slots.put(renderer)
    if kind == "error":
        raise ValueError(answer.decode())
    return answer


@cache
def _slots(process: int) -> "LifoQueue[_Renderer | None]":
    """Return the renderers of a process, None for one that was not started yet: a forked process has its own."""
    slots = LifoQueue[_Renderer | None]()
    for _ in range(num_cores()):
        slots.put(None)
    atexit.register(_close_all, process, slots)
    return slots


def _close_all(process: int, slots: "LifoQueue[_Renderer | None]") -> None:
    with suppress(Empty):
        while process == os.getpid():
            renderer = slots.get_nowait()
            if renderer is not None:
                renderer.close()


class _Renderer:
    """A process that draws one SVG after the other, see `svg_process`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("svg_process.py")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script), json.dumps(sys.path, default=str)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C interrupts this process only, which then ends the other
            )
        except OSError as error:  # not a fault of the SVG
            raise EmbedcacheError(f"cannot start a process that draws SVG files: {error}") from error

    def draw(self, options: Mapping[str, Any]) -> tuple[str, bytes]:
        """Return `png` and the drawing, or `error` and the reason."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        with suppress(BrokenPipeError):
            requests.write(json.dumps(options).encode() + b"\n")
            requests.flush()
        kind, _, size = answers.readline().decode().partition(" ")
        answer = answers.read(int(size or 0))
        if not size or len(answer) < int(size):
            status = self._process.wait()
            crash = next((name for name in _CRASHES if getattr(signal, name, None) == -status), None)
            if crash is not None:
                raise ValueError(f"the renderer crashed ({crash})")
            raise EmbedcacheError(
                f"a process that draws SVG files ended with status {status}; run the same command again"
            )
        return kind, answer

    def close(self) -> None:
        """End the process."""
        with suppress(OSError), self._process:  # closes its pipes and waits for it
            self._process.kill()


def check_svg(data: bytes) -> None:
    """Check the elements of a file, without building a tree of them; `ItemError` as in `render_svg`."""
    if len(data) > _MAX_BYTES:
        raise ItemError(f"SVG too large: {len(data):,} bytes, more than {_MAX_BYTES:,}")
    depth = uses = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, uses
        depth, uses = depth + 1, uses + (name.rpartition(":")[2] == "use")
        if depth > _MAX_DEPTH:
            raise ItemError(f"SVG too deep: more than {_MAX_DEPTH} nested elements")
        if uses > _MAX_USES:
            raise ItemError(f"SVG too complex: more than {_MAX_USES:,} copied elements")
        _check_link(name, attributes)

    def end(_: str) -> None:
        nonlocal depth
        depth -= 1

    def declare(name: str, *_: Any) -> None:
        raise ItemError(f"SVG with the XML entity {name!r}")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.EntityDeclHandler = start, end, declare
    try:
        parser.Parse(data, True)  # noqa: FBT003
    except expat.ExpatError as error:
        raise ItemError(f"damaged SVG: {error}") from None


def _check_link(name: str, attributes: dict[str, str]) -> None:
    """Check that an element draws no other file, which the renderer would read from any place on the disk."""
    links = (value.strip() for key, value in attributes.items() if key.rpartition(":")[2] == "href")
    if name.rpartition(":")[2] in ("image", "feImage") and not all(link.startswith(_EMBEDDED) for link in links):
        raise ItemError("SVG with an image that is not a PNG, JPEG, GIF or WebP in the file itself")


@cache
def _fonts() -> dict[str, Any]:
    """Return the options of the renderer that make one font stand for all."""
    found = find_spec("matplotlib")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    files = [str(Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")) for folder in folders]
    kinds = ("font", "serif", "sans_serif", "cursive", "fantasy", "monospace")
    return {"skip_system_fonts": True, "font_files": files, **{f"{kind}_family": "DejaVu Sans" for kind in kinds}}


_EMBEDDED = ("#", *(f"data:image/{kind}" for kind in ("png", "jpeg", "jpg", "gif", "webp")))
