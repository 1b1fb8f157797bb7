"""The examples in the documentation run: Python blocks as they stand, command lines against the real parser."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from embedcache.cli.main import app
from tests.pictures import write_pictures

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """Every block of a language, with the name of its page."""
    return [
        (str(page.relative_to(ROOT)), code)
        for page in PAGES
        for kind, code in BLOCK.findall(page.read_text())
        if kind == language
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: `flickr`, a cache, and `photos`, a folder with captions."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "tests" / "golden" / "cache-1", folder / "flickr")
    write_pictures(folder / "photos", 120)
    return folder


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value[:30].replace("\n", " "))
def test_python_examples_run(folder: Path, page: str, code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"


COMMANDS = [
    (page, line)
    for page, code in blocks("sh")
    for line in code.splitlines()
    for line in line.split(" && ")
    if line.startswith("embedcache ")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_lines_are_understood(page: str, line: str) -> None:
    command: click.Command = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    context = click.Context(command)
    while isinstance(command, click.Group):
        found = command.get_command(context, words.pop(0))
        assert found is not None, f"{page}: {line}"
        command = found
    command.make_context("embedcache", words)


def test_there_are_examples() -> None:
    assert len(COMMANDS) > 10
    assert len(blocks("python")) >= 6


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_readme_names_every_file_of_the_package() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "embedcache").rglob("*.py"):
        if path.stem not in ("__init__", "__main__", "contract"):
            room = path.relative_to(ROOT / "embedcache").parts[0]
            name = path.name if path.parent.name == "embedcache" else path.stem
            assert re.search(rf"\b{re.escape(name)}\b", readme) or room in ("cli", "quickstart"), f"README lacks {path}"
