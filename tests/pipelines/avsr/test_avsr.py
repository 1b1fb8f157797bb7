"""The pipeline of audio-visual speech recognition, from the world to its page and a transcript."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.avsr.__main__ import questions
from pipelines.avsr.steps import AUDIO, FUSION, TEST_VIEWS, TINY, VIDEO, Runs
from pipelines.avsr.transcribe import Recognizer
from pipelines.results import Result, Results
from tests.pipelines.one_core import run_tiny
from tests.pipelines.test_talking import HAS_ESPEAK, HAS_FLITE, HAS_RECORDINGS


@pytest.mark.slow
@pytest.mark.pipeline
@pytest.mark.skipif(not (HAS_ESPEAK and HAS_FLITE and HAS_RECORDINGS), reason="needs the packages of .ci/run")
def test_tiny_pipeline_writes_its_page_and_resumes(tmp_path: Path) -> None:
    run_tiny("avsr.__main__", tmp_path)
    assert "synthetic" in (tmp_path / "avsr.html").read_text()  # nobody takes its figures for those of real speech
    results = Results.read(tmp_path)
    for model in (AUDIO, VIDEO, FUSION):
        assert set(results.seeds(model, "A")[0].measures) == set(TEST_VIEWS)
        assert model in results.models("R")
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
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    path = runs.folder / "results" / "a-audio.json"  # of other weights: recognized again
    replace(Result.read(path), weights="0" * 64).write(path)
    runs = replace(runs, caches={"A": tmp_path / "caches" / "A"})
    again = runs.evaluate(*questions(AUDIO, ("A",))[0])
    assert again.weights == results.seeds(AUDIO, "A")[0].weights
