"""Records of a stranger's run: what a command reads of them is of its type, and leads nowhere."""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launcher.jobs import Job
from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import read_manifest, seal
from t5vae.checkpoint.rank_files import Fragments
from t5vae.cluster.run_folder import lock_run
from t5vae.common.errors import printable
from t5vae.common.files import LARGEST, parse_json
from tests.refused import refusal as refused_call
from tests.strangers.conftest import refusal

JOB = {"id": "77", "cluster": "slurm", "logs": "run/jobs", "time": "2026-11-29T19:11:45+00:00"}
STEP = "checkpoints/step-00000008"
ESCAPE = "\x1b]0;owned\x07"


@pytest.fixture(autouse=True)
def _no_slurm(handed, monkeypatch):
    monkeypatch.setenv("PATH", str(handed.folder / "programs"))


def written(handed, **job):
    (handed.run / "jobs").mkdir(exist_ok=True)
    (handed.run / "jobs/77.json").write_text(json.dumps({**JOB, **job}) + "\n")


@pytest.mark.parametrize(
    "job",
    [
        *({"id": each} for each in ("--me", "../../secret", "a b", "*", "", 77, "7\n", ESCAPE)),
        *({"cluster": each} for each in ("other", "os", None)),
        *({"time": each} for each in ("yesterday", "2026-11-29T19:11:45", 5)),
        {"logs": ["x"]},
        {"folder": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("words", [("status", "run"), ("logs", "run"), ("cancel", "run")])
def test_a_job_that_is_none_is_refused(handed, launched, words, job):
    written(handed, **job)
    assert "run/jobs/77.json" in refusal(launched(*words))


def test_logs_are_those_of_the_run_whatever_folder_is_written_down(handed, launched):
    other = handed.folder / "other"
    other.mkdir()
    (other / "77_0_log.out").write_text("another file\n")
    written(handed, logs=str(other))
    assert "run/jobs/77_0_log.out does not exist" in refusal(launched("logs", "run"))
    (handed.run / "jobs/77_0_log.out").write_text("a line\n")
    assert launched("logs", "run").out == "a line\n"
    (handed.run / "jobs/77_0_log.out").unlink()
    (handed.run / "jobs/77_0_log.out").symlink_to(handed.secret)
    assert "is a link" in refusal(launched("logs", "run"))


def test_the_process_of_another_run_is_not_ended(handed, launched, tmp_path):
    """Its number is in a record, and it is one of submitit's."""
    package = tmp_path / "package/submitit/local"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "_local.py").write_text("import time\ntime.sleep(60)\n")
    program = [sys.executable, "-m", "submitit.local._local"]

    def start(folder):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "package")}
        process = subprocess.Popen([*program, str(folder)], env=environment)
        while b"_local" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        return process

    mine, others = start(handed.run / "jobs"), start(tmp_path / "run/jobs")
    try:
        written(handed, id=str(others.pid), cluster="local")
        assert " RUNNING " not in launched("status", "run").out
        assert "has ended already" in refusal(launched("cancel", "run"))
        written(handed, id=str(mine.pid), cluster="local")
        assert " RUNNING " in launched("status", "run").out
        assert launched("cancel", "run").code == 0
        assert mine.wait(20) == -signal.SIGTERM
        assert others.poll() is None
    finally:
        for process in (mine, others):
            process.kill()
            process.wait()


@pytest.mark.parametrize("job", ["1", "-1", "0", str(os.getppid()), "9" * 30, "²"])
def test_a_process_that_is_no_job_is_not_ended(handed, launched, job):
    written(handed, id=job, cluster="local")
    refusal(launched("cancel", "run"))


def test_pickles_of_jobs_are_not_loaded(handed, launched):
    class Owned:
        def __reduce__(self):
            return os.mkdir, (str(handed.folder / "owned"),)

    written(handed)
    for name in ("77_submitted.pkl", "77_0_result.pkl"):
        (handed.run / "jobs" / name).write_bytes(pickle.dumps(Owned()))
    (handed.run / "jobs/77_0_log.out").write_text("a line\n")
    for words in (
        ("status", "run"),
        ("logs", "run"),
        ("cancel", "run"),
        ("resume", "run", "--dry-run", "--cluster", "local"),
    ):
        assert launched(*words).deeds == []
    assert not (handed.folder / "owned").exists()


def test_the_lock_of_a_run_is_no_link(handed):
    (handed.run / ".lock").symlink_to(handed.secret)
    assert "cannot use the run folder" in refused_call(lock_run, handed.run)
    assert handed.secret.read_text() == "the secret\n"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 10**5, b'{"job": 7}', b'{"folder": "\\u0000"}']
)
def test_a_lock_that_says_nothing_is_nobodys(handed, content):
    (handed.run / ".lock").write_bytes(content)
    lock_run(handed.run).close()


def resealed(handed, **changes):
    path = handed.run / STEP / "manifest.json"
    manifest = read_manifest(path.parent)
    path.write_bytes(seal({**manifest, **changes}))
    return manifest


@pytest.mark.parametrize("name", ["../../config.yaml", "/etc/passwd", "rank-0.safetensors", ""])
def test_a_checkpoint_has_files_of_ranks_alone(handed, command, name):
    files = read_manifest(handed.run / STEP)["files"]
    resealed(handed, files={**files, name: {"bytes": 1, "sha256": "0"}})
    assert "files" in command("checkpoints", "run").out
    assert retention.newest_valid(handed.run / "checkpoints") is None


@pytest.mark.parametrize(
    "changes",
    [
        *({"scalars": each} for each in ([], {}, {"step": "x", "loss_scale": {}})),
        {"scalars": {"step": 1.0, "loss_scale": {"__class__": 1}}},
        *({"data": each} for each in ([], None, 7)),
        *({"watch": each} for each in ([], {"skipped": "x"}, {"means": {"loss": None}})),
        *({"layout": each} for each in (None, {"world_size": "2"})),
        *({"step": each} for each in (-1, "8", None)),
        *({"model": each} for each in (None, [])),
        {"held_out": "0"},
    ],
    ids=str,
)
def test_a_manifest_of_other_types_is_no_manifest(handed, command, changes):
    resealed(handed, **changes)
    (name,) = changes
    done = command("checkpoints", "run", "--json")
    assert done.code == 0
    (found,) = json.loads(done.out)["checkpoints"]
    assert found["problem"].startswith(f"manifest.json: {name}")


def test_a_header_of_a_rank_is_read_no_further_than_its_file_goes(handed):
    path = handed.run / STEP / "rank-00000.safetensors"
    content = path.read_bytes()
    for length in (2**63, 2**32, len(content) - 7):
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        assert "is damaged" in refused_call(Fragments, [path])
    header = json.dumps({"__metadata__": {"random": 7}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "is damaged" in refused_call(Fragments, [path])


ARRAYS = {
    "doubles": ("codes.npy", lambda array: array.astype(np.float64)),
    "flat": ("codes.npy", lambda array: array.ravel()),
    "longer": ("codes.npy", lambda array: np.concatenate([array, array])),
    "of objects": ("codes.npy", lambda array: array.astype(object)),
    "falling": ("ends.npy", lambda array: array[::-1].copy()),
    "negative": ("ends.npy", lambda array: np.where(array == array[3], -5, array)),
    "past the end": ("ends.npy", lambda array: np.where(array == array[3], 2**62, array)),
    "floats": ("ends.npy", lambda array: array.astype(np.float64)),
    "square": ("ends.npy", lambda array: array[:, None]),
}


@pytest.mark.parametrize("change", ARRAYS)
def test_arrays_of_codes_are_as_they_were_written(handed, refused, change):
    name, changed = ARRAYS[change]
    np.save(handed.codes / name, changed(np.load(handed.codes / name)), allow_pickle=True)
    assert "codes is damaged" in refused("nearest", "run", "x", "--corpus", "codes")


def test_codes_of_columns_first_are_read_as_they_are(handed, honest):
    before = honest("nearest", "run", "x", "--corpus", "codes")
    array = np.load(handed.codes / "codes.npy")
    np.save(handed.codes / "codes.npy", np.asfortranarray(array))
    assert honest("nearest", "run", "x", "--corpus", "codes") == before


@pytest.mark.parametrize("line", [b"7", b"null", b"[" * 50, b'["x"]', b'"x', b"\xff"])
def test_texts_of_codes_are_texts(handed, refused, line):
    lines = (handed.codes / "texts.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = line.ljust(len(lines[1]) - 1) + b"\n"
    (handed.codes / "texts.jsonl").write_bytes(b"".join(lines))
    if len(b"".join(lines)) != np.load(handed.codes / "ends.npy")[-1]:
        np.save(handed.codes / "ends.npy", np.cumsum([len(each) for each in lines]))
    assert "its text 1 is none" in refused("dedupe", "run", "--corpus", "codes")


@pytest.mark.parametrize("run_id", ["../../x", "--x", "a/b", "a b", "", "x\x1b[2J"])
def test_the_id_of_a_run_at_a_tracker_is_a_name(handed, command, run_id):
    (handed.run / "wandb").mkdir()
    (handed.run / "wandb/run-id").write_text(run_id)
    done = command("track", "run", "--wandb")
    assert "wandb is off: run/wandb/run-id" in done.err
    assert done.deeds == []


def test_what_a_terminal_obeys_is_shown_and_not_sent(handed, command, launched):
    strange = shutil.copytree(handed.run, handed.folder / f"run{ESCAPE}")
    for words in (
        ("runs", "."),
        ("compare", strange.name),
        ("plot", strange.name, "run"),
        ("checkpoints", "nowhere" + ESCAPE),
    ):
        done = command(*words)
        assert "owned" in done.out + done.err
        assert "\x1b" not in done.out + done.err
    written(handed)
    assert "\x1b" not in launched("logs", "x" + ESCAPE).err
    assert printable("a\nb\x1b\ud800é\t", "\n") == "a\nb\\x1b\\ud800é\\t"


def test_texts_of_a_report_stay_texts_in_its_page(handed, honest):
    """They are a stranger's, and the page is opened in a browser."""
    bad = "</script></style><script>alert(1)</script><img src=x onerror=alert(1)>"
    path = handed.run / "eval.json"
    report = json.loads(path.read_text())
    for rows in (report["examples"]["samples"], report["examples"]["reconstructions"]):
        rows[0]["text"] = bad
    report["alarms"] = {"x": bad}
    path.write_text(json.dumps(report))
    (handed.run / "config.yaml").write_text(
        (handed.run / "config.yaml").read_text().replace("name: tiny", f"name: '{bad}'")
    )
    from t5vae.evaluation.page import page
    from t5vae.evaluation.report import read_file

    html = page(read_file(path), bad)
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "<img src=x" not in html
    shutil.rmtree(handed.run / "export")
    honest("export", "run")
    card = (handed.run / "export/README.md").read_text()
    front, body = card.split("\n---\n", 1)
    import yaml

    (model,) = yaml.safe_load(front.removeprefix("---\n"))["model-index"]
    assert model["name"] == bad
    assert "<script" not in body.replace("\\<script", "")


def test_json_is_bounded():
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * 10**5)
    with pytest.raises(ValueError, match="bytes"):
        parse_json(b" " * (LARGEST + 1))


def test_a_job_has_its_logs_in_its_run_or_its_sweep(tmp_path):
    run = tmp_path / "sweep/run"
    (run / "jobs").mkdir(parents=True)
    (tmp_path / "sweep/jobs").mkdir()
    job = Job("77_1", run, "slurm", "/elsewhere", JOB["time"])
    assert job.log() == run / "jobs/77_1_0_log.out"
    (tmp_path / "sweep/jobs/77_submission.sh").touch()
    assert job.log() == tmp_path / "sweep/jobs/77_1_0_log.out"


# What opens a file of a run, of its export, or of codes, and what it says of a pipe there.
OPENED = {
    "run/metrics.jsonl": (["plot", "run"], "metrics.jsonl"),
    "run/eval.json": (["compare", "run"], "run has not been evaluated"),
    f"run/{STEP}/manifest.json": (["export", "run", "--dtype", "bf16"], "it is no regular file"),
    "run/export/model.safetensors": (["sample", "run"], "is not a whole export"),
    "codes/corpus.json": (["nearest", "run", "x", "--corpus", "codes"], "it is no regular file"),
    "codes/codes.npy": (["decode", "run", "codes"], "it is no regular file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", OPENED)
def test_a_pipe_is_not_waited_for(handed, refused, name):
    arguments, said = OPENED[name]
    (handed.folder / name).unlink()
    os.mkfifo(handed.folder / name)
    assert said in refused(*arguments)


@pytest.mark.timeout(60)
def test_nor_is_one_in_place_of_a_job(handed, launched):
    (handed.run / "jobs").mkdir()
    os.mkfifo(handed.run / "jobs/77.json")
    for word in ("status", "logs", "cancel"):
        assert "it is no regular file" in refusal(launched(word, "run"))
