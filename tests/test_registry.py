"""Names to objects, and what is said when there is none."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from embedcache.errors import MissingExtraError, UnknownNameError
from embedcache.registry import Registry, is_installed, require

TABLE = Registry("number", {"pi": "math:pi", "broken": "math:no_such_number"})


def test_load_by_name() -> None:
    assert TABLE.load("pi") == math.pi


def test_load_by_path() -> None:
    assert TABLE.load("json:dumps") is json.dumps


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("pie", "'pi'"),
        (":x", "unknown number"),
        ("../x:y", "unknown number"),
        ("json:", "unknown number"),
        ("a..b:c", "unknown number"),
        ("no_such_module_of_mine:x", "module:attribute"),
        ("math:no_such_number", "module:attribute"),
    ],
)
def test_unknown_name_raises(name: str, word: str) -> None:
    with pytest.raises(UnknownNameError, match=word):
        TABLE.load(name)


def test_load_plugin_with_missing_import_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_plugin.py").write_text("import no_such_dependency.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=r"'half_plugin:x' imports 'no_such_dependency'.*pip install no_such"):
        TABLE.load("half_plugin:x")


def test_load_plugin_with_bug_raises_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "buggy_plugin.py").write_text("import math\nmath.no_such_number\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AttributeError, match="no_such_number"):
        TABLE.load("buggy_plugin:x")


def test_folder_that_an_uninstalled_package_leaves_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "left_behind" / "__pycache__").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("left_behind") is not None
    assert [is_installed(name) for name in ("left_behind", "no_such_package", "numpy")] == [False, False, True]
    with pytest.raises(MissingExtraError, match=r"'left_behind' is not installed.*install umap-learn"):
        require("left_behind", package="umap-learn")
    with pytest.raises(MissingExtraError, match=r"'left_behind' is not installed"):
        require("left_behind.part", package="umap-learn")
