"""Valid files and words, changed: strategies, whose draws shrink to the least change that fails."""

import copy
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

DEEP = "@deep@"  # stands for lists in lists, more than Python's own stack takes
HUGE = "@huge@"  # for a number of more digits than Python reads
DEPTH = 100_000
TEXTS = st.sampled_from(
    [
        *("", " ", "x", "\x00", "\x1b[2J\x1b]0;x\x07", "\ud800", "\u202eabc", "a\nb", "../../x"),
        *("/etc/passwd", "-x", "--help", "~nobody/x", "$HOME", "${", "s3://", "[bold]x[/]", "{0}"),
        *("http://[", "file:///etc/passwd", "</script><script>alert(1)</script>", "y" * 10_000),
    ]
)
NUMBERS = st.sampled_from(
    [
        *(0, -1, 1, 2, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400, True),
        *(0.5, -0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    ]
)
SIMPLE = st.one_of(st.none(), NUMBERS, TEXTS)
VALUES = st.one_of(
    SIMPLE,
    st.sampled_from([[], {}, [[]], [None], {"": {}}, DEEP, HUGE]),
    st.lists(SIMPLE, max_size=3),
    st.dictionaries(TEXTS, SIMPLE, max_size=2),
)
Content = st.SearchStrategy[bytes]

PLACES = ("missing", "folder", "dangling", "null", "loop")


def put(path: Path, what: bytes | str) -> None:
    """Put content, or one of `PLACES`, where a file is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif what == "folder":
        path.mkdir()
    elif what != "missing":
        path.symlink_to({"dangling": "nowhere", "null": os.devnull, "loop": path.name}[what])


def bytes_changed(content: bytes) -> Content:
    """Cut short, flipped, inserted into, repeated; or other things altogether."""
    others = [
        b"",
        b"\0" * 4096,
        bytes(range(256)) * 4,
        b"\xef\xbb\xbf" + content,
        content.decode("latin-1").encode("utf-16"),
        content + content,
        content.replace(b"\n", b"\r\n"),
        b"[" * DEPTH,
        b'{"a":' * DEPTH,
        b"\x93NUMPY\x01\x00",
        b"\x1f\x8b\x08\x00",
        b"null",
        b"{}",
        b"[]",
    ]
    others = [other for other in others if other != content]
    places = st.integers(0, max(0, len(content) - 1))
    inserted = st.one_of(
        st.sampled_from([b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\n\n\n", b'"', b"{", b"]"]),
        st.binary(min_size=1, max_size=8),
    )
    return st.one_of(
        st.sampled_from(others),
        places.map(lambda at: content[:at]),
        st.tuples(places, st.integers(1, 255)).map(lambda drawn: _flipped(content, *drawn)),
        st.tuples(places, inserted).map(
            lambda drawn: content[: drawn[0]] + drawn[1] + content[drawn[0] :]
        ),
    )


def _flipped(content: bytes, at: int, bits: int) -> bytes:
    if not content:
        return bytes([bits])
    return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


def dumped(document: Any) -> bytes:
    """A document as JSON, deep where it says so."""
    return _with_marks(json.dumps(document), '"').encode()


def _with_marks(text: str, quote: str) -> str:
    deep, huge = f"{quote}{DEEP}{quote}", f"{quote}{HUGE}{quote}"
    return text.replace(deep, "[" * DEPTH + "]" * DEPTH).replace(huge, "9" * 5000)


def json_changed(content: bytes, write: Callable[[Any], bytes] = dumped) -> Content:
    """A JSON document of which one value, key or item is another; written again by a function."""
    return tree_changed(json.loads(content)).map(write)


def lines_changed(content: bytes) -> Content:
    """The same in one of the lines of a file."""
    lines = content.splitlines(keepends=True)
    return st.integers(0, len(lines) - 1).flatmap(
        lambda at: json_changed(lines[at]).map(
            lambda line: b"".join([*lines[:at], line + b"\n", *lines[at + 1 :]])
        )
    )


def tree_changed(document: Any) -> st.SearchStrategy[Any]:
    """A document of which one value, key or item is another."""
    paths = list(_paths(document))

    @st.composite
    def changed(draw: st.DrawFn) -> Any:
        found = copy.deepcopy(document)
        path = draw(st.sampled_from(paths))
        how = draw(st.sampled_from(["value", "value", "value", "drop", "key"]))
        if not path:
            return draw(VALUES)
        holder = found
        for part in path[:-1]:
            holder = holder[part]
        if how == "drop":
            del holder[path[-1]]
        elif how == "key":
            value = draw(VALUES)
            if isinstance(holder, dict):
                holder[draw(TEXTS)] = value
            else:
                holder.append(value)
        else:
            holder[path[-1]] = draw(st.one_of(VALUES, st.sampled_from(_near(holder[path[-1]]))))
        return found

    return changed()


def _paths(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all that a document holds, but for the middle of lists."""
    yield path
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _paths(value, (*path, key))
    elif isinstance(document, list):
        for index in sorted({0, len(document) - 1} if document else ()):
            yield from _paths(document[index], (*path, index))


def _near(value: Any) -> list[Any]:
    """What a value may be taken for, and is not."""
    if isinstance(value, bool) or value is None:
        return [str(value), int(bool(value)), [value]]
    if isinstance(value, int | float):
        return [-value, value + 1, value * 2**32, value * 2**70, str(value), [value], value + 0.5]
    if isinstance(value, str):
        return [f"{value}\x1b[31m", f"../{value}", f"/{value}", [value], f"{value}\0", value * 300]
    if isinstance(value, list):
        return [value + value, value[:-1], value[::-1], {"a": value}, dict.fromkeys("ab", value)]
    return [[value], list(value), {**value, "x": value}, str(value)]


LAUGHS = "\n".join(
    ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)
SNIPPETS = (
    "!!python/object/apply:os.system ['touch owned']",
    "!!python/name:os.system",
    "!!binary aGVsbG8=",
    "!!binary x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!timestamp 2026-99-99",
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!null {a: 1}",
    "!!str {a: 1}",
    "!!map [1]",
    "!unknown x",
    "&a [*a]",
    "&a {b: *a}",
    "*nowhere",
    "{<<: x}",
    "{<<: [1]}",
    "{<<: &m {a: 1}, <<: *m}",
    "{a: 1, a: 2}",
    "{? [a]: b}",
    "{? {a: b}: c}",
    "\t- x",
    "[",
    "'",
    "|\n    x",
    "0x_",
    "0b",
    "1e999999",
    "1_0",
    "1:99:99",
    "9" * 5000,
    "2026-11-30",
    "=",
    "%",
    "@x",
    "`x`",
    "\x85",
    "[" * 2000,
    "[" * DEPTH + "]" * DEPTH,
    "{a: " * 300 + "1" + "}" * 300,
    "{l: [" + LAUGHS.replace("\n", ", ") + "]}",
)


def yaml_changed(content: bytes) -> Content:
    """A YAML document of which one value, key or item is another, or holds YAML's own traps."""
    lines = content.decode().splitlines()
    keys = [number for number, line in enumerate(lines) if ":" in line]

    def trapped(at: int, snippet: str) -> bytes:
        key = lines[at].partition(":")[0]
        return "\n".join([*lines[:at], f"{key}: {snippet}", *lines[at + 1 :]]).encode()

    def again(at: int, to: int) -> bytes:
        return "\n".join([*lines[:to], lines[at], *lines[to:]]).encode()

    return st.one_of(
        tree_changed(yaml.safe_load(content)).map(_as_yaml),
        st.builds(trapped, st.sampled_from(keys), st.sampled_from(SNIPPETS)),
        st.builds(again, st.sampled_from(keys), st.sampled_from(keys)),
        st.sampled_from(SNIPPETS).map(str.encode),
        st.sampled_from([b"---\n", b"...\n", b"--- x\n"]).map(
            lambda mark: content + mark + content
        ),
    )


def _as_yaml(document: Any) -> bytes:
    return _with_marks(yaml.safe_dump(document, sort_keys=False), "'").encode(
        errors="surrogatepass"
    )


def array_changed(content: bytes) -> Content:
    """An array of another type, shape or order, of other values, or whose header lies."""
    array = np.load(io.BytesIO(content))
    if array.dtype.names:
        array = array[array.dtype.names[0]]
    dtypes = ("<f8", ">f4", "<f2", "i1", "<i8", "<u8", "?", "<c8", "<U4", "S3", "<M8[s]", "O")
    flat = array.ravel()
    others = [
        *(_cast(array, dtype) for dtype in dtypes),
        *(flat, array[None], array[..., None], array[:0], array[:1], array[:-1], array[::-1]),
        *(np.concatenate([array, array]), np.zeros((), array.dtype), np.asfortranarray(array)),
        *(np.zeros((len(array), 0), array.dtype), np.zeros((0, 8), array.dtype), array.T),
        np.zeros(len(array), [("a", "<i8"), ("b", "<f4")]),
    ]
    values = st.sampled_from([0, -1, 2**62, -(2**62), float("nan"), float("inf"), 1e38])
    at = st.integers(0, array.size - 1)
    shapes = [
        (2**62,),
        (2**40, 8),
        (-1, 8),
        (2**31, 2**31),
        (10**30,),
        (),
        ("x",),
        (True,),
        (64.0,),
    ]
    return st.one_of(
        st.sampled_from(others).map(_saved),
        st.builds(lambda value, at: _saved(_with(array, at, value)), values, at),
        st.sampled_from(shapes).map(lambda shape: _headed(array, shape=shape)),
        st.sampled_from(["<f4", "|O", "<i8", "x", "<V0", "f4,f4", "<U1000000", None, ["a"]]).map(
            lambda descr: _headed(array, descr=descr)
        ),
        st.sampled_from([b"\x01\x00\xff\xff", b"\x02\x00\xff\xff\xff\x7f", b"\x09\x09"]).map(
            lambda version: content[:6] + version + content[6 + len(version) :]
        ),
        bytes_changed(content),
    )


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype("<i8").astype(dtype) if dtype == "<M8[s]" else array.astype(dtype)


def _with(array: np.ndarray, at: int, value: float) -> np.ndarray:
    array = array.copy()
    with np.errstate(all="ignore"):
        array.flat[at] = np.array(value).astype(array.dtype)
    return array


def _saved(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def _headed(array: np.ndarray, **said: Any) -> bytes:
    """An array after a header that says something else."""
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **said}
    text = f"{header!r}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + array.tobytes()


def tensors_changed(content: bytes) -> Content:
    """A safetensors file whose header says something else, or whose numbers are others."""
    length = int.from_bytes(content[:8], "little")
    data = content[8 + length :]

    def written(header: Any) -> bytes:
        text = dumped(header)
        return len(text).to_bytes(8, "little") + text + data

    return st.one_of(
        json_changed(content[8 : 8 + length], written),
        st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1, length - 1, length + 8]).map(
            lambda said: said.to_bytes(8, "little") + content[8:]
        ),
        st.sampled_from([b"\xff", b"\x00", b"\x7f"]).map(
            lambda byte: content[: 8 + length] + byte * len(data)
        ),
        bytes_changed(content),
    )


WORDS = st.sampled_from(
    [
        *("", " ", "-", "--", "-1", "0", "0.5", "1e400", "nan", "-inf", "99999999999999999999999"),
        *("x", "é", "\udcff", "\x1b[2J", "[bold]x", "a=b", "=", "run", "run/config.yaml", "codes"),
        *("shards", "nowhere", "dangling", "/dev/null", "regex:(", "os.system", "a.b:c", "cuda:99"),
        *("s3://", "http://[", "$NOWHERE", "z" * 5000, "train.steps=x", "**", "a\nb"),
    ]
)
OPTIONS = st.sampled_from(
    [
        *("--file", "--column", "--seed", "-n", "--steps", "--radius", "--check", "--device"),
        *("--corpus", "--out", "--json", "--jsonl", "--key", "--step", "--dtype", "--remove"),
        *("--nodes", "--world-size", "--temperature", "--method", "--shards", "--strength"),
        *("--cluster", "--rank", "--time", "--unknown"),
    ]
)


def words_changed(words: Sequence[str]) -> st.SearchStrategy[tuple[str, ...]]:
    """A command line with one word left out, added or replaced."""
    words = tuple(words)

    def cut(at: int, more: tuple[str, ...], gone: int) -> tuple[str, ...]:
        return (*words[:at], *more, *words[at + gone :])

    place = st.integers(1, max(1, len(words) - 1))
    word = WORDS.map(lambda each: (each,))
    return st.one_of(
        st.builds(cut, place, word, st.just(1)),
        st.builds(cut, place, word, st.just(0)),
        st.builds(cut, place, st.just(()), st.just(1)),
        st.builds(cut, st.just(len(words)), st.tuples(OPTIONS, WORDS), st.just(0)),
        st.builds(cut, st.just(len(words)), st.tuples(OPTIONS), st.just(0)),
    )
