"""What mkdocs makes while it builds: the reference of the command line, and the list of decisions."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

DOCS = Path(__file__).parent


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill the two pages that are made from something else."""
    path = page.file.src_uri
    if path == "reference/cli.md":
        return f"{markdown}\n{command_reference()}"
    if path == "decisions/README.md":
        return f"{markdown}\n{decision_list()}"
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Keep each option of a command in one piece where a long line is wrapped."""
    block = re.compile(r'<div class="language-sh.*?</pre>', re.DOTALL)
    return block.sub(lambda found: re.sub(r"(?<= </span>)(--?[a-z][\w-]*)", r"<span>\1</span>", found[0]), html)


def command_reference() -> str:
    """Give what `--help` says of every command of `embedcache`, as Markdown."""
    from embedcache.cli.main import app

    return "\n".join(f"## {words}\n\n```text\n{_help(app, words)}```\n" for words in commands(get_command(app)))


def commands(command: Any, words: str = "embedcache") -> Iterator[str]:
    """Name a command and all below it by the words that call them."""
    yield words
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from commands(below, f"{words} {name}")


def decision_list() -> str:
    """List the decision records by their titles."""
    paths = sorted(DOCS.glob("decisions/0*.md"))
    return "\n".join(f"- [{path.read_text().splitlines()[0].removeprefix('# ')}]({path.name})" for path in paths)


def _help(app: Any, words: str) -> str:
    program, *rest = words.split()
    said = CliRunner().invoke(app, [*rest, "--help"], prog_name=program, env={"COLUMNS": "100"})
    return said.output.strip() + "\n"
