"""Names to objects, and what is said when there is none."""

import json
import math
from pathlib import Path

import pytest

from embedcache.errors import MissingExtraError, UnknownNameError
from embedcache.registry import Registry, require, unknown_name

TABLE = Registry("number", {"pi": "math:pi", "broken": "math:no_such_number"})


def test_load_by_name() -> None:
    assert TABLE.load("pi") == math.pi


def test_load_by_path() -> None:
    assert TABLE.load("json:dumps") is json.dumps


def test_unknown_name_lists_close_match() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown number 'pie'; did you mean 'pi'.*known: broken, pi"):
        TABLE.load("pie")


@pytest.mark.parametrize("name", ["no_such_module_of_mine:x", "math:no_such_number"])
def test_load_missing_path_raises(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"no_such.*module:attribute"):
        TABLE.load(name)


def test_load_broken_builtin_raises() -> None:
    with pytest.raises(AttributeError, match="no_such_number"):
        TABLE.load("broken")


def test_unknown_name_in_empty_registry() -> None:
    assert "there is no number here" in str(unknown_name("number", "pi", []))


def test_require_missing_package_raises() -> None:
    with pytest.raises(MissingExtraError, match=r"no_such_package.*pip install 'embedcache\[open-clip\]'"):
        require("no_such_package.part", extra="open-clip")


def test_require_broken_package_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        require("half_installed", extra="cpu")
