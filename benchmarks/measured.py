"""Run a module as `python -m` does, and write what it took: python -m benchmarks.measured FILE MODULE [WORDS].

The peak that the system tells of a child counts the memory of the process that started it, so the child tells its own.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from embedcache.provenance import peak_memory_bytes


class Took(NamedTuple):
    """What a command took.

    Args:
        seconds: from start to end, imports included.
        cpu_s: of all its threads.
        peak_gb: largest resident memory.
    """

    seconds: float
    cpu_s: float
    peak_gb: float


def run_embedcache(words: Sequence[str], *, folder: Path, is_quiet: bool = True) -> Took:
    """Run `embedcache` with some words in a process of its own."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "benchmarks.measured", file.name, "embedcache", *words]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
        out = subprocess.DEVNULL if is_quiet else None
        started = time.perf_counter()
        subprocess.run(command, check=True, cwd=folder, env=environment, stdout=out, stderr=out)
        seconds = time.perf_counter() - started
        return Took(seconds, **json.loads(Path(file.name).read_text()))


def main() -> None:
    """Run the module and write."""
    path, module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    code: object = None
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    Path(path).write_text(json.dumps({"cpu_s": time.process_time(), "peak_gb": peak_memory_bytes() / 1e9}))
    sys.exit(code)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
