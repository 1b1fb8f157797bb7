"""How long `embedcache --help` takes, beside Python starting and doing nothing."""

import subprocess
import sys

from benchmarks.measure import median_seconds, show


def main(*, quick: bool) -> None:
    """Print starts a second."""
    nothing = [sys.executable, "-c", "pass"]
    asking = [sys.executable, "-m", "embedcache", "--help"]
    rates = [
        (name, 1 / median_seconds(lambda command=command: subprocess.run(command, capture_output=True, check=True)))  # type: ignore[misc]
        for name, command in (("python -c pass", nothing), ("embedcache --help", asking))
    ]
    show("start", "starts/s", rates)
