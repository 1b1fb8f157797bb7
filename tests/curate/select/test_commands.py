"""The commands, as a user types them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embedcache.cli.main import main
from tests.curate.select.conftest import FEATURES

Command = Callable[[str], tuple[object, str, str]]


@pytest.fixture
def command(
    around: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Run a command in a folder where `cache`, `concepts`, `target` and `run` are: exit status, output, errors."""
    for name, path in around.items():
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["embedcache", "curate", *line.format(**FEATURES).split()])
        with pytest.raises(SystemExit) as stopped:
            main()
        shown = capsys.readouterr()
        return stopped.value.code, shown.out, shown.err

    return run


def test_feature_need_not_be_named(command: Command) -> None:
    code, out, err = command("select cache b.parquet --method rare-first:per_concept=9 --concepts concepts")
    assert code == 0, err
    assert "36 of 300" in out
    assert err.startswith("open_toy/mean is used: of the text features of cache, concepts has no other one")


MISTAKES = [
    ("select cache a.parquet --method k-center --budget 3", "--feature NAME"),
    ("negatives cache out.parquet", "--feature image=NAME"),
    ("select cache a.parquet --method random --budget many", "many"),
    ("select cache a.parquet --method random --budget 200% --feature {image}", "200%"),
    ("select cache a.parquet --method hierarchical:clusters=5+x --budget 3", "5+x"),
    ("combine cache x.parquet and y.parquet a.parquet", "x.parquet"),
    ("export cache keys.txt uids.npy --format datacomp", "keys.txt"),
]


@pytest.mark.parametrize(("line", "expected"), MISTAKES)
def test_error_is_one_line(command: Command, line: str, expected: str) -> None:
    code, _, err = command(line)
    assert code == 1
    (error_line,) = [part for part in err.splitlines() if part.startswith("error: ")]
    assert expected in error_line
