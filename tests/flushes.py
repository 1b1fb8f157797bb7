"""Flushes to disk that return at once; `tests/conftest.py` and `tests/crash.py` import this module first.

No test can tell whether bytes have reached the disk: those of a killed process stay in the kernel, and other processes
read them. But tests flush tens of thousands of files, and a disk takes milliseconds for each.
"""

import os


def check_descriptor(file: int) -> None:
    """Raise OSError as `os.fsync` does if the file is not open."""
    os.fstat(file)


os.fsync = check_descriptor  # type: ignore[assignment]
