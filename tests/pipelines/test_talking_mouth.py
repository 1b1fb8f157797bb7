"""The mouths of the talking-mouth world: what phones look like, and how faces and damages change it."""

from dataclasses import replace

import numpy as np
import pytest

from embedcache.errors import DataError
from embedcache.sources.media import decode_video
from pipelines.worlds.talking import encode_clip
from pipelines.worlds.talking_mouth import (
    HEIGHT,
    PARAMETERS,
    PHONES,
    VISEMES,
    WIDTH,
    Damage,
    Face,
    Phone,
    cmu_phone,
    damaged,
    draw_clip,
    draw_face,
    draw_mouths,
    espeak_phones,
    mouth_track,
)
from pipelines.worlds.talking_speech import LETTERS, WORDS

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


def test_phones_have_shapes_and_all_shapes_are_used() -> None:
    assert {viseme for visemes in PHONES.values() for viseme in visemes} == set(VISEMES)
    assert {phone for phones in WORDS.values() for phone in phones.split()} <= set(PHONES)
    assert {phone for phones in LETTERS.values() for phone in phones.split()} <= set(PHONES)


def test_names_of_each_program() -> None:
    assert [espeak_phones(name) for name in ("'i@", "D", "t#", "_:", "@L")] == [
        ("IH", "AX"),
        ("DH",),
        ("T",),
        ("SIL",),
        ("AX", "L"),
    ]
    assert [cmu_phone(name) for name in ("pau", "iy1", "D", "SIL", "ax")] == ["SIL", "IY", "D", "SIL", "AX"]
    for name, translate in (("ogonek", cmu_phone), ("q!!", espeak_phones)):
        with pytest.raises(DataError, match=f"got '{name}'"):
            translate(name)


def test_track_reaches_the_shape_of_a_long_phone_and_rests_outside() -> None:
    track_T6 = mouth_track([Phone("AA", 0.4, 0.8)], num_frames=30)
    np.testing.assert_allclose(track_T6[15], VISEMES["A"], atol=1e-6)
    np.testing.assert_allclose(track_T6[[0, 5, 29]], [VISEMES["silence"]] * 3, atol=1e-6)
    np.testing.assert_allclose(mouth_track([], num_frames=3), [VISEMES["silence"]] * 3, atol=1e-6)


def test_diphthong_moves_from_its_first_shape_to_its_second() -> None:
    heights = mouth_track([Phone("AW", 0.0, 0.6)], num_frames=15)[:, COLUMN["height"]]
    rounding = mouth_track([Phone("AW", 0.0, 0.6)], num_frames=15)[:, COLUMN["rounding"]]
    assert heights[4] > 0.9 > 0.4 > heights[11]
    assert rounding[4] < 0.1 < 0.7 < rounding[11]


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


def test_same_generator_draws_same_frames_and_another_draws_others() -> None:
    phones, face = [Phone("B", 0.1, 0.2), Phone("IY", 0.2, 0.5)], draw_face(rng(3))
    clips = [draw_clip(phones, num_frames=15, face=face, rng=rng(seed)) for seed in (0, 0, 1)]
    assert clips[0].shape == (15, HEIGHT, WIDTH)
    assert clips[0].dtype == np.uint8
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


def test_large_frames_show_the_same_face() -> None:
    face = replace(draw_face(rng(5)), noise=0.0)
    small, large = held("AA", face).astype(float), held("AA", face, width=4 * WIDTH).astype(float)
    assert large.shape == (4 * HEIGHT, 4 * WIDTH)
    blocks = large.reshape(HEIGHT, 4, WIDTH, 4).mean(axis=(1, 3))
    assert np.abs(blocks - small).mean() < 2


def test_shift_moves_the_lips_in_time() -> None:
    phones, face = [Phone("AA", 0.2, 0.4), Phone("M", 0.4, 0.5), Phone("UW", 0.5, 0.8)], Face()
    late = damaged(phones, Damage(shift_s=0.08), rng())
    ahead = mouth_track(phones, num_frames=25)
    np.testing.assert_allclose(mouth_track(late, num_frames=25)[2:], ahead[:-2], atol=1e-5)
    assert not np.array_equal(
        draw_clip(phones, num_frames=25, face=face, rng=rng(), damage=Damage(shift_s=0.08)),
        draw_clip(phones, num_frames=25, face=face, rng=rng()),
    )


def test_jitter_keeps_order_and_replacement_keeps_silence() -> None:
    phones = [Phone(name, 0.1 * n, 0.1 * n + 0.1) for n, name in enumerate(["SIL", "AA", "M", "SIL"] * 50)]
    moved = damaged(phones, Damage(jitter_s=0.08, replace=0.5), rng())
    bounds = np.array([[phone.start_s, phone.stop_s] for phone in moved]).reshape(-1)
    assert np.all(np.diff(bounds) >= 0)
    assert 0.03 < np.std(bounds[::2] - 0.1 * np.arange(200)) < 0.12
    is_silent = [phone.name == "SIL" for phone in phones]
    assert [phone.name == "SIL" for phone in moved] == is_silent
    changed = np.mean([new.name != old.name for new, old in zip(moved, phones, strict=True) if old.name != "SIL"])
    assert 0.3 < changed < 0.65
    assert np.allclose([phone[1:] for phone in damaged(phones, Damage(), rng())], [phone[1:] for phone in phones])


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
