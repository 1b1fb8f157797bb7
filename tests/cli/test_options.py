"""Help that can be read on a narrow terminal, and `--json` and `--output` of every command."""

from typing import Any

import pytest
from typer.testing import CliRunner

from docs.hooks import leaves
from embedcache.cli.main import app, root_command

COMMANDS = list(leaves(root_command()))


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_every_command_has_json(words: str, command: Any) -> None:
    options = {flag: option for option in command.params for flag in option.opts}
    assert options["--json"].is_flag, words
    assert ("--output" in options) == (words != "embedcache serve"), words  # which prints its address, and goes on


@pytest.mark.parametrize("words", ["", "evaluate", "curate", "export", "import", "cache"])
def test_group_help_has_no_cut_line_and_no_python_type(words: str) -> None:
    shown = CliRunner().invoke(app, [*words.split(), "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).output
    assert "…" not in shown
    assert "..." not in shown.replace("[ARGS]...", "")
    assert "<" not in shown
