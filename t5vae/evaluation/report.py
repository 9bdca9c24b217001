"""A report that is read back: what tables, pages and cards rely on is there, and of its type."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from t5vae.common import records
from t5vae.common.errors import UserError
from t5vae.common.files import head, parse_json, reading
from t5vae.common.records import Record
from t5vae.common.storage import patiently
from t5vae.evaluation.evaluate import SCHEMA_VERSION
from t5vae.evaluation.tables import ROWS, value_at
from t5vae.latent.workspace import Workspace

REPORT = "eval.json"
Count = Annotated[int, Field(ge=0)]
Number = int | float
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]
Numbers = Annotated[list[Number], Field(min_length=1)]


def _check_edges(edges: list[Number]) -> list[Number]:
    if not all(low < high for low, high in pairwise(edges)):
        raise ValueError("edges that do not rise")
    return edges


class _Counts(Record):
    held_out: Count
    samples: Count
    interpolations: Count


class _Source(Record):
    model_sha256: str
    shards_sha256: str


class _OfLength(Record):
    tokens: Count
    n: Count
    exact_match: float
    interval: Interval


class _Histogram(Record):
    edges: Annotated[list[Number], Field(min_length=2), AfterValidator(_check_edges)]
    density: Numbers


class _Quantiles(Record):
    levels: Annotated[list[Number], Field(min_length=5, max_length=5)]
    values: Annotated[list[Numbers], Field(min_length=5, max_length=5)]


class _Map(Record):
    x: list[Number]
    y: list[Number]
    share: Number


class _Pictures(Record):
    by_length: Annotated[list[_OfLength], Field(min_length=1)]
    eigenvalues: Numbers
    histogram: _Histogram
    quantiles: _Quantiles
    map: _Map
    values: list[Number | None]


class _Text(Record):
    text: str
    valid: bool | None


class _Sample(_Text):
    known: bool


class _Back(Record):
    text: str
    decoded: str
    exact: bool


class _Examples(Record):
    reconstructions: list[_Back]
    samples: list[_Sample]
    interpolations: list[Annotated[list[_Text], Field(min_length=2)]]


class _Report(Record):
    schema_version: int
    check: str | None
    measure: str
    latent_size: Count
    n: _Counts
    intervals: dict[str, Any]
    controls: dict[str, Any]
    alarms: dict[str, str]
    pictures: _Pictures
    examples: _Examples
    made_from: _Source


def parse_report(content: bytes) -> dict[str, Any]:
    """A report out of its file.

    Raises:
        ValueError: it is none of this version, in one line.
    """
    report = parse_json(content)
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"it is of version {version!r:.20}, not {SCHEMA_VERSION}")
    records.parse(_Report, report)
    if len({len(report["pictures"]["map"][each]) for each in "xy"}) > 1:
        raise ValueError("pictures.map: points without a place")
    for row in ROWS:
        _check(report, row.name, _is_figure)
        _check(report["intervals"], row.name, _is_interval)
        if row.control:
            _check(report["controls"], row.control, _is_figure)
    return report


def _check(report: dict[str, Any], name: str, is_right: Any) -> None:
    try:
        right = is_right(value_at(report, name))
    except AttributeError:  # there is no such section
        right = False
    if not right:
        raise ValueError(f"{name} is no figure")


def _is_figure(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _is_interval(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) in (0, 2) and all(map(_is_figure, value))
    )


def read_report(run: str | Path) -> dict[str, Any]:
    """The `eval.json` of a run or an export.

    Raises:
        UserError: there is none, or it is of another version or damaged.
    """
    path = Workspace(Path(run)).home / REPORT
    if not path.is_file():
        raise UserError(f"{run} has not been evaluated: `t5vae eval {run}`")
    try:
        return read_file(path)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, then `t5vae eval {run}`"
        ) from None


def read_file(path: Path) -> dict[str, Any]:
    """The same of its file.

    Raises:
        ValueError: it is no report of this version, in one line.
        UserError: it cannot be read.
        StorageError: the storage failed for minutes.
    """
    with reading(str(path)):
        return parse_report(patiently(partial(head, path), str(path)))
