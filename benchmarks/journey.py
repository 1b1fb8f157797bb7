#!/usr/bin/env python3
"""Count our files and functions that run during one command, or during a piece of Python: the length of its way.

    python benchmarks/journey.py train cache/ run/ --projector mlp --epochs 2
    python benchmarks/journey.py --list curate coverage cache/ cache/ --label label --modality image
    python benchmarks/journey.py --python rows.py      # counts what runs between start() and stop() in rows.py

Run it with the Python of an environment in which embedcache is installed. A file counts when one of its functions
runs, in any thread of this process; module bodies, lambdas, comprehensions and class bodies do not. The last line is
the count.
"""

import runpy
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import embedcache

ROOT = f"{Path(embedcache.__file__).resolve().parent}/"
OPTIMIZED = 0x1  # code of functions, not of modules and classes
calls: dict[str, int] = {}
functions: set[tuple[str, int]] = set()


def profile(frame: FrameType, event: str, argument: Any) -> None:
    code = frame.f_code
    if event == "call" and code.co_flags & OPTIMIZED and code.co_filename.startswith(ROOT) and "<" not in code.co_name:
        calls[code.co_filename] = calls.get(code.co_filename, 0) + 1
        functions.add((code.co_filename, code.co_firstlineno))


def start() -> None:
    """Begin to count, in this thread and in those that it starts."""
    threading.setprofile(profile)
    sys.setprofile(profile)


def stop() -> None:
    """Stop counting."""
    sys.setprofile(None)
    threading.setprofile(None)


def main() -> None:
    words = sys.argv[1:]
    is_listed = bool(words) and words[0] == "--list"
    words = words[is_listed:]
    try:
        if words and words[0] == "--python":
            runpy.run_path(words[1], init_globals={"start": start, "stop": stop}, run_name="__main__")
        else:
            sys.argv = ["embedcache", *words]
            from embedcache.cli.main import main as run

            start()
            run()
    except SystemExit as end:
        if end.code:
            print(f"exit status {end.code}", file=sys.stderr)
    finally:
        stop()
    if is_listed:
        for name, count in sorted(calls.items()):
            print(f"{count:>7} {name.removeprefix(ROOT)}", file=sys.stderr)
    lines = sum(Path(name).read_text(encoding="utf-8").count("\n") for name in calls)
    print(f"{len(calls)} files, {len(functions)} functions, {lines:,} lines of these files", file=sys.stderr)


if __name__ == "__main__":
    main()
