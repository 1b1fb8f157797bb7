"""Progress on standard error: names of parts, states, bars that stay when they are finished, and when there are any."""

import sys
from types import SimpleNamespace

import pytest

from embedcache import progress as module
from embedcache.progress import BarProgress, NullProgress, PlainProgress, to_progress, watch
from tests.recorded import RecordedProgress


def test_lines_name_the_part_and_the_state(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0)
    progress = PlainProgress()
    progress.finish()  # of nothing
    for name in ("sound", "lips"):
        part = progress.part(name)
        part.start("training", 40, "utterances")
        part.describe(f"loss of {name}")
        part.advance(10)
        part.finish()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", ")[0] for line in lines] == [
        *["sound: training:  25% 10/40 [00:00<00:00"] * 2,
        *["lips: training:  25% 10/40 [00:00<00:00"] * 2,
    ]
    assert lines[0].endswith(" utterances/s, loss of sound]")


@pytest.mark.parametrize("kind", [NullProgress, BarProgress, PlainProgress])
def test_units_without_a_step_are_ignored(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    progress = kind()
    for _ in range(2):
        progress.advance(3)
        progress.finish()
    assert capsys.readouterr().err == ""


def test_watched_parts_count_once_they_are_used() -> None:
    progress = RecordedProgress()
    parts = watch([[1, 2, 3], slice(3, 7), "ab"], progress, "writing", 9, "rows")
    assert progress.started == []
    for num_before in (0, 3, 7):
        next(parts)
        assert progress.started == [("writing", 9, "rows")]
        assert progress.counts["writing"] == num_before
    assert next(parts, None) is None
    assert progress.counts["writing"] == 9


def test_bars_are_shown_in_terminals_and_notebooks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {None: NullProgress, False: NullProgress, True: PlainProgress}
    assert {request: type(to_progress(request)) for request in kinds} == kinds
    own = RecordedProgress()
    assert to_progress(own) is own
    kinds |= {None: BarProgress, True: BarProgress}
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        assert {request: type(to_progress(request)) for request in kinds} == kinds
    for config, kind in ({"IPKernelApp": {}}, BarProgress), ({}, NullProgress):  # Jupyter, IPython in a file
        shell = SimpleNamespace(config=config)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))  # type: ignore[arg-type]
        assert type(to_progress(None)) is kind
