"""A Hugging Face Hub on this machine: one dataset repository, served as the real one does.

    python -m tests.sources.hub < sources.json

opens each source of a list while the Hub is up, then runs each command of another list while it is down, and prints
what came of them: the libraries read the Hub's address once, when they are imported.
"""

import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

_ROUTE = re.compile(
    r"/(?:api/)?datasets/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info|resolve)/(?P<rest>.*))?"
)


class _Hub(BaseHTTPRequestHandler):
    """Answers for one repository."""

    name: str
    revisions: Mapping[str, Mapping[str, bytes]]

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        found = _ROUTE.fullmatch(unquote(urlsplit(self.path).path))
        if found is None or found["name"] != self.name:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision, _, path = (found["rest"] or "main").partition("/")
        files = self.revisions.get(revision.removeprefix("sha-"))
        if files is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        sha = f"sha-{revision.removeprefix('sha-')}"
        if found["what"] == "resolve":
            return self._send_file(files.get(path), sha)
        if found["what"] == "tree":
            return self._send_json(_entries(files, path))
        if found["what"] == "paths-info":
            given = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self._send_json([entry for each in given for entry in _info(files, each)])
        siblings = [{"rfilename": each} for each in files]
        return self._send_json(
            {
                "id": self.name,
                "sha": sha,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "private": False,
            }
        )

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, data: bytes | None, sha: str) -> None:
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hash(data) & 0xFFFFFFFF:x}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, data, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], headers)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serve_hub(name: str, revisions: Mapping[str, Mapping[str, bytes]]) -> Iterator[str]:
    """Serve a dataset repository, revision -> path -> content, at the address that is yielded."""
    handler = type("Hub", (_Hub,), {"name": name, "revisions": revisions})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _entries(files: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
    """Return all files and folders below a folder."""
    below = [path for path in files if path.startswith(f"{folder}/" if folder else "")]
    folders = {path.rpartition("/")[0] for path in below if "/" in path} - {folder}
    return [entry for path in [*sorted(folders), *below] for entry in _info(files, path)]


def _info(files: Mapping[str, bytes], path: str) -> list[dict[str, Any]]:
    if path in files:
        return [{"type": "file", "path": path, "size": len(files[path]), "oid": f"{hash(files[path]) & 0xFFFFFFFF:x}"}]
    is_folder = any(each.startswith(f"{path}/") for each in files)
    return [{"type": "directory", "path": path, "size": 0, "oid": "0"}] if is_folder else []


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
    with serve_hub("org/name", {"main": files, "v1": {**files, "de/train.parquet": write_table("old")}}) as address:
        os.environ |= {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        from embedcache.errors import EmbedcacheError
        from embedcache.sources import open_source, reopen_source

        for location in asked["up"]:
            try:
                source = reopen_source(open_source(location).describe())
                found[location] = [
                    (sample.key, sample.texts[0].text, dict(sample.columns)) for sample in source.samples()
                ]
            except EmbedcacheError as error:
                found[location] = str(error)
    from tests.cli.run import embedcache

    for command in asked["down"]:
        done = embedcache(*command.split(), cwd=Path.cwd())
        found[command] = (done.code, done.stderr)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
