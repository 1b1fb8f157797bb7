"""What mkdocs makes while it builds: the reference of the command line, and the list of decisions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer

DOCS = Path(__file__).parent


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill the two pages that are made from something else."""
    path = page.file.src_uri
    if path == "reference/cli.md":
        return f"{markdown}\n{command_reference()}"
    if path == "decisions/README.md":
        return f"{markdown}\n{decision_list()}"
    return markdown


def command_reference() -> str:
    """Describe every command of `embedcache`: what it does, its arguments and options, as Markdown."""
    from embedcache.cli.main import app

    return "\n".join(_describe(words, command) for words, command in commands(typer.main.get_command(app)))


def commands(command: click.Command, words: str = "embedcache") -> Iterator[tuple[str, click.Command]]:
    """Go through a command and all below it, each with the words that call it."""
    yield words, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, f"{words} {name}")


def decision_list() -> str:
    """List the decision records by their titles."""
    paths = sorted(DOCS.glob("decisions/0*.md"))
    return "\n".join(f"- [{path.read_text().splitlines()[0].removeprefix('# ')}]({path.name})" for path in paths)


def _describe(words: str, command: click.Command) -> str:
    context = click.Context(command, info_name=words)
    usage = " ".join([words, *command.collect_usage_pieces(context)])
    rows = [_row(parameter, context) for parameter in command.params]
    table = ["| | | |", "| --- | --- | --- |", *rows] if rows else []
    return "\n".join([f"## {words}", "", command.help or "", "", f"    {usage}", "", *table, ""])


def _row(parameter: click.Parameter, context: click.Context) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    called = parameter.make_metavar(context) if isinstance(parameter, click.Argument) else "`, `".join(names)
    kind = "" if getattr(parameter, "is_flag", False) else _kind(parameter)
    says = getattr(parameter, "help", None) or ""
    default = parameter.default
    if isinstance(parameter, click.Option) and default not in (None, False, ()) and "[default" not in says:
        says += f" [default: {default}]"
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{called}`", kind, says)) + " |"


def _kind(parameter: click.Parameter) -> str:
    choices = getattr(parameter.type, "choices", None)
    return ", ".join(f"`{choice}`" for choice in choices) if choices else parameter.type.name.replace("text", "")
