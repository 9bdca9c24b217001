"""What a command does besides what it says: files it writes, programs it starts, hosts it calls."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 3 * 2**30  # bytes that a command may map on top of what this process has
CHANGES = {  # events of `sys.addaudithook`, and which of their arguments are paths
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.link": (1,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.utime": (0,),
}
STARTS = ("os.exec", "os.fork", "os.posix_spawn", "os.system", "subprocess.Popen")
CALLS = ("socket.connect", "socket.getaddrinfo")


@dataclass
class Watch:
    """What was seen, and what need not be told.

    Attributes:
        folder: where files may be written.
        secret: a file that may not be read.
        deeds: what was done that a stranger's files must not bring about, a line each.
    """

    folder: Path
    secret: Path
    deeds: list[str] = field(default_factory=list)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int):
                self._see_open(_real(os.fsdecode(path), flags), flags)
        elif event in CHANGES:
            for number in CHANGES[event]:
                self._see_change(event, arguments[number])
        elif event in STARTS:
            self.deeds.append(f"{event} {arguments[0]}")
        elif event in CALLS:
            self._see_call(event, arguments[0] if event == "socket.getaddrinfo" else arguments[1])
        elif event == "pickle.find_class":
            self.deeds.append(f"unpickled {arguments[0]}.{arguments[1]}")

    def _see_open(self, path: str, flags: int) -> None:
        if path == str(self.secret):
            self.deeds.append("read the secret")
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and not self._is_ours(path):
            self.deeds.append(f"wrote {path}")

    def _see_call(self, event: str, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "::1", "localhost", None):
            self.deeds.append(f"{event} {host}")

    def _see_change(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        folder, name = os.path.split(os.fsdecode(path))  # a link itself may be changed
        whole = os.path.join(os.path.realpath(folder or "."), name)
        if not self._is_ours(whole):
            self.deeds.append(f"{event} {whole}")

    def _is_ours(self, path: str) -> bool:
        return path == os.devnull or Path(path).is_relative_to(self.folder)


def _real(path: str, flags: int) -> str:
    """Where a file lies that is opened; a link that is not to be followed lies where it is."""
    if not flags & os.O_NOFOLLOW:
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder or "."), name)


_active: list[Watch] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _active:
        watch.see(event, arguments)


_hooked = False


@contextmanager
def watched(folder: Path, secret: Path) -> Iterator[Watch]:
    """Watch this process, which may write into a folder alone, and map no more than `MEMORY`."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # which cannot be taken away again
        _hooked = True
    watch = Watch(Path(os.path.realpath(folder)), Path(os.path.realpath(secret)))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    _active.append(watch)
    try:
        yield watch
    finally:
        _active.remove(watch)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
