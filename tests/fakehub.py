"""A Hub on this machine: as much of its protocol as loading a small dataset or model takes, and as
many of its faults."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

TAG = "v1"

Repos = dict[str, dict[str, bytes]]
# By the end of a path, what is done with its next requests: a status, `short` (half of the body,
# then nothing), `hang`, `wrong` (other bytes), `gated`; the last one stays if it ends with a `+`.
Faults = dict[str, list[str]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: Repos
    faults: Faults
    asked: list[str]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing on the tests' stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if self._fails(path):
            return
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        if parts[0] not in ("datasets", "models"):
            parts = ["models", *parts]
        if len(parts) < 3:
            self._send(404, b"no such page")
            return
        files = self.repos.get("/".join(parts[1:3]))
        commit = _digest(repr(files).encode())
        rest = parts[3:]
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif len(rest) > 1 and rest[1] not in ("main", TAG, commit):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif is_api:
            self._api("/".join(parts[1:3]), files, commit, rest, body)
        elif rest[0] == "resolve" and "/".join(rest[2:]) in files:
            name, content = "/".join(rest[2:]), files["/".join(rest[2:])]
            headers = {"ETag": f'"{_etag(name, content)}"', "X-Repo-Commit": commit}
            self._send_part(self._spoiled(path, content), headers)
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})

    def _api(
        self, name: str, files: dict[str, bytes], commit: str, rest: list[str], body: bytes
    ) -> None:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _etag(path, content)}
            for path, content in files.items()
        ]
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        entries += [{"type": "directory", "path": path, "oid": commit} for path in sorted(folders)]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": commit, "siblings": siblings, "tags": []})
        elif rest[0] == "tree":
            below = PurePosixPath("/".join(rest[2:]) or ".")
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0]
            paths = {str(entry["path"]): PurePosixPath(str(entry["path"])) for entry in entries}
            inside = {
                path
                for path, pure in paths.items()
                if (below in pure.parents if deep.lower() == "true" else pure.parent == below)
            }
            self._json([entry for entry in entries if entry["path"] in inside])
        elif rest[0] == "paths-info":
            text = body.decode()
            asked = json.loads(text) if text.startswith("{") else parse_qs(text)
            self._json([entry for entry in entries if entry["path"] in asked["paths"]])
        else:
            self._send(404, b"{}")

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_part(self, content: bytes, headers: dict[str, str]) -> None:
        """A file, or what is left of it, where the request names a place to go on from."""
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if not start:
            self._send(200, content, headers)
            return
        self.asked.append(f"from {start}")
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._next(self.path, {"short"}):
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def _next(self, path: str, kinds: set[str]) -> str:
        """The fault that is due for a path, if it is of these kinds."""
        for end, faults in self.faults.items():
            if path.endswith(end) and faults and faults[0].rstrip("+") in kinds:
                return faults[0].rstrip("+") if faults[0].endswith("+") else faults.pop(0)
        return ""

    def _fails(self, path: str) -> bool:
        """Whether a fault was all that there was to be answered."""
        codes = {"401", "403", "404", "429", "500", "503"}
        fault = self._next(path, {*codes, "gated", "hang"})
        if fault == "hang":
            time.sleep(3)
            self.close_connection = True
        elif fault == "gated":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif fault:
            self._send(int(fault), b"{}")
        return bool(fault)

    def _spoiled(self, path: str, content: bytes) -> bytes:
        if self.command == "HEAD" or not self._next(path, {"wrong"}):
            return content
        return bytes(reversed(content))


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _etag(name: str, content: bytes) -> str:
    """As the Hub names content: large files by their SHA-256, others as git does."""
    if name.endswith((".safetensors", ".bin")):
        return hashlib.sha256(content).hexdigest()
    return _digest(b"blob %d\0" % len(content) + content)


@contextmanager
def serve(
    repos: Repos, faults: Faults | None = None, asked: list[str] | None = None
) -> Generator[str]:
    """Datasets and models by name, each as its files.

    Args:
        asked: is told every path that is asked for, and `from N` where not from the beginning.

    Yields:
        What `HF_ENDPOINT` is to be.
    """
    told = {"repos": repos, "faults": faults or {}, "asked": [] if asked is None else asked}
    handler = type("Handler", (_Handler,), told)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_python(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own, with its own caches in `folder`; it sees no other Hub."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = {
        **plain,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HOME": str(folder),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "STEMTUNE_CACHE": str(folder / "cache"),
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
