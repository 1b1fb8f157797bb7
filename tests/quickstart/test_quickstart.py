"""The main job, whole, on the packaged encoders and pictures."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from embedcache.cli.main import main
from embedcache.quickstart.quickstart import QuickstartReport, quickstart

pytestmark = pytest.mark.slow


class Notes:
    """Keeps the lines that a person would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, what: str, total: int, unit: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "work dir"  # a path that a shell must quote


@pytest.fixture(scope="module")
def notes() -> Notes:
    return Notes()


@pytest.fixture(scope="module")
def report(workdir: Path, notes: Notes) -> QuickstartReport:
    return quickstart(workdir, progress=notes)


def test_held_out_recall_is_far_above_chance_and_the_control_is_at_chance(report: QuickstartReport) -> None:
    figures = json.loads(report.metrics_path.read_text())["retrieval"]
    assert figures["seeds"] == [0, 1, 2]
    assert figures["num_images"] >= 463
    for way in ("i2t", "t2i"):
        assert figures[way]["r@1"] >= 0.058
        assert figures[way]["r@10"] >= 0.29
        assert figures[way]["r@10"] >= figures["closed_form"][way]["r@10"] - 0.01
        low, high = figures["chance"][way]["intervals"]["r@10"]
        control_low, control_high = figures["shuffled"][way]["intervals"]["r@10"]
        assert control_low <= high
        assert control_high >= low
    assert (figures["overlap"]["exact"], figures["overlap"]["near"]) == (0, 0)


def test_the_page_holds_everything_it_shows(report: QuickstartReport) -> None:
    page = report.page_path.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert page.count("<svg") == 2
    assert page.count("data:image/webp") > 60
    for words in ("shuffled pairs", "closed form", "chance", "first right one at rank", "right at rank 1", "OpenMoji"):
        assert words in page


def test_several_languages_are_kept(report: QuickstartReport, workdir: Path) -> None:
    from embedcache.store.cache import Cache

    languages = Cache(workdir / "cache").items("text")["language"].to_pylist()
    assert {"en", "de", "es", "fr"} == set(languages)


def test_every_printed_command_does_the_same_from_a_shell(
    report: QuickstartReport, notes: Notes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [line.removeprefix("$ ") for line in notes.lines if line.startswith("$ ")]
    assert commands == [stage.command for stage in report.stages]
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0, command
        shown = capsys.readouterr().out
        if " train " in command:
            assert "is there already, made with the same settings" in shown
        if " extract " in command:
            assert "encoded 0 images" in shown
            assert "encoded 0 texts" in shown


def test_a_second_run_uses_what_is_there(report: QuickstartReport, workdir: Path) -> None:
    notes = Notes()
    again = quickstart(workdir, progress=notes)
    said = "\n".join(notes.lines)
    assert "encoded 0 images, reused 1,893" in said
    assert said.count("is there already") == 9
    assert again.reports == report.reports
