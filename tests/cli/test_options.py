"""Every option means the same in every command, and every help text can be read."""

import re
from collections import defaultdict
from typing import Any

import pytest
from typer.testing import CliRunner

from docs.hooks import leaves
from embedcache.cli.main import app, root_command

COMMANDS = list(leaves(root_command()))
OPTIONS = [
    (words, option) for words, command in COMMANDS for option in command.params if option.param_type_name == "option"
]

SAME_NOUN = {
    "--beam": "of the hybrid decoder of speech, of captions",
    "--batch-size": "items of a forward pass in extract, of a training step in train",
    "--chunk-size": "imports name the default of a new cache",
    "--config": "train reads the config.json of a run too",
    "--device": "extract takes several; train explains torchrun",
    "--dtype": "derive stores labels, too",
    "--feature": "extract names features to store, before encoder/feature exists",
    "--image-cosine": "limit of near-duplicates: above it for a strict split, at or above it for leaks",
    "--image-feature": "evaluate pairs takes several",
    "--json": "serve prints its address",
    "--language": "language of the captions that are read: several in some commands",
    "--index": "negatives searches it, cache remove takes several",
    "--modality": "names what the command does with the items of that modality",
    "--memory": "limit of an index while it is searched, of the features in training",
    "--num-negatives": "curate lists them, train draws them",
    "--other-cosine": "as --image-cosine",
    "--part": "search can filter by any value of the column split; probe measures on two parts",
    "--precision": "of the encoder in extract, of the projectors in train",
    "--run": "search and serve find the run of the index themselves unless it has moved",
    "--seed": "train names what it draws",
    "--selection": "samples to use; serve offers several, train fills in {seed}",
    "--text-cosine": "as --image-cosine",
    "--text-feature": "as --image-feature",
    "--threads": "of decoding in extract, of torch in train",
    "--view": "extract names what alters items, derive the views that are stored",
    "--width": "of the transformer of a likelihood, of the vectors of an index",
    "--widths": "train adds losses of them, evaluate ranks by them",
    "-k": "number of nearest items: per query, concept or sample",
}
"""Options whose help differs between commands, and why they have one meaning all the same."""
SAME_VALUE = {
    "--feature": "train names features of two modalities",
    "--dtype": "derive stores labels, too",
    "--modality": "coverage can read both",
    "--part": "search can filter by any value of the column split; probe measures on two parts",
}
"""Options whose placeholder of the value differs between commands, and why."""
BRITISH = re.compile(r"\b\w*(colour|neighbour|centre|normalis|optimis|initialis|labell|analyse)\w*", re.IGNORECASE)
AVOIDED = re.compile(r"\b(pictures?|spine|the share|a share|told|mend(ed|s)?)\b", re.IGNORECASE)


def variants(describe: Any) -> dict[str, set[Any]]:
    """Return option -> its different descriptions over all commands."""
    found: dict[str, set[Any]] = defaultdict(set)
    for _, option in OPTIONS:
        for flag in option.opts:
            found[flag].add(describe(option))
    return found


def test_same_option_has_the_same_help() -> None:
    differing = {name for name, helps in variants(lambda option: option.help).items() if len(helps) > 1}
    assert differing == set(SAME_NOUN)


def test_same_option_takes_the_same_value() -> None:
    differing = {name for name, values in variants(lambda option: option.metavar).items() if len(values) > 1}
    assert differing == set(SAME_VALUE)


def test_short_options_are_few() -> None:
    short = {flag for _, option in OPTIONS for flag in option.opts if re.fullmatch("-.", flag)}
    assert short == {"-k", "-q", "-v"}


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_help_is_readable(words: str, command: Any) -> None:
    summary, _, _ = command.help.partition("\n\n")
    assert len(summary) <= 60, summary
    assert summary.endswith(".")
    assert f"Example: {words} " in command.help or command.help.endswith(f"Example: {words}")
    for text in (command.help, *(parameter.help for parameter in command.params)):
        assert text, words
        assert not BRITISH.search(text), text
        assert not AVOIDED.search(text), text
        assert "[" not in text, f"rich reads {text} as markup"
    for parameter in command.params:
        assert parameter.metavar is not None, f"{words} {parameter.name} has no metavar"
        assert getattr(parameter, "min", None) is None, f"{words} --help shows {parameter.name} as a Python range"
        assert parameter.help.endswith("."), parameter.help


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_shared_options_come_last(words: str, command: Any) -> None:
    options = [each for each in command.params if each.param_type_name == "option" and not each.rich_help_panel]
    shared = ["engine", "address", "device", "image_folder", "trust", "config"]
    found = [option.name for option in options if option.name in shared]
    assert [option.name for option in options][-len(found) or None :] == sorted(found, key=shared.index), words


WITHOUT_OUTPUT = {
    "embedcache serve": "prints its address, and does not end",
    "embedcache evaluate clip-benchmark": "--output is an option of CLIP_benchmark's eval",
}
"""Commands without `--output FILE`, and why."""


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_every_command_has_json(words: str, command: Any) -> None:
    options = {flag: option for option in command.params for flag in option.opts}
    assert options["--json"].is_flag, words
    assert ("--output" in options) == (words not in WITHOUT_OUTPUT)


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_inputs_come_first_and_the_output_last(words: str, command: Any) -> None:
    arguments = [parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"]
    assert not {"OUT", "STUDY"} & set(arguments[:-1])


@pytest.mark.parametrize("words", ["", "evaluate", "curate", "export", "import", "cache"])
def test_group_help_has_no_cut_line_and_no_python_type(words: str) -> None:
    shown = CliRunner().invoke(app, [*words.split(), "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).output
    assert "…" not in shown
    assert "..." not in shown.replace("[ARGS]...", "")
    assert "<" not in shown
