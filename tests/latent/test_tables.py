import gzip
import math

import pyarrow
import pyarrow.parquet
import pytest

from t5vae.common.errors import UserError
from t5vae.latent.tables import read_values

CSV = 'name,smiles,logS\na,CCO,-0.5\nb,"C,C",2\nc,,1\nd,N,\ne,O,nan\n'
JSONL = (
    '{"smiles": "CCO", "logS": -0.5, "more": {"a": 1}}\n{"smiles": "C,C", "logS": 2}\n'
    '{"logS": 1}\n{"smiles": "N"}\n{"smiles": "O", "logS": null}\n'
)


@pytest.fixture(params=["csv", "csv.gz", "jsonl", "parquet"])
def table(request, tmp_path):
    path = tmp_path / f"table.{request.param}"
    if request.param == "csv.gz":
        path.write_bytes(gzip.compress(CSV.encode()))
    elif request.param == "parquet":
        columns = {"smiles": ["CCO", "C,C", None, "N", "O"], "logS": [-0.5, 2, 1, None, math.nan]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        path.write_text({"csv": CSV, "jsonl": JSONL}[request.param])
    return str(path)


def test_texts_and_values_of_every_format(table):
    texts, values, left_out = read_values(table, "smiles", "logS")
    assert left_out == {"empty": 1}
    assert texts == ["CCO", "C,C", "N", "O"]
    assert values == pytest.approx([-0.5, 2, math.nan, math.nan], nan_ok=True)
    assert all(type(value) is float for value in values)


def test_a_missing_field_is_one_line(table):
    for fields in (("smiles", "logP"), ("text", "logS")):
        with pytest.raises(UserError) as caught:
            read_values(table, *fields)
        assert table in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "none.csv"),
        ("table.xlsx", b"PK", "is no table: give a .csv, .jsonl or .parquet file"),
        ("empty.csv", b"", "empty.csv"),
        ("empty.jsonl", b"", "empty.jsonl"),
        ("empty.parquet", b"", "empty.parquet"),
        ("binary.csv", bytes(range(256)) * 9, "binary.csv"),
        ("binary.jsonl", bytes(range(256)) * 9, "binary.jsonl"),
        ("header.csv", b"smiles,logS\n", "no rows with both 'smiles' and 'logS'"),
        ("words.csv", b"smiles,logS\nCCO,soluble\n", "row 0 .*soluble.* is no number"),
        ("cut.csv.gz", gzip.compress(b"smiles,logS\n" + b"CCO,1\n" * 9999)[:-50], "cut.csv.gz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a gzip file holds the time
)
def test_what_is_no_table_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_values(str(path), "smiles", "logS")
    assert "\n" not in str(caught.value)
