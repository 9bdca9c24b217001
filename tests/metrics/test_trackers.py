"""Trackers, against a stand-in of wandb's server and TensorBoard's own reader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5vae.common.errors import UserError
from t5vae.metrics import trackers
from t5vae.metrics.runlog import RunLog
from t5vae.metrics.trackers import TensorBoard, Trackers
from tests.metrics.wandb_server import serving

KEY = "local-" + "0123456789abcdef" * 3
TABLES = {"samples": [{"text": "a | b"}, {"text": "<x>\n"}], "paths": [{"path": 0, "text": "c"}]}


def record(step: int) -> dict:
    return {"step": step, "loss": 1 / step, "event": "a spike", "mmd": None}


@pytest.fixture
def run(make_config):
    """The configuration of a run with a folder."""
    config = make_config(log={"wandb": True, "tensorboard": True})
    config.run_dir.mkdir()
    config.write()
    return config


@pytest.fixture
def server(monkeypatch):
    with serving() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        yield found


def in_a_process(code: str, config, **environment: str) -> subprocess.CompletedProcess:
    """Run code with the trackers of a run as `trackers`; wandb's service ends with the process."""
    setup = (
        "from t5vae.config import load_config\nfrom t5vae.metrics.trackers import Trackers\n"
        f"folder = {str(config.run_dir)!r}\n"
        "config = load_config(f'{folder}/config.yaml', ['log.tensorboard=false'])\n"
        "trackers = Trackers(config, print)\ntrackers.facts['attempt'] = 1\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
    return subprocess.run(
        [sys.executable, "-c", setup + code],
        env={**clean, "HOME": str(config.run_dir), **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


SEND = (
    "trackers.start(0)\n"
    "for step in (1, 2, 3):\n"
    "    trackers.metrics({'step': step, 'loss': 1 / step, 'event': 'a spike', 'mmd': None})\n"
    "trackers.close()\nprint(len(trackers.running), 'left')"
)


@pytest.mark.slow
def test_wandb_with_a_key_sends_every_line_and_keeps_the_key_to_itself(run, server):
    done = in_a_process(SEND, run, WANDB_API_KEY=KEY)
    assert done.stdout.endswith("1 left\n"), done.stdout + done.stderr
    name = (run.run_dir / "wandb/run-id").read_text()
    sent = [(row["_step"], row["step"], row["loss"]) for row in server.rows[name]]
    assert sent == [(1, 1, 1.0), (2, 2, 0.5), (3, 3, pytest.approx(1 / 3))]
    written = [path for path in run.run_dir.rglob("*") if path.is_file()]
    assert written
    assert not any(KEY.encode() in path.read_bytes() for path in written)


@pytest.mark.slow
def test_wandb_without_a_key_keeps_what_can_be_sent_later(run, server):
    done = in_a_process(SEND, run)
    assert done.stdout.endswith("1 left\n"), done.stdout + done.stderr
    assert not server.rows
    again = in_a_process(SEND.replace("(1, 2, 3)", "(4, 5)"), run)
    assert again.stdout.endswith("1 left\n"), again.stdout + again.stderr
    name = (run.run_dir / "wandb/run-id").read_text()
    folders = sorted((run.run_dir / "wandb").glob("offline-run-*"))
    assert [folder.name.split("-")[3] for folder in folders] == [name, name]
    command = [Path(sys.executable).with_name("wandb"), "sync", *folders]
    subprocess.run(
        command,
        env={**os.environ, "WANDB_API_KEY": KEY, "HOME": str(run.run_dir)},
        check=True,
        capture_output=True,
        timeout=200,
    )
    steps = sorted(row["step"] for row in server.rows[name])
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_wandb_server_that_does_not_answer_leaves_the_run_offline(run):
    done = in_a_process(SEND, run, WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.stdout.endswith("1 left\n"), done.stdout + done.stderr
    assert "going on offline" in done.stderr
    assert list((run.run_dir / "wandb").glob("offline-run-*"))


def read_back(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_has_numbers_and_texts(run):
    tracker = TensorBoard(run, 0)
    for step in (1, 2, 3):
        tracker.metrics(record(step))
    tracker.tables(3, TABLES)
    tracker.close()
    events = read_back(run.run_dir / "tensorboard")
    assert events.Tags()["scalars"] == ["step", "loss"]
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    (text,) = events.Tensors("eval/samples/text_summary")
    assert text.step == 3
    shown = text.tensor_proto.string_val[0].decode()
    assert shown.splitlines()[0] == "| text |"
    assert "| <code>a &#124; b</code> |" in shown
    assert "| <code>&lt;x>&#10;</code> |" in shown


def test_tensorboard_hides_what_lies_past_the_checkpoint_of_a_resumed_run(run):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = TensorBoard(run, start)
        for step in steps:
            tracker.metrics(record(step) | {"loss": start})
        tracker.close()
    losses = read_back(run.run_dir / "tensorboard").Scalars("loss")
    assert [(event.step, event.value) for event in losses] == [(1, 0), (2, 0), (3, 2), (4, 2)]


class Broken:
    name = "wandb"

    def __getattr__(self, method):
        raise ConnectionResetError("its service\nis gone")


@pytest.fixture
def _no_exit_handlers(monkeypatch):
    monkeypatch.setattr(trackers.atexit, "register", lambda call: None)


@pytest.mark.usefixtures("_no_exit_handlers")
@pytest.mark.parametrize("call", ["metrics", "tables", "close"])
def test_a_tracker_that_is_gone_is_told_once_and_the_others_go_on(run, call):
    said = []
    both = Trackers(run, said.append)
    other = TensorBoard(run, 0)
    both.running = [Broken(), other]
    arguments = {"metrics": (record(1),), "tables": (1, TABLES), "close": ()}[call]
    getattr(both, call)(*arguments)
    getattr(both, call)(*arguments)
    assert said == ["wandb is off: its service is gone"]
    assert both.running == [other]
    other.close()


def test_a_tracker_that_cannot_start_is_left_out(run, monkeypatch):
    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(trackers, "WandB", broken)
    monkeypatch.setattr(broken, "name", "wandb", raising=False)
    said = []
    both = Trackers(run, said.append)
    both.start(0)
    assert said == ["wandb is off: RuntimeError"]
    assert [tracker.name for tracker in both.running] == ["TensorBoard"]
    both.close()


def test_a_run_is_sent_afterwards_with_its_texts(run, capsys):
    log = RunLog(run, enabled=True)
    for step in (1, 2):
        log.metrics({"step": step, "loss": 1 / step, "mmd": 0.0, "tokens_per_second": 1.0})
    log.tables(2, TABLES)
    assert trackers.track(run.run_dir, print, wandb=False, tensorboard=True) == 2
    events = read_back(run.run_dir / "tensorboard")
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Tensors("eval/paths/text_summary")] == [2]


def test_what_is_no_run_or_has_no_metrics_cannot_be_sent(run, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        trackers.track(tmp_path, print, wandb=True)
    with pytest.raises(UserError, match="has no metrics yet"):
        trackers.track(run.run_dir, print, wandb=True)


def test_texts_are_files_of_the_run(run):
    log = RunLog(run, enabled=True)
    log.tables(7, TABLES)
    written = json.loads((run.run_dir / "samples/step-00000007.json").read_text())
    assert written == {"step": 7, **TABLES}
