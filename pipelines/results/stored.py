"""Results of steps on disk, with a digest, and the settings that they were computed with.

Files of earlier versions have no digest, and are read as they are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedcache.errors import CorruptError
from embedcache.files import write_atomic
from embedcache.provenance import DIGEST, add_digest, read_record

_NEXT_STEP = "delete it, and it is computed again"


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON values with their digest, atomically."""
    write_atomic(path, (json.dumps(add_digest(values)) + "\n").encode())


def read_values(path: Path) -> dict[str, Any]:
    """Read what `write_values` wrote.

    Raises:
        PathError: the file does not exist.
        CorruptError: it has changed since it was written.
    """
    record = read_record(path, next_step=_NEXT_STEP)
    record.pop(DIGEST, None)
    return record


def write_step(path: Path, settings: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write the values of a step with its settings."""
    write_values(path, {"settings": settings, "values": values})


def read_step(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the values of a step; None if it was not computed yet, or with other settings.

    Raises:
        CorruptError: the file has changed since it was written.
    """
    if not path.is_file():
        return None
    record = read_values(path)
    if record.get("settings") != json.loads(json.dumps(settings)):
        return None
    if not isinstance(record.get("values"), dict):
        raise CorruptError(f"{path}: expected the values of a step; {_NEXT_STEP}")
    return dict(record["values"])
