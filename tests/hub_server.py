"""A small hub on this machine, in memory: what huggingface_hub 2 asks for to upload, list and read a repository.

It compares the hashes and sizes of uploads, and answers in the form that huggingface_hub expects. It has one branch,
other revisions that a test puts there, and no Xet, multi-part uploads, tokens, limits or history. It cannot show how
the real Hub behaves.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".parquet", ".safetensors")


@dataclass
class Hub:
    """State of the hub: files of `OWNER/NAME`, also at other revisions, large objects by SHA-256, and requests."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)  # of (OWNER/NAME, revision)
    large: dict[str, bytes] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    stored: Counter[str] = field(default_factory=Counter)
    failing_commit: int = -1  # number of the commit that is refused once

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that uses this hub; huggingface_hub reads it when it is imported."""
        return {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_of_a_test",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run a hub; repositories named `closed` refuse everything."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        server.end_connections()


class _Server(ThreadingHTTPServer):
    """A server whose connections, which clients keep open between requests, can be ended."""

    connections: list[socket.socket]

    def server_activate(self) -> None:
        self.connections = []
        super().server_activate()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def end_connections(self) -> None:
        """End all connections; most were closed by their clients."""
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(LARGE) or "/c/" in name


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 0.04 s for the client to acknowledge its headers

    def do_POST(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/closed/" in path:
            self._answer({"error": "You have no rights here"}, status=403)
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/(preupload|commit|paths-info)/(.+)", path):
            answer = {"preupload": self._preupload, "commit": self._commit, "paths-info": self._paths_info}[found[2]]
            if (files := self._files(found[1], found[3])) is not None:
                answer(found[1], files, body)
        elif found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        else:
            self._answer({"error": f"no such endpoint {path}"}, status=404)

    def do_PUT(self) -> None:
        data, oid = self._body(), self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            self._answer({"error": "wrong bytes"}, status=400)
            return
        self.hub.large[oid] = data
        self.hub.stored[oid] += 1
        self._answer({})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if (files := self._files(found[1], found[2])) is not None:
                siblings = [{"rfilename": name} for name in files]
                about = {"id": found[1], "sha": self._sha(files), "siblings": siblings, "private": True, "tags": []}
                self._answer(about)
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            if (files := self._files(found[1], found[2])) is not None:
                self._tree(files, found[3] or "")
        elif found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            if (files := self._files(found[1], found[2])) is not None:
                self._resolve(files, found[3])
        else:
            self._answer({"error": f"no such endpoint {path}"}, status=404)

    do_HEAD = do_GET

    def _create(self, about: dict[str, Any]) -> None:
        self.hub.created.append(about)
        name = f"{about['organization']}/{about['name']}" if about.get("organization") else f"me/{about['name']}"
        if about["name"] == "closed":
            self._answer({"error": "You have no rights here"}, status=403)
            return
        self.hub.repositories.setdefault(name, {})
        prefix = "datasets/" if about.get("type") == "dataset" else ""
        self._answer({"url": f"{self.hub.url}/{prefix}{name}", "name": name})

    def _preupload(self, repository: str, files: dict[str, bytes], body: bytes) -> None:
        self._answer({"files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": self._oid(file["path"], files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def _batch(self, request: dict[str, Any]) -> None:
        objects = []
        for item in request["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/store/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.large else {"actions": upload})})
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, files: dict[str, bytes], body: bytes) -> None:
        if len(self.hub.commits) == self.hub.failing_commit:
            self.hub.failing_commit = -1
            self._answer({"error": "the hub is tired"}, status=500)
            return
        lines = [json.loads(line) for line in body.splitlines() if line]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits.append((repository, [line["value"]["path"] for line in lines if line["key"] != "header"]))
        self._answer({
            "commitUrl": f"{self.hub.url}/{repository}/commit/{self._sha(files)}",
            "commitOid": self._sha(files),
            "success": True,
        })  # fmt: skip

    def _paths_info(self, repository: str, files: dict[str, bytes], body: bytes) -> None:
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
        found = []
        for path in paths:
            if path in files:
                found.append(self._file(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append(self._folder(path))
        self._answer(found)

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = sorted(name for name in files if name.startswith(prefix))
        if folder and not inside:
            self._missing("EntryNotFound")
            return
        parts = [name.removeprefix(prefix).split("/") for name in inside]
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1"):
            ends = {prefix + "/".join(part[:depth]) for part in parts for depth in range(1, len(part))}
        else:
            ends = {prefix + part[0] for part in parts if len(part) > 1}
            inside = [name for name, part in zip(inside, parts, strict=True) if len(part) == 1]
        self._answer([self._folder(path) for path in sorted(ends)] + [self._file(name, files[name]) for name in inside])

    def _resolve(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            self._missing("EntryNotFound")
            return
        data, status, headers = files[name], 200, {}
        total = len(data)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or total - 1), total - 1)
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        headers |= {"X-Repo-Commit": self._sha(files), "ETag": f'"{self._oid(name, files[name])}"'}
        headers["Accept-Ranges"] = "bytes"
        self._send(data, "application/octet-stream", status, headers)

    def _files(self, repository: str, revision: str | None) -> dict[str, bytes] | None:
        """Return the files at a branch, tag or commit; answer that there is none, and return None."""
        if repository not in self.hub.repositories:
            self._missing("RepoNotFound")
            return None
        named = {"main": self.hub.repositories[repository]}
        named |= {tag: files for (name, tag), files in self.hub.revisions.items() if name == repository}
        named |= {self._sha(files): files for files in list(named.values())}
        if (revision or "main") not in named:
            self._missing("RevisionNotFound")
        return named.get(revision or "main")

    @staticmethod
    def _oid(name: str, data: bytes) -> str:
        return hashlib.sha256(data).hexdigest() if is_large(name) else git_hash(data)

    def _file(self, name: str, data: bytes) -> dict[str, Any]:
        about: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
        if is_large(name):
            about["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return about

    @staticmethod
    def _folder(path: str) -> dict[str, Any]:
        return {"type": "directory", "path": path, "size": 0, "oid": git_hash(path.encode())}

    @staticmethod
    def _sha(files: dict[str, bytes]) -> str:
        return git_hash(b"".join(name.encode() + git_hash(data).encode() for name, data in sorted(files.items())))

    def _missing(self, code: str) -> None:
        self._send(b"{}", "application/json", 404, {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _answer(self, value: object, *, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status, {})

    def _send(self, data: bytes, kind: str, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if length or self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_: object) -> None:
        """Log nothing."""
