"""Folders of talking faces in the layout of LRS2 and LRS3 as a source of clips and their transcripts.

    open_source("lrs2/main::lrs2/train.txt", kind="pipelines.avsr.lrs:LrsSource")
    open_source("lrs3/trainval", kind="pipelines.avsr.lrs:LrsSource")

A clip is `SPEAKER/CLIP.mp4`, and the first line of `SPEAKER/CLIP.txt` is `Text:` and its words. A list has one clip per
line, `SPEAKER/CLIP`; LRS2's list of test clips names a kind of noise after it. The corpora themselves are not packaged:
their owners lend them on application.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embedcache.errors import PathError, SourceError
from embedcache.files import reading
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.sources.files import read_item_file
from embedcache.sources.open import SourceSettings

KIND = "pipelines.avsr.lrs:LrsSource"
_SEPARATOR = "::"
_LABEL = "text:"


class LrsSource:
    """Clips below a folder, or the clips of a list. The location is `FOLDER` or `FOLDER::LIST`.

    A sample has one transcript in capitals, and the clip is both its audio and its video. Columns are `speaker`;
    `split`, the list's name without its suffix; and `noise`, the word after a clip in the list. The last two are None
    without a list, and clips are then sorted by path.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("lrs")
        folder, _, list_path = str(location).partition(_SEPARATOR)
        self._folder = Path(folder).absolute()
        self._list = Path(list_path).absolute() if list_path else None

        if not self._folder.is_dir():
            raise PathError(f"expected a folder of SPEAKER/CLIP.mp4, got {self._folder}, which does not exist")
        if self._list is not None and not self._list.is_file():
            raise PathError(f"expected a list of clips, got {self._list}, which does not exist")

    def describe(self) -> Mapping[str, Any]:
        paths = [str(path) for path in (self._folder, self._list) if path is not None]
        return {"type": KIND, "path": _SEPARATOR.join(paths), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the clips, reading their transcripts."""
        is_empty = True
        for key, noise in self._clips():
            is_empty = False
            file = FileItem(path=f"{key}.mp4")
            yield Sample(
                key=key,
                texts=(TextItem(text=read_transcript(self._folder / f"{key}.txt"), language="en"),),
                files={"audio": (file,), "video": (file,)},
                columns={
                    "speaker": key.partition("/")[0],
                    "split": self._list.stem if self._list else None,
                    "noise": noise,
                },
            )

        if is_empty:
            raise SourceError(f"expected SPEAKER/CLIP.mp4 below {self._folder}, got none; name the folder of speakers")

    def read(self, item: FileItem) -> bytes:
        return read_item_file(self._folder / item.path)

    def _clips(self) -> Iterator[tuple[str, str | None]]:
        """Iterate over the keys of clips and their noise."""
        if self._list is None:
            for path in sorted(self._folder.glob("*/*.mp4")):
                yield path.relative_to(self._folder).with_suffix("").as_posix(), None
            return

        with reading(self._list, error_class=SourceError):
            lines = self._list.read_text(encoding="utf-8").splitlines()

        for number, line in enumerate(lines, 1):
            # LRS2's list of test clips names the noise after the clip; empty lines are skipped.
            key, *rest = line.split()[:2] or [""]
            if not key:
                continue
            if key.count("/") != 1:
                raise SourceError(f"{self._list}, line {number}: expected SPEAKER/CLIP, got {line!r}")
            yield key, rest[0] if rest else None


def read_transcript(path: Path) -> str:
    """Read the transcript of a clip, in capitals, from the first line of its file.

    Raises:
        SourceError: the line is not `Text:` and words.
    """
    with reading(path, error_class=SourceError), path.open(encoding="utf-8") as file:
        line = file.readline()

    text = " ".join(line[len(_LABEL) :].split()).upper()
    if not line.lower().startswith(_LABEL) or not text:
        raise SourceError(f"{path}: expected 'Text:' and words in its first line, got {line.strip()!r}")
    return text
