"""The process in which SVG files are drawn; `drawing.draw_png` runs this file as a script.

Each line of the standard input is a JSON object, the arguments of `resvg_py.svg_to_bytes`. Each answer is a line with
its kind, `png` or `error`, and its number of bytes, then these bytes. It ends with the standard input, so also when the
process that started it is killed.
"""

import json
import os
import signal
import sys

import resvg_py


def main() -> None:
    """Draw until the standard input ends; what Rust writes to the standard error where it panics is discarded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C interrupts the process that started this one
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for line in sys.stdin.buffer:
        try:
            kind, answer = "png", resvg_py.svg_to_bytes(**json.loads(line))
        except BaseException as error:  # noqa: BLE001 - a panic of Rust has no class that could be imported
            kind, answer = "error", str(error).encode()
        sys.stdout.buffer.write(f"{kind} {len(answer)}\n".encode() + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
