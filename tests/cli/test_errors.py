"""Errors of the operating system are one line, and nothing that is printed can control the terminal."""

import asyncio
import errno
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from embedcache.cli import main
from embedcache.cli.console import print_json, print_line, print_table
from embedcache.cli.failures import run_program
from embedcache.errors import visible
from embedcache.progress import PlainProgress
from tests.cli.run import embedcache

HOSTILE = "\x1b]0;owned\x07\x9b2J\u202eabc\ud800"


@pytest.mark.parametrize(
    "name", ["EIO", "ESTALE", "EFBIG", "EMFILE", "ENAMETOOLONG", "ENOLCK", "ENOTSUP", "EACCES", "EROFS", "ELOOP"]
)
def test_error_of_the_system_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(**_: str) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "a/b")

    monkeypatch.setattr(main, "root_command", lambda: fail)
    done = embedcache("inspect", "a", cwd=tmp_path)
    assert done.code == 1
    assert done.stderr.startswith(f"error: a/b: {os.strerror(getattr(errno, name))}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "c", "r", "--precision", "x"), "'--precision': expected one of float32, float16, "),
        (("train", "c", "r", "--lr", "abc"), "Invalid value for '--lr': expected a number, got 'abc'"),
        (("train", "c", "r", "--epochs", "2.5"), "Invalid value for '--epochs': expected a whole number, got '2.5'"),
        (("curate", "combine", "c", "a", "or", "b", "o.parquet"), "'and|minus': expected one of and, minus, got 'or'"),
        (("inspect", "a\nb"), r"error: a\nb does not exist"),
        (("inspect", "x" * 300), "File name too long; use shorter names"),
        (("inspect", "caf\udce9"), r"expected arguments in UTF-8, got 'caf\udce9'"),
        (
            ("train", "c", "s3://b/run"),
            "RUN: expected a path on this machine, got the URL s3://b/run; name a local path",
        ),
        (("train", "c", "filecache::s3://b/run"), "got the URL filecache::s3://b/run; name a local path"),
        (("extract", "simplecache::memory://x.tar", "c"), "chained by a double colon: simplecache::memory://x.tar;"),
        (("curate", "index", "c", "gs://b/i"), "INDEX: expected a path on this machine, got the URL gs://b/i;"),
        (("curate", "dedup", "c", "memory://d.parquet"), "path on this machine, got the URL memory://d.parquet;"),
        (
            ("search", "i", "--query-file", "text=a.txt"),
            "--query-file: expected MODALITY=FILE with a modality of image, audio, video, points, such as",
        ),
        (("export", "npy", "c", "file:///o"), "OUT: expected a path on this machine, got the URL file://o;"),
        (
            ("evaluate", "retrieval", "c", "r", "--output", "s3://b/r.json"),
            "--output: expected a path on this machine, got the URL s3://b/r.json;",
        ),
    ],
)
def test_bad_argument_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = embedcache(*words, cwd=tmp_path)
    assert done.code in (1, 2)
    assert "Traceback" not in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "github://x"), "github://x: URLs of this protocol cannot be read: "),
        (("inspect", "reference://x"), "reference://x: URLs of this protocol cannot be read: "),
        (("extract", "dir://x", "c"), "dir://x: URLs of this protocol cannot be read: "),
        (("inspect", "http://localhost:1/"), "http://localhost:1/ cannot be read: Cannot connect to host "),
        (("verify", "http://localhost:1/"), "http://localhost:1/ cannot be read: Cannot connect to host "),
        (("extract", "data://x,y", "c"), "data://x,y: URLs of this protocol cannot be read: "),
        (("extract", "webhdfs://localhost:1/x", "c"), "cannot read webhdfs:///x: "),
        (
            ("import", "npy", "http://localhost:1/", "--file", "image=a.npy"),
            "cannot write http://localhost:1/: ",
        ),
        (
            ("import", "npy", "data://x", "--file", "image=a.npy"),
            "data://x: URLs of this protocol cannot be read: ",
        ),
        (
            ("import", "npy", "http://localhost:99999/", "--file", "image=a.npy"),
            "a remote service failed: Port out of range 0-65535; check the address and the network",
        ),
    ],
)
def test_url_that_cannot_be_used_is_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 4), np.float32))
    done = embedcache(*words, cwd=tmp_path)
    assert done.code == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (("train",), "CACHE"),
        (("train", "--lr", "0.1", "c"), "RUN"),
        (("sweep", "c"), "SPACE"),
        (("sweep", "c", "space.toml"), "STUDY"),
        (("cache", "merge", "c"), "OUT"),
        (("curate", "coverage", "c"), "CONCEPTS"),
    ],
)
def test_first_missing_argument_is_named(words: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    done = embedcache(*words, cwd=tmp_path)
    assert done.code == 2
    assert f"Missing argument '{missing}'" in done.stderr


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("train", "my cache", "r"), "embedcache extract SOURCE 'my cache'"),
        (("train", "my classes.txt", "r"), "embedcache extract 'my classes.txt' CACHE ('prompts:my classes.txt' if"),
        (("evaluate", "retrieval", "c", "my run"), "embedcache train CACHE 'my run'"),
        (("search", "my index", "a dog"), "embedcache curate index CACHE 'my index'"),
    ],
)
def test_command_in_a_message_quotes_its_paths(words: tuple[str, ...], command: str, tmp_path: Path) -> None:
    (tmp_path / "my classes.txt").write_text("a\n")
    done = embedcache(*words, cwd=tmp_path)
    assert done.code == 1
    assert command in done.stderr


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def allocate() -> None:
        torch.empty(2**50)

    with pytest.raises(SystemExit):
        run_program(allocate)
    assert capsys.readouterr().err == (
        f"error: out of memory: can't allocate memory: you tried to allocate {2**52} bytes. Error code 12 (Cannot "
        "allocate memory); use smaller settings, or give this process more memory\n"
    )


@pytest.mark.slow
def test_tracebacks_of_errors_that_gcsfs_raises_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    retry = pytest.importorskip("gcsfs.retry")

    async def fail() -> None:
        raise retry.HttpError({"code": 400, "message": "x"})

    run_program(lambda: None)
    with pytest.raises(retry.HttpError):
        asyncio.run(retry.retry_request(fail)())
    for line in ("Could not determine bucket type for bucket name b", "deferred close failed"):
        logging.getLogger("gcsfs").warning(line)
    assert caplog.messages == ["deferred close failed"]


def test_deleted_working_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["embedcache", "inspect", "a"])
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match="1"):
        main.main()
    assert capsys.readouterr().err == "error: the working folder does not exist any more; change to another one\n"


def test_table_in_a_file_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    caption = f"a{' red' * 80} boat"
    print_table(["caption", "key"], [[caption, "1"]])
    assert f"│ {caption} │   1 │" in capsys.readouterr().out.splitlines()


def test_cells_of_tables_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """A key such as `12:100:7` has the name of an emoji in it, and `[/b]` would end a style."""
    print_table(["a:cat:b"], [["12:100:7"], ["[b]x[/b] [/i]"]], title=":key: of [b]")
    shown = capsys.readouterr().out
    for text in ("a:cat:b", "12:100:7", "[b]x[/b] [/i]", ":key: of [b]"):
        assert text in shown


def test_controls_are_printed_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible("a\tb\n" + HOSTILE) == "a\tb\n" + r"\x1b]0;owned\x07\x9b2J\u202eabc\ud800"
    print_line(HOSTILE)
    print_table([HOSTILE], [[HOSTILE]], title=HOSTILE)
    print_json({"caption": HOSTILE})
    progress = PlainProgress()
    progress.start(HOSTILE, 1, "items")
    progress.note(HOSTILE)
    progress.advance(1)
    progress.finish()
    shown = capsys.readouterr()
    assert not any(visible(text) != text for text in (shown.out, shown.err))
    text = shown.out[shown.out.index("{") :]
    assert json.loads(text)["caption"] == HOSTILE
