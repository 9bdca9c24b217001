"""Commands on bad inputs, made from valid ones: one line and an exit code, never a traceback.

Inputs are the same each time, but for `make soak`, which draws `T5VAE_SOAK_EXAMPLES` of each kind.
"""

import csv
import gzip
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from t5vae.checkpoint.manifest import seal
from t5vae.common.errors import UserError
from tests.strangers.conftest import WRITTEN, Done, Handed
from tests.strangers.mutations import (
    DEEP,
    PLACES,
    array_changed,
    bytes_changed,
    json_changed,
    lines_changed,
    put,
    tensors_changed,
    words_changed,
    yaml_changed,
)
from tests.strangers.watch import STARTS, watched

SECONDS = 20  # that a command may take
FEW, MANY = 2, 12  # inputs of a kind
SOAK = int(os.environ.get("T5VAE_SOAK_EXAMPLES", "200"))
SAY_BY_CODE = {"checkpoints", "doctor", "verify"}  # exit with 1 on damage or problems
CHECKPOINT = "run/checkpoints/step-00000008"
PROGRESS = re.compile(r".* in \d+\.\d s( \(.*\))?|.* is read as \w+, by its name")
LINES = [f"value_{i} = function_{i % 7}({i})" for i in range(40)]


class NotAllowedError(BaseException):
    """What no command may do to this machine, or take so long for."""


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if _forbidding and event in (*STARTS, "os.kill"):
        raise NotAllowedError(event, arguments)


_forbidding: list[bool] = []
sys.addaudithook(_forbid)


def _too_long(*_: Any) -> None:
    raise NotAllowedError(f"more than {SECONDS} s")


@contextmanager
def guarded() -> Iterator[None]:
    """What starts a program, or takes long, is ended before it does harm."""
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again, where it is raised in vain
    _forbidding.append(True)
    try:
        yield
    finally:
        _forbidding.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _program(name: str) -> Callable[[], Any]:
    if name == "t5vae":
        from t5vae.cli import main
    elif name == "t5vae-launch":
        from launcher.cli import main
    else:
        from t5vae.config import load_config
        from t5vae.training.main import main as train

        def main() -> None:
            with suppress(UserError):
                load_config(sys.argv[1], sys.argv[2:])
                return  # all is well, and training would begin
            sys.exit(train(sys.argv[1:]))

    return main


def execute(words: Sequence[str], stdin: bytes | None = b"") -> tuple[int, str, str]:
    """Run a program in this process.

    Args:
        words: its name and arguments.
        stdin: what it can read; None where that is closed.

    Returns:
        Its exit code, what it printed, and what it and its libraries said besides.
    """
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors, newline="", write_through=True)
        for errors in ("strict", "backslashreplace")
    )
    given = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    program = _program(words[0])
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = list(words), given
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, category, *_: (  # as if to standard error
                print(f"{category.__name__}: {message}", file=err)
                if not issubclass(category, (DeprecationWarning, ResourceWarning, ImportWarning))
                else None
            )
            code = 0
            try:
                with guarded():
                    program()
            except SystemExit as end:
                code = end.code or 0
            except NotAllowedError as end:
                if end.args[0] != "os.exec" or words[1] != "train":
                    raise  # else all is well, and training would begin
    finally:
        sys.argv, sys.stdin = before
    return code, *(each.buffer.getvalue().decode() for each in (out, err))


def check(words: Sequence[str], done: Done) -> None:
    """What holds whatever is wrong with an input."""
    assert done.deeds == []
    assert done.code in (0, 1, 2)
    assert "Traceback" not in done.err
    assert "\x1b" not in done.err
    if done.code == 1:
        assert SAY_BY_CODE & set(words) or "the storage fails" in done.err
    if done.code == 2 and "╭─ Error ─" not in done.err and "Usage: " not in done.out:
        *progress, line = done.err.split("\n")[:-1]
        assert all(map(PROGRESS.fullmatch, progress))
        assert line.startswith("error: ")


@dataclass(frozen=True)
class Kind:
    """A kind of bad inputs.

    Attributes:
        file: the one that is changed, below the folder that is handed over.
        changed: its content, changed.
        commands: those that are to read it, one of which is drawn; {} is the file.
        content: of a file that is not among those handed over.
        beside: more files there.
    """

    file: str
    changed: Callable[[bytes], st.SearchStrategy[Any]]
    commands: tuple[str, ...]
    content: bytes | None = None
    beside: dict[str, bytes] = field(default_factory=dict)

    def original(self) -> bytes:
        return (WRITTEN / self.file).read_bytes() if self.content is None else self.content

    def drawn(self) -> st.SearchStrategy[tuple[Any, tuple[str, ...]]]:
        commands = st.sampled_from([tuple(command.split()) for command in self.commands])
        return st.tuples(self.changed(self.original()), commands)

    def lay(self, folder: Path, change: Any) -> None:
        for name, content in self.beside.items():
            put(folder / name, content)
        put(folder / self.file, change)


def _sealed(document: Any) -> bytes:
    """A manifest that says of itself that it is as it was written."""
    if not isinstance(document, dict) or DEEP in json.dumps(document):
        return json.dumps(document).encode()
    document.pop("seal", None)
    return seal(document)


def _packed(kind: str) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    """The lines of a corpus, changed and then packed."""
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "tar": _tar}[kind]
    return lambda content: st.one_of(
        bytes_changed(content).map(pack), bytes_changed(pack(content)), st.sampled_from(PLACES)
    )


def _tar(content: bytes, name: str = "0.txt") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _table() -> dict[str, bytes]:
    rows = [{"text": line, "value": number} for number, line in enumerate(LINES)]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text", "value"])
    writer.writeheader()
    writer.writerows(rows)
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    return {
        "csv": text.getvalue().encode(),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "parquet": parquet.getvalue(),
    }


TABLE = _table()
TEXT = "\n".join(LINES).encode() + b"\n"
BUILD = "t5vae shards build {} --out built --tokenizer byte --max-length 16 --workers 1"
ENCODE = "t5vae encode run --file {} --out encoded"
FIELD = " --column text"
JOB = {"id": "77", "cluster": "slurm", "logs": "run/jobs", "time": "2026-11-29T19:11:45+00:00"}
RECORD = json.dumps(JOB).encode() + b"\n"
LOGS = {"run/jobs/77_0_log.out": b"a line\n"}
PLACED = lambda change: lambda content: st.one_of(change(content), st.sampled_from(PLACES))  # noqa: E731
NEAREST = ("t5vae nearest run --corpus codes x", "t5vae dedupe run --corpus codes --json")
ASK = ("t5vae reconstruct run x", "t5vae encode run x --json", "t5vae sample run -n 2")
LAUNCH = ("status run", "logs run", "cancel run", "resume run --dry-run --cluster local")
LAUNCHES = tuple(f"t5vae-launch {words}" for words in LAUNCH)
SETTINGS = (
    *("t5vae config show {}", "t5vae plan {}", "t5vae train {} --ranks 2", "train.py {}"),
    *("t5vae-launch submit {} --dry-run --cluster local", "t5vae-launch script {}"),
)
RUN = (
    *("t5vae checkpoints run", "t5vae export run", "t5vae runs .", "t5vae plot run"),
    *("t5vae nearest run x -n 2", "t5vae-launch status run", "t5vae-launch logs run"),
)
SHARDS = (
    *("t5vae shards inspect shards", "t5vae shards verify shards", "t5vae config show {}"),
    *("t5vae export run", "t5vae nearest run x -n 2"),
)
SHARDS = tuple(command.replace("{}", "run/config.yaml") for command in SHARDS)

KINDS = {
    "configuration of a run": Kind("run/config.yaml", PLACED(yaml_changed), (*SETTINGS, *RUN)),
    "configuration": Kind(
        "mine.yaml", PLACED(yaml_changed), SETTINGS, (WRITTEN / "run/config.yaml").read_bytes()
    ),
    "configuration's bytes": Kind("run/config.yaml", bytes_changed, SETTINGS),
    "metrics": Kind(
        "run/metrics.jsonl",
        PLACED(lines_changed),
        (
            *("t5vae runs .", "t5vae runs . --json", "t5vae plot run --x hours", "t5vae plot run"),
            *("t5vae plot run --out curves.png", "t5vae export run", "t5vae-launch status run"),
            "t5vae track run --tensorboard",
        ),
        beside={"run/jobs/77.json": RECORD},
    ),
    "metrics' bytes": Kind(
        "run/metrics.jsonl", bytes_changed, ("t5vae runs .", "t5vae plot run", "t5vae export run")
    ),
    "attempts": Kind(
        "run/attempts.jsonl",
        PLACED(lines_changed),
        LAUNCHES,
        json.dumps(
            {"attempt": 1, "job": "78", "step": 0, "folder": None, "hosts": [], "time": JOB["time"]}
        ).encode()
        + b"\n",
    ),
    "job": Kind("run/jobs/77.json", PLACED(lines_changed), LAUNCHES, RECORD, LOGS),
    "job of this machine": Kind(
        "run/jobs/1.json",
        PLACED(lines_changed),
        LAUNCHES,
        json.dumps({**JOB, "id": "1", "cluster": "local"}).encode() + b"\n",
    ),
    "job's bytes": Kind("run/jobs/77.json", bytes_changed, LAUNCHES, RECORD, LOGS),
    "lock": Kind(
        "run/.lock",
        PLACED(lines_changed),
        LAUNCHES,
        json.dumps({"job": None, "host": "h", "token": "t", "folder": "."}).encode() + b"\n",
        {"run/jobs/77.json": RECORD},
    ),
    "report": Kind(
        "run/eval.json",
        PLACED(json_changed),
        ("t5vae compare run", "t5vae compare run run --json", "t5vae export run", "t5vae eval run"),
    ),
    "report's bytes": Kind("run/eval.json", bytes_changed, ("t5vae compare run",)),
    "manifest": Kind(
        f"{CHECKPOINT}/manifest.json",
        lambda content: json_changed(content, _sealed),
        ("t5vae checkpoints run", "t5vae checkpoints run --verify --json", "t5vae export run"),
    ),
    "manifest's bytes": Kind(
        f"{CHECKPOINT}/manifest.json", PLACED(bytes_changed), ("t5vae checkpoints run",)
    ),
    "fragments": Kind(
        f"{CHECKPOINT}/rank-00000.safetensors", PLACED(tensors_changed), ("t5vae export run",)
    ),
    "exported configuration": Kind("run/export/config.json", PLACED(json_changed), ASK),
    "exported tokenizer": Kind("run/export/tokenizer_config.json", PLACED(json_changed), ASK),
    "exported generation": Kind("run/export/generation_config.json", PLACED(json_changed), ASK),
    "exported pieces": Kind("run/export/tokenizer.json", PLACED(json_changed), ASK),
    "exported weights": Kind("run/export/model.safetensors", PLACED(tensors_changed), ASK),
    "source of an export": Kind(
        "run/export/SOURCE",
        PLACED(bytes_changed),
        ("t5vae export run", "t5vae export run --dtype bf16", "t5vae eval run"),
    ),
    "corpus": Kind("codes/corpus.json", PLACED(json_changed), NEAREST),
    "corpus's bytes": Kind("codes/corpus.json", bytes_changed, NEAREST),
    "texts": Kind("codes/texts.jsonl", PLACED(lines_changed), NEAREST),
    "texts' bytes": Kind("codes/texts.jsonl", bytes_changed, NEAREST),
    "codes": Kind("codes/codes.npy", PLACED(array_changed), (*NEAREST, "t5vae decode run codes")),
    "ends": Kind("codes/ends.npy", PLACED(array_changed), NEAREST),
    "rows": Kind(
        "codes/rows.npy",
        PLACED(array_changed),
        NEAREST,
        (lambda file: (np.save(file, np.arange(64)), file.getvalue())[1])(io.BytesIO()),
        {
            "codes/corpus.json": (WRITTEN / "codes/corpus.json")
            .read_bytes()
            .replace(b'"format_version": 1', b'"format_version": 2')
        },
    ),
    "given codes": Kind(
        "given.json",
        PLACED(json_changed),
        ("t5vae decode run {}",),
        json.dumps({"texts": [{"text": "x", "code": [0.5] * 8}]}).encode(),
    ),
    "given array": Kind(
        "given.npy",
        PLACED(array_changed),
        ("t5vae decode run {}",),
        (WRITTEN / "codes/codes.npy").read_bytes(),
    ),
    "pairs": Kind(
        "pairs.tsv", PLACED(bytes_changed), ("t5vae direction run x --pairs {}",), b"x\ty\n" * 3
    ),
    "text": Kind("lines.txt", PLACED(bytes_changed), (BUILD, ENCODE), TEXT),
    "csv": Kind(
        "table.csv",
        PLACED(bytes_changed),
        (
            *(BUILD + FIELD, ENCODE + FIELD),
            "t5vae fit-property run size --file {} --column text --values value",
        ),
        TABLE["csv"],
    ),
    "jsonl": Kind(
        "table.jsonl",
        PLACED(lines_changed),
        (
            *(BUILD + FIELD, ENCODE + FIELD),
            "t5vae fit-property run size --file {} --column text --values value",
        ),
        TABLE["jsonl"],
    ),
    "jsonl's bytes": Kind(
        "table.jsonl", bytes_changed, (BUILD + FIELD, ENCODE + FIELD), TABLE["jsonl"]
    ),
    "parquet": Kind(
        "table.parquet",
        PLACED(bytes_changed),
        (
            *(BUILD + FIELD, ENCODE + FIELD),
            "t5vae fit-property run size --file {} --column text --values value",
        ),
        TABLE["parquet"],
    ),
    "gz": Kind("lines.txt.gz", _packed("gz"), (BUILD, ENCODE), TEXT),
    "zst": Kind("lines.txt.zst", _packed("zst"), (BUILD, ENCODE), TEXT),
    "tar": Kind("lines.tar", _packed("tar"), (BUILD + " --column txt",), TEXT),
    "index": Kind("shards/index.json", PLACED(json_changed), SHARDS),
    "index's bytes": Kind("shards/index.json", bytes_changed, SHARDS),
    "blocks": Kind("shards/blocks.npy", PLACED(array_changed), SHARDS),
    "shard": Kind("shards/train-00000.tar", PLACED(bytes_changed), SHARDS),
    "tokenizer of shards": Kind("shards/tokenizer/tokenizer_config.json", json_changed, SHARDS),
    "pieces of shards": Kind("shards/tokenizer/tokenizer.json", PLACED(json_changed), SHARDS),
}

COMMANDS = (
    "t5vae --version",
    "t5vae config ls",
    "t5vae config copy quickstart own.yaml",
    "t5vae config show run/config.yaml train.steps=3 --world-size 2",
    "t5vae config schema --json",
    "t5vae plan run/config.yaml --nodes 2 --gpus-per-node 2 --gpu-memory 80",
    "t5vae plan run/config.yaml --device a100 --network 100 --store 1 --price 2",
    "t5vae plan run/config.yaml --gpus-per-node 0 --tflops 2 --utilisation 0.5 --disk 1",
    "t5vae checkpoints run --verify --remove 8",
    "t5vae export run --step 8 --dtype bf16",
    "t5vae compare run run --json",
    "t5vae runs . --json",
    "t5vae plot run --key loss --x hours --out curves.svg",
    "t5vae encode run x --out out",
    "t5vae decode run codes -n 2 --temperature 0.5 --seed 1 --json",
    "t5vae reconstruct run x y --jsonl",
    "t5vae interpolate run x y --steps 3 --method slerp",
    "t5vae grid run a b c d --steps 2",
    "t5vae sample run -n 2 --prior gaussian --seed 3 --check python",
    "t5vae neighbors run x --radius 1 -n 3",
    "t5vae nearest run x -n 2 --corpus codes",
    "t5vae direction run x --pairs pairs.tsv --strength 2",
    "t5vae fit-property run length --kind ridge",
    "t5vae optimize run x --property length --target 3 -n 2",
    "t5vae outliers run x y -n 1",
    "t5vae dedupe run --corpus codes --radius 0.5",
    "t5vae shards inspect shards",
    "t5vae shards verify shards",
    "t5vae-launch status run",
    "t5vae-launch logs run --rank 0",
    "t5vae-launch cancel 77",
    "t5vae-launch script run/config.yaml launcher.nodes=2",
)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What takes its time is imported before any command's begins."""
    for name in (
        *("launcher.cli", "t5vae.checkpoint.export", "t5vae.evaluation", "t5vae.planning.plan"),
        *("t5vae.training.main", "torch.utils.tensorboard"),
    ):
        importlib.import_module(name)


@pytest.fixture
def anew(handed: Handed, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Handed]:
    """Lays what is handed over again, as it was."""
    monkeypatch.setenv("PATH", str(handed.folder / "programs"))  # SLURM's are not asked

    def lay() -> Handed:
        for path in handed.folder.iterdir():
            if path.name != "temporary":  # garbage, which may be collected late, removes its own
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(WRITTEN, handed.folder, dirs_exist_ok=True)
        (handed.folder / "dangling").symlink_to("nowhere")
        return handed

    return lay


def run(handed: Handed, words: Sequence[str], stdin: bytes | None = b"") -> Done:
    with watched(handed.folder, handed.secret) as watch:
        code, out, err = execute(words, stdin)
    return Done(code, out, err, watch.deeds)


def of(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count,
        derandomize=count != SOAK,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )


COUNTS = pytest.mark.parametrize(
    "count",
    [
        pytest.param(FEW, id="few"),
        pytest.param(MANY, id="many", marks=pytest.mark.slow),
        pytest.param(SOAK, id="soak", marks=pytest.mark.soak),
    ],
)


@COUNTS
@pytest.mark.parametrize("name", KINDS)
def test_a_bad_file_is_refused_in_a_line(anew, name, count):
    kind = KINDS[name]

    @of(count)
    @given(kind.drawn())
    def refused(drawn):
        change, command = drawn
        handed = anew()
        kind.lay(handed.folder, change)
        words = [word.replace("{}", kind.file) for word in command]
        check(words, run(handed, words))

    refused()


@COUNTS
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_command_line_is_refused_in_a_line(anew, command, count):
    @of(count)
    @given(words_changed(command.split()))
    def refused(words):
        handed = anew()
        put(handed.run / "jobs/77.json", RECORD)
        put(handed.folder / "pairs.tsv", b"x\ty\n" * 3)
        check(words, run(handed, words))

    refused()


@COUNTS
@pytest.mark.parametrize(
    "command",
    [
        *("reconstruct run", "encode run -", "outliers run --file -", "decode run"),
        *("interpolate run --json", "direction run x --pairs -", "encode run --file - --out out"),
        "shards build - --out built --tokenizer byte --max-length 16 --workers 1",
    ],
)
def test_bad_standard_input_is_refused_in_a_line(anew, command, count):
    @of(count)
    @given(st.one_of(st.none(), bytes_changed(b"x = 1\ny = 2\n"), st.binary(max_size=20)))
    def refused(stdin):
        words = ("t5vae", *command.split())
        check(words, run(anew(), words, stdin))

    refused()
