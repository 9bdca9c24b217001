"""The formats of corpora: a file here and a line in the table for each."""

from shards.write.formats.csv import CSV
from shards.write.formats.format import Format
from shards.write.formats.jsonl import JSONL
from shards.write.formats.parquet import PARQUET
from shards.write.formats.python import PYTHON
from shards.write.formats.text import TEXT
from shards.write.formats.webdataset import WEBDATASET

FORMATS: dict[str, Format] = {
    "text": TEXT,
    "jsonl": JSONL,
    "csv": CSV,
    "parquet": PARQUET,
    "python": PYTHON,
    "webdataset": WEBDATASET,
}


def format_of(path: str) -> str:
    """The format of a file, by its name's ending; upper and lower case are the same."""
    fitting = [
        (len(ending), name)
        for name, format in FORMATS.items()
        if format.told_by_name
        for ending in format.suffixes
        if path.lower().endswith(ending)
    ]
    return max(fitting)[1]
