"""Items of a cache as a page shows and plays them, read again from its source.

A cache may be a stranger's, and says where its items are: they are read only below folders that the user names, or
below the folder of the source, unless that holds more than its items.
"""

import base64
import io
import pwd
import wave
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embedcache.arrays import Floats
from embedcache.errors import ItemError, PathError
from embedcache.modalities import noun
from embedcache.registry import has_trust
from embedcache.sources.base import FileItem
from embedcache.sources.files import SHARD_SEPARATOR, restrict_reads
from embedcache.sources.images import MAX_PIXELS, decode_image
from embedcache.sources.media import AUDIO_RATE_HZ, probe_media
from embedcache.sources.open import (
    IMPORTED_SOURCE,
    MERGED,
    SOURCES,
    base_source,
    merged_parts,
    reopen_source,
    source_credit,
)
from embedcache.sources.sound import decode_audio
from embedcache.sources.video import announced_length, frame_at
from embedcache.sources.webdataset import shard_root
from embedcache.store.cache import Cache
from embedcache.store.rows import RowReader
from embedcache.store.tables import ITEM_SCHEMAS
from embedcache.units import format_bytes

PICTURED = ("image", "video", "audio")
"""Modalities whose items can be shown."""
PLAYED = ("video", "audio")
"""Modalities whose items can be played."""
_SIZE_PX = {"image": 88, "video": 176, "audio": 176}
_FIRST_PERSON = 1000  # users with smaller numbers are services
_MOVED = "; if they have moved, run the same extract on their new place: it encodes nothing and records the place"
_WINDOW = 512  # samples per column of a spectrogram, 32 ms
_WINDOWS_PER_COLUMN = 4
_QUIETEST_DB = -60.0  # white; the loudest is black


def credit(cache: Cache) -> str:
    """Return the attribution that must be shown with the images of a cache; empty if none is required."""
    return source_credit(cache.info.source)


def allowed_folders(cache: Cache, folders: Sequence[Path] = (), modality: str = "image") -> Sequence[Path] | None:
    """Return the folders below which files of a cache may be read; None: anywhere, within `trust_files`.

    Args:
        cache: the cache.
        folders: folders that the user names; empty: those of `source_folders`, with its errors.
        modality: what is read, for the errors.
    """
    return None if has_trust() else folders or source_folders(cache, modality)


def restricted(folders: Sequence[Path] | None) -> AbstractContextManager[None]:
    """Restrict reads of this thread to files in some folders, after following links; None: not."""
    return nullcontext() if folders is None else restrict_reads(folders)


class UnplayableError(ItemError):
    """An item that can be read, but not be played on a page. Its text holds no path."""


@dataclass(frozen=True, kw_only=True)
class PlayedFile:
    """A recording or video as a file that browsers play: a WAV of 16 kHz mono, or the video's own file."""

    data: bytes
    media_type: str


class Thumbnails:
    """Small images of items, read again from the source of a cache, only from files in some folders, after links.

    A video is represented by its middle frame, a recording by its spectrogram, 0 to 8 kHz on the mel scale. Within
    `trust_files`, items are read wherever the cache says that they are.

    Args:
        cache: the cache.
        folders: folders that the user allows; empty: the folder of the cache's source, see `source_folders`.
        modality: one of `PICTURED`.

    Raises:
        PathError: the source's files no longer exist; or it is remote, a custom class or too large a folder, and the
            cache is not trusted.
    """

    def __init__(self, cache: Cache, folders: Sequence[Path] = (), modality: str = "image") -> None:
        self._modality = modality
        self.folders = allowed_folders(cache, folders, modality)
        try:
            with restricted(self.folders):
                self._source = reopen_source(cache.info.source)
        except PathError as error:
            raise PathError(f"{not_shown(modality)}{error}{_MOVED}") from None
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
        data = self._read(item)
        if self._modality == "audio":
            return draw_sound(decode_audio(data, item.start_s, item.stop_s), size_px)
        return _middle_frame(data, item) if self._modality == "video" else decode_image(data)

    def read(self, row: int) -> bytes:
        """Read the file of the item in a row; raise an ItemError with the reason if it fails. Thread-safe."""
        return self._read(self._item(row))

    def play(self, row: int, max_bytes: int) -> PlayedFile:
        """Return the recording or video in a row as a file to play. Thread-safe.

        A recording is decoded, its interval if it is one, and what is returned is what an encoder gets. Of a video, it
        is the whole file as it is stored; see `interval_fragment`.

        Raises:
            UnplayableError: the file would be larger than `max_bytes`, or is a video in a format that browsers lack.
            ItemError: the item cannot be read or decoded.
        """
        item = self._item(row)
        data = self._read(item)
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

    def _read(self, item: FileItem) -> bytes:
        with restricted(self.folders):
            return self._source.read(item)


def data_url(data: bytes, media_type: str) -> str:
    """Return a file as a `data:` URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def draw_sound(samples_n: Floats, width_px: int) -> Image.Image:
    """Draw the spectrogram of a recording at 16 kHz, half as high as wide: time to the right, dark is loud.

    Each column is the mean of a few windows, however long the recording is.
    """
    height_px, num_windows = width_px // 2, width_px * _WINDOWS_PER_COLUMN
    padded_n = np.pad(samples_n, (0, max(0, _WINDOW - len(samples_n))))
    starts = np.linspace(0, len(padded_n) - _WINDOW, num_windows).astype(np.int64)
    windows = padded_n[starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(windows))).reshape(width_px, _WINDOWS_PER_COLUMN, -1).mean(axis=1)
    mel = np.linspace(np.log1p(AUDIO_RATE_HZ / 2 / 700), 0, height_px)  # the first row is the top
    bins = 700 * np.expm1(mel) * _WINDOW / AUDIO_RATE_HZ
    shown = np.stack([np.interp(bins, np.arange(column.size), column) for column in power], axis=1)
    level_db = 10 * np.log10(shown / max(shown.max(), 1e-6) + 1e-12)
    return Image.fromarray(np.round(255 * np.clip(level_db / _QUIETEST_DB, 0, 1)).astype(np.uint8))


def _middle_frame(data: bytes, item: FileItem) -> Image.Image:
    """Return the frame in the middle of a video or its interval; the first one if its end is not known.

    Its frames have at most as many pixels as an image: a file of a few megabytes may announce gigabytes of them.
    """
    start_s, info = item.start_s or 0.0, probe_media(data).get("video")
    announced_s = None if info is None else info.duration_s
    middle_s = start_s + max(0.0, announced_length(announced_s, item.start_s, item.stop_s) or 0.0) / 2
    return Image.fromarray(np.ascontiguousarray(frame_at(data, middle_s, max_pixels=MAX_PIXELS)))


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
        size, limit = format_bytes(num_bytes), format_bytes(max_bytes)
        raise UnplayableError(f"too large to be played here: {size}, more than {limit}")


def _video_type(data: bytes) -> str:
    """Return the media type of a video that FFmpeg can open, if browsers know its container."""
    is_webm, is_mp4 = data.startswith(b"\x1a\x45\xdf\xa3"), data[4:8] == b"ftyp"
    if not is_webm and not is_mp4:
        raise UnplayableError("browsers play MP4 and WebM, and this video is neither; convert it to one of them")
    if "video" not in probe_media(data):
        raise ItemError("no frames: the file has no video stream")
    return "video/mp4" if is_mp4 else "video/webm"


def not_shown(modality: str) -> str:
    """Return how the reason begins why items of a modality are missing on a page."""
    return f"{noun(modality)} are not shown: "


def source_folders(cache: Cache, modality: str = "image") -> list[Path]:
    """Return the folders that hold the files of a cache's source; empty if it has no files.

    The cache says where they are, so a folder that holds more than items is rejected: the root, a home or a folder
    above it, and one that holds the cache. If the source is one file there that holds its items, it is returned alone.

    Raises:
        PathError: so it is, or the source is none of folders here; the error is about items of `modality`.
    """
    folders = _recorded_folders(cache.info.source, modality)
    for folder in folders:
        held = _held_by(folder.resolve(), cache)
        if held is None:
            continue
        path, location = _first_path(cache, modality), Path(base_source(cache.info.source)[1])
        if path and location.is_file() and any(folder / path == location for folder in folders):
            return [location]
        if path == "":
            reason = "the import names no file of the first one; if it does of others"
            raise PathError(f"{not_shown(modality)}{reason}, name their folder with --image-folder")
        where = f"the cache says that they are in {folder}, which holds {held}"
        raise PathError(f"{not_shown(modality)}{where}{_name_folder(modality)}")
    return folders


def _first_path(cache: Cache, modality: str) -> str | None:
    """Return the path of the first item of a modality; None without items."""
    if not cache.info.num_items.get(modality):
        return None
    return str(RowReader(cache, modality, ["path"]).take(np.array([0]))["path"][0].as_py())


def _name_folder(modality: str) -> str:
    return f"; name a folder of {noun(modality)} with --image-folder, or use --trust if you trust the cache"


def _held_by(folder: Path, cache: Cache) -> str | None:
    """Return what a folder holds besides items, if anything."""
    if folder == Path(folder.anchor):
        return "all files of this machine"
    if any(home.is_relative_to(folder) for home in _homes()):
        return "a home"
    return "the cache" if cache.path.resolve().is_relative_to(folder) else None


def _homes() -> Iterator[Path]:
    """Iterate over the homes of people, of the administrator and of this user; others are folders of the system."""
    with suppress(RuntimeError):  # a user without a home
        yield Path.home().resolve()
    yield from (Path(user.pw_dir) for user in pwd.getpwall() if user.pw_uid == 0 or user.pw_uid >= _FIRST_PERSON)


def _recorded_folders(source: Mapping[str, Any], modality: str) -> list[Path]:
    if source.get("type") == MERGED:
        return [folder for part in merged_parts(source) for folder in _recorded_folders(part, modality)]
    kind, location = base_source(source)
    missing, name_folder = not_shown(modality), _name_folder(modality)
    if kind not in SOURCES.paths and kind != IMPORTED_SOURCE:
        if kind in SOURCES:
            raise PathError(
                f"{missing}the source of the cache is the plug-in {kind!r}, which may read any file{name_folder}"
            )
        raise PathError(
            f"{missing}the cache names the source class {kind!r}, which is custom code; if you trust the "
            "cache, use --trust"
        )
    if kind == "openmoji":
        return []
    if "://" in location:
        raise PathError(f"{missing}the cache says that they are at {location}{name_folder}")
    if kind in {"folder", "huggingface"} and not Path(location).exists():
        next_step = _MOVED if kind == "folder" else name_folder  # else it may be a name on the Hub
        raise PathError(f"{missing}{location} is not a folder of this machine{next_step}")
    if kind == "webdataset":
        return [shard_root(shard) for shard in location.split(SHARD_SEPARATOR)]
    path, root = Path(location), source.get("settings", {}).get("root")
    folders = [] if kind == "coco" else [path if path.is_dir() else path.parent]
    if root and "://" in root:
        raise PathError(f"{missing}the cache says that they are at {root}{name_folder}")
    return [*folders, *([Path(root)] if root else [])]
