"""A matrix on the disk for as long as it is needed; a killed process leaves none behind."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedcache.arrays import Array
from embedcache.disk import disk_errors
from embedcache.errors import DiskFullError, PathError


@contextmanager
def scratch_matrix(folder: Path, shape: tuple[int, int], dtype: npt.DTypeLike) -> Iterator[Array]:
    """Give a matrix that lies in a file without a name; all of its space is taken at once.

    Args:
        folder: where; it must exist.
        shape: of the matrix.
        dtype: of its values.

    Raises:
        PathError: there is no such folder.
        DiskFullError: it does not fit; says how much is needed and how much is free.
    """
    if not folder.is_dir():
        raise PathError(f"the scratch folder {folder} does not exist; make it, or name another with --scratch")
    needed, free = shape[0] * shape[1] * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"comparing {shape[0]:,} vectors needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB "
            "free; free some, or name another folder with --scratch"
        )
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, needed))  # a hole that cannot be filled later would be a SIGBUS
        yield np.memmap(file, dtype, "r+", shape=shape)
