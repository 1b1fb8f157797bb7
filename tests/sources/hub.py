"""A dataset repository on a small hub of this machine, opened as a source.

    python -m tests.sources.hub < sources.json

opens each source of a list while the Hub is up, then runs each command of another list while it is down, and prints
what came of them: the libraries read the Hub's address once, when they are imported.
"""

import io
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hub_server import serve_hub

CARD = b"""---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train.parquet}
  - {split: test, path: en/test.parquet}
- config_name: de
  data_files:
  - {split: train, path: de/train.parquet}
---
"""
"""Config -> splits, as the card of a dataset has it."""


def write_table(*captions: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"caption": captions}), file)
    return file.getvalue()


def main() -> None:
    tables = {"en/train": ("a", "b", "c"), "en/test": ("d",), "de/train": ("x", "y")}
    files = {"README.md": CARD, **{f"{path}.parquet": write_table(*captions) for path, captions in tables.items()}}
    asked = json.load(sys.stdin)
    found: dict[str, Any] = {}
    with serve_hub() as hub:
        hub.repositories["org/name"] = files
        hub.revisions["org/name", "v1"] = {**files, "de/train.parquet": write_table("old")}
        os.environ |= hub.environment()
        from embedcache.errors import EmbedcacheError
        from embedcache.sources.open import open_source
        from embedcache.sources.reopen import open_below

        for location in asked["up"]:
            try:
                source = open_below(open_source(location).describe(), None)
                found[location] = [
                    (sample.key, sample.texts[0].text, dict(sample.columns)) for sample in source.samples()
                ]
            except EmbedcacheError as error:
                found[location] = str(error)
    from huggingface_hub.utils import _http

    from tests.cli.run import embedcache

    # The library tries again and again, and waits twice as long each time: half a minute in all.
    _http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # type: ignore[assignment]

    for command in asked["down"]:
        done = embedcache(*command.split(), cwd=Path.cwd())
        found[command] = (done.code, done.stderr)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
