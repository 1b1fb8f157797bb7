"""Drawings of SVG through resvg, each in a process beside this one.

resvg_py holds the lock of Python's interpreter while it draws, so that threads would draw one after the other and hold
up everything else; and a crash of the renderer would end the whole extraction.
"""

import atexit
import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import LifoQueue
from signal import SIGKILL
from typing import Any

from embedcache.errors import EmbedcacheError
from embedcache.processes import num_cores


def draw_png(**options: Any) -> bytes:
    """Draw an SVG as a PNG with the arguments of `resvg_py.svg_to_bytes`.

    Each thread that draws has a process of its own, at most one per core, which ends with this one.

    Raises:
        ValueError: the SVG cannot be parsed or drawn, or the renderer crashed.
        EmbedcacheError: the process was killed, as where the machine has too little memory.
    """
    slots = _slots(os.getpid())
    renderer = slots.get()
    try:
        if renderer is None:
            script = Path(__file__).with_name("draw_process.py")
            renderer = subprocess.Popen(
                [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        return _draw(renderer, options)
    finally:
        slots.put(None if renderer is None or renderer.returncode is not None else renderer)


@cache
def _slots(_: int) -> "LifoQueue[subprocess.Popen[bytes] | None]":
    """Return the renderers of a process, None for one that was not started yet: a forked process has its own."""
    slots = LifoQueue[subprocess.Popen[bytes] | None]()
    for _ in range(num_cores()):
        slots.put(None)
    atexit.register(_end, slots)
    return slots


def _end(slots: "LifoQueue[subprocess.Popen[bytes] | None]") -> None:
    for renderer in filter(None, slots.queue):
        renderer.kill()
        renderer.communicate()


def _draw(renderer: "subprocess.Popen[bytes]", options: dict[str, Any]) -> bytes:
    assert renderer.stdin is not None
    assert renderer.stdout is not None
    try:
        renderer.stdin.write(json.dumps(options).encode() + b"\n")
        renderer.stdin.flush()
        kind, size = renderer.stdout.readline().split()
    except (OSError, ValueError):
        with suppress(OSError), renderer:  # closes its pipes and waits for it
            pass
        if renderer.returncode == -SIGKILL:
            raise EmbedcacheError("a process that draws SVG files was killed; run the same command again") from None
        raise ValueError("the renderer crashed") from None
    answer = renderer.stdout.read(int(size))
    if kind == b"error":
        raise ValueError(answer.decode())
    return answer
