import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import shards
from shards import ShardStream
from shards.cli import app
from t5vae.common.errors import UserError
from t5vae.config import Data, Run

BATCH = 24
run = CliRunner().invoke


@pytest.fixture(scope="module")
def other(dataset, tmp_path_factory):
    """About 1,170 train sequences in more blocks than lanes, with the tokenizer of `dataset`."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "lines.txt").write_text("\n".join(f"other_{i} = {i % 9}" for i in range(1300)))
    options = {"tokenizer": dataset / "tokenizer", "max_length": 30, "block_size": 16}
    shards.build(folder / "lines.txt", folder / "data", **options, valid_fraction=0.1)
    return folder / "data"


def replay(*arguments) -> list[dict]:
    """The rows that `inspect` gives with --json."""
    result = run(app, ["inspect", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


def steps_of_training(data, steps, *, world_size, micro_batch_size=None) -> list[list[dict]]:
    """The rows of each step that a run with seed 3 reads from its start, rank after rank."""
    paths = [index.path for index in shards.open_dataset(data).indexes]
    tokenizer = shards.open_dataset(data).tokenizer()
    options = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    seen = [[] for _ in range(steps)]
    for rank in range(world_size):
        with ShardStream(data, seed=3, global_batch_size=BATCH, rank=rank, **options) as stream:
            for number, rows in enumerate(seen):
                while stream.consumed == number * BATCH:
                    batch = next(stream)
                    texts = tokenizer.batch_decode(batch.ids, skip_special_tokens=True)
                    rows += [
                        {
                            "sequence": batch.sequence[row].item(),
                            "tokens": batch.lengths[row].item(),
                            "source": paths[batch.source[row]],
                            "quarantined": batch.weights[row].item() == 0,
                            "text": text,
                        }
                        for row, text in enumerate(texts)
                    ]
    return seen


def test_build_inspect_and_verify(corpus, tmp_path):
    out = str(tmp_path / "d")
    options = ["--tokenizer", "byte", "--max-length", "40"]
    built = run(app, ["build", str(corpus), "--out", out, *options])
    assert built.exit_code == 0, built.output
    assert "kept" in built.stdout
    assert run(app, ["verify", out]).exit_code == 0
    shown = run(app, ["inspect", out])
    assert "Share of texts" in shown.stdout
    document = json.loads(run(app, ["inspect", out, "--json", "--examples", "3"]).stdout)
    assert document["max_length"] == 40
    assert len(document["examples"]["train"]) == 3
    assert set(document["examples"]["train"]) <= set(corpus.read_text().splitlines())


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, -(2**70)])
def test_any_integer_is_a_seed(corpus, dataset, tmp_path, seed):
    options = ["--tokenizer", "byte", "--max-length", "40", "--workers", "1"]
    built = run(app, ["build", str(corpus), "--out", str(tmp_path), *options, "--seed", str(seed)])
    assert built.exit_code == 0, built.output
    assert len(replay(dataset, "--position", 300, "--batch", BATCH, "--seed", seed)) == BATCH


@pytest.mark.parametrize(
    ("overflow", "fate"), [("drop", "dropped"), ("truncate", "truncated"), ("split", "pieces")]
)
def test_build_says_what_became_of_long_texts(corpus, tmp_path, overflow, fate):
    options = ["--tokenizer", "byte", "--max-length", "30", "--workers", "1"]
    out = str(tmp_path / "d")
    built = run(app, ["build", str(corpus), "--out", out, *options, "--overflow", overflow])
    assert built.exit_code == 0, built.output
    overlong = sum(len(line) > 29 for line in corpus.read_text().splitlines())
    [row] = [line for line in built.stdout.splitlines() if "over 30 tokens" in line]
    assert f"{overlong} texts ({overlong / 1000:.1%})" in row
    assert fate in row


def test_verify_exits_1_on_damage(dataset, tmp_path):
    (tmp_path / "index.json").write_text((dataset / "index.json").read_text())
    result = run(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "blocks.npy" in result.stdout


def test_replay_gives_the_batches_that_ranks_trained_on(dataset):
    n = shards.open_index(dataset).sequences("train")
    straddling = n // BATCH
    assert n % BATCH  # else nothing straddles
    trained = steps_of_training(dataset, straddling + 2, world_size=3)
    for step in (0, 7, straddling, straddling + 1):
        options = ["--position", step * BATCH, "--batch", BATCH, "--seed", 3]
        assert replay(dataset, *options) == trained[step]


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.5, 2]])
def test_replay_gives_the_batches_of_a_mixture(dataset, other, weights):
    paths = [dataset, other]
    mixture = [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]
    sizes = [shards.open_index(path).sequences("train") for path in paths]
    ends = [n * sum(weights) / w / BATCH for n, w in zip(sizes, weights, strict=True)]
    straddling = int(min(ends))  # the first step in which an epoch of a dataset ends
    assert straddling < min(ends)
    trained = steps_of_training(mixture, straddling + 2, world_size=4)
    options = ["--batch", BATCH, "--seed", 3]
    if weights != [1, 1]:
        options += ["--weight", weights[0], "--weight", weights[1]]
    for step in (0, 7, straddling, straddling + 1):
        rows = replay(*paths, "--position", step * BATCH, *options)
        assert rows == trained[step]
        assert {row["source"] for row in rows} == {str(dataset), str(other)}


def test_replay_gives_the_set_that_micro_batches_hold(dataset, other):
    trained = steps_of_training([dataset, other], 9, world_size=2, micro_batch_size=3)
    rows = replay(dataset, other, "--position", 8 * BATCH, "--batch", BATCH, "--seed", 3)
    assert rows != trained[8]  # dealt in another order
    key = json.dumps
    assert sorted(rows, key=key) == sorted(trained[8], key=key)


def test_replay_takes_the_batch_and_seed_of_a_run_by_default(dataset):
    batch, seed = Data.model_fields["global_batch_size"].default, Run().seed
    rows = replay(dataset, "--position", 300)
    assert rows == replay(dataset, "--position", 300, "--batch", batch, "--seed", seed)
    assert len(rows) == batch
    assert rows != replay(dataset, "--position", 300, "--batch", batch, "--seed", seed + 1)


def test_replay_shows_damaged_rows_as_quarantined(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    block = shards.open_index(copy).blocks[0]
    content = bytearray((copy / "train-00000.tar").read_bytes())
    content[block["tokens_offset"]] ^= 1
    (copy / "train-00000.tar").write_bytes(content)
    n = shards.open_index(copy).sequences("train")
    whole, rows = (replay(path, "--position", 0, "--batch", n) for path in (dataset, copy))
    assert not any(row["quarantined"] for row in whole)
    assert sum(row["quarantined"] for row in rows) == block["sequences"]
    for before, after in zip(whole, rows, strict=True):
        stand_in = {"tokens": 1, "quarantined": True, "text": ""} if after["quarantined"] else {}
        assert after == before | {"source": str(copy)} | stand_in
    shown = run(app, ["inspect", str(copy), "--position", "0", "--batch", str(n)])
    cells = [line.split()[:3] for line in shown.stdout.splitlines()]
    assert cells[0] == ["sequence", "tokens", "quarantined"]
    told = [[int(number), int(tokens), answer == "yes"] for number, tokens, answer in cells[1:]]
    assert told == [[row["sequence"], row["tokens"], row["quarantined"]] for row in rows]


def test_replay_names_sources_only_of_a_mixture(dataset, other):
    options = ["--position", "0", "--batch", "8"]
    alone = run(app, ["inspect", str(other), *options]).stdout
    assert str(other) not in alone
    [header, *lines] = run(app, ["inspect", str(dataset), str(other), *options]).stdout.splitlines()
    assert "source" in header.split()
    rows = replay(dataset, other, *options)
    assert [line.split()[3] for line in lines] == [row["source"] for row in rows]


def test_replay_prints_each_row_on_one_line(tmp_path):
    shown_as = {
        "two\nlines": r"'two\nlines'",
        "a\ttab": r"'a\ttab'",
        "esc\x1b[2J": r"'esc\x1b[2J'",
        "a\u2028separator": r"'a\u2028separator'",
        "it's \\n plain": "it's \\n plain",
        "é 漢\u3000\U0001f469\u200d\U0001f4bb": "é 漢\u3000\U0001f469\u200d\U0001f4bb",
    }
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in shown_as))
    options = {"tokenizer": "byte", "max_length": 40, "valid_fraction": 0}
    shards.build(source, tmp_path / "data", format="jsonl", column="text", **options)
    options = ["--position", "0", "--batch", str(len(shown_as))]
    assert {row["text"] for row in replay(tmp_path / "data", *options)} == set(shown_as)
    [_, *lines] = run(app, ["inspect", str(tmp_path / "data"), *options]).stdout.splitlines()
    assert sorted(line.split(maxsplit=3)[3] for line in lines) == sorted(shown_as.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "2 datasets and no --position"),
        (["--position", "0", "--weight", "2"], "2 datasets, but the number of --weight is 1"),
        (["--position", "0", "--weight", "2", "--weight", "0"], "each must be above 0"),
    ],
)
def test_a_mixture_without_position_or_with_bad_weights_is_refused(
    dataset, other, options, message
):
    result = run(app, ["inspect", str(dataset), str(other), *options])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


@pytest.mark.parametrize("options", [["--position", "-1"], ["--position", "0", "--batch", "0"]])
def test_positions_and_batches_that_are_none_are_refused(dataset, options):
    result = run(app, ["inspect", str(dataset), *options])
    assert result.exit_code == 2
    assert options[-2] in result.output


def test_user_errors_reach_the_caller(tmp_path):
    result = run(app, ["inspect", str(tmp_path)])
    assert isinstance(result.exception, UserError)


@pytest.mark.parametrize("command", ["build", "verify", "inspect"])
def test_help_has_an_example(command):
    result = run(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout


def test_help_and_errors_load_nothing_heavy():
    code = "import shards.cli, sys; from shards import UserError; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "numpy", "pyarrow"} & set(loaded.stdout.split())
