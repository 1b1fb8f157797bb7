"""The pipeline of audio-visual speech recognition, from the world to its page and a transcript."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.avsr.__main__ import AUDIO, FUSION, VIDEO, questions
from pipelines.avsr.results import Result, Results
from pipelines.avsr.steps import TEST_VIEWS, TINY, Runs
from pipelines.avsr.transcribe import Recognizer
from tests.pipelines.one_core import run_tiny
from tests.pipelines.test_talking import HAS_ESPEAK, HAS_FLITE, HAS_RECORDINGS


@pytest.mark.slow
@pytest.mark.pipeline
@pytest.mark.skipif(not (HAS_ESPEAK and HAS_FLITE and HAS_RECORDINGS), reason="needs the packages of .ci/run")
def test_tiny_pipeline_writes_its_page_and_resumes(tmp_path: Path) -> None:
    run_tiny("avsr.__main__", tmp_path)
    assert "What is synthetic" in (tmp_path / "avsr.html").read_text()
    results = Results.read([tmp_path / "seed0"])
    for model in (AUDIO, VIDEO, FUSION):
        assert results.views("A") == list(TEST_VIEWS)
        assert results.has(model, "R")
    assert results.seeds(FUSION, "R")[0].cluster_noun == "recordings"
    runs = Runs(folder=tmp_path / "seed0", caches={}, seed=0, size=TINY)
    for stream in (AUDIO, VIDEO):
        own = load_file(runs.path(stream) / "model.safetensors")
        fused = load_file(runs.path(FUSION) / "model.safetensors")
        encoder = [key for key in own if key.startswith(f"encoders.{stream}.")]
        assert encoder
        assert all(torch.equal(own[key], fused[key]) for key in encoder)
    recognizer = Recognizer(runs.path(FUSION))
    sound = recognizer.transcribe(recognizer.open(tmp_path / "world" / "A" / "0000.wav"))
    assert (sound.streams, sound.duration_s > 1) == (("audio",), True)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in {".json", ".safetensors"}}
    run_tiny("avsr.__main__", tmp_path)
    step, *_ = pickle.loads(pickle.dumps((runs.evaluate, *questions(AUDIO, ("A",))[0])))  # noqa: S301 - to a process
    assert step.__self__ == runs
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    path = runs.folder / "results" / "audio-A.json"  # of other weights: recognized again
    replace(Result.read(path), weights="0" * 64).write(path)
    runs = replace(runs, caches={"A": tmp_path / "caches" / "A"})
    again = runs.evaluate(*questions(AUDIO, ("A",))[0])
    assert again.weights == results.seeds(AUDIO, "A")[0].weights
