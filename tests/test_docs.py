"""Examples in the documentation: Python blocks and the tutorial are run, other command lines are parsed.

A block that cannot be checked has a comment above it: `<!-- not run: the reason -->`.
"""

import contextlib
import io
import itertools
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.core import TyperGroup

from embedcache import arrays
from embedcache.cli.main import app
from tests.cli.run import embedcache
from tests.images import write_images

ROOT = Path(__file__).parents[1]
OTHERS = re.compile(r"#|(\w+=\S+ )?(just|(python -m )?pip install) ")
"""Beginnings of lines that are comments or that CI runs."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^(?:<!-- (.+?) -->\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""The HTML comment right above, the language and the content of a block."""
NOT_RUN = "not run: "
VARIES = "varies: "
"""Beginnings of such comments; the reason follows."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    comment: str
    language: str
    code: str

    @property
    def is_run(self) -> bool:
        """Whether no comment says that the block is not run."""
        return not self.comment.startswith(NOT_RUN)


def blocks_of(page: Path) -> list[Block]:
    """Return all blocks of a page, in order."""
    return [Block(str(page.relative_to(ROOT)), *found) for found in BLOCK.findall(page.read_text())]


def blocks(language: str) -> list[Block]:
    """Return all blocks of a language, except those of the tutorial, which are run together."""
    return [block for page in PAGES if page != TUTORIAL for block in blocks_of(page) if block.language == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which examples run, with a cache `flickr` and `photos`, images with captions."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "tests" / "golden" / "cache-1", folder / "flickr")
    write_images(folder / "photos", 120)
    return folder


PYTHON = [block for block in blocks("python") if block.is_run]


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.code[:30].replace("\n", " "))
def test_python_examples_run(folder: Path, block: Block) -> None:
    run_block(block, folder)


LINES = [
    (block, line)
    for block in blocks("sh")
    if block.is_run
    for text in block.code.splitlines()
    for line in text.rpartition("torchrun ")[2].split(" -- ")[-1].split(" && ")
]
COMMANDS = [(block.page, line) for block, line in LINES if line.startswith("embedcache ")]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_line_parses(page: str, line: str) -> None:
    parse(line)


@pytest.mark.parametrize(
    "line", ["embedcache exrtact a b", "embedcache train cache/ run/ --epoks 3", "embedcache verify"]
)
def test_wrong_command_line_fails(line: str) -> None:
    usage_error = typer.BadParameter.__mro__[1]
    with pytest.raises((KeyError, usage_error)):
        parse(line)


def parse(line: str) -> None:
    """Parse a line with the parser of its command, without running it."""
    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    while isinstance(command, TyperGroup):  # typer has a click of its own, whose groups are not click's
        command = command.commands[words.pop(0)]
    command.make_context("embedcache", words)


def test_unchecked_lines_have_a_reason() -> None:
    """Check that commands of other programs, which cannot be parsed here, are in blocks with a reason."""
    unchecked = {
        f"{block.page}: {line}" for block, line in LINES if not (line.startswith("embedcache ") or OTHERS.match(line))
    }
    assert not unchecked


def test_examples_are_found() -> None:
    assert len(COMMANDS) > 10
    assert len(PYTHON) >= 4
    assert len(blocks_of(TUTORIAL)) > 20


@pytest.mark.slow
def test_tutorial_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run its blocks in order, in one folder, and compare the shown lines with the output except for numbers."""
    monkeypatch.setenv("COLUMNS", "120")
    output, missing = "", {}
    for block in blocks_of(TUTORIAL):
        if block.language == "text" and not block.comment.startswith(VARIES):
            if lines := plain(block.code) - plain(output):
                missing[block.code] = lines, output
        elif block.language in ("sh", "python"):
            output = run_block(block, tmp_path)
    assert not missing


def run_block(block: Block, folder: Path) -> str:
    """Run a block in a folder and return its output; commands of embedcache and Python run in this process."""
    if block.language == "python":
        output = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            exec(compile(block.code, block.page, "exec"), {"__name__": "__main__"})  # noqa: S102
        return output.getvalue()
    parts = itertools.groupby(block.code.splitlines(), key=lambda line: line.startswith("embedcache "))
    return "".join(run_lines(list(lines), folder, is_command=is_command) for is_command, lines in parts)


def run_lines(lines: list[str], folder: Path, *, is_command: bool) -> str:
    """Run lines of a shell block, which are commands of embedcache or a script."""
    if is_command:
        results = [embedcache(*shlex.split(line)[1:], cwd=folder) for line in lines]
        assert all(result.code == 0 for result in results), results
        return "".join(result.stdout + result.stderr for result in results)
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def plain(output: str) -> set[str]:
    """Return the lines of an output without numbers, table borders and spaces."""
    lines = (re.sub(r"[\d.,]+", "#", re.sub(r"[\u2500-\u257f]", " ", line)) for line in output.splitlines())
    return {" ".join(line.split()) for line in lines} - {""}


def test_links_exist() -> None:
    """Check the files and anchors of links; anchors of Python names, `embedcache.…`, are generated with the site."""
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page, link in links
        if not link.startswith("http") and is_broken(page, link)
    ]
    assert not broken


def is_broken(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    if not target.exists():
        return True
    return bool(anchor) and not anchor.startswith("embedcache.") and anchor not in anchors_of(target)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, formed as GitHub and the site form them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("link", ["train.md#choose-a-projektor", "no-such-page.md", "#no-such-section"])
def test_broken_link_is_found(link: str) -> None:
    assert is_broken(ROOT / "docs" / "howto" / "evaluate.md", link)


def test_readme_names_every_module_and_package() -> None:
    tree = re.search(r"^embedcache/\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert tree
    package = ROOT / "embedcache"
    names = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    names += [path.stem for path in package.glob("*.py") if not path.stem.startswith("_")]
    assert not [name for name in names if not re.search(rf"(?<![\w/]){name}(?![\w/])", tree[1])]


def test_shape_letters_match_the_legend() -> None:
    legend = (arrays.__doc__ or "").replace("\n", "   ")
    letters = dict(re.findall(r"   ([A-Z])  (.+?)(?=   |$)", legend))
    rows = re.findall(r"^\| ([A-Z]) \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert len(letters) > 20
    assert dict(rows) == letters
