"""The cores of this machine.

The one connection to a Ray cluster.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from embedcache.errors import EmbedcacheError
from embedcache.registry import require


def num_cores() -> int:
    """Count the cores that this process may use; a job array's scheduler may give it a few of a machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Give Ray, connected; a connection that was there before stays.

    Args:
        address: of a cluster; None starts one on this machine.

    Raises:
        MissingExtraError: Ray is not installed.
        EmbedcacheError: there is no cluster at the address.
    """
    ray = require("ray", extra="ray")
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False)
    except ConnectionError as error:
        raise EmbedcacheError(f"no Ray cluster at {address}: {error}; start one with: ray start --head") from error
    try:
        yield ray
    finally:
        ray.shutdown()
