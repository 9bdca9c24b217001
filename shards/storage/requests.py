"""The files under a URL of any protocol that fsspec knows: requests, and what fails them."""

import errno
import io
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import fsspec

from shards.storage.store import SMALL, too_large
from t5vae.common.errors import UserError, first_line
from t5vae.common.storage import WEATHER

# Statuses of HTTP servers, which object stores tell too
MISSING = (404,)
DENIED = (401, 403)
BEYOND = (416,)
LATER = (408, 425, 429)  # besides those of 500 and more
NO_URL = ("InvalidUrlRedirectClientError", "NonHttpUrlRedirectClientError")  # of a redirect
WITHOUT_CREDENTIALS = ("DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError")
FAULTS = (  # of what was asked for, or of the program: another try is no use
    AttributeError,
    ImportError,
    IsADirectoryError,
    LookupError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,  # a certificate that does not hold, too
)
MOST = 16 * 2**20  # bytes of a range
# Of fsspec's protocols, those that read others': some run what a file says, or open what it names.
WRAPPERS = frozenset(
    {
        "async_wrapper",
        "asyncwrapper",
        "blockcache",
        "cached",
        "dask",
        "dir",
        "filecache",
        "generic",
        "libarchive",
        "reference",
        "simplecache",
        "tar",
        "zip",
    }
)
HARMLESS = frozenset({"simplecache", "tar", "zip"})
TOKENIZER_FILE = re.compile(r"[\w-][\w.-]*\.(?:jinja|json|model|txt)", re.ASCII)
MOST_FILES, MOST_OF_FILES = 64, 256 * 2**20  # of a tokenizer's folder, and their bytes
UNLISTED = (  # what the folder of a tokenizer may hold, where a server lists no folders
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class Remote:
    """The files under a URL, each request made once.

    Every method raises FileNotFoundError where there is no file, PermissionError where access is
    denied, OSError with a number of `WEATHER` where the server or the way to it fails, and any
    other OSError where the file cannot be read.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """

    def __init__(self, url: str):
        check_url(url)
        self.url = url.rstrip("/")
        self._over_http = self.url.startswith(("http://", "https://"))
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url, **bounded(self.url))
        except ImportError as error:
            raise UserError(
                f"reading {url} needs another package: pip install 't5vae[remote]' ({error})"
            ) from None
        except ValueError as error:
            raise UserError(f"cannot open {url}: {error}") from None

    def get(self, name: str, most: int = SMALL) -> bytes:
        """The content of a file, of at most so many bytes."""
        if self._over_http:  # of which some servers know no ranges
            content = self._try(name, self._fs.cat_file)
        else:
            content = self._range(name, 0, most + 1)
        if len(content) > most:
            raise too_large(most)
        return content

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A range of a file, shorter than asked for where the file ends."""
        content = b""
        while len(content) < size and (
            part := self._range(name, offset + len(content), min(MOST, size - len(content)))
        ):
            content += part
        return content

    def size(self, name: str) -> int:
        """Bytes of a file."""
        self.read(name, 0, 1)
        try:
            size = self._try(name, self._fs.size)
        except FileNotFoundError:  # over HTTP every failure is one to fsspec's size()
            raise OSError(errno.EIO, f"{self.url}/{name}: its size cannot be told now") from None
        if size is None:
            raise OSError(
                errno.EOPNOTSUPP, f"the server of {self.url} does not tell the size of {name}"
            )
        return size

    def stamp(self, name: str) -> str:
        """What a server gives a file anew when it changes; "" where it does not tell."""
        try:
            told = self._try(name, self._fs.info)
        except OSError:  # who reads the file will say what is wrong
            return ""
        stamps = {str(told[key]) for key in ("ETag", "etag") if told.get(key)}
        return next(iter(stamps), "")

    def folder(self, name: str) -> dict[str, bytes]:
        """The files of a folder and their contents."""
        contents: dict[str, bytes] = {}
        missing: OSError = FileNotFoundError(errno.ENOENT, f"{self.url}/{name} does not exist")
        for file in self._files(name):
            try:
                contents[file] = self.get(f"{name}/{file}")
            except FileNotFoundError:
                pass
            except PermissionError as error:
                missing = error
            if sum(map(len, contents.values())) > MOST_OF_FILES:
                raise too_large(MOST_OF_FILES)
        if not contents:
            raise missing
        return contents

    def _files(self, name: str) -> list[str]:
        """What a tokenizer may be read from, of all that a server lists in a folder."""
        try:
            if self._over_http:
                # fsspec looks for links in a time that grows with the page's square.
                page = self._try(name, self._fs.cat_file).decode(errors="replace")
                found = set(TOKENIZER_FILE.findall(page))
            else:
                paths = self._try(name, partial(self._fs.ls, detail=False))
                found = set(filter(TOKENIZER_FILE.fullmatch, (p.rpartition("/")[2] for p in paths)))
        except OSError as error:
            if error.errno in WEATHER:
                raise
            return list(UNLISTED)
        if len(found) > MOST_FILES:
            raise OSError(errno.EFBIG, f"it has more than {MOST_FILES} files")
        return sorted(found)

    def _range(self, name: str, offset: int, size: int) -> bytes:
        try:
            content = self._try(name, partial(self._fs.cat_file, start=offset, end=offset + size))
        except OSError as error:
            if error.errno == errno.ERANGE:
                return b""
            raise
        if len(content) > size:
            raise OSError(
                errno.EOPNOTSUPP,
                f"{self.url} sends only whole files: serve the dataset by another server (one that "
                "answers range requests) or copy it here",
            )
        return content

    def _try(self, name: str, call: Callable[[str], Any]) -> Any:
        try:
            return call(f"{self._root}/{name}")
        except Exception as error:  # each protocol raises its own
            number = error_number(error)
            missing = number == errno.ENOENT
            reason = f"{self.url}/{name} does not exist" if missing else first_line(error)
            raise OSError(number, reason) from None


def check_url(url: str) -> None:
    """Refuse a URL that holds a password, which would be written down, or reads more than it names.

    Raises:
        UserError: it does.
    """
    *before, last = url.split("::")
    schemes = [part.partition("://")[0] for part in before]
    wrong = [s for s in schemes if s not in HARMLESS] + [
        s for s in (last.partition("://")[0],) if s in WRAPPERS
    ]
    if wrong:
        raise UserError(f"URLs of {wrong[0]}:// are not read: give the files' own")
    try:
        has_password = urlsplit(last).password is not None
    except ValueError as error:
        raise UserError(f"cannot open {url}: {error}") from None
    if has_password:
        shown = last.partition("://")[2].rpartition("@")[2]
        raise UserError(
            f"the URL of {shown} holds a password, which would be written down with it: leave it "
            "out, and set it in the environment or in fsspec's configuration "
            "(~/.config/fsspec/*.json)"
        )


def bounded(url: str) -> dict[str, Any]:
    """What fsspec is to be given with a URL so that no answer that is read whole is endless."""
    return {"get_client": _http_client()} if url.startswith(("http://", "https://")) else {}


@cache
def _http_client() -> Callable[..., Any]:
    import aiohttp

    class Answer(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            if self._body is None:
                held = bytearray()
                async for part in self.content.iter_any():
                    held += part
                    if len(held) > SMALL:
                        self.close()
                        raise ValueError(f"the server sends more than {SMALL:,} bytes")
                self._body = bytes(held)
            return await super().read()

    async def get_client(**options: Any) -> Any:
        return aiohttp.ClientSession(**{"response_class": Answer} | options)

    return get_client


def error_number(error: Exception) -> int:
    """The number of an OSError that says what a protocol's exception means."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in MISSING:
        return errno.ENOENT
    denied = isinstance(error, PermissionError) or type(error).__name__ in WITHOUT_CREDENTIALS
    if denied or status in DENIED or str(error).startswith("Forbidden: "):  # the last is gcsfs's
        return errno.EACCES
    if status in BEYOND:
        return errno.ERANGE
    if isinstance(error, TimeoutError | ConnectionError) or status in LATER:
        return errno.EIO
    fault = isinstance(error, FAULTS) or type(error).__name__ in NO_URL
    refused = 300 <= status < 500 or fault
    return errno.EINVAL if refused else errno.EIO


def _status(error: Exception) -> int:
    """The HTTP status that an exception tells; 0 where none."""
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(answer, dict):  # botocore's
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    for told in (error, answer):
        for name in ("status", "status_code", "code"):
            status = str(getattr(told, name, ""))
            if status.isdecimal():
                return int(status)
    return 0


Result = TypeVar("Result")


class Request(Protocol):
    """What makes a request, perhaps several times."""

    def __call__(self, attempt: Callable[[], Result], name: str, /) -> Result: ...


def _once(attempt: Callable[[], Result], name: str) -> Result:
    return attempt()


class RemoteFile(io.RawIOBase):
    """A remote file, read from its beginning to its end by ranges of up to 16 MiB.

    Args:
        remote: where it lies.
        name: its name there.
        request: makes a request, as `patiently` does; by default once.

    Attributes:
        url: the file's.
        size: its bytes.
    """

    def __init__(self, remote: Remote, name: str, request: Request = _once):
        self.url = f"{remote.url}/{name}"
        self.size = request(partial(remote.size, name), self.url)
        self._read, self._request = partial(remote.read, name), request
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), MOST, self.size - self._at)
        content = self._request(partial(self._read, self._at, size), self.url) if size else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
