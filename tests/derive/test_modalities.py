"""Derivation over recordings and point clouds of the same samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.derive.derive import derive
from embedcache.derive.rules import Block, Derivation, Output, Rule
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.media_files import cloud, npz, tone, wav
from tests.media_toy import MEDIA

NUM_SAMPLES = 10


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples of a cloud and a recording in chunks of 4; sample 2 has no recording, that of sample 5 is broken."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "source").mkdir()
    for number in range(NUM_SAMPLES):
        path = folder / "source" / f"{number:02d}"
        path.with_suffix(".npz").write_bytes(npz(cloud(3 + number, seed=number)))
        if number != 2:
            path.with_suffix(".wav").write_bytes(b"junk" if number == 5 else wav(tone(0.1 + number / 20)))
    settings = ExtractSettings(features=("xyz", "uv", "label", "mean"), chunk_size=4)
    encoders = {"points": [MEDIA], "audio": [MEDIA]}
    extract(open_source(folder / "source"), folder / "c", encoder=encoders, settings=settings)
    return folder / "c"


def near(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    """Keep the labels of points near the sensor, -1 elsewhere, and add the loudness to each height."""
    xyz, labels, sounds = inputs
    assert labels.lengths is not None
    is_near = np.linalg.norm(xyz.rows(), axis=1, keepdims=True) < parameters["within"]
    loudness = np.repeat(sounds.values[:, :1], labels.lengths, axis=0)
    return {
        "label": labels.with_rows(np.where(is_near, labels.values, -1)),
        "height": xyz.with_rows(xyz.rows()[:, 2:] + loudness),
    }


NEAR = Rule(
    name="tests.derive.test_modalities:NEAR",
    apply=near,
    outputs=lambda _, __: {"label": (-1, 1), "height": (-1, 1)},
    parameters={"within": 30.0},
    keeps_axis=True,
)


def test_points_and_recordings_of_the_same_samples(cache: Path) -> None:
    derivation = Derivation(
        name="near",
        inputs=[("points", "open_media/xyz"), ("points", "open_media/label"), ("audio", "open_media/mean")],
        rule=NEAR,
        dtype="float32",
    )
    report = derive(cache, derivation)
    assert report.line().startswith("near (label, height): derived 10 point clouds, reused 0, failed 2: 1 ")
    label = Cache(cache).feature("points", "near/label")
    assert label.failures[2] == "no audio in its sample"
    assert sorted(label.failures) == [2, 5]
    assert label.axis == Cache(cache).feature("points", "open_media/xyz").axis
    assert label.axis is not None
    rows = np.flatnonzero(label.valid)
    for row, found in zip(rows, label.gather_tokens(rows), strict=True):
        points = cloud(3 + row, seed=row)
        is_near = np.linalg.norm(points["xyz"].astype(np.float32), axis=1) < 30
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found[:, 0], np.where(is_near, points["label"], -1))
    assert not verify(Cache(cache))
