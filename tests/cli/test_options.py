"""Help that can be read on a narrow terminal, and `--json` and `--output` of every command."""

from typing import Any

import pytest

from docs.hooks import leaves
from embedcache.cli.main import root_command

COMMANDS = list(leaves(root_command()))


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_every_command_has_json(words: str, command: Any) -> None:
    options = {flag: option for option in command.params for flag in option.opts}
    assert options["--json"].is_flag, words
    assert ("--output" in options) == (words != "embedcache serve"), words  # which prints its address, and goes on
