"""Start-up time of `embedcache --help`, relative to that of Python alone."""

import subprocess
import sys

from benchmarks.measure import median_seconds, show


def main(*, quick: bool) -> None:
    """Print starts per second."""
    nothing = [sys.executable, "-c", "pass"]
    show_help = [sys.executable, "-m", "embedcache", "--help"]
    rates = [
        (name, 1 / median_seconds(lambda command=command: subprocess.run(command, capture_output=True, check=True)))  # type: ignore[misc]
        for name, command in (("python -c pass", nothing), ("embedcache --help", show_help))
    ]
    show("start", "starts/s", rates)
