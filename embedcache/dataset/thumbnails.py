"""Items of a cache as a page shows and plays them, read again from its source, as `reopen_source` allows it."""

import base64
import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from embedcache.arrays import Floats
from embedcache.errors import ItemError, PathError
from embedcache.modalities import FileItem, noun
from embedcache.settings import format_bytes
from embedcache.sources.images import decode_image
from embedcache.sources.media import AUDIO_RATE_HZ, decode_audio, decode_video, probe_media
from embedcache.sources.open import reopen_source, source_credit
from embedcache.store.cache import Cache, RowReader
from embedcache.store.tables import ITEM_SCHEMAS

PICTURED = ("image", "video", "audio")
"""Modalities whose items can be shown."""
PLAYED = ("video", "audio")
"""Modalities whose items can be played."""
_SIZE_PX = {"image": 88, "video": 176, "audio": 176}
_MAX_BYTES = 2**28  # of the file of an item
_MOVED = "; or run the same extract on the place where they are: it encodes nothing and records that"
_WINDOW = 512  # samples per column of a spectrogram, 32 ms
_WINDOWS_PER_COLUMN = 4
_QUIETEST_DB = -60.0  # white; the loudest is black


def credit(cache: Cache) -> str:
    """Return the attribution that must be shown with the images of a cache; empty if none is required."""
    return source_credit(cache.info.source)


class UnplayableError(ItemError):
    """An item that can be read, but not be played on a page. Its text holds no path."""


@dataclass(frozen=True, kw_only=True)
class PlayedFile:
    """A recording or video as a file that browsers play: a WAV of 16 kHz mono, or the video's own file."""

    data: bytes
    media_type: str


class Thumbnails:
    """Small images of items, read again from the source of a cache, at most 256 MiB for each.

    A video is represented by its middle frame, a recording by its spectrogram, 0 to 8 kHz on the mel scale.

    Args:
        cache: the cache.
        modality: one of `PICTURED`.

    Raises:
        PathError: the source's files no longer exist, or may not be read; see `reopen_source`.
    """

    def __init__(self, cache: Cache, modality: str = "image") -> None:
        self._modality = modality

        try:
            self._source = reopen_source(cache.info.source, cache.info.index_digest, max_bytes=_MAX_BYTES)
        except PathError as error:
            raise PathError(f"{not_shown(modality)}{error}{_MOVED}") from None

        self.places: Sequence[str] = getattr(self._source, "places", ())
        self._items = RowReader(cache, modality, [name for name in ITEM_SCHEMAS[modality].names if name != "sample"])
        self._urls: dict[int, str] = {}

    def data_url(self, row: int) -> str:
        """Return a thumbnail of the item in a row as a `data:` URL; raise an ItemError with the reason if it fails."""
        if row not in self._urls:
            self._urls[row] = data_url(self.webp(row, _SIZE_PX[self._modality]), "image/webp")
        return self._urls[row]

    def webp(self, row: int, size_px: int) -> bytes:
        """Return the image of the item in a row as a WebP file that fits into a square of `size_px`. Thread-safe."""
        image = self._image(row, size_px)
        image.thumbnail((size_px, size_px))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()

    def _image(self, row: int, size_px: int) -> Image.Image:
        item = self._item(row)
        data = self._source.read(item)
        if self._modality == "audio":
            return draw_sound(decode_audio(data, item.start_s, item.stop_s), size_px)
        return _middle_frame(data, item) if self._modality == "video" else decode_image(data)

    def read(self, row: int) -> bytes:
        """Read the file of the item in a row; raise an ItemError with the reason if it fails. Thread-safe."""
        return self._source.read(self._item(row))

    def play(self, row: int, max_bytes: int) -> PlayedFile:
        """Return the recording or video in a row as a file to play. Thread-safe.

        A recording, or its interval, is decoded and returned as an encoder gets it. A video is returned as the whole
        stored file; see `interval_fragment`.

        Raises:
            UnplayableError: the file would be larger than `max_bytes`, or is a video in a format that browsers lack.
            ItemError: the item cannot be read or decoded.
        """
        item = self._item(row)
        data = self._source.read(item)

        if self._modality == "audio":
            samples_n = decode_audio(data, item.start_s, item.stop_s)
            _check_size(2 * len(samples_n), max_bytes)
            return PlayedFile(data=_wav(samples_n), media_type="audio/wav")

        _check_size(len(data), max_bytes)
        return PlayedFile(data=data, media_type=_video_type(data))

    def interval_fragment(self, row: int) -> str:
        """Return the part of a URL that lets a browser play the interval of a video only; empty if it is none."""
        item = self._item(row)
        if self._modality != "video" or (item.start_s, item.stop_s) == (None, None):
            return ""
        return f"#t={item.start_s or 0:g}" + ("" if item.stop_s is None else f",{item.stop_s:g}")

    def _item(self, row: int) -> FileItem:
        return FileItem(**self._items.take(np.array([row])).to_pylist()[0])


def data_url(data: bytes, media_type: str) -> str:
    """Return a file as a `data:` URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def draw_sound(samples_n: Floats, width_px: int) -> Image.Image:
    """Draw the spectrogram of a recording at 16 kHz, half as high as wide: time to the right, dark is loud.

    Each column is the mean of a few windows, however long the recording is.
    """
    height_px = width_px // 2
    num_windows = width_px * _WINDOWS_PER_COLUMN

    # A recording shorter than one window still gives a column.
    padded_n = np.pad(samples_n, (0, max(0, _WINDOW - len(samples_n))))
    starts = np.linspace(0, len(padded_n) - _WINDOW, num_windows).astype(np.int64)

    # The Hann window keeps a loud tone from spreading over all frequencies.
    windows = padded_n[starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(windows))).reshape(width_px, _WINDOWS_PER_COLUMN, -1).mean(axis=1)

    mel = np.linspace(np.log1p(AUDIO_RATE_HZ / 2 / 700), 0, height_px)  # the first row is the top
    bins = 700 * np.expm1(mel) * _WINDOW / AUDIO_RATE_HZ
    shown = np.stack([np.interp(bins, np.arange(column.size), column) for column in power], axis=1)

    # The floors keep the logarithm of silence finite.
    level_db = 10 * np.log10(shown / max(shown.max(), 1e-6) + 1e-12)
    return Image.fromarray(np.round(255 * np.clip(level_db / _QUIETEST_DB, 0, 1)).astype(np.uint8))


def _middle_frame(data: bytes, item: FileItem) -> Image.Image:
    """Return the frame in the middle of a video or its interval; the first one if its end is not known."""
    video = decode_video(data, item.start_s, item.stop_s)
    middle_s = (item.start_s or 0.0) + (video.duration_s or 0.0) / 2

    # Decoding starts half a frame early, so that rounding of times does not skip the middle frame.
    half_step_s = 0.5 / video.rate_hz
    frame = next(decode_video(data, max(0.0, middle_s - half_step_s)).frames())
    return Image.fromarray(np.ascontiguousarray(frame()))


def _wav(samples_n: Floats) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(AUDIO_RATE_HZ)
        file.writeframes(np.round(samples_n * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        size = format_bytes(num_bytes)
        limit = format_bytes(max_bytes)
        raise UnplayableError(f"too large to be played here: {size}, more than {limit}")


def _video_type(data: bytes) -> str:
    """Return the media type of a video that FFmpeg can open, if browsers know its container."""
    is_webm = data.startswith(b"\x1a\x45\xdf\xa3")
    is_mp4 = data[4:8] == b"ftyp"
    if not is_webm and not is_mp4:
        raise UnplayableError("browsers play MP4 and WebM, and this video is neither; convert it to one of them")
    if "video" not in probe_media(data):
        raise ItemError("no frames: the file has no video stream")
    return "video/mp4" if is_mp4 else "video/webm"


def not_shown(modality: str) -> str:
    """Return how the reason begins why items of a modality are missing on a page."""
    return f"{noun(modality)} are not shown: "
