"""How pipelines end."""

import runpy
import sys
from pathlib import Path

import pytest


def test_users_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "pipelines.icons.__main__", raising=False)  # imported by other tests
    monkeypatch.setattr(sys, "argv", ["icons", str(tmp_path / "work"), "--icons", str(tmp_path / "nope")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pipelines.icons", run_name="__main__", alter_sys=True)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "nope: expected the folder of the npm package @iconify/json" in line
