"""Python: the statements of source files."""

import ast
import io
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from typing import IO

from shards.write.formats.format import Default, Format

LONGEST_FILE = 16 * 2**20  # bytes: a file's tree takes some hundred times as much memory


def read_python(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[str]]:
    """The statements that fit one line and parse alone, indentation removed.

    One-line compound statements (`if x: y`) count, and so do the statements inside them. Strings
    that stand alone (docstrings) are prose and left out.

    Raises:
        SyntaxError: the file does not parse, or has more than 16 MiB.
    """
    source = stream.read(LONGEST_FILE + 1)
    if len(source) > LONGEST_FILE:
        raise SyntaxError("too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old code's escapes are not this user's concern
            yield list(_statements(source))
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error)) from None


def _statements(source: bytes) -> Iterator[str]:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    text = io.TextIOWrapper(io.BytesIO(source), encoding=encoding).read()
    tree = ast.parse(text)
    lines = text.split("\n")
    for node in _walk(tree.body):
        if node.lineno != node.end_lineno or _is_string(node):
            continue
        line = lines[node.lineno - 1].encode()  # ast counts columns in bytes
        statement = line[node.col_offset : node.end_col_offset].decode()
        if not isinstance(node, ast.If) or _parses(statement):  # an `elif` is an ast.If too
            yield statement


def _walk(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for name in ("body", "handlers", "cases", "orelse", "finalbody"):
            for part in getattr(node, name, ()):
                yield from _walk([part] if isinstance(part, ast.stmt) else part.body)


def _is_string(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _parses(statement: str) -> bool:
    try:
        ast.parse(statement)
    except SyntaxError:
        return False
    return True


PYTHON = Format(
    read_python,
    suffixes=(".py",),
    help="one-line statements",
    told_by_name=False,  # a file of code is read as lines, unless asked for
    default=Default(
        help="Python's standard library",
        name=f"standard library of Python {'.'.join(map(str, sys.version_info[:3]))}",
        folder=sysconfig.get_path("stdlib"),
    ),
    passed_over=frozenset({"site-packages", "dist-packages"}),
)
