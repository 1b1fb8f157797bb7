"""The process in which SVG files are drawn; `svg.draw_png` runs this file as a script.

It imports nothing else of embedcache, so that it starts in some 30 ms. Each line of the standard input is a JSON
object, the arguments of `resvg_py.svg_to_bytes`. Each answer is a line with its kind, `png` or `error`, and its number
of bytes, then these bytes. It ends with the standard input, so also when the process that started it is killed.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> None:
    """Draw until the standard input ends; the argument is the search path of the process that started this one."""
    sys.path[:] = json.loads(sys.argv[1])
    import resvg_py

    for line in sys.stdin.buffer:
        try:
            with _quiet():
                kind, answer = "png", resvg_py.svg_to_bytes(**json.loads(line))
        except (ValueError, RuntimeError, OSError) as error:
            kind, answer = "error", str(error).encode()
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, whose class has no module to import it from
                raise
            kind, answer = "error", f"the renderer panicked: {error}".encode()
        sys.stdout.buffer.write(f"{kind} {len(answer)}\n".encode())
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what Rust writes to the standard error where it panics or has too little memory."""
    shown, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)
        os.close(null)


if __name__ == "__main__":
    main()
