"""A small stand-in of the Hub's HTTP interface on 127.0.0.1: what huggingface_hub asks when it looks up, downloads and
uploads over plain HTTP (HF_HUB_DISABLE_XET). It can break a transfer, refuse, and be switched off."""
from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = re.compile(r"\.(safetensors|parquet|gz|model)$")  # kept apart from git, served by a redirect
REFUSED = {"repo": "RepoNotFound", "revision": "RevisionNotFound", "entry": "EntryNotFound", "gated": "GatedRepo"}
API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/([^/]+))?$")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """commits: id -> path -> content; refs: branch or tag -> id."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


class Hub:
    """The stand-in: repositories, tokens (token -> role), what was asked, and the faults to come."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens = {"hf_writes": "write", "hf_reads": "read"}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.faults: list[list] = []
        self.server: http.server.ThreadingHTTPServer | None = None
        self.port = 0
        self.on()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> str:
        """Where large files lie: to the library another host, which gets no token."""
        return f"http://localhost:{self.port}"

    def on(self) -> None:
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Answer)
        self.server.daemon_threads, self.server.hub, self.port = True, self, self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def off(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, kind: str, name: str, files: dict[str, bytes | str] | Path, branch: str = "main", **how: bool) -> str:
        """Commit files (on top of nothing) to a branch, making the repository if need be; the commit's id."""
        if isinstance(files, Path):
            files = {str(f.relative_to(files)): f.read_bytes() for f in sorted(files.rglob("*")) if f.is_file()}
        repo = self.repos.setdefault((kind, name), Repo(**how))
        content = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        about = repr([kind, name, len(repo.commits), sorted(content.items())]).encode()
        commit = repo.refs[branch] = hashlib.sha1(about).hexdigest()
        repo.commits[commit] = content
        self.large |= {hashlib.sha256(data).hexdigest(): data for path, data in content.items() if LARGE.search(path)}
        return commit

    def fail(self, request: str, how: int | str, times: int = 1) -> None:
        """Let the next `times` requests that fit the pattern ("METHOD /path") go wrong: a status, "cut" (the
        connection ends after half of the body) or "reset"."""
        self.faults.append([re.compile(request), how, times])

    def count(self, request: str) -> int:
        """How many requests fitted a pattern."""
        return sum(bool(re.search(request, f"{method} {path}")) for method, path, _ in self.asked)


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Refusal(Exception):
    """An answer that is an error: (status, X-Error-Code, X-Error-Message)."""


class Answer(http.server.BaseHTTPRequestHandler):
    """One request."""

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range")))
        fault = next((f for f in hub.faults if f[2] and f[0].search(f"{self.command} {path}")), None)
        self.how = fault[1] if fault else None
        if fault:
            fault[2] -= 1
        if self.how == "reset" and self.command != "GET":
            return self.reset()
        body = self.body()
        try:
            if isinstance(self.how, int):
                raise Refusal(self.how, "", "told to")
            self.role = self.check_token()
            self.answer(path, body)
        except Refusal as found:
            status, code, message = found.args
            self.send(json.dumps({"error": message}).encode(), status,
                      {"X-Error-Code": code, "X-Error-Message": message} if code or message else {})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def check_token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.hub.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.server.hub.tokens.get(token)

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        broken = self.how in ("cut", "reset")
        self.wfile.write(data[:len(data) // 2] if broken else data)
        if self.how == "reset":
            self.reset()

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def repo(self, kind: str, name: str) -> Repo:
        repo = self.server.hub.repos.get((kind, name))
        if repo is None or repo.private and not self.role:
            raise Refusal(404 if self.role else 401, REFUSED["repo"], "Repository not found")
        return repo

    def commit(self, repo: Repo, revision: str) -> str:
        found = repo.refs.get(revision, revision)
        if found not in repo.commits:
            raise Refusal(404, REFUSED["revision"], f"Invalid rev id: {revision}")
        return found

    def may_write(self) -> None:
        if self.role != "write":
            raise Refusal(403 if self.role else 401, "", "You don't have the rights to do this")

    def answer(self, path: str, body: bytes) -> None:
        hub = self.server.hub
        if path == "/":
            return self.send(b"")
        if path == "/api/whoami-v2":
            if not self.role:
                raise Refusal(401, "", "Invalid username or password.")
            return self.json({"name": "ann", "type": "user", "orgs": [], "auth": {"accessToken": {"role": self.role}}})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.startswith(("/large/", "/upload/")) and self.headers.get("Authorization"):
            raise Refusal(400, "", "a token was sent to another host")
        if path.startswith("/large/"):
            return self.large(hub.large[path.removeprefix("/large/")])
        if path.startswith("/upload/"):
            hub.large[path.removeprefix("/upload/")] = body
            return self.send(b"")
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if found := FILE.fullmatch(path):
            return self.file("dataset" if found[1] else "model", *found.group(2, 3, 4))
        found = API.fullmatch(path)
        if found is None:
            raise Refusal(404, "", f"the stand-in does not know {path}")
        kind, name, task, revision = found.groups()
        tasks = {"tree": self.tree, "preupload": self.preupload, "commit": self.take_commit}
        return tasks.get(task, self.about)(kind, name, revision or "main", body)

    def about(self, kind: str, name: str, revision: str, _: bytes) -> None:
        repo = self.repo(kind, name)
        commit = self.commit(repo, revision)
        readme = repo.commits[commit].get("README.md", b"").decode()
        licence = re.search(r"^license: (.+)$", readme, re.M)
        self.json({"_id": "0", "id": name, "sha": commit, "private": repo.private, "gated": repo.gated, "tags": [],
                   "disabled": False, "downloads": 0, "likes": 0, "author": name.split("/")[0],
                   "cardData": {"license": licence[1]} if licence else {},
                   "siblings": [{"rfilename": path} for path in repo.commits[commit]]})

    def tree(self, kind: str, name: str, revision: str, _: bytes) -> None:
        repo = self.repo(kind, name)
        content = repo.commits[self.commit(repo, revision)]
        self.json([{"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
                   | ({"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                      if LARGE.search(path) else {}) for path, data in content.items()])

    def file(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.repo(kind, name)
        commit = self.commit(repo, revision)
        if repo.gated:
            raise Refusal(403 if self.role else 401, REFUSED["gated"], "Access is restricted")
        data = repo.commits[commit].get(path)
        if data is None:
            raise Refusal(404, REFUSED["entry"], "Entry not found")
        if not LARGE.search(path):
            return self.large(data, {"X-Repo-Commit": commit, "ETag": f'"{git_id(data)}"'})
        digest = hashlib.sha256(data).hexdigest()
        self.send(b"", 302, {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)),
                             "Location": f"{self.server.hub.store}/large/{digest}"})

    def large(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not start:
            return self.send(data, headers=headers)
        begin = int(start[1])
        self.send(data[begin:], 206, {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}", **(headers or {})})

    def create(self, asked: dict) -> None:
        self.may_write()
        name = f"{asked['organization'] or 'ann'}/{asked['name']}"
        if name.split("/")[0] != "ann":
            raise Refusal(403, "", "You don't have the rights to create a model under this namespace")
        known = ("model", name) in self.server.hub.repos
        if not known:
            self.server.hub.put("model", name, {}, private=asked.get("visibility") == "private")
        self.send(json.dumps({"url": f"{self.server.hub.url}/{name}", "name": name}).encode(), 409 if known else 200)

    def preupload(self, kind: str, name: str, revision: str, body: bytes) -> None:
        self.may_write()
        there = self.repo(kind, name).files
        oid = lambda path: (hashlib.sha256(there[path]).hexdigest() if LARGE.search(path) else git_id(there[path])) \
            if path in there else None
        self.json({"files": [{"path": f["path"], "uploadMode": "lfs" if LARGE.search(f["path"]) else "regular",
                              "shouldIgnore": False, "oid": oid(f["path"])} for f in json.loads(body)["files"]]})

    def batch(self, asked: dict) -> None:
        self.may_write()
        hub = self.server.hub
        self.json({"transfer": "basic", "objects": [
            {"oid": o["oid"], "size": o["size"]}
            | ({} if o["oid"] in hub.large else {"actions": {"upload": {"href": f"{hub.store}/upload/{o['oid']}"}}})
            for o in asked["objects"]]})

    def take_commit(self, kind: str, name: str, revision: str, body: bytes) -> None:
        self.may_write()
        files = dict(self.repo(kind, name).files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.large[value["oid"]]
        commit = self.server.hub.put(kind, name, files, revision)
        self.json({"commitUrl": f"{self.server.hub.url}/{name}/commit/{commit}", "commitOid": commit,
                   "pullRequestUrl": None})
