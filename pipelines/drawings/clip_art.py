"""Two collections of drawings and photographs with names, as tables that `extract` reads: stamps and clip art."""

import html
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from embedcache.files import write_atomic

STAMPS = Path("/usr/share/tuxpaint/stamps")
CLIP_ART = Path("/usr/share/openclipart/svg")
_MOST_OF_ONE_TITLE = 5
_MOST_DRAWINGS = 2_000
_LEFT_OUT = ("computer", "shapes", "special", "recreation/games/cards")
"""Folders of icons, stars, gradients, patterns and playing cards."""

ListFiles: TypeAlias = Callable[[Path], Iterator[tuple[Path, str]]]


def write_table(path: Path, folder: Path, list_files: ListFiles) -> Path:
    """Write a table of images and their names, sorted by path; return its path."""
    lines = [
        json.dumps({"key": file.relative_to(folder).as_posix(), "image": str(file), "caption": caption})
        for file, caption in list_files(folder)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path


def list_stamps(folder: Path) -> Iterator[tuple[Path, str]]:
    """Iterate over the stamps of Tux Paint, each with the first line of its text file, which is English."""
    for path in sorted(folder.rglob("*.txt")):
        for image in (path.with_suffix(".png"), path.with_suffix(".svg")):
            if image.is_file():
                yield image, path.read_text(encoding="utf-8").splitlines()[0]
                break


def list_clip_art(folder: Path) -> Iterator[tuple[Path, str]]:
    """Iterate over random drawings of the Open Clip Art Library, each with its title.

    Where more than a few have one title, that of a theme, the name of the file is taken instead.
    """
    titles = {path: _title(path) for path in sorted(folder.rglob("*.svg"))}
    counts = Counter(titles.values())
    named = {
        path: title if title and counts[title] <= _MOST_OF_ONE_TITLE else _words(path.stem)
        for path, title in titles.items()
        if not path.relative_to(folder).as_posix().startswith(_LEFT_OUT)
    }
    paths = [path for path, name in named.items() if name]
    drawn = random.Random(0).sample(paths, min(_MOST_DRAWINGS, len(paths)))
    yield from ((path, named[path]) for path in sorted(drawn))


def _title(path: Path) -> str:
    found = re.search(r"<dc:title>(.*?)</dc:title>", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    title = html.unescape(found[1]) if found else ""
    return _words(re.sub(r"^\s*Clipart by .*? - ", "", title))


def _words(name: str) -> str:
    """Return the letters of a name, with spaces between words."""
    return " ".join(re.findall(r"[^\W\d_]+", name)).lower()
