"""Containers of recordings: what was cut or changed is noticed, and what is unusual but whole is read."""

import io

import av
import numpy as np
import pytest

from embedcache.errors import ItemError
from embedcache.sources.containers import announced_frames, check_container
from embedcache.sources.sound import decode_audio
from tests.media_files import encode_audio, tone, wav


def recording(kind: str) -> bytes:
    return wav(tone(2.0)) if kind == "wav" else encode_audio(tone(2.0), kind)


@pytest.mark.parametrize("kind", ["wav", "aiff", "ogg", "flac", "mp3"])
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9, 0.95])
def test_cut_recording_fails(kind: str, fraction: float) -> None:
    whole = recording(kind)
    with pytest.raises(ItemError, match="truncated|damaged"):
        decode_audio(whole[: int(len(whole) * fraction)])


@pytest.mark.parametrize("kind", ["wav", "aiff"])
def test_one_missing_byte_of_the_samples_fails(kind: str) -> None:
    with pytest.raises(ItemError, match=r"truncated: 64,\d{3} bytes of 64,\d{3}$"):
        decode_audio(recording(kind)[:-1])


@pytest.mark.parametrize("kind", ["ogg", "flac"])
def test_flipped_bits_fail_or_change_nothing(kind: str) -> None:
    """Bits in padding and in tags of FLAC belong to no frame; every byte of Ogg belongs to a page."""
    whole, rng = recording(kind), np.random.default_rng(0)
    samples = decode_audio(whole)
    num_failed = 0
    for position in rng.choice(len(whole), 60, replace=False):
        data = bytearray(whole)
        data[position] ^= 1 << rng.integers(8)
        try:
            np.testing.assert_array_equal(decode_audio(bytes(data)), samples)
        except ItemError:
            num_failed += 1
    assert num_failed == 60 if kind == "ogg" else num_failed >= 30


@pytest.mark.parametrize("size", [0, 2**31 - 4096, 2**31, 2**32 - 1])
def test_wav_of_unknown_size_is_read_to_its_end(size: int) -> None:
    """Programs that write WAV into a pipe announce one of these sizes: FFmpeg, sox and arecord."""
    whole, field = wav(tone(2.0)), size.to_bytes(4, "little")
    piped = whole[:4] + field + whole[8:40] + field + whole[44:]
    np.testing.assert_array_equal(decode_audio(piped), decode_audio(whole))


def test_wav_with_chunks_around_its_samples() -> None:
    whole, note = wav(tone(2.0)), b"LIST" + (5).to_bytes(4, "little") + b"INFO\0\0"  # padded to an even size
    body = whole[8:36] + note + whole[36:] + note
    data = b"RIFF" + len(body).to_bytes(4, "little") + body
    np.testing.assert_array_equal(decode_audio(data), decode_audio(whole))
    np.testing.assert_array_equal(decode_audio(data[:-3]), decode_audio(whole))  # the samples are whole
    with pytest.raises(ItemError, match="truncated"):
        decode_audio(data[: -len(note) - 1])


def test_large_wav_announces_its_size_in_a_chunk_of_its_own() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="wav", options={"rf64": "always"}) as out:
        stream = out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.ones((1, 16_000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
    data = file.getvalue()
    assert data[:4] == b"RF64"
    assert len(decode_audio(data)) == 16_000
    with pytest.raises(ItemError, match="truncated"):
        decode_audio(data[:-2])


def checksum(page: bytes) -> bytes:
    """Compute the checksum of an Ogg page bit by bit, as RFC 3533 defines it."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return value.to_bytes(4, "little")


def without_end(data: bytes) -> bytes:
    """Return an Ogg file whose last page is not marked as such."""
    start = data.rindex(b"OggS")
    page = bytearray(data[start:])
    page[5] &= ~4
    page[22:26] = bytes(4)
    page[22:26] = checksum(page)
    return data[:start] + page


def test_ogg_without_a_marked_end_is_whole() -> None:
    """Many programs mark no end: 548 of 1,842 Ogg files in Debian's packages."""
    whole = recording("ogg")
    samples = decode_audio(without_end(whole))  # and the padding of the last packet, which the mark would cut off
    np.testing.assert_array_equal(samples[:31_900], decode_audio(whole)[:31_900])


def test_ogg_with_a_tag_behind_its_end_is_whole() -> None:
    whole = recording("ogg")
    np.testing.assert_array_equal(decode_audio(whole + b"TAG" + bytes(125)), decode_audio(whole))
    with pytest.raises(ItemError, match="expected a page of Ogg at byte"):
        check_container(io.BytesIO(without_end(whole) + bytes(125)))


def test_chained_ogg_is_whole_and_each_part_checked() -> None:
    whole = recording("ogg")
    check_container(io.BytesIO(2 * whole))
    with pytest.raises(ItemError, match=r"truncated: the last page of Ogg, from byte \d+,\d{3} on, is cut"):
        check_container(io.BytesIO((2 * whole)[:-1]))


def mp3(**options: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp3", options=options) as out:
        stream = out.add_stream("libmp3lame", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((tone(2.0) * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"id3v2_version": "0"}, {"write_id3v1": "1"}])
def test_frames_that_an_mp3_announces(options: dict[str, str]) -> None:
    data = mp3(**options)
    announced = announced_frames(io.BytesIO(data))
    with av.open(io.BytesIO(data)) as container:
        assert announced == sum(packet.size > 0 for packet in container.demux())
    with pytest.raises(ItemError, match=rf"truncated: \d+ frames of sound of {announced}$"):
        decode_audio(data[: len(data) // 2])


def test_mp3_that_announces_nothing_is_read_to_its_end() -> None:
    data = mp3(write_xing="0")
    assert announced_frames(io.BytesIO(data)) is None
    assert len(decode_audio(data[: len(data) // 2])) == pytest.approx(16_000, abs=1_200)


@pytest.mark.parametrize(
    "data", [b"ID3", b"ID3\x04\0\x10\0\0\0\0", b"\xff\xfb", b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(99)]
)
def test_head_of_an_mp3_that_is_no_more_announces_nothing(data: bytes) -> None:
    assert announced_frames(io.BytesIO(data)) is None
