import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embedcache.runs import Run, RunInfo, RunInput
from embedcache.store.cache import Cache
from pipelines.summit.__main__ import METHODS
from pipelines.summit.metrics import mean_iou
from pipelines.summit.networks import RUN_KIND, PointNetworks
from pipelines.summit.results import Result, summary_table
from pipelines.summit.steps import ORACLE, SOURCE, is_adapted
from pipelines.summit.training import save_adapted_norms
from tests.pipelines.one_core import run_tiny


def make_result(scenario: str, *, switch: float, oracle: float = 0.9, source: float = 0.5, world: int = 1) -> Result:
    """A result in which each method has that fraction of two classes right, in all views."""

    def counts(right: float) -> dict[str, np.ndarray]:
        frame = np.array(
            [[round(1000 * right), 1000 - round(1000 * right)], [1000 - round(1000 * right), round(1000 * right)]]
        )
        return dict.fromkeys(("2D", "3D", "2D+3D"), np.stack([frame] * 4))

    methods = {SOURCE: counts(source), "switch": counts(switch), ORACLE: counts(oracle)}
    gaps = {"image": 0.5, "points": 0.1}
    return Result(scenario=scenario, world=world, seed=0, gaps=gaps, counts=methods)


def test_norms_of_another_source_run_are_not_reused(tmp_path: Path) -> None:
    features = {"image": np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)}
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        feature = RunInput(modality="points", feature="f", spec="s", fingerprint={}, width=3)
        arguments = {"widths": {"image": 3}, "num_classes": 2}
        info = RunInfo(kind=RUN_KIND, arguments=arguments, inputs={"image": feature})
        Run.create(tmp_path / name, info).finish(PointNetworks(**arguments), {})
    save_adapted_norms({"image": tmp_path / "a"}, features, ["image"], tmp_path / "norms")
    assert is_adapted(tmp_path / "norms", {"image": tmp_path / "a"}, ["image"])
    assert not is_adapted(tmp_path / "norms", {"image": tmp_path / "b"}, ["image"])
    assert not is_adapted(tmp_path / "norms", {"image": tmp_path / "a"}, [])
    assert not is_adapted(tmp_path / "none", {"image": tmp_path / "a"}, ["image"])


@pytest.mark.slow
def test_summary_counts_gains_and_harm() -> None:
    results = [make_result("a", switch=0.7), make_result("b", switch=0.5), make_result("c", switch=0.4)]
    columns, rows = summary_table(results, [SOURCE, "switch", ORACLE])
    switch, oracle = (dict(zip(columns, row, strict=True)) for row in rows[1:])
    gains = [mean_iou(np.array([[r, 1 - r], [1 - r, r]])) - 1 / 3 for r in (0.7, 0.5, 0.4)]
    assert switch["change"] == f"{100 * np.mean(gains):+.1f}"
    assert (switch["better by > 2"], switch["worse by > 0.5"]) == ("1 of 3", "1 of 3")
    assert switch["any view worse"] == switch["beyond interval"] == "3 of 9"
    full = mean_iou(np.array([[0.9, 0.1], [0.1, 0.9]])) - 1 / 3
    assert switch["to oracle"] == f"{sum(gains) / (3 * full):.0%}"
    assert oracle["to oracle"] == "100%"


@pytest.mark.slow
@pytest.mark.pipeline
def test_tiny_pipeline_runs_and_resumes(tmp_path: Path) -> None:
    first = run_tiny("summit.__main__", tmp_path)
    result_path = tmp_path / "world1" / "seed0" / "day-day-night.json"
    settings = {"domains": ("day", "day", "night"), "world": 1, "seed": 0, "epochs": 3, "frames": "frames=4,test=2"}
    result = Result.read(result_path, {**settings, "ablations": {}})
    assert result is not None
    assert set(result.counts) == set(METHODS)
    assert result.gaps["image"] > 0.3
    for views in result.counts.values():
        assert {view: counts.shape for view, counts in views.items()} == dict.fromkeys(("2D", "3D", "2D+3D"), (2, 7, 7))
        assert len({counts.sum() for counts in views.values()}) == 1
    assert result.iou(SOURCE, "2D") < result.iou("switch", "2D")
    runs = result_path.with_suffix("")
    for name in ("source", "AF", "EW+HT", "switch", ORACLE):
        assert Run.open(runs / name).info.kind == RUN_KIND
    labels = Cache(tmp_path / "world1" / "night").feature("points", "seed0-day-day-night-source-agree/label")
    assert labels.dtype == "int16"
    page = (tmp_path / "summit.html").read_text()
    assert all(method in page for method in METHODS)
    before = result_path.stat().st_mtime_ns
    assert run_tiny("summit.__main__", tmp_path).splitlines()[-3:] == first.splitlines()[-3:]
    assert result_path.stat().st_mtime_ns == before
    json.loads(result_path.read_text())
