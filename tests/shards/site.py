"""A web server of this machine that fails as it is told to."""

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from shards import Index


@dataclass
class Site:
    """A folder on a web server of this machine, and what was asked of it.

    `faults` are taken by requests for a file in order: an HTTP status, "flip" a bit, "cut" the
    answer short, an event to wait for, None for nothing; those under (name, "whole") by requests
    for all of the file only, as copies of small files are made.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    listed: bool = True
    tells_changes: bool = False  # by an ETag
    asked: list[tuple[str, str]] = field(default_factory=list)  # name, "whole" or "part"
    faults: dict[tuple[str, str], list] = field(default_factory=dict)
    gone: threading.Event = field(default_factory=threading.Event)

    def count(self, what: str) -> Counter:
        return Counter(name for name, how in self.asked if how == what and name.endswith(".tar"))


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            if site.gone.is_set():
                self.close_connection = True
                return None
            name = self.path.lstrip("/")
            path = site.folder / name
            if path.is_dir() and site.listed:
                links = "".join(f'<a href="{file.name}">' for file in path.iterdir())
                return self.answer(200, links.encode(), "text/html")
            if not path.is_file():
                return self.answer(404, b"")
            content, status, how = path.read_bytes(), 200, "whole"
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and site.ranges:
                first, last = map(int, asked.groups())
                how = "whole" if (first, last) == (0, len(content) - 1) else "part"
                content, status = content[first : last + 1], 206
            self.tag = hashlib.sha256(path.read_bytes()).hexdigest()
            if self.command == "HEAD":
                return self.answer(status, content)
            site.asked.append((name, how))
            faults = site.faults.get((name, how), [])
            fault = faults.pop(0) if faults else None
            if isinstance(fault, int):
                return self.answer(fault, b"")
            if isinstance(fault, threading.Event):
                fault.wait()
            if fault == "flip":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.answer(status, content, fault=fault)

        def answer(self, status, content, kind="application/octet-stream", fault=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", kind)
            if site.tells_changes:
                self.send_header("ETag", f'"{self.tag}"')
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault == "cut":
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # clients of these tests go away at will


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    site = Site(folder)
    server = Server(("127.0.0.1", 0), handler(site))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield site
    site.gone.set()
    server.shutdown()
    server.server_close()


def everything(index: Index) -> list[list[int]]:
    """The ids of the train split's sequences."""
    return index.read("train", np.arange(index.sequences("train")))[0].tolist()
