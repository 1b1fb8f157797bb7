"""Small real recordings, videos and point clouds, as bytes."""

import io
import wave
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

RATE_HZ = 16_000
CODECS = {
    "flac": ("flac", "flac"),
    "mp3": ("mp3", "libmp3lame"),
    "ogg": ("ogg", "libopus"),
    "m4a": ("ipod", "aac"),
    "aiff": ("aiff", "pcm_s16be"),
}


def tone(seconds: float, hz: float = 440.0, *, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Return a sine that grows louder, so that no part of it is like another: (n,) float32."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    return (np.sin(2 * np.pi * hz * times) * (0.1 + 0.8 * times / max(seconds, 1e-9))).astype(np.float32)


def wav(samples: np.ndarray, *, rate_hz: int = RATE_HZ, channels: int = 1) -> bytes:
    """Return a 16-bit WAV file, with the same samples in every channel."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(np.repeat(np.round(samples * 32767).astype("<i2"), channels).tobytes())
    return file.getvalue()


def float_wav(samples: np.ndarray) -> bytes:
    """Return a WAV of 32-bit floats, which the standard library cannot write."""
    data = samples.astype("<f4").tobytes()
    layout = (3).to_bytes(2, "little") + (1).to_bytes(2, "little") + (16_000).to_bytes(4, "little")
    layout += (64_000).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    body = b"WAVEfmt " + len(layout).to_bytes(4, "little") + layout + b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def encode_audio(samples: np.ndarray, kind: str) -> bytes:
    """Return a compressed recording; `kind` is its suffix."""
    container_format, codec = CODECS[kind]
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as out:
        stream = out.add_stream(codec, rate=48_000 if codec == "libopus" else RATE_HZ, layout="mono")
        _write_audio(out, stream, samples)
    return file.getvalue()


def moving_square(num_frames: int, *, width: int = 32, height: int = 24) -> np.ndarray:
    """Return frames in which a bright square moves to the right: (T, H, W, 3) uint8."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for number, frame in enumerate(frames):
        left = number % (width - 8)
        frame[8:16, left : left + 8] = 255
    return frames


def encode_video(
    frames: np.ndarray,
    *,
    rate_hz: int = 25,
    samples: np.ndarray | None = None,
    kind: str = "mp4",
    codec: str | None = None,
    times_ms: Sequence[int] | None = None,
) -> bytes:
    """Return a video, with sound if samples are given; `times_ms` are those of frames of varying length."""
    file = io.BytesIO()
    codec = codec or {"mp4": "mpeg4", "webm": "libvpx", "mkv": "mpeg4", "avi": "mpeg4", "mov": "mpeg4"}[kind]
    with av.open(file, "w", format={"mkv": "matroska"}.get(kind, kind)) as out:
        stream = out.add_stream(codec, rate=rate_hz, width=frames.shape[2], height=frames.shape[1], pix_fmt="yuv420p")
        sound = None if samples is None else out.add_stream("aac", rate=RATE_HZ, layout="mono")
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None and samples is not None:
            _write_audio(out, sound, samples)
    return file.getvalue()


def large_video(num_frames: int, *, width: int = 1920, height: int = 1080) -> bytes:
    """Return a video at 25 frames per second whose frames are gray, with luma 30, 70, 110, 150 and 190 in turn."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25, width=width, height=height, pix_fmt="yuv420p")
        stream.options, stream.gop_size = {"preset": "ultrafast", "tune": "zerolatency"}, 1
        planes = np.full((5, height * 3 // 2, width), 128, np.uint8)
        planes[:, :height] = 30 + 40 * np.arange(5)[:, None, None]  # luma; the others are those of gray
        images = [av.VideoFrame.from_ndarray(image, format="yuv420p") for image in planes]
        encoded = [bytes(packet) for image in images for packet in stream.encode(image)]
        _write_packets(out, stream, [encoded[number % 5] for number in range(num_frames)])
    return file.getvalue()


def jpeg_video(frames: Iterable[np.ndarray]) -> bytes:
    """Return a video at 25 frames per second whose frames may differ in size."""
    file, images = io.BytesIO(), []
    for frame in frames:
        image = io.BytesIO()
        Image.fromarray(frame).save(image, "jpeg")
        images.append(image.getvalue())
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("mjpeg", rate=25, width=frame.shape[1], height=frame.shape[0], pix_fmt="yuvj420p")
        _write_packets(out, stream, images)
    return file.getvalue()


def _write_packets(out: av.container.OutputContainer, stream: av.VideoStream, packets: Sequence[bytes]) -> None:
    """Write encoded frames, each of which can be decoded alone."""
    for number, data in enumerate(packets):
        packet = av.Packet(data)
        packet.stream, packet.is_keyframe = stream, True
        packet.pts = packet.dts = number
        packet.time_base = Fraction(1, 25)
        out.mux(packet)


def _write_audio(out: av.container.OutputContainer, stream: av.AudioStream, samples: np.ndarray) -> None:
    frame = av.AudioFrame.from_ndarray(np.round(samples * 32767).astype("<i2")[None], format="s16", layout="mono")
    frame.sample_rate = RATE_HZ
    out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def cloud(num_points: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return points of a scan with coordinates, their places in an image, and labels."""
    rng = np.random.default_rng(seed)
    return {
        "xyz": rng.uniform(-40, 40, (num_points, 3)).astype(np.float32),
        "uv": rng.uniform(0, 1, (num_points, 2)).astype(np.float32),
        "label": rng.integers(0, 7, num_points).astype(np.int16),
    }


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return a compressed `.npz`."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()
