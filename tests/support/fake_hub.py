"""A hub on this machine: what huggingface_hub asks of one, from a folder, with bytes counted.

<root>/<org>/<name>/<revision>/...      the files of a model at a branch or tag
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import make_tokenizer
from tests.support.web_server import running

MAIN = "main"
TINY, SHARDS = "org/tiny", "org/shards"
"""Models that `fill_hub` makes; the second is in shards, and has a revision `v2`."""
_WEIGHTS = "model.safetensors"
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_STORE = "/store"
"""Large files are redirected to an address below it, on another host."""
_LARGE_BYTES = 20_000


def commit_of(revision: str) -> str:
    """Return the commit that a branch or tag stands for."""
    return sha1(revision.encode(), usedforsecurity=False).hexdigest()


def fill_hub(root: Path, llama: Path) -> Path:
    """Put models below `root` as their makers upload them, made of a tiny llama; return `root`."""
    single = root / TINY / MAIN
    shutil.copytree(llama, single)
    (single / "original").mkdir()
    (single / "additional_chat_templates").mkdir()
    (single / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    for name in ("consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin"):
        shutil.copyfile(single / _WEIGHTS, single / name)
    (single / "README.md").write_text("About")
    model = AutoModelForCausalLM.from_pretrained(single, dtype=torch.bfloat16)
    for revision in (MAIN, "v2"):
        model.save_pretrained(root / SHARDS / revision, max_shard_size="60KB")
        make_tokenizer().save_pretrained(root / SHARDS / revision)
        model.model.norm.weight.data += 1
    return root


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library of the hub, in this process, ask the hub at `url`."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@dataclass
class FakeHub:
    """A hub that serves models from a folder.

    Attributes:
        root: where the models are.
        url: where it is reached.
        sent: bytes that were sent of each file, by its path below the revision.
        ignores_ranges: whether it sends whole files to who asks for a part.
    """

    root: Path
    url: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    ignores_ranges: bool = False

    def revisions(self, repo: str) -> dict[str, Path]:
        """Return the folders of a model by revision and by commit."""
        folders = {path.name: path for path in (self.root / repo).iterdir()}
        return {**folders, **{commit_of(name): path for name, path in folders.items()}}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path."""
        if path.startswith(_STORE):
            return 200, {}, (self.root / path.removeprefix(_STORE + "/")).read_bytes()
        if api := _API.fullmatch(path):
            return self._listing(api["repo"], (api["rest"] or "").strip("/"))
        found = _FILE.fullmatch(path)
        return self._file(**found.groupdict()) if found else (404, {}, b"")

    def _listing(self, repo: str, rest: str) -> tuple[int, dict[str, str], bytes]:
        if not (self.root / repo).is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        kind, _, revision = rest.partition("/")
        folder = self.revisions(repo).get(revision or MAIN)
        if folder is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        document: Any = {
            "id": repo,
            "sha": commit_of(folder.name),
            "siblings": [{"rfilename": name, "size": size} for name, size in files.items()],
        }
        if kind == "tree":
            document = [
                {"type": "file", "path": name, "size": size, "oid": commit_of(name)}
                for name, size in files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()

    def _file(self, repo: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        folder = self.revisions(repo)[revision]
        file = folder / name
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {"ETag": f'"{commit_of(str(file))}"', "X-Repo-Commit": commit_of(folder.name)}
        content = file.read_bytes()
        if len(content) < _LARGE_BYTES:
            return 200, headers, content
        elsewhere = self.url.replace("127.0.0.1", "localhost")
        headers |= {
            "Location": f"{elsewhere}{_STORE}/{file.relative_to(self.root)}",
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": headers["ETag"],
        }
        return 302, headers, b""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        status, headers, body = self.hub.answer(path)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if span and status == 200 and not self.hub.ignores_ranges:
            start, end = int(span[1]), int(span[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            status, body = 206, body[start : end + 1]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self._send(path.rpartition("/")[2], body)

    def _send(self, name: str, body: bytes) -> None:
        try:
            for start in range(0, len(body), 1 << 16):
                part = body[start : start + (1 << 16)]
                self.wfile.write(part)
                self.hub.sent[name] += len(part)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the test's output quiet."""


@contextmanager
def serving_hub(root: Path) -> Iterator[FakeHub]:
    """Serve the models below `root` on a free port of the loopback interface."""
    hub = FakeHub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    with running(server):
        yield hub
