"""The mouths of the talking-mouth world: what phones look like, and how faces change it."""

from dataclasses import replace

import numpy as np
import pytest

from embedcache.sources.media import decode_video
from pipelines.worlds.talking import encode_clip
from pipelines.worlds.talking_mouth import (
    PARAMETERS,
    WIDTH,
    Face,
    Phone,
    draw_clip,
    draw_face,
    draw_mouths,
    mouth_track,
)

COLUMN = {name: column for column, name in enumerate(PARAMETERS)}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def held(phone: str, face: Face, *, width: int = WIDTH) -> np.ndarray:
    """Return a frame in the middle of a phone of 0.2 s between two vowels."""
    phones = [Phone("IY", 0.0, 0.2), Phone(phone, 0.2, 0.4), Phone("IY", 0.4, 0.6)]
    return draw_clip(phones, num_frames=15, face=face, rng=rng(), width=width)[7]


def darkness(frame: np.ndarray, face: Face) -> float:
    """Return the area that is about as dark as the opening of the mouth, in pixels of a frame of 48 x 32."""
    return float((frame < (face.opening + face.lip) / 2).sum() * (WIDTH / frame.shape[1]) ** 2)


@pytest.mark.parametrize("seed", range(4))
def test_lips_close_for_p_b_m_and_open_wide_for_aa(seed: int) -> None:
    face = replace(draw_face(rng(seed)), noise=0.0, softness=1.0, light=(0.0, 0.0))
    face = replace(face, teeth=face.opening)  # else they hide it
    closed = [darkness(held(phone, face), face) for phone in "PBM"]
    assert max(closed) < 0.25 * darkness(held("AA", face), face)
    assert np.array_equal(held("P", face), held("M", face))
    track_T6 = mouth_track([Phone("AA", 0, 0.2), Phone("M", 0.2, 0.3), Phone("AA", 0.3, 0.5)], num_frames=12, face=face)
    assert track_T6[6, COLUMN["height"]] < 0.25 * track_T6[3, COLUMN["height"]]


@pytest.mark.slow
def test_sounds_with_other_lips_look_different_and_those_alike_do_not() -> None:
    faces = [draw_face(rng(seed)) for seed in range(20)]

    def distance(first: str, second: str) -> float:
        return float(np.mean([np.abs(held(first, f).astype(float) - held(second, f)).mean() for f in faces]))

    different = [distance(*pair) for pair in ("BD", "FS", "MN", "BV")]
    assert min(different) > 1
    assert [distance(*pair) for pair in ("PB", "TD", "SZ", "FV")] == [0.0] * 4


def test_clip_is_the_same_bytes_and_decodes_to_its_frames() -> None:
    face = replace(draw_face(rng(2)), noise=3.0)
    frames = draw_mouths(mouth_track([Phone("AA", 0.1, 0.5)], num_frames=20), face=face, rng=rng())
    data = encode_clip(frames)
    assert data == encode_clip(frames)
    video = decode_video(data)
    assert video.rate_hz == 25
    assert video.frames_THW3.shape == (*frames.shape, 3)
    error = video.frames_THW3[..., 0].astype(float) - frames
    assert abs(error.mean()) < 1
    assert error.std() < 5
