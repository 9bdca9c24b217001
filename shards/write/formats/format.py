"""What a format of corpora is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, Any, Literal

Kind = Literal["text", "tokens"]


def always_text(column: str | None) -> Kind:
    """The kind of a format that knows no token ids."""
    return "text"


@dataclass(frozen=True)
class Default:
    """A corpus that is there without a source."""

    help: str
    """What it is, in the command's help."""
    name: str
    folder: str


@dataclass(frozen=True)
class Format:
    """How the files of a corpus are found and read.

    Processes of a build get it by pickle: its functions are a module's, not lambdas.
    """

    read: Callable[[IO[bytes], str, str | None], Iterator[list[Any]]]
    """Takes a stream of decompressed bytes, the file's name (its path or URL) and a column, and
    yields lists of sequences: str, or the bytes of little-endian int32 token ids. Empty ones are
    yielded too, and a `BadRow` for what is no row. What a user can mend raises UserError;
    SyntaxError leaves the file out, counted."""
    suffixes: tuple[str, ...]
    """How its files' names end."""
    help: str | None = None
    """What follows its name in the help of `t5vae shards build`."""
    told_by_name: bool = True
    """Whether a file that is named so is of this format where none is given."""
    has_columns: bool = False
    """Whether a column says where the sequences lie: it must then be given, or found."""
    find_column: Callable[[IO[bytes], str], str] | None = None
    """Finds the column in a file (as of `read`, a stream and its name) where none is given."""
    kind: Callable[[str | None], Kind] = always_text
    """What sequences of a column are."""
    read_rows: Callable[[IO[bytes], str, Sequence[str | None]], Iterator[list[Any]]] | None = None
    """For tables: as `read`, of several columns; a sequence is the tuple of their values."""
    list_columns: Callable[[IO[bytes], str], list[str]] | None = None
    """Finds the columns of a file (as of `read`, a stream and its name), for a user to choose."""
    default: Default | None = None
    """What is read where no source is given."""
    passed_over: frozenset[str] = frozenset()
    """Names of folders whose files are not meant."""

    def claims(self, relative: PurePath) -> bool:
        """Whether a file in a folder is meant: named so, not hidden, not passed over."""
        return (
            relative.name.lower().endswith(self.suffixes)
            and not any(part.startswith(".") for part in relative.parts)
            and self.passed_over.isdisjoint(relative.parts[:-1])
        )
