"""Runs of a pipeline in a process of its own, on one core."""

import os
import subprocess
import sys
from pathlib import Path

from tests.blocks import ROOT


def run_tiny(pipeline: str, folder: Path) -> None:
    """Run `python -m pipelines.NAME folder --tiny` on one core, where all its steps share one process.

    It is on that core before any library counts cores: threads of a library that expects two would wait for each other,
    busily.
    """
    core = max(os.sched_getaffinity(0))
    subprocess.run(
        [sys.executable, "-m", f"pipelines.{pipeline}", str(folder), "--tiny"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
