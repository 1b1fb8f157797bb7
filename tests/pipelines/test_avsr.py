"""The pipeline of audio-visual speech recognition, from the world to its page."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.speech.models import AUDIO, FUSION, VIDEO, questions
from pipelines.speech.results import Result, Results
from pipelines.speech.steps import TEST_VIEWS, TINY, Runs, Size
from tests.pipelines.one_core import run_tiny
from tests.pipelines.test_talking import HAS_ESPEAK, HAS_FLITE, HAS_RECORDINGS


@pytest.mark.slow
@pytest.mark.skipif(not (HAS_ESPEAK and HAS_FLITE and HAS_RECORDINGS), reason="needs the packages of .ci/run")
def test_tiny_pipeline_writes_its_page_and_resumes(tmp_path: Path) -> None:
    run_tiny("avsr", tmp_path)
    page = (tmp_path / "avsr.html").read_text()
    for words in ("What is synthetic", "nothing here estimates an error rate on LRS2"):
        assert words in page
    results = Results.read(tmp_path / "seed0" / "results")
    for model in (AUDIO, VIDEO, FUSION):
        assert results.views("A") == list(TEST_VIEWS)
        assert results.has(model, "A")
        assert results.has(model, "R")
    assert results.seeds(FUSION, "R")[0].cluster_noun == "recordings"
    runs = Runs(folder=tmp_path / "seed0", caches={}, seed=0, size=TINY)
    for stream in (AUDIO, VIDEO):
        own = load_file(runs.path(stream) / "model.safetensors")
        fused = load_file(runs.path(FUSION) / "model.safetensors")
        encoder = [key for key in own if key.startswith(f"encoders.{stream}.")]
        assert encoder
        assert all(torch.equal(own[key], fused[key]) for key in encoder)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in {".json", ".safetensors"}}
    run_tiny("avsr", tmp_path)
    asked = questions(AUDIO, ("A", "R"))
    step, *_ = pickle.loads(pickle.dumps((runs.evaluate, *asked[0])))  # noqa: S301 - as a step goes to a process
    assert step.__self__ == runs
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    path = runs.folder / "results" / "audio-A.json"  # of other weights: recognized again
    replace(Result.read(path), weights="0" * 64).write(path)
    runs = replace(runs, caches={"A": tmp_path / "caches" / "A"})
    again = runs.evaluate(*questions(AUDIO, ("A",))[0])
    assert again.weights == Result.read(path).weights == results.seeds(AUDIO, "A")[0].weights


def test_full_size_trains_longer_than_it_aligns() -> None:
    size = Size()
    assert 0 < size.align_epochs < size.epochs["audio"]
