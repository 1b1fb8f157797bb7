"""The examples in the documentation hold: those of Python and of the tutorial run, other command lines are parsed.

A block that can do neither has a comment above it: `<!-- not run: the reason -->`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.core import TyperGroup

from embedcache.cli.main import app
from tests.pictures import write_pictures

ROOT = Path(__file__).parents[1]
OTHERS = re.compile(r"#|(\w+=\S+ )?(just|(python -m )?pip install) ")
"""How lines begin that are comments, or that CI runs."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^(?:<!-- (.+?) -->\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""An HTML comment right above, the language, and what is in the block."""
NOT_RUN = "not run: "
VARIES = "varies: "
"""How such comments begin; the reason follows."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    comment: str
    language: str
    code: str

    @property
    def is_run(self) -> bool:
        """Whether nothing says why it is not."""
        return not self.comment.startswith(NOT_RUN)


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    return [Block(str(page.relative_to(ROOT)), *found) for found in BLOCK.findall(page.read_text())]


def blocks(language: str) -> list[Block]:
    """Every block of a language outside the tutorial, whose blocks run together."""
    return [block for page in PAGES if page != TUTORIAL for block in blocks_of(page) if block.language == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: `flickr`, a cache, and `photos`, a folder with captions."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "tests" / "golden" / "cache-1", folder / "flickr")
    write_pictures(folder / "photos", 120)
    return folder


PYTHON = [block for block in blocks("python") if block.is_run]


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.code[:30].replace("\n", " "))
def test_python_examples_run(folder: Path, block: Block) -> None:
    done = run_block(block, folder)
    assert done.returncode == 0, f"{block.page}: {done.stderr}"


LINES = [
    (block, line)
    for block in blocks("sh")
    if block.is_run
    for text in block.code.splitlines()
    for line in text.rpartition("torchrun ")[2].split(" -- ")[-1].split(" && ")
]
COMMANDS = [(block.page, line) for block, line in LINES if line.startswith("embedcache ")]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_lines_are_understood(page: str, line: str) -> None:
    parse(line)


@pytest.mark.parametrize(
    "line", ["embedcache exrtact a b", "embedcache train cache/ run/ --epoks 3", "embedcache verify"]
)
def test_a_wrong_command_line_would_be_seen(line: str) -> None:
    usage_error = typer.BadParameter.__mro__[1]
    with pytest.raises((KeyError, usage_error)):
        parse(line)


def parse(line: str) -> None:
    """Let the command's own parser read a line, without running it."""
    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    while isinstance(command, TyperGroup):  # typer has a click of its own, whose groups are not click's
        command = command.commands[words.pop(0)]
    command.make_context("embedcache", words)


def test_what_is_not_checked_says_why() -> None:
    """A command of another program, which only its own parser could check, stands in a block that says why."""
    unchecked = {
        f"{block.page}: {line}" for block, line in LINES if not (line.startswith("embedcache ") or OTHERS.match(line))
    }
    assert not unchecked


def test_there_are_examples() -> None:
    assert len(COMMANDS) > 10
    assert len(PYTHON) >= 4
    assert len(blocks_of(TUTORIAL)) > 20


@pytest.mark.slow
def test_the_tutorial_runs_and_says_what_it_shows(tmp_path: Path) -> None:
    """Its blocks in order, in one folder. A line that is shown comes out, whatever its numbers."""
    said = ""
    for block in blocks_of(TUTORIAL):
        if block.language == "text" and not block.comment.startswith(VARIES):
            assert plain(block.code) <= plain(said), f"{block.code}\n--- came out as ---\n{said}"
        elif block.language in ("sh", "python"):
            done = run_block(block, tmp_path)
            said = done.stdout + done.stderr
            assert done.returncode == 0, f"{block.code}\n{said}"


def run_block(block: Block, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a block of Python or of a shell in a folder."""
    command = [sys.executable, "-W", "error", "-c"] if block.language == "python" else ["bash", "-euc"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "COLUMNS": "120"}
    return subprocess.run(
        [*command, block.code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def plain(output: str) -> set[str]:
    """Take output apart into lines without numbers, frames of tables and spaces."""
    lines = (re.sub(r"[\d.,]+", "#", re.sub(r"[\u2500-\u257f]", " ", line)) for line in output.splitlines())
    return {" ".join(line.split()) for line in lines} - {""}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_readme_names_every_package() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "embedcache").glob("*/__init__.py"):
        assert re.search(rf"\b{path.parent.name}/", readme), f"README lacks {path.parent.name}/"
