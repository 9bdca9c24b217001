"""Corpora: texts and their codes, encoded once and kept on disk.

Shapes: N texts, D latent size.
"""

import hashlib
import json
import shutil
import tempfile
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from shards import Dataset
from shards.write.corpora import Corpus as Source
from shards.write.corpora import Reading
from shards.write.streams import copy_pipe, is_pipe
from t5vae.common import records
from t5vae.common.errors import UserError, first_line
from t5vae.common.files import head, parse_json, reading
from t5vae.common.patient import open_patiently
from t5vae.common.progress import say, stage
from t5vae.common.records import Record
from t5vae.common.storage import patiently
from t5vae.common.workfolder import work_folder
from t5vae.latent.artifacts import open_array
from t5vae.latent.codec import Codec
from t5vae.latent.writer import (
    CODES,
    ENDS,
    FORMAT_VERSION,
    MANIFEST,
    ROWS,
    TEXTS,
    TOO_LONG,
    Writer,
    is_of_use,
)

CHUNK = 16_384  # sequences between two notes of what is done


@dataclass(frozen=True)
class Corpus:
    """A folder of texts with their codes; both are read from the disk as they are needed.

    `codes.npy` is float32 [N, D], `rows.npy`, int64 [N], says which rows of the source they are of,
    `texts.jsonl` has a JSON string a line, `ends.npy`, int64 [N], says where each line ends, and
    `corpus.json` what they were made from.

    Attributes:
        folder: where they lie.
        codes_ND: the codes, float32 [N, D], mapped into memory.
        rows_N: the number of each one's row in the source, int64 [N], from 0: of its line, or as
            pandas numbers a table's rows; what was left out is numbered too, and further files
            count on. None for a folder of version 1, which did not keep it.
        reasons: how many texts of the source were left out, by reason: "empty", or "too many
            tokens" for the model.
    """

    folder: Path
    codes_ND: Tensor
    ends_N: np.ndarray
    rows_N: np.ndarray | None
    reasons: dict[str, int]

    @property
    def left_out(self) -> int:
        """How many texts of the source were left out."""
        return sum(self.reasons.values())

    def __len__(self) -> int:
        return len(self.codes_ND)

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Texts by row.

        Raises:
            UserError: one is damaged, or cannot be read.
            StorageError: the storage failed for minutes.
        """
        found = []
        path = self.folder / TEXTS
        with reading(str(path)), open_patiently(path) as file:
            for row in map(int, rows):
                begin = int(self.ends_N[row - 1]) if row else 0
                file.seek(begin)
                found.append(self._text(file.read(int(self.ends_N[row]) - begin), row))
        return found

    def _text(self, line: bytes, row: int) -> str:
        try:
            text = parse_json(line)
        except ValueError:
            text = None
        if not isinstance(text, str):
            raise _damaged(self.folder, f"its text {row} is none")
        return text

    @classmethod
    def open(cls, folder: Path, model_sha256: str) -> "Corpus":
        """Open an encoded corpus.

        Raises:
            UserError: there is none, it is damaged or may not be read, or another model encoded it.
            StorageError: it could not be read for minutes.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} is no encoded corpus: make one with `t5vae encode`")
        if manifest["model_sha256"] != model_sha256:
            raise UserError(f"{folder} was encoded by another model: encode its texts again")
        said = records.check(_Said, manifest, str(folder / MANIFEST))

        def load(name: str) -> np.ndarray:
            return patiently(lambda: open_array(folder / name), str(folder / name))

        with reading(str(folder)):
            try:
                codes_ND, ends_N = load(CODES), load(ENDS)
                rows_N = load(ROWS) if said.format_version > 1 else None
                bytes = patiently((folder / TEXTS).stat, str(folder / TEXTS)).st_size
            except (FileNotFoundError, ValueError, EOFError) as error:
                raise _damaged(folder, first_line(error)) from None
        N, D = said.sequences, said.latent_size
        numbers = [each for each in (ends_N, rows_N) if each is not None]
        if {each.shape for each in numbers} != {(N,)} or codes_ND.shape != (N, D):
            raise _damaged(folder, "its files differ in length")
        if codes_ND.dtype != np.float32 or any(each.dtype != np.int64 for each in numbers):
            raise _damaged(folder, "its numbers are of another type")
        if not _is_cut(ends_N, bytes):
            raise _damaged(folder, f"{ENDS} is not where the lines of {TEXTS} end")
        known = {TOO_LONG: said.left_out} if said.left_out else {}
        reasons = known if said.reasons is None else said.reasons
        return cls(folder, _mapped(codes_ND), ends_N, rows_N, reasons)


class _Said(Record):
    """What is used of an encoded corpus's manifest.

    Attributes:
        reasons: None in version 1.
    """

    format_version: int
    sequences: Annotated[int, Field(ge=0)]
    latent_size: Annotated[int, Field(ge=1)]
    left_out: Annotated[int, Field(ge=0)]
    reasons: dict[str, Annotated[int, Field(ge=0)]] | None = None


def _damaged(folder: Path, why: str) -> UserError:
    return UserError(f"{folder} is damaged ({why}): remove it")


def _is_cut(ends_N: np.ndarray, bytes: int) -> bool:
    """Whether a file of so many bytes is cut into lines there, none of them empty."""
    if not len(ends_N):
        return bytes == 0
    rises = all(
        (np.diff(ends_N[at : at + CHUNK + 1]) > 0).all() for at in range(0, len(ends_N), CHUNK)
    )
    return bool(rises and ends_N[0] > 0 and ends_N[-1] == bytes)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What an encoded corpus was made from; None where there is none."""
    file = folder / MANIFEST
    try:
        with reading(str(file)):
            content = patiently(lambda: _content(file), str(file))
        manifest = parse_json(content)
        known = isinstance(manifest["model_sha256"], str)
        return manifest if known and manifest["format_version"] in (1, FORMAT_VERSION) else None
    except (ValueError, KeyError, TypeError):
        return None


def _content(file: Path) -> bytes:
    """What a file holds; nothing where there is none."""
    try:
        return head(file)
    except (FileNotFoundError, NotADirectoryError):
        return b""


def encode_corpus(codec: Codec, source: "Texts", out: Path, model_sha256: str) -> Corpus:
    """Encode all texts of a source into a folder, some thousands at a time.

    What a halted encoding has done is kept beside the folder, and the same call goes on with it;
    one that is done is opened. Texts with more tokens than the model takes are left out; what is
    left out is counted, and told in a line.

    Args:
        codec: the model.
        source: where texts come from.
        out: the folder; another corpus there is replaced once the new one is whole.
        model_sha256: of the model's weights.

    Raises:
        UserError: no text fits, no space is left, another process writes there, or something else
            than an encoded corpus is there.
    """
    made_from = {
        "format_version": FORMAT_VERSION,
        "model_sha256": model_sha256,
        "source": source.describe(),
    }
    there = read_manifest(out)
    if there is None or any(there.get(key) != value for key, value in made_from.items()):
        if out.exists() and not (out / MANIFEST).is_file():
            raise UserError(f"{out} is there, and is no encoded corpus: name another folder")
        _encode(codec, source, out, made_from)
    corpus = Corpus.open(out, model_sha256)
    if corpus.left_out:
        say(left_out(corpus.reasons))
    return corpus


def left_out(reasons: Mapping[str, int]) -> str:
    """What was left out, by reason, in words."""
    return "left out: " + ", ".join(f"{count:,} ({why})" for why, count in reasons.items())


def _encode(codec: Codec, source: "Texts", out: Path, made_from: dict[str, Any]) -> None:
    with work_folder(out, is_of_use) as work, Writer(work, codec.latent_size, made_from) as writer:
        if writer.read:
            say(f"going on after {writer.read:,} texts")
        with stage(f"encoded {source.name}", source.total, done=writer.read) as advance:
            for rows, texts in source.chunks(writer.read):
                ids = codec.token_ids(texts)
                fitting = [at for at, tokens in enumerate(ids) if codec.fits(tokens)]
                codes_ND = codec.encode_ids([ids[at] for at in fitting])
                chosen = [rows[at] for at in fitting], [texts[at] for at in fitting]
                writer.append(*chosen, codes_ND, len(texts))
                advance(len(texts))
        if not writer.rows:
            limit = codec.model.config.sequence_length
            why = f"; {left_out(source.skipped)}" if source.skipped else ""
            writer.forget()
            raise UserError(f"{source.name} holds no text of up to {limit} tokens{why}")
        writer.finish(out, source.skipped)


def _mapped(codes_ND: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch could write into it
        return torch.from_numpy(codes_ND)


class Texts(ABC):
    """Where a corpus's texts come from.

    Attributes:
        name: for people.
        total: how many there are.
        skipped: how many more the source has that are left out, by reason.
    """

    name: str
    total: int
    skipped: Mapping[str, int]

    @abstractmethod
    def chunks(self, begin: int) -> Iterator[tuple[list[int], list[str]]]:
        """Yield the texts from number `begin` on, some thousands at a time, after their rows."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What tells these texts from all others, fit for JSON."""


class GivenTexts(Texts):
    """Texts in memory."""

    def __init__(self, texts: Sequence[str], name: str = "texts"):
        self.texts, self.name, self.total, self.skipped = texts, name, len(texts), {}

    def chunks(self, begin: int) -> Iterator[tuple[list[int], list[str]]]:
        for at in range(begin, self.total, CHUNK):
            texts = list(self.texts[at : at + CHUNK])
            yield list(range(at, at + len(texts))), texts

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(list(self.texts)).encode())
        return {"texts": self.total, "sha256": digest.hexdigest()}


class FileTexts(Texts):
    """The texts of files, in any format that shards are built from; empty ones are left out.

    Args:
        path: a file, folder, glob or URL. Or a pipe of lines of text, such as "-" for standard
            input, which is copied into a temporary file.
        column: the field that holds the text, for formats that have fields.
        format: of the files; None for what their names say.

    Raises:
        UserError: nothing is there, or the column is missing or superfluous.
    """

    def __init__(self, path: str, column: str | None = None, format: str | None = None):
        self.copy: Path | None = None
        if is_pipe(path):
            if column is not None:
                raise UserError(
                    f"{path} is a pipe, which is read as lines of text: leave --column out, or "
                    "give a file, whose name tells its format"
                )
            format, self.copy = "text", self._copied(path)
        name = "standard input" if path == "-" else path
        self.source = Source(self.copy or path, format, column, name if self.copy else None)
        self.name = self.source.name
        with self._names():
            once = self._reading()
            self.total = sum(map(len, once))
        self.skipped = once.skipped

    def chunks(self, begin: int) -> Iterator[tuple[list[int], list[str]]]:
        rows: list[int] = []
        texts: list[str] = []
        for more_rows, more_texts in self._reading().numbered():
            done = min(begin, len(more_texts))
            begin -= done
            rows += more_rows[done:]
            texts += more_texts[done:]
            while len(texts) >= CHUNK:
                yield rows[:CHUNK], texts[:CHUNK]
                rows, texts = rows[CHUNK:], texts[CHUNK:]
        if texts:
            yield rows, texts

    def describe(self) -> dict[str, Any]:
        if self.copy:
            return {"sha256": self.source.sha256()}
        files = [[file.path, file.stamp] for file in self.source.files]
        return {**self.source.describe(), "files": files}

    def _copied(self, path: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="t5vae-"))
        weakref.finalize(self, shutil.rmtree, folder)
        with reading(path):
            return copy_pipe(path, folder)

    def _reading(self) -> Reading:
        return Reading(self.source.files, self.source.format, self.source.column)

    @contextmanager
    def _names(self) -> Iterator[None]:
        """Name a pipe, and not its copy, in what goes wrong."""
        try:
            yield
        except UserError as error:
            if self.copy is None:
                raise
            raise UserError(str(error).replace(str(self.copy), self.name)) from None


class SplitTexts(Texts):
    """The texts of a dataset's split, or some of them, which the build's shuffle chose.

    Args:
        dataset: of one or several sources, each of which gives its share.
        split: "train" or "valid".
        limit: how many at most.
    """

    def __init__(self, dataset: Dataset, split: str, limit: int | None = None):
        self.dataset, self.split = dataset, split
        self.name = f"{dataset.path}, split {split}"
        everything = dataset.sequences(split)
        if limit is None or limit >= everything:
            self.numbers = np.arange(everything)
        else:
            self.numbers = dataset.first(split, limit)
        self.total, self.skipped = len(self.numbers), {}

    def chunks(self, begin: int) -> Iterator[tuple[list[int], list[str]]]:
        for at in range(begin, self.total, CHUNK):
            numbers = self.numbers[at : at + CHUNK]
            yield numbers.tolist(), self.dataset.texts(self.split, numbers)

    def describe(self) -> dict[str, Any]:
        return {"shards_sha256": self.dataset.sha256, "split": self.split, "texts": self.total}
