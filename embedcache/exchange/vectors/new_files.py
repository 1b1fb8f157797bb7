"""Exports are new files and folders, whole or absent."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedcache.disk import disk_errors, flush, make_folder, partial_path
from embedcache.errors import PathError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; after the block it is flushed and becomes `folder`, and after an error it is gone.

    Raises:
        PathError: `folder` is there and not empty, or is a file.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise PathError(f"{folder} is not empty, or no folder; give the path of a new one")
    make_folder(folder.parent)
    temporary = partial_path(folder)
    temporary.mkdir()
    try:
        with disk_errors(folder):
            yield temporary
            for path in temporary.rglob("*"):
                flush(path)
            temporary.rename(folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_file(path: Path, suffix: str) -> None:
    """Refuse to write over a file, or under a name that says something else.

    Raises:
        PathError: the file is there, or its name does not end so.
    """
    if path.suffix != suffix:
        raise PathError(f"{path} is no name for this file; end it in {suffix}")
    if path.exists():
        raise PathError(f"{path} is there already; give the path of a new file")
