"""A stand-in for the server of Weights & Biases, which remembers what runs sent."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandBServer:
    """Attributes:
    url: where it is.
    rows: of each run's history, by its id.
    """

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "viewer" in query:
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}"}}
        if "upsertBucket" in query:
            entity = {"id": "1", "name": "me"}
            project = {"id": "1", "name": variables["project"], "entity": entity}
            bucket = {"id": "1", "name": variables["name"], "project": project}
            bucket |= {"displayName": "a run", "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"{self.url}/storage"} for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        lines = files.get("wandb-history.jsonl", {}).get("content", [])
        self.rows.setdefault(run, []).extend(map(json.loads, lines))


@contextmanager
def serving() -> Iterator[WandBServer]:
    """Such a server, on a port of this host."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if content[:2] == b"\x1f\x8b":
                content = gzip.decompress(content)
            told: dict[str, Any] = {}
            if self.path == "/graphql":
                request = json.loads(content)
                told = {"data": server.graphql(request["query"], request.get("variables", {}))}
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(content).get("files") or {})
            self._answer(json.dumps(told).encode())

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(b"")

        def _answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = WandBServer(http.server_port)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
