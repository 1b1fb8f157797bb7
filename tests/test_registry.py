"""Names to objects, and what is said when there is none."""

import json
import math
from pathlib import Path

import pytest

from embedcache.errors import MissingExtraError, UnknownNameError
from embedcache.registry import Registry, require, unknown_name

TABLE = Registry("number", {"pi": "math:pi", "broken": "math:no_such_number"})


def test_a_name_of_the_table_is_loaded() -> None:
    assert TABLE.load("pi") == math.pi


def test_a_path_of_the_users_own_is_loaded() -> None:
    assert TABLE.load("json:dumps") is json.dumps


def test_an_unknown_name_lists_what_there_is_and_the_near_miss() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown number 'pie'; did you mean 'pi'.*known: broken, pi"):
        TABLE.load("pie")


@pytest.mark.parametrize("name", ["no_such_module_of_mine:x", "math:no_such_number"])
def test_a_path_that_leads_nowhere_says_how_one_is_written(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"no_such.*module:attribute"):
        TABLE.load(name)


def test_a_fault_in_our_own_table_is_not_blamed_on_the_user() -> None:
    with pytest.raises(AttributeError, match="no_such_number"):
        TABLE.load("broken")


def test_an_empty_table_says_so() -> None:
    assert "there is no number here" in str(unknown_name("number", "pi", []))


def test_a_missing_package_gives_the_pip_line() -> None:
    with pytest.raises(MissingExtraError, match=r"no_such_package.*pip install 'embedcache\[open-clip\]'"):
        require("no_such_package.part", extra="open-clip")


def test_a_package_whose_own_import_is_missing_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        require("half_installed", extra="cpu")
