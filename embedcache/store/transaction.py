"""Replacing files of one folder together: all of them or none, whenever the process is killed.

The new files are written below a folder of the transaction. Then a file is written there that says that all are
complete: at this moment they have replaced the old ones. What is left, moving each to its place, is done by
whoever comes next: the writer itself or, if it was killed, the next writer, or a reader who finds an old file beside
a new one.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from embedcache.files import is_remote, locked, put_file, remove_folder, write_atomic

_COMPLETE = "complete"
"""File of a transaction whose other files are all written."""


@contextmanager
def replacing_together(root: Path, number: int) -> Iterator[Path]:
    """Create a folder whose files replace, after the block, those of the same paths below `root`, all or none.

    After an error none is replaced. The caller has locked the number in `root/chunks`, and has finished what a killed
    writer left.

    Args:
        root: folder of an encoder.
        number: number of the transaction, such as that of the chunk whose files are replaced.

    Example:
        >>> with replacing_together(group.path, chunk) as folder:  # doctest: +SKIP
        ...     write_atomic(folder / "chunks/00003.json", commit)
    """
    folder = _folder(root, number)
    try:
        yield folder
    except BaseException:
        _remove(folder)
        raise
    write_atomic(folder / _COMPLETE, b"")
    roll_forward(root, number)


def roll_forward(root: Path, number: int) -> None:
    """Finish a transaction, as `finish` does, for a caller that has locked it."""
    folder = _folder(root, number)
    if is_complete(root, number):
        # The commit comes last: an old one beside a new array differs from its checksum, which readers notice.
        for name in sorted(_find_names(folder), key=lambda name: name.startswith("chunks/")):
            _move(folder / name, root / name)
    _remove(folder)


def finish(root: Path, number: int) -> None:
    """Move the files of a transaction that is complete to their places; remove those of one that is not.

    It waits for a writer that works on the transaction.
    """
    if _folder(root, number).exists():
        with locked(root / "chunks", number):
            roll_forward(root, number)


def is_complete(root: Path, number: int) -> bool:
    """Return whether a transaction has replaced its files, of which some are not in their places yet."""
    return (_folder(root, number) / _COMPLETE).exists()


def find_transactions(root: Path) -> list[int]:
    """Return the numbers of the transactions that killed writers left in a local folder, or that are in work."""
    return sorted(int(path.stem) for path in (root / "chunks").glob("*.txn"))


def _folder(root: Path, number: int) -> Path:
    return root / "chunks" / f"{number:05d}.txn"


def _find_names(folder: Path) -> list[str]:
    """Return the paths of the files of a transaction below its folder, without the one that completes it."""
    if is_remote(folder):
        prefix = f"{folder.path}/"  # type: ignore[attr-defined]
        names = [name.removeprefix(prefix) for name in folder.fs.find(folder.path)]  # type: ignore[attr-defined]
    else:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if name != _COMPLETE]


def _move(file: Path, path: Path) -> None:
    if is_remote(file):
        file.fs.cp_file(file.path, path.path)  # type: ignore[attr-defined]
    else:
        put_file(file, path)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        remove_folder(folder)
