"""A small Hub on the loopback, for the real client: listings, downloads, commits, faults."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

WRITER, READER = "hf_writer_token", "hf_reader_token"


@dataclass
class Repo:
    """A repository: its commits by revision, and who may see it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    private: bool = False
    gated: bool = False


@dataclass
class Hub:
    """What the server holds, what it was asked, and the faults that it shall have."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """METHOD PATH, with the range of a download behind it."""
    cut_once: set[str] = field(default_factory=set)
    """Files whose first download ends in the middle."""
    busy: dict[str, int] = field(default_factory=dict)
    """Start of METHOD PATH -> how many such requests are answered by 429."""
    retry_after: str = "1"
    """What such an answer asks for, in seconds."""
    early: list[str] = field(default_factory=list)
    """Requests that came again before that was over."""
    not_before: dict[str, float] = field(default_factory=dict)
    """METHOD PATH -> until when it was asked to wait."""
    forbidden: dict[str, int] = field(default_factory=dict)
    """The same for 403."""
    bodies: list[bytes] = field(default_factory=list)
    """Everything that was sent."""

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision."""
        commits = self.repos[name].commits
        by_hash = {commit_of(name, r): r for r in commits}
        revision = by_hash.get(revision, revision)
        return (commit_of(name, revision), commits[revision]) if revision in commits else None


def commit_of(name: str, revision: str) -> str:
    """The hash of the commit that a revision stands for."""
    return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests look at `requests`."""

    def do_GET(self) -> None:
        """Listings and files."""
        self._handle()

    def do_HEAD(self) -> None:
        """What a file is."""
        self._handle()

    def do_POST(self) -> None:
        """Repositories, commits, and what an upload needs."""
        self._handle()

    def do_PUT(self) -> None:
        """The bytes of a large file."""
        self._handle()

    def _handle(self) -> None:
        path = unquote(self.path.split("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.bodies.append(body)
        asked = self.headers.get("Range", "")
        line = f"{self.command} {path}"
        self.hub.requests.append(f"{line} {asked}".strip())
        if time.monotonic() < self.hub.not_before.get(line, 0):
            self.hub.early.append(line)
        if self._counted(self.hub.busy, line):
            self.hub.not_before[line] = time.monotonic() + float(self.hub.retry_after)
            return self._error(429, "TooManyRequests", {"Retry-After": self.hub.retry_after})
        if self._counted(self.hub.forbidden, line):
            return self._error(403, "")
        if self._token() not in ("", WRITER, READER):
            return self._error(401, "")
        if path == "/api/whoami-v2":
            return self._whoami()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if line.startswith("PUT /upload/"):
            self.hub.blobs[path.rsplit("/", 1)[1]] = body
            return self._send(b"")
        for pattern, answer in (
            (r"/api/models/(.+?)/revision/(.+)", self._info),
            (r"/api/models/(.+?)/tree/([^/]+).*", self._tree),
            (r"/api/models/(.+?)/preupload/(.+)", self._preupload),
            (r"/api/models/(.+?)/commit/(.+)", self._commit),
            (r"/(.+?)\.git/info/lfs/objects/batch()", self._batch),
            (r"/(.+?)/resolve/([^/]+)/.*", self._file),
        ):
            if found := re.fullmatch(pattern, path):
                name, revision = found[1], found[2]
                if self._refused(name):
                    return None
                if revision and self.hub.find(name, revision) is None:
                    return self._error(404, "RevisionNotFound")
                return answer(name, revision, path, body)
        return self._error(404, "EntryNotFound")

    @staticmethod
    def _counted(faults: dict[str, int], line: str) -> bool:
        """Whether a request has one of the faults that are left."""
        for start, left in faults.items():
            if left and line.startswith(start):
                faults[start] = left - 1
                return True
        return False

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _refused(self, name: str) -> bool:
        repo = self.hub.repos.get(name)
        known = self._token() in (WRITER, READER)
        if repo is None or (repo.private and not known):
            self._error(404 if known else 401, "RepoNotFound")
        elif repo.gated and self._token() != WRITER:
            self._error(403 if known else 401, "GatedRepo")
        else:
            return False
        return True

    def _whoami(self) -> None:
        role = {WRITER: "write", READER: "read"}.get(self._token())
        if role is None:
            return self._error(401, "")
        access = {"displayName": "t", "role": role}
        orgs = [{"name": "org", "roleInOrg": "write", "type": "org"}]
        orgs.append({"name": "readers", "roleInOrg": "read", "type": "org"})
        about = {"type": "user", "name": "someone", "orgs": orgs}
        return self._json({**about, "auth": {"type": "access_token", "accessToken": access}})

    def _create(self, asked: dict[str, Any]) -> None:
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        if self._token() != WRITER:
            return self._error(403, "")
        if name in self.hub.repos:
            return self._json({"url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _info(self, name: str, revision: str, path: str, body: bytes) -> None:
        found = self.hub.find(name, revision)
        assert found is not None
        siblings = [{"rfilename": file} for file in found[1]]
        about = {"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "tags": []}
        self._json({**about, "private": self.hub.repos[name].private, "downloads": 0, "likes": 0})

    def _tree(self, name: str, revision: str, path: str, body: bytes) -> None:
        found = self.hub.find(name, revision)
        assert found is not None
        entries = [
            {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for file, data in found[1].items()
        ]
        self._json(entries)

    def _preupload(self, name: str, revision: str, path: str, body: bytes) -> None:
        if self._token() != WRITER:
            return self._error(403, "")
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return self._json({"files": files})

    def _batch(self, name: str, revision: str, path: str, body: bytes) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            there = asked["oid"] in self.hub.blobs
            upload = {"upload": {"href": f"{self.hub.url}/upload/{asked['oid']}"}}
            objects.append({**asked, **({} if there else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, revision: str, path: str, body: bytes) -> None:
        files = self.hub.repos[name].commits[revision]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = commit_of(name, revision)
        about = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
        self._json({**about, "success": True, "hookOutput": ""})

    def _file(self, name: str, revision: str, path: str, body: bytes) -> None:
        commit, files = self.hub.find(name, revision) or ("", {})
        file = path.split(f"/resolve/{revision}/", 1)[1]
        if file not in files:
            return self._error(404, "EntryNotFound")
        data, start = files[file], 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if file in self.hub.cut_once:
            self.hub.cut_once.remove(file)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        self.wfile.write(data[start:])
        return None

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(
            b"{}", status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}
        )

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A Hub that listens on the loopback while the context lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
