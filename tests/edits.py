"""Changes by hand to files that embedcache has written."""

from pathlib import Path
from typing import Any

from embedcache.provenance import DIGEST, read_json, write_json


def edit_record(path: Path, replace: dict[str, str] | None = None, **values: Any) -> None:
    """Change keys of a JSON object, then texts anywhere in it, and remove its digest, as a person or a stranger may."""
    record = {**{name: value for name, value in read_json(path).items() if name != DIGEST}, **values}
    write_json(path, record)
    text = path.read_text()
    for old, new in (replace or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)


def exchange(path: Path, data: bytes | bytearray) -> None:
    """Put another file in place of one, which threads of FAISS that read ahead may still have mapped."""
    other = path.with_suffix(".other")
    other.write_bytes(data)
    other.replace(path)
