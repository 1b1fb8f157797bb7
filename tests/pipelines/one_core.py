"""Runs of pipelines on one core."""

import io
import os
import sys
from contextlib import redirect_stdout
from importlib import import_module
from unittest import mock

import torch

from embedcache.processes import num_cores


def run_tiny(pipeline: str, *words: object) -> str:
    """Run `python -m pipelines.NAME words --tiny` in this process, and return what it prints.

    A pipeline that sees one core runs all its steps in one process; each other process would import for seconds.
    """
    main, printed = import_module(f"pipelines.{pipeline}").main, io.StringIO()
    cores, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    num_cores.cache_clear()
    try:
        with (
            redirect_stdout(printed),
            mock.patch.dict(os.environ, COLUMNS="200"),
            mock.patch.object(sys, "argv", [pipeline, *map(str, words), "--tiny"]),
        ):
            main()
    finally:
        os.sched_setaffinity(0, cores)
        num_cores.cache_clear()
        torch.set_num_threads(num_threads)
    return printed.getvalue()
