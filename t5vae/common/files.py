"""Files: written whole or not at all, read as lines of JSON, and what goes wrong with them told."""

import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from t5vae.common.errors import StorageError, UserError, first_line
from t5vae.common.openers import only_file
from t5vae.common.patient import open_patiently
from t5vae.common.storage import WEATHER

LARGEST = 64 * 2**20  # bytes of a JSON document, or of a line of JSON, that is read
SCRATCH = 64 * 2**20  # bytes free in the temporary folder, without which libraries fail


def write_whole(path: Path, text: str) -> None:
    """Write a file, of which a reader sees the old text or the new one, never a part.

    Raises:
        OSError: if that fails; the file is as it was.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """The same for objects, a line of JSON each."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name to write a file under, which then appears at `path` whole and on disk."""
    temporary = path.with_name(f"{path.name}.part")
    yield temporary
    fsync(temporary)
    os.replace(temporary, path)


def fsync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The objects of a file of lines of JSON; none where there is no file.

    A last line that a crash cut short is left out.

    Args:
        path: the file.
        tail: look at so many bytes at the end alone.

    Raises:
        UserError: if the file cannot be read, or holds anything else.
        StorageError: the storage failed for minutes.
    """
    return list(iter_records(path, tail))


def iter_records(path: Path, tail: int | None = None) -> Iterator[dict[str, Any]]:
    """The same one by one, for files that are large."""
    with reading(str(path)):
        try:
            file = open_patiently(path, grows=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        with file:
            if tail is not None:
                begin = file.seek(max(0, file.seek(0, os.SEEK_END) - tail))
                if begin:
                    file.readline()
            while line := file.readline(LARGEST):
                if len(line) == LARGEST or line.endswith(b"\n"):
                    yield _parse(line, path)


def head(path: Path) -> bytes:
    """What a file holds, but of a large one no more than `parse_json` needs to refuse it.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=only_file) as file:
        return file.read(LARGEST + 1)


def parse_json(content: bytes | str) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, it is larger than `LARGEST`, or nested deeper than Python's stack.
    """
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{path} is damaged, or no file of a run: its lines are not all JSON objects"
        )
    return record


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raise what goes wrong while reading a file as a UserError that names it.

    Where the storage fails, that is a StorageError: nothing is wrong with the file.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error.reason})") from None
    except tarfile.TarError as error:
        raise UserError(f"{name} is no whole tar file ({error})") from None
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno in WEATHER:
            raise not_answering(name, error) from error
        raise UserError(f"cannot read {name}: {first_line(error)}") from None


def not_answering(name: str, error: OSError) -> StorageError:
    """What is raised where storage failed, and trying again is for the same command to do."""
    return StorageError(
        f"{name}: the storage fails ({first_line(error)}); the same command goes on once it answers"
    )
