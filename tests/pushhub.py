"""A Hub on this machine that takes pushes: as much of its protocol as they use, and its faults.

What is loaded from a Hub: tests/fakehub.py.
"""

import base64
import hashlib
import json
import re
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from stemtune import network

TOKEN = "hf_" + "CanaryCanaryCanaryCanaryCanary0123"
# The Hub's client hands files to its network library in a way that this one calls old.
OLD_WAYS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
LICENCES = {"apache-2.0", "mit", "cc-by-4.0"}  # some that it knows
Files = dict[str, bytes]


@dataclass
class Repo:
    """What it holds at each commit, and which one each branch is at."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def put(self, branch: str, files: Files) -> str:
        """A new commit."""
        oid = hashlib.sha1(repr((len(self.commits), files)).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> Files | None:
        """The files of a branch or a commit."""
        return self.commits.get(self.branches.get(revision, revision))


class PushHub:
    """Answers requests.

    Attributes:
        faults: by a part of a path, what happens to the next requests: a status, `cut` (the
            connection, in the middle of the request), `lost` (the answer), `page` (a proxy's, 502),
            `wrong` (other bytes are kept); the last one stays if it ends with a `+`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.tokens: set[str] = set()

    def make(self, name: str, *, private: bool = True) -> Repo:
        """A repository, with what the Hub puts into a new one."""
        self.repos[name] = Repo(private)
        self.repos[name].put("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.repos[name]

    def files(self, name: str, revision: str = "main") -> Files:
        """What was pushed."""
        found = self.repos[name].at(revision)
        assert found is not None
        return {path: content for path, content in found.items() if path != ".gitattributes"}

    def __call__(self, request: Request) -> Response:
        path = unquote(request.path)

        if path == "/api/agent-harnesses":  # which the client asks, whoever it is
            return _json({}, 404)
        self.asked.append(f"{request.method} {path}")
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.tokens.add(sent)
        fault = self._next(path)
        if fault == "cut":
            request.stream.read(1000)
            return self._hang_up(request)
        if fault == "page":
            return Response("<html>Bad gateway</html>", 502, content_type="text/html")
        if fault.isdigit():
            return _json({"error": f"what the server says of {fault}"}, int(fault))
        if sent != TOKEN and not path.startswith("/lfs/"):
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return _json({"error": "Invalid credentials"}, 401, headers)
        answer = self._answer(request, path, wrong=fault == "wrong")
        return self._hang_up(request) if fault == "lost" else answer

    def _next(self, path: str) -> str:
        for part, faults in self.faults.items():
            if part in path and faults:
                return faults[0].rstrip("+") if faults[0].endswith("+") else faults.pop(0)
        return ""

    def _hang_up(self, request: Request) -> Response:
        request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return Response()

    def _answer(self, request: Request, path: str, *, wrong: bool) -> Response:
        if path == "/api/whoami-v2":
            return _json({"name": "me", "type": "user"})
        if path == "/api/repos/create":
            return self._create(request.get_json())
        if path == "/api/validate-yaml":
            return _validate(request.get_json()["content"])
        if path.startswith("/lfs/"):
            return self._keep(path.removeprefix("/lfs/"), request.get_data(), wrong)
        if batch := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(request.get_json()) if batch[1] in self.repos else _json({}, 404)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)/(.+))?", path)
        if found is None:
            return _json({"error": f"no such page: {path}"}, 404)
        name, verb, revision = found.groups()
        if name not in self.repos:
            return _json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self._of_repo(request, name, verb or "revision", revision or "main")

    def _of_repo(self, request: Request, name: str, verb: str, revision: str) -> Response:
        repo = self.repos[name]
        if verb == "branch":
            if revision in repo.branches:
                return _json({"error": "it is there"}, 409)
            repo.branches[revision] = repo.branches["main"]
            return _json({})
        files = repo.at(revision)
        if files is None:
            return _json({"error": "not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if verb == "revision":
            sha = repo.branches.get(revision, revision)
            return _json({"id": name, "private": repo.private, "sha": sha, "siblings": []})
        if verb == "preupload":
            return _json({"files": [_mode(file, files) for file in request.get_json()["files"]]})
        if verb == "paths-info":
            asked = request.get_json(silent=True) or {"paths": request.form.getlist("paths")}
            return _json([_info(p, files[p]) for p in asked["paths"] if p in files])
        assert verb == "commit"
        return self._commit(request, name, revision, dict(files))

    def _create(self, asked: dict[str, Any]) -> Response:
        owner = asked["organization"] or "me"
        if owner != "me":
            said = f"You don't have the rights to create a model under the namespace {owner!r}"
            return _json({"error": said}, 403)
        name = f"{owner}/{asked['name']}"
        status = 409 if name in self.repos else 200
        if status == 200:
            self.make(name, private=asked.get("visibility") == "private")
        return _json({"url": f"{self.url}/{name}"}, status)

    def _batch(self, asked: dict[str, Any]) -> Response:
        """Where to send what it does not have yet."""
        objects = []
        for one in asked["objects"]:
            there = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.objects:
                there["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
            objects.append(there)
        return _json({"objects": objects, "transfer": "basic"})

    def _keep(self, oid: str, content: bytes, wrong: bool) -> Response:
        if hashlib.sha256(content).hexdigest() != oid:
            return _json({"error": "other bytes than were promised"}, 400)
        self.objects[oid] = content[::-1] if wrong else content
        return Response()

    def _commit(self, request: Request, name: str, revision: str, files: Files) -> Response:
        repo = self.repos[name]
        for line in request.get_data().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repo.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        proposed = request.args.get("create_pr") == "1"
        oid = repo.put("refs/pr/1" if proposed else revision, files)
        answer = {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}
        if proposed:
            answer["pullRequestUrl"] = f"{self.url}/{name}/discussions/1"
        return _json(answer)


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, content_type="application/json")


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf", ".png"))


def _hash(path: str, content: bytes) -> str:
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _mode(file: dict[str, Any], files: Files) -> dict[str, Any]:
    path = file["path"]
    there = _hash(path, files[path]) if path in files else None
    mode = "lfs" if _is_large(path) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there}


def _info(path: str, content: bytes) -> dict[str, Any]:
    value = {"type": "file", "path": path, "size": len(content), "oid": _hash(path, content)}
    if _is_large(path):
        value["lfs"] = {"oid": value["oid"], "size": len(content), "pointerSize": 130}
    return value


def _validate(card: str) -> Response:
    """As the Hub does: it knows licences by their names, and bases by theirs."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    data = yaml.safe_load(found[1]) if found else {}
    errors = []
    if "license" in data and data["license"] not in LICENCES:
        errors.append(f'"license" must be one of {sorted(LICENCES)}')
    for base in [data["base_model"]] if "base_model" in data else []:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            errors.append('"base_model" is not valid. Use a model id from https://hf.co/models')
    told = {"errors": [{"message": error} for error in errors], "warnings": []}
    return _json(told, 400 if errors else 200)


@contextmanager
def push_hub(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Generator[PushHub]:
    """The Hub of this process, with a login; its client does not wait between its tries."""
    hub = PushHub(server.url_for("").rstrip("/"))
    server.expect_request(re.compile("/.*")).respond_with_handler(hub)
    for name in ("HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HF_TOKEN": TOKEN, "NO_PROXY": "*", "no_proxy": "*"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    monkeypatch.setattr(network, "FIRST", 0.001)
    monkeypatch.setattr(network, "LONGEST", 0.001)
    close_session()
    try:
        yield hub
    finally:
        close_session()
