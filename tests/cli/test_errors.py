"""Errors of the operating system are one line, and nothing that is printed can control the terminal."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from embedcache.cli import main
from embedcache.cli.console import print_json, print_line, print_table, run_program
from embedcache.errors import visible
from embedcache.progress import PlainProgress
from tests.cli.run import embedcache, succeed

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
    ("words", "expected"),
    [
        (("train", "c", "r", "--precision", "x"), "--precision"),
        (("train", "c", "r", "--lr", "abc"), "--lr"),
        (("train", "c", "r", "--config", "digits.toml"), "expected TOML"),
        (("curate", "combine", "c", "a", "or", "b", "o.parquet"), "minus"),
        (("inspect", "a\nb"), r"a\nb"),
        (("inspect", "x" * 300), "too long"),
        (("inspect", "caf\udce9"), r"caf\udce9"),
        (("train", "c", "s3://b/run"), "RUN"),
        (("extract", "simplecache::memory://x.tar", "c"), "double colon"),
        (("curate", "dedup", "c", "memory://d.parquet"), "memory://d.parquet"),
        (("search", "i", "--query-file", "text=a.txt"), "--query-file"),
        (("export", "npy", "c", "file:///o"), "OUT"),
        (("evaluate", "retrieval", "c", "r", "--output", "s3://b/r.json"), "--output"),
        (("inspect", "github://x"), "protocol"),
        (("extract", "data://x,y", "c"), "protocol"),
        (("inspect", "http://localhost:1/"), "cannot be read"),
        (("verify", "http://localhost:1/"), "cannot be read"),
        (("extract", "webhdfs://localhost:1/x", "c"), "cannot read"),
        (("import", "npy", "http://localhost:1/", "--file", "image=a.npy"), "cannot write"),
        (("import", "npy", "http://localhost:99999/", "--file", "image=a.npy"), "address"),
    ],
)
def test_bad_argument_is_refused(words: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 4), np.float32))
    (tmp_path / "digits.toml").write_text("seed = " + 5000 * "9")
    done = embedcache(*words, cwd=tmp_path)
    assert done.code in (1, 2)
    assert "Traceback" not in done.stderr
    assert expected in done.stderr


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


@pytest.mark.parametrize(
    ("command", "expected"),
    [("train", {"--lr", "--config"}), ("extract", {"--image-encoder", "--limit"}), ("curate select", {"--method"})],
)
def test_help_of_many_options_shows_the_common_ones(command: str, expected: set[str], tmp_path: Path) -> None:
    """Check that a newcomer sees few options, and the way to all of them."""
    name = re.compile(r"^│ (?:\*)? {0,3}(--[a-z-]+|-[a-z])", re.MULTILINE)  # not of a description that wraps
    short, full = (
        set(name.findall(succeed(*command.split(), option, cwd=tmp_path))) for option in ("--help", "--help-all")
    )
    assert expected | {"--help-all"} < short
    assert len(short) <= 15
    assert short < full


@pytest.mark.parametrize("name", ["index", "coverage", "dedup", "select"])
def test_command_of_a_group_is_found_by_its_name(name: str, tmp_path: Path) -> None:
    """Check that a command that is typed without its group names the group."""
    result = embedcache(name, "cache", cwd=tmp_path)
    assert result.code == 2
    assert f"curate {name}" in result.stderr


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("train", "cache", "run", "--learning-rate", "-1"), "--lr"),
        (("train", "cache", "run", "--wd=-1"), "--weight-decay"),
        (("search", "index", "a cat", "--top-k", "0"), "-k"),
    ],
)
def test_options_of_other_tools_are_understood(words: tuple[str, ...], option: str, tmp_path: Path) -> None:
    """Check that the usual names of other tools set our options."""
    assert embedcache(*words, cwd=tmp_path).stderr.startswith(f"error: {option}: expected")
