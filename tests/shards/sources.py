"""Small files of every format, and what a corpus reads of them."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
import zstandard

from shards.write.corpora import Corpus, Reading

LINES = ["a = 1", "naïve = 'ü'  ", "  indented"]
PACK = {"txt": bytes, "gz": gzip.compress, "zst": zstandard.compress}


def reading(corpus: Corpus, files=None) -> Reading:
    return Reading(corpus.files if files is None else files, corpus.format, corpus.column)


def read(*args) -> list:
    return [item for items in reading(Corpus(*args)) for item in items]


def write(path, kind):
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"n": 1, "t": line}) + "\n" for line in LINES))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["n", "t"], *([1, line] for line in LINES)])
    elif kind == "parquet":
        pq.write_table(pa.table({"n": [1] * 3, "t": LINES}), path)
    else:
        write_tar(path, [{"t.txt": line + "\n", "json": b"{}"} for line in LINES])
    return path


def write_tar(path, records):
    with webdataset.TarWriter(str(path)) as tar:
        for number, record in enumerate(records):
            tar.write({"__key__": f"{number:04d}", **record})
    return path
