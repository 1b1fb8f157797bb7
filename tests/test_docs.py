"""Examples in the documentation: Python blocks are run and command lines are parsed; quickstart/ runs the tutorial.

A block that cannot be checked has a comment above it: `<!-- not run: the reason -->`.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.core import TyperGroup

from embedcache.cli.main import root_command
from tests.blocks import ROOT, TUTORIAL, Block, blocks_of, run_block
from tests.images import write_images

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[Block]:
    """Return all blocks of a language, except those of the tutorial, which are run together."""
    return [block for page in PAGES if page != TUTORIAL for block in blocks_of(page) if block.language == language]


@pytest.fixture(scope="module")
def folder(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which examples run: a cache `flickr`, images with captions in `photos`."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(small_cache, folder / "flickr")
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


def parse(line: str) -> None:
    """Parse a line with the parser of its command, without running it."""
    command, words = root_command(), shlex.split(line)[1:]
    while isinstance(command, TyperGroup):  # typer has a click of its own, whose groups are not click's
        command = command.commands[words.pop(0)]
    command.make_context("embedcache", words)


def test_examples_are_found() -> None:
    assert len(COMMANDS) > 10
    assert len(PYTHON) >= 4
    assert len(blocks_of(TUTORIAL)) > 20


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
