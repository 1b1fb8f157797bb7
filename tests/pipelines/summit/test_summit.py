import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embedcache.runs import Run, RunInfo, RunInput
from embedcache.store.cache import Cache
from pipelines.summit.__main__ import METHODS
from pipelines.summit.networks import RUN_KIND, PointNetworks
from pipelines.summit.results import Result
from pipelines.summit.steps import ORACLE, SOURCE, is_adapted
from pipelines.summit.training import save_adapted_norms
from tests.pipelines.one_core import run_tiny


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
