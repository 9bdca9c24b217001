"""What real runs tell while they go: evaluations that change nothing, events, a profile."""

import gzip
import json
import shlex
import shutil
from types import SimpleNamespace

import pytest

from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import consolidated_weights
from t5vae.cli import main
from t5vae.metrics.reading import read_metrics
from tests.launching import T5, rank_starter, run_of, small_config

pytestmark = pytest.mark.distributed

SECTIONS = {
    "model": {"t5": {**T5, "dropout_rate": 0.2}, "latent_size": 8, "token_size": 4},
    "optim": {"name": "adamw", "lr": 0.01},
    "deepspeed": {"zero_stage": 3},
}
EVALUATED = ("eval.every=4", "eval.sequences=30", "eval.decoded=8", "eval.check=regex:.*")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts ranks by their environment alone."""
    with rank_starter(tmp_path_factory.mktemp("ranks")) as start:
        yield start


@pytest.fixture(scope="module")
def write_config(dataset, tmp_path_factory):
    def write(steps: int, **sections):
        train = {"steps": steps, "precision": "fp32", **sections.pop("train", {})}
        folder = tmp_path_factory.mktemp("run")
        return small_config(folder, dataset, **{**SECTIONS, "train": train, **sections})

    return write


@pytest.fixture(scope="module")
def watched(start, write_config):
    """The same run twice, once with evaluations and a profile; two ranks, sharded weights."""
    runs = {}
    for name, settings in {
        "plain": (),
        "evaluated": (*EVALUATED, "train.profile=[2,3]", "log.tensorboard=true"),
    }.items():
        config = write_config(10, checkpoint={"every": 3, "keep_last": 1})
        ranks = start(2, config, *settings)
        assert ranks.end() == [0, 0], ranks.output()
        run = run_of(config)
        runs[name] = SimpleNamespace(run=run, lines=read_metrics(run), output=ranks.output())
    return SimpleNamespace(**runs)


def test_evaluation_changes_no_loss(watched):
    for name in ("loss", "reconstruction", "mmd", "grad_norm", "latent_variance", "consumed"):
        plain, evaluated = (
            [line[name] for line in run.lines] for run in (watched.plain, watched.evaluated)
        )
        assert plain == evaluated, name
    weights = [
        consolidated_weights(run.run / "checkpoints/step-00000010")
        for run in (watched.plain, watched.evaluated)
    ]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_evaluations_are_at_their_interval_and_with_every_checkpoint(watched):
    figures = {
        line["step"]: line for line in watched.evaluated.lines if "eval/nats_per_token" in line
    }
    assert list(figures) == [3, 4, 6, 8, 9, 10]
    for line in figures.values():
        assert line["eval/valid"] == line["eval/interpolation_validity"] == 1
        assert line["eval/seconds"] > 0
        assert line["tokens_per_second"] > 0
    assert figures[10]["eval/nats_per_token"] < figures[3]["eval/nats_per_token"]
    assert not any(name.startswith("eval/") for line in watched.plain.lines for name in line)
    assert not (watched.plain.run / "samples").exists()
    texts = json.loads((watched.evaluated.run / "samples/step-00000008.json").read_text())
    assert texts["step"] == 8
    assert len(texts["reconstructions"]) == len(texts["samples"]) == 8
    assert "step 8: held-out" in watched.evaluated.output


def test_the_best_checkpoint_is_kept(watched):
    saved = retention.describe(watched.evaluated.run / "checkpoints", hashes=False)
    held_out = {
        line["step"]: line["eval/nats_per_token"]
        for line in watched.evaluated.lines
        if line["step"] in (3, 6, 9, 10)
    }
    best = min(held_out, key=held_out.__getitem__)
    assert {checkpoint["step"] for checkpoint in saved} == {best, 10}
    for entry in saved:
        assert entry["held_out"] == held_out[entry["step"]]
    plain = retention.describe(watched.plain.run / "checkpoints", hashes=False)
    assert [(entry["step"], entry["held_out"]) for entry in plain] == [(10, None)]


def test_a_profile_has_a_trace_of_every_rank_and_a_table(watched):
    folder = watched.evaluated.run / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"rank-0000{rank}.trace.json.gz" for rank in (0, 1)),
        "steps.txt",
    ]
    for rank in (0, 1):
        with gzip.open(folder / f"rank-0000{rank}.trace.json.gz") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count("backward") == 2
    table = (folder / "steps.txt").read_text()
    assert table.startswith("steps 2 to 3: ")
    phases = [line.split()[0] for line in table.splitlines()[3:11] if line]
    assert phases[:6] == ["data", "forward", "mmd", "backward", "optimizer", "evaluation"]
    assert "aten::mm" in table
    assert "profiled steps 2 to 3" in watched.evaluated.output


def test_a_spike_is_a_line_of_its_own_that_says_which_batch_it_was(start, write_config):
    config = write_config(
        40, log={"every": 100}, train={"spike": 0.97, "max_bad_steps": 0}, deepspeed={}
    )
    ranks = start(1, config)
    assert ranks.end() == [0], ranks.output()
    *marked, last = read_metrics(run_of(config))
    assert marked
    assert last["step"] == 40
    assert last["spikes"] == len(marked) + ("event" in last)
    for line in marked:
        assert "is a spike (usually" in line["event"]
        assert line["position"] == 16 * (line["step"] - 1)
        assert f"step {line['step']}: {line['event']}" in ranks.output()
        assert f"(the batch from position {line['position']:,})" in ranks.output()


def test_a_run_that_goes_wrong_names_a_command_that_shows_the_batch(
    start, write_config, monkeypatch, capsys
):
    config = write_config(40, train={"spike": 0.5, "max_bad_steps": 2}, deepspeed={"zero_stage": 0})
    ranks = start(1, config)
    assert ranks.end() == [2], ranks.output()
    last = read_metrics(run_of(config))[-1]
    command = next(
        part for part in ranks.errors()[0].split("(") if part.startswith("t5vae shards inspect")
    ).split(")")[0]
    assert f"--position={last['position']}" in command
    monkeypatch.setattr("sys.argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 1 + 16
    assert "value_" in shown


def test_what_would_fail_at_the_first_evaluation_is_refused_before_training(
    start, write_config, dataset
):
    config = write_config(10)
    for settings, says in [
        (("eval.every=4", "eval.check=nonsense"), "unknown checker 'nonsense'"),
        (("eval.every=4", "eval.sequences=1"), "eval.sequences"),
        (("train.profile=[3,2]",), "give the first and the last step"),
    ]:
        ranks = start(1, config, *settings)
        assert ranks.end() == [2], ranks.output()
        assert says in ranks.errors()[0]
    assert not (run_of(config) / "metrics.jsonl").exists()
    shutil.rmtree(run_of(config), ignore_errors=True)
