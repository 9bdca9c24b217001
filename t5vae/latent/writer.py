"""The files of a corpus, while it is encoded: they grow, and go on growing after a halt.

Shapes: N texts, D latent size.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from t5vae.common import records
from t5vae.common.errors import UserError
from t5vae.common.files import parse_json, write_whole
from t5vae.common.records import Record
from t5vae.common.storage import patiently

FORMAT_VERSION = 2  # 1 did not know of rows, and counted those with too many tokens alone

NOTE = "done.json"
MANIFEST, CODES, TEXTS, ENDS = "corpus.json", "codes.npy", "texts.jsonl", "ends.npy"
ROWS = "rows.npy"
TOO_LONG = "too many tokens"


def is_of_use(work: Path) -> bool:
    """Whether a work folder holds what another encoding may go on with."""
    return NOTE in os.listdir(work)


class _Done(Record):
    """How far an encoding is: texts read and rows written, and the bytes of these."""

    read: int
    rows: int
    bytes: int
    made_from: dict[str, Any]


class Writer:
    """The files of a corpus, while they grow, and how far they are."""

    def __init__(self, work: Path, latent_size: int, made_from: dict[str, Any]):
        self.folder, self.note = work / "corpus", work / NOTE
        self.latent_size, self.made_from = latent_size, made_from
        self.read = self.rows = self.bytes = 0
        self._take_up()
        self.folder.mkdir(exist_ok=True)
        self.texts = open(self.folder / TEXTS, "ab")  # noqa: SIM115
        self.texts.truncate(self.bytes)
        self.codes = _Array(self.folder / CODES, np.float32, (latent_size,), self.rows)
        self.ends = _Array(self.folder / ENDS, np.int64, (), self.rows)
        self.numbers = _Array(self.folder / ROWS, np.int64, (), self.rows)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.texts, self.codes.file, self.ends.file, self.numbers.file):
            file.close()

    def append(self, rows: list[int], texts: list[str], codes_ND: Tensor, read: int) -> None:
        """Add texts, their rows and codes; `read` texts of the source are done with them."""
        lines = [json.dumps(text, ensure_ascii=False).encode() + b"\n" for text in texts]
        sizes = np.array([len(line) for line in lines], dtype=np.int64)
        self.texts.write(b"".join(lines))
        self.texts.flush()
        self.ends.append(self.bytes + sizes.cumsum())
        self.codes.append(codes_ND.numpy())
        self.numbers.append(np.array(rows, dtype=np.int64))
        self.read += read
        self.rows += len(texts)
        self.bytes += int(sizes.sum())
        done = {"read": self.read, "rows": self.rows, "bytes": self.bytes}
        write_whole(self.note, json.dumps({**done, "made_from": self.made_from}))

    def finish(self, out: Path, skipped: Mapping[str, int]) -> None:
        """Put the folder where it belongs, in place of an older one; what the source skipped."""
        too_long = self.read - self.rows
        reasons = {**skipped, **({TOO_LONG: too_long} if too_long else {})}
        manifest = {
            **self.made_from,
            "sequences": self.rows,
            "left_out": sum(reasons.values()),
            "reasons": reasons,
            "latent_size": self.latent_size,
        }
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        if out.exists():
            shutil.rmtree(out)
        os.replace(self.folder, out)
        self.forget()

    def forget(self) -> None:
        """Let no encoding go on with what is done."""
        self.note.unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Go on with what a halted encoding of the same left, or remove it."""
        try:
            said = parse_json(patiently(self.note.read_text, str(self.note)))
            done = records.check(_Done, said, str(self.note))
            (self.folder / TEXTS).stat()  # it is gone where a kill hit the end of `finish`
            if done.made_from == self.made_from:
                self.read, self.rows, self.bytes = done.read, done.rows, done.bytes
                return
        except (FileNotFoundError, ValueError, UserError):
            pass
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)


class _Array:
    """An array in a .npy file to which rows are added: numpy leaves room for that in the header."""

    def __init__(self, path: Path, dtype: type, shape: tuple[int, ...], rows: int):
        self.dtype, self.shape, self.rows = np.dtype(dtype), shape, rows
        self.file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self._write_header()
        self.file.truncate(self.file.tell() + rows * self.dtype.itemsize * math.prod(shape))

    def append(self, rows: np.ndarray) -> None:
        self.file.seek(0, os.SEEK_END)
        self.file.write(rows.astype(self.dtype).tobytes())
        self.rows += len(rows)
        self._write_header()
        self.file.flush()

    def _write_header(self) -> None:
        shape = (self.rows, *self.shape)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)
