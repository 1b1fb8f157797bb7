"""What the C library does with the memory of tensors that are gone."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_TENSOR = 2**30


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, for the rest of the process.

    By default it gives large blocks back to the system, and each step then waits for the system to clear their pages
    again: docs/benchmarks/train.md has the figures. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_TENSOR)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
