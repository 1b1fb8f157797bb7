"""Pages that mkdocs generates during the build: the command line and its options; links to files beside the docs."""

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.core import TyperGroup

from embedcache.cli.main import root_command

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Append what is generated to the pages that ask for it, and let links to pipelines lead to the repository."""
    markdown = re.sub(r"\]\((?:\.\./)+(pipelines/[^)]+)\)", rf"]({PROJECT['urls']['Source']}/blob/main/\1)", markdown)
    generated = {"reference/cli.md": command_reference, "reference/options.md": option_table}
    build = generated.get(page.file.src_uri)
    return f"{markdown}\n{build()}" if build else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Keep each option of a command in one piece where a long line is wrapped."""
    block = re.compile(r'<div class="language-sh.*?</pre>', re.DOTALL)
    return block.sub(lambda found: re.sub(r"(?<= </span>)(--?[a-z][\w-]*)", r"<span>\1</span>", found[0]), html)


def command_reference() -> str:
    """Return the help of every command as Markdown, as typer's own `utils docs` writes it."""
    command = root_command()
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="embedcache", indent=1)
    return re.sub(r"^Example: (.+)$", r"```sh\n\1\n```", text, flags=re.MULTILINE)


def option_table() -> str:
    """Return a table of all options: value, meaning and the commands that take it."""
    uses: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    names = [words for words, _ in leaves(root_command(), "")]
    for words, command in leaves(root_command(), ""):
        context = typer.Context(command)
        for option in command.get_params(context):
            if option.param_type_name == "option":
                flags = ", ".join(f"`{flag}`" for flag in sorted([*option.opts, *option.secondary_opts], key=len)[::-1])
                metavar = (option.display_type_rich(ctx=context) or "").replace("|", r"\|")
                uses[flags, metavar, option.help or ""].append(words.strip())
    lines = ["| option | value | meaning | commands |", "| --- | --- | --- | --- |"]
    for (flags, metavar, meaning), commands in sorted(uses.items(), key=lambda use: use[0][0].strip("`-")):
        where = "all" if len(commands) == len(names) else ", ".join(commands)
        lines.append(f"| {flags} | {metavar and f'`{metavar}`'} | {meaning} | {where} |")
    return "\n".join(lines)


def leaves(command: Any, words: str = "embedcache") -> Iterator[tuple[str, Any]]:
    """Iterate over all commands that are not groups, with the words that call them."""
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from leaves(below, f"{words} {name}")
    else:
        yield words, command
