"""Progress on standard error: names of parts, states, and bars that stay when they are finished."""

import pytest

from embedcache.cli import console
from embedcache.cli.console import PlainProgress, TerminalProgress


def test_lines_name_the_part_and_the_state(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0)
    progress = PlainProgress()
    progress.finish()  # of nothing
    for name in ("sound", "lips"):
        part = progress.part(name)
        part.start("training", 40, "utterances")
        part.describe(f"loss of {name}")
        part.advance(10)
        part.finish()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", ")[0] for line in lines] == [
        "sound: training: 10/40 utterances",
        "sound: training: 10 utterances in 0.0 s",
        "lips: training: 10/40 utterances",
        "lips: training: 10 utterances in 0.0 s",
    ]
    assert lines[0].endswith(" s left; loss of sound")


def test_bars_of_parts_are_shown_at_once_and_stay(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TerminalProgress()
    first, second = progress.part("sound"), progress.part("lips")
    for part in (first, second):
        part.start("training", 40, "utterances")
        part.advance(30)
    first.describe("epoch 2/2")
    first.advance(10)
    first.finish()
    progress.note("sound is done")
    second.start("recognize", 0, "utterances")  # ends the training
    second.finish()
    second.finish()
    found = [line.split("·")[0].split() for line in capsys.readouterr().err.splitlines() if line.strip()]
    words = [[word for word in line if not word.startswith("━")] for line in found]
    assert words == [
        ["sound:", "training", "40/40"],
        ["sound", "is", "done"],
        ["lips:", "training", "30/40"],
        ["lips:", "recognize"],
    ]
