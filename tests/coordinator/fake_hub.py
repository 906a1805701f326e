"""A fake of the Hugging Face hub: the few endpoints that an upload asks, over HTTP, as the library calls them."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_a_test"


class FakeHub:
    """What was asked of it. `broken`: it answers 503 to all."""

    def __init__(self) -> None:
        self.broken = False
        self.repos: dict[str, bool] = {}  # whether private, by name
        self.stored: dict[str, bytes] = {}  # large files by SHA-256
        self.commits: list[tuple[str, dict[str, bytes]]] = []  # message, and files by path
        self.tokens: set[str] = set()
        self.url = ""

    def answer(self, path: str, body: bytes) -> Any:
        """To a POST."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization", "me"), asked["name"])))
            self.repos.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
            return {"url": f"{self.url}/{name}", "name": name, "id": "1"}
        if "/preupload/" in path:
            return {"files": [{"path": file["path"], "shouldIgnore": False, "oid": None, "uploadMode": "lfs" if
                               file["path"].endswith(".safetensors") else "regular"}
                              for file in json.loads(body)["files"]]}
        if path.endswith(".git/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{self.url}/store/{one['oid']}"}}}
                for one in json.loads(body)["objects"]]}
        assert "/commit/" in path, path
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
                 if line["key"] == "file"}
        files |= {line["value"]["path"]: self.stored[line["value"]["oid"]] for line in lines
                  if line["key"] == "lfsFile"}
        self.commits.append((lines[0]["value"]["summary"], files))
        return {"commitUrl": f"{self.url}/me/model/commit/{len(self.commits):040x}", "commitOid":
                f"{len(self.commits):040x}", "success": True}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """One that serves on loopback."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _reply(self, status: int, answer: Any) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            body = self._body()
            hub.tokens.add(self.headers.get("Authorization", ""))
            if hub.broken:
                self._reply(503, {"error": "the fake is broken"})
            else:
                self._reply(200, hub.answer(self.path.split("?")[0], body))

        def do_PUT(self) -> None:
            hub.stored[self.path.rpartition("/")[2]] = self._body()
            self._reply(200, {})

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
