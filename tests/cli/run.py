"""Runs `embedcache` in this process, as a shell would."""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from embedcache import registry
from embedcache.cli.main import main

TOY = ("--image-encoder", "tests.toy:open_toy", "--text-encoder", "tests.toy:open_toy")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str


def embedcache(*words: object, cwd: Path) -> Result:
    """Run a command in a folder; whatever it raises has become an exit code."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["embedcache", *map(str, words)]),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.object(registry, "_USED_PLUGINS", set()),  # those of other tests in this process
    ):
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return Result(code=code, stdout=out.getvalue(), stderr=err.getvalue())


def succeed(*words: object, cwd: Path) -> str:
    """Run a command that must succeed, and return its standard output."""
    done = embedcache(*words, cwd=cwd)
    assert done.code == 0, done.stderr
    return done.stdout
