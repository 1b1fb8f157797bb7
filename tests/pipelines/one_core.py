"""Runs of pipelines on one core."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from unittest import mock

import torch

from embedcache.processes import num_cores


@contextmanager
def one_core() -> Iterator[None]:
    """Run on one core: a pipeline that sees one core runs all its steps in one process.

    Each other process would import for seconds; and threads of a library wait for each other, busily, where a core is
    taken.
    """
    cores, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    num_cores.cache_clear()
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        num_cores.cache_clear()
        torch.set_num_threads(num_threads)


def run_tiny(pipeline: str, *words: object) -> str:
    """Run `python -m pipelines.NAME words --tiny` in this process, on one core, and return what it prints."""
    main, printed = import_module(f"pipelines.{pipeline}").main, io.StringIO()
    with (
        one_core(),
        redirect_stdout(printed),
        mock.patch.dict(os.environ, COLUMNS="200"),
        mock.patch.object(sys, "argv", [pipeline, *map(str, words), "--tiny"]),
    ):
        main()
    return printed.getvalue()
