"""A dataset repository on a small hub of this machine, opened as a source."""

import io
import os
import time
from collections.abc import Sequence
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


def ask(folder: Path, up: Sequence[str], down: Sequence[str]) -> dict[str, Any]:
    """Open sources while the Hub is up, then run commands in a folder while it is down; return what came of each.

    Call it in a process of its own: the libraries read the Hub's address once, when they are imported.
    """
    tables = {"en/train": ("a", "b", "c"), "en/test": ("d",), "de/train": ("x", "y")}
    files = {"README.md": CARD, **{f"{path}.parquet": write_table(*captions) for path, captions in tables.items()}}
    found: dict[str, Any] = {}
    with serve_hub() as hub:
        hub.repositories["org/name"] = files
        hub.revisions["org/name", "v1"] = {**files, "de/train.parquet": write_table("old")}
        os.environ |= hub.environment()
        from embedcache.errors import EmbedcacheError
        from embedcache.sources.open import open_below, open_source

        for location in up:
            try:
                source = open_below(open_source(location).describe(), None)
                found[location] = [
                    [sample.key, sample.texts[0].text, dict(sample.columns)] for sample in source.samples()
                ]
            except EmbedcacheError as error:
                found[location] = str(error)
    from huggingface_hub.utils import _http

    from tests.cli.run import embedcache

    # The library tries again and again, and waits twice as long each time: half a minute in all.
    _http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # type: ignore[assignment]

    for command in down:
        done = embedcache(*command.split(), cwd=folder)
        found[command] = (done.code, done.stderr)
    return found
