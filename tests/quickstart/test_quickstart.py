"""The whole workflow on the packaged encoders and images: the quickstart, and the tutorial on its image features."""

import ast
import contextlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from embedcache.cli.main import main
from embedcache.errors import PathError
from embedcache.extract.extract import extract
from embedcache.quickstart.quickstart import SOURCE, QuickstartReport, quickstart
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.blocks import TUTORIAL, VARIES, blocks_of, run_block
from tests.net import commands
from tests.net.checks import check_features, check_values
from tests.net.record import NUM_REAL_ITEMS
from tests.recorded import RecordedProgress
from tests.toy import TEXT as TOY

pytestmark = pytest.mark.slow

ENGLISH = "openmoji:en"
NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "work dir"  # a path that a shell must quote


@pytest.fixture(scope="module")
def notes() -> RecordedProgress:
    return RecordedProgress()


@pytest.fixture(scope="module")
def report(workdir: Path, notes: RecordedProgress) -> QuickstartReport:
    """Run it on the English names alone: the others are not trained on, and take 9 seconds to encode."""
    return quickstart(ENGLISH, workdir, progress=notes)


def test_figures_are_those_of_the_net(report: QuickstartReport, workdir: Path) -> None:
    """Compute the features and figures of all commands, which `tests.net.record` recorded."""
    with contextlib.chdir(workdir):
        check_features("quickstart", commands.features_of("cache", NUM_REAL_ITEMS))
        check_values("quickstart", commands.quickstart_figures())


def test_recall_beats_chance_and_control(report: QuickstartReport) -> None:
    metrics = json.loads(report.metrics_path.read_text())["retrieval"]
    assert metrics["seeds"] == [0, 1, 2]
    assert metrics["num_images"] >= 463
    for way in ("i2t", "t2i"):
        assert metrics[way]["r@1"] >= 0.058
        assert metrics[way]["r@10"] >= 0.29
        assert metrics[way]["r@10"] >= metrics["closed_form"][way]["r@10"] - 0.01
        low, high = metrics["chance"][way]["intervals"]["r@10"]
        control_low, control_high = metrics["shuffled"][way]["intervals"]["r@10"]
        assert control_low <= high
        assert control_high >= low
    assert (metrics["overlap"]["exact"], metrics["overlap"]["near"]) == (0, 0)


def test_page_is_self_contained(report: QuickstartReport) -> None:
    page = report.page_path.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert page.count("<svg") == 3
    assert page.count("data:image/webp") > 60
    for words in (
        "shuffled pairs",
        "closed form",
        "chance",
        "correct at rank 1",
        "Images: OpenMoji",
        "Validation chose",
        ">0.317<",
    ):
        assert words in page


def test_all_languages_are_cached(tmp_path: Path) -> None:
    extract(open_source(SOURCE), tmp_path / "cache", text_encoder=[TOY])
    languages = Cache(tmp_path / "cache").items("text")["language"].to_pylist()
    assert set(languages) == {"en", "de", "es", "fr"}


def test_printed_commands_reuse_the_results(
    report: QuickstartReport,
    notes: RecordedProgress,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = [line.removeprefix("$ ") for line in notes.notes if line.startswith("$ ")]
    assert commands == [stage.command for stage in report.stages]
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0, command
        output = capsys.readouterr().out
        if " train " in command:
            assert "reused, trained earlier with the same settings" in output
        if " extract " in command:
            assert "encoded 0 images" in output or "imported 0 images" in output
            assert "encoded 0 texts" in output


def test_second_run_reuses_the_results(report: QuickstartReport, workdir: Path) -> None:
    notes = RecordedProgress()
    again = quickstart(ENGLISH, workdir, progress=notes)
    output = "\n".join(notes.notes)
    assert "encoded 0 images, reused 1,893" in output
    assert output.count("reused, trained earlier") == 9
    assert again.retrieval == report.retrieval


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    (tmp_path / "report.html").write_text("of the study")
    with pytest.raises(PathError, match="expected a new folder, or that of .*, got a finished study"):
        quickstart(ENGLISH, tmp_path)
    assert (tmp_path / "report.html").read_text() == "of the study"


def test_tutorial_prints_what_it_shows(
    report: QuickstartReport, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run its blocks in order, in one folder, and compare the shown lines with the output except for numbers."""
    monkeypatch.setenv("COLUMNS", "120")
    shutil.copytree(workdir / "cache", tmp_path / "emoji")  # its source and encoders are those of the tutorial
    output, missing = "", {}
    for block in blocks_of(TUTORIAL):
        if block.language == "text" and not block.comment.startswith(VARIES):
            if lines := plain(block.code) - plain(output):
                missing[block.code] = lines, output
        elif block.language in ("sh", "python"):
            code = block.code.replace("embedcache train ", "embedcache train --patience 4 ")  # of the same 30 epochs
            output = run_block(block._replace(code=code), tmp_path)
    assert not missing


def test_notebook_runs(
    report: QuickstartReport, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run its cells beside the results of the quickstart, which it reuses, and show the last value of each."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    (tmp_path / "embedcache-quickstart").symlink_to(workdir)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert not cell["outputs"], "outputs are not kept: they change with every machine"
        *statements, last = ast.parse("".join(cell["source"]).replace(SOURCE, ENGLISH)).body
        if not isinstance(last, ast.Expr):
            statements.append(last)
        exec(compile(ast.Module(statements, []), str(NOTEBOOK), "exec"), names)  # noqa: S102
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
    page = "\n".join(shown)
    assert names["reports"][0].line().startswith("efficientnet-lite0 (patch_mean): encoded 0 images, reused 1,893")
    assert names["report"].reused, "the notebook trains as the quickstart does, so its run is reused"
    assert "1,893 samples, 1,893 images, 1,9" in page
    assert page.count("data:image/webp") == 2 * 7
    assert "Images: OpenMoji" in page
    assert names["model"].classify(names["image"], ["red circle", "green tree"]).best == ["red circle"]
    assert names["losses"][-1] < names["losses"][0]


def plain(output: str) -> set[str]:
    """Return the lines of an output without numbers, table borders and spaces."""
    lines = (re.sub(r"[\d.,]+", "#", re.sub(r"[\u2500-\u257f]", " ", line)) for line in output.splitlines())
    return {" ".join(line.split()) for line in lines} - {""}
