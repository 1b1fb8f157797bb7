"""The cores of this machine."""

import os


def num_cores() -> int:
    """Count the cores that this process may use; a job array's scheduler may give it a few of a machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
