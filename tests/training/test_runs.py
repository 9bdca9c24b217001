"""Real training runs, launched as users launch them; several checks share each launch."""

import io
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

import t5vae.model  # noqa: F401 (registers T5VAE with transformers)
from t5vae import cli
from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import consolidated_weights
from t5vae.cluster.run_folder import lock_run
from t5vae.config import load_config
from t5vae.metrics.reading import read_metrics
from t5vae.training.main import main as train_main
from tests import launching
from tests.launching import (
    SAVES,
    SPEEDS,
    TRAIN,
    exact_metrics,
    launcher,
    lines_written,
    run_of,
    small_config,
    steps_saved,
    torchrun,
)

pytestmark = pytest.mark.distributed

STEPS, EVERY = 40, 10
MODEL = {"t5": launching.T5, "latent_size": 8, "token_size": 4}
VAE = yaml.safe_load((TRAIN.parent / "configs/vae.yaml").read_text())
VARIANTS = {
    "muon-zero1-bf16": {"train": {"steps": STEPS, "precision": "bf16"}},
    "adamw-zero2-fp32": {
        "optim": {"name": "adamw"},
        "deepspeed": {"zero_stage": 2},
        "train": {"steps": STEPS, "precision": "fp32"},
        "model": {**MODEL, **{key: VAE["model"][key] for key in ("posterior", "normalize")}},
        "objective": {
            **VAE["objective"],
            "mmd": {"prior": "uniform"},
            "epps_pulley": {"weight": 1.0, "slices": 8},
        },
    },
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Starts a program; whatever is left of it ends here."""
    with launcher(tmp_path_factory.mktemp("launches")) as start:
        yield start


@pytest.fixture(scope="module")
def deepspeed(launch):
    """Starts a configuration on two ranks, as `deepspeed train.py CONFIG` does."""
    return lambda *arguments: launch(*launching.deepspeed(*arguments))


@pytest.fixture(scope="module")
def write_config(dataset, tmp_path_factory):
    """Writes a run's configuration into a new folder that holds the run's own folder too."""

    def write(**sections: dict) -> Path:
        whole = {"train": {"steps": STEPS}, "checkpoint": {"every": EVERY}, **sections}
        return small_config(tmp_path_factory.mktemp("run"), dataset, **whole)

    return write


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request, write_config, deepspeed):
    """A run of all its steps, never interrupted."""
    sections = dict(VARIANTS[request.param])
    if "fp32" in request.param:
        data = yaml.safe_load(write_config().read_text())["data"]
        sections["data"] = {**data, "micro_batch_size": 4}
    config = write_config(**sections)
    done = deepspeed(config)
    assert done.end() == 0, done.output()
    return SimpleNamespace(
        config=config, sections=sections, run=run_of(config), output=done.output()
    )


@pytest.fixture(scope="module")
def killed(golden, write_config, deepspeed):
    """The same run, killed with SIGKILL once its first checkpoint is there."""
    config = write_config(**golden.sections)
    run = run_of(config)
    first = deepspeed(config)
    first.wait_until(lambda: bool(steps_saved(run)))
    first.kill()
    assert lines_written(run) < STEPS, "it was over before it was killed"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 39, "lo')  # as a crash in the middle of a line leaves it
    return config, run, steps_saved(run)[-1]


def test_a_run_logs_every_step_and_keeps_its_last_checkpoints(golden):
    lines = read_metrics(golden.run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["consumed"] for line in lines] == [16 * step for step in range(1, STEPS + 1)]
    muon = load_config(golden.run / "config.yaml").optim.name == "muon"
    for line in lines:
        assert ("grad_norm" in line) is not muon
        saved = line["step"] % EVERY == 1 and line["step"] > 1
        assert [name for name in SAVES if name in line] == [*(SAVES if saved else ())]
        assert line["checkpoint"] == (line["step"] - 1) // EVERY * EVERY
        assert line["steps"] == STEPS
        for name in ("loss", "reconstruction", "mmd", *SPEEDS, *([] if muon else ["grad_norm"])):
            assert math.isfinite(line[name])
        total = line["reconstruction"] + line["mmd_weight"] * line["mmd"]
        assert ("epps_pulley" in line) is ("kl" in line) is not muon
        total += line.get("epps_pulley", 0)
        sequences_a_token = line["nats_per_token"] / line["nats_per_sequence"]
        total += line.get("kl", 0) * sequences_a_token
        assert line["loss"] == pytest.approx(total)
        assert line["skipped"] == line["nonfinite"] == 0
    assert sum(line["loss"] for line in lines[-5:]) < sum(line["loss"] for line in lines[:5])
    assert steps_saved(golden.run) == [20, 30, 40]
    assert sorted(os.listdir(golden.run / "logs")) == ["rank-00000.log", "rank-00001.log"]
    assert load_config(golden.run / "config.yaml").data == load_config(golden.config).data


def test_a_run_prints_a_line_for_each_step_and_none_of_deepspeeds_own(golden):
    lines = golden.output.splitlines()
    assert sum(line.startswith("step ") for line in lines) == STEPS
    assert sum(line.startswith("saved ") for line in lines) == STEPS // EVERY
    others = [line for line in lines if not line.startswith(("step ", "saved "))]
    assert len(others) <= 1, others


def test_resume_after_kill_and_after_sigterm_repeats_the_metrics_bit_for_bit(
    golden, killed, deepspeed
):
    config, run, last = killed
    resumed = deepspeed(config)
    if "adamw" in golden.config.read_text():
        resumed.wait_until(lambda: resumed.rank(1) is not None)
        rank_1 = resumed.rank(1)
        resumed.wait_until(lambda: "resuming from" in resumed.output())
        resumed.wait_until(lambda: lines_written(run) > last)
        rank_1.send_signal(signal.SIGTERM)  # to one rank: all of them must stop
        assert resumed.end() == 0, resumed.output()
        assert "told to stop" in resumed.output()
        stopped = read_metrics(run)[-1]["step"]
        assert last < stopped < STEPS
        assert steps_saved(run)[-1] == stopped
        assert f"step-{last:08d}" in resumed.output()
        resumed, last = deepspeed(config), stopped
    assert resumed.end() == 0, resumed.output()
    assert "resuming from" in resumed.output()
    assert f"step-{last:08d}" in resumed.output()
    assert exact_metrics(run) == exact_metrics(golden.run)
    ends = [consolidated_weights(path / "checkpoints/step-00000040") for path in (run, golden.run)]
    assert ends[0].keys() == ends[1].keys()
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name


@pytest.fixture
def _alone(monkeypatch):
    """This process as one that no launcher started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


def everything(run: Path) -> dict[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in run.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.mark.usefixtures("_alone")
def test_a_finished_run_started_again_says_so_and_changes_nothing(golden, capsys):
    before = everything(golden.run)
    assert train_main([str(golden.config)]) == 0
    out = capsys.readouterr().out
    assert "already trained" in out
    assert str(golden.run) in out
    assert everything(golden.run) == before


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("what", ["shards", "batch"])
def test_a_run_cannot_go_on_with_other_shards_or_another_batch(
    golden, capsys, what, dataset, other_dataset
):
    from shards import open_index

    override, old, new = {
        "batch": ("data.global_batch_size=32", "16", "32"),
        "shards": (
            f"data.shards={other_dataset}",
            open_index(dataset).sha256,
            open_index(other_dataset).sha256,
        ),
    }[what]
    before = everything(golden.run)
    assert train_main([str(golden.config), override, "train.steps=50"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: cannot resume")
    assert old in err
    assert new in err
    assert everything(golden.run) == before


def test_a_folder_in_use_is_refused_by_all_ranks_with_one_line_and_exit_code_2(
    write_config, deepspeed
):
    config = write_config()
    with lock_run(load_config(config).run_dir):
        refused = deepspeed(config)
        assert refused.end() == 2, refused.output()
    lines = [line for line in refused.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "another process" in lines[0]
    assert "Traceback" not in refused.output()
    assert not (run_of(config) / "metrics.jsonl").exists()


def test_the_losses_do_not_depend_on_how_the_batch_is_split_over_ranks(
    launch, write_config, dataset, damaged_dataset
):
    """On a mixture, one of whose datasets has a damaged block, with all the noise there is."""
    mixture = [{"path": str(dataset), "weight": 3}, {"path": str(damaged_dataset)}]
    sections = {
        "data": {"shards": mixture, "global_batch_size": 16, "on_corrupt": "skip"},
        "objective": {"latent_noise": 0.5, "input_mask": 0.2, "word_dropout": 0.2},
        "optim": {"name": "adamw", "warmup": 0.0},
        "train": {"steps": 3, "precision": "fp32"},
        "eval": {"every": 3, "sequences": 30},
    }
    alone, split = write_config(**sections), write_config(**sections)
    one = launch(*torchrun(TRAIN, alone, ranks=1))
    assert one.end() == 0, one.output()
    two = launch(*torchrun(TRAIN, split))
    assert two.end() == 0, two.output()
    assert "1 ranks" in one.output()
    assert "2 ranks" in two.output()
    pairs = list(zip(read_metrics(run_of(alone)), read_metrics(run_of(split)), strict=True))
    assert [left["step"] for left, _ in pairs] == [1, 2, 3]
    for left, right in pairs:
        for name in ("consumed", "epoch", f"epoch/{dataset}", f"epoch/{damaged_dataset}"):
            assert left[name] == right[name], name
        assert left["quarantined"] == right["quarantined"] > 0
        for name in ("loss", "reconstruction", "mmd", "nats_per_token", "nats_per_sequence"):
            assert left[name] == pytest.approx(right[name], rel=1e-3), (left["step"], name)
        held_out = [line.get("eval/nats_per_token") for line in (left, right)]
        assert (None in held_out) is (left["step"] != 3)
        assert held_out[0] == pytest.approx(held_out[1], abs=2e-3)
    log = run_of(alone) / "logs" / "rank-00000.log"
    assert f"{damaged_dataset}/train-00000.tar, block 0 is damaged" in log.read_text()


# What follows uses the finished run.


@pytest.fixture
def t5vae_command(monkeypatch, capsys):
    """Runs `t5vae ...` in this process; returns what it printed."""

    def run(*arguments: Any, stdin: str = "", code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["t5vae", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert (caught.value.code or 0) == code, out + err
        return out, err

    return run


def document(text: str) -> Any:
    """The one JSON document that a text is; NaN is none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def exported(golden, t5vae_command):
    t5vae_command("export", golden.run)
    return golden.run / "export"


def test_an_export_is_a_transformers_model_and_is_made_once(golden, t5vae_command):
    shutil.rmtree(golden.run / "export", ignore_errors=True)
    out, _ = t5vae_command("export", golden.run)
    assert "already" not in out
    export = golden.run / "export"
    assert str(export) in out
    before = everything(export)
    out, _ = t5vae_command("export", golden.run)
    assert "already exported" in out
    assert everything(export) == before
    assert not list(golden.run.glob("export.*"))

    model = AutoModel.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    saved = consolidated_weights(golden.run / "checkpoints/step-00000040")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == saved.keys()
    for name, weight in parameters.items():
        assert torch.equal(weight.flatten(), saved[name]), name
    ids = tokenizer(["value_1 = function_1(a)"], return_tensors="pt").input_ids
    z_BD = model(input_ids=ids, mode="encode")
    assert z_BD.shape == (1, 8)
    with torch.no_grad():
        assert model.generate(latent=z_BD).shape[0] == 1
    assert "library_name: transformers" in (export / "README.md").read_text()


def test_eval_gives_one_document_of_the_promised_names_and_keeps_it(
    golden, exported, t5vae_command
):
    (golden.run / "eval.json").unlink(missing_ok=True)
    options = ["--sequences", 20, "--samples", 20, "--interpolations", 3, "--check", "python"]
    out, _ = t5vae_command("eval", golden.run, *options, "--json")
    report = document(out)
    assert document((golden.run / "eval.json").read_text()) == report
    figures = {"exact_match", "token_accuracy", "edit_similarity", "valid", "unique", "novel"}
    assert figures | {"shuffled_gap", "participation_ratio", "mmd"} <= set(report)
    assert {"validity", "directness"} <= set(report["interpolation"])
    assert {"valid", "unique", "novel"} <= set(report["controls"]["trigram"])
    for name in figures:
        assert 0 <= report[name] <= 1, name
    assert "20 held-out sequences" in (golden.run / "export" / "README.md").read_text()
    before = (golden.run / "eval.json").stat().st_mtime_ns
    out, _ = t5vae_command("eval", golden.run, *options)
    assert "already evaluated" in out
    assert (golden.run / "eval.json").stat().st_mtime_ns == before
    out, _ = t5vae_command("eval", golden.run, *options[:-2])
    assert "already evaluated" not in out


def test_sample_draws_as_many_as_asked_and_the_same_again(golden, exported, t5vae_command):
    first = document(t5vae_command("sample", golden.run, "-n", 5, "--json")[0])
    assert len(first["texts"]) == 5
    assert document(t5vae_command("sample", exported, "-n", 5, "--json")[0]) == first
    out, _ = t5vae_command("sample", golden.run, "-n", 5)
    assert out == "".join(f"{text}\n" for text in first["texts"])


def test_reconstruct_takes_arguments_or_lines(golden, exported, t5vae_command):
    texts = ["value_1 = function_1(a)", "", "value_2 = function_2(a, b)"]
    given = document(t5vae_command("reconstruct", golden.run, *texts, "--json")[0])
    assert [pair["text"] for pair in given["texts"]] == texts
    for pair in given["texts"]:
        assert pair["exact"] == (pair["text"] == pair["reconstruction"])
    stdin = "\n".join(texts) + "\n"
    assert document(t5vae_command("reconstruct", golden.run, "--json", stdin=stdin)[0]) == given
    piped, _ = t5vae_command("reconstruct", golden.run, "-", "--json", stdin=stdin)
    assert document(piped) == given


def test_interpolate_gives_the_steps_asked_for(golden, exported, t5vae_command):
    ends = ["value_1 = function_1(a)", "value_2 = function_2(a, b)"]
    options = ["--steps", 5]
    walked = document(t5vae_command("interpolate", golden.run, *ends, *options, "--json")[0])
    assert [walked["a"], walked["b"]] == ends
    assert len(walked["texts"]) == 5
    back = document(t5vae_command("reconstruct", golden.run, *ends, "--json")[0])["texts"]
    assert [walked["texts"][0], walked["texts"][-1]] == [end["reconstruction"] for end in back]
    out, _ = t5vae_command("interpolate", golden.run, *ends, *options, "--method", "slerp")
    assert out.startswith("0.00  ")
    assert "\n1.00  " in out


def test_export_sets_a_damaged_checkpoint_aside_and_takes_the_one_before(
    golden, t5vae_command, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(golden.run, run, ignore=shutil.ignore_patterns("export"))
    newest = run / "checkpoints/step-00000040"
    largest = max(newest.glob("rank-*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    out, err = t5vae_command("export", run)
    assert "step-00000040" in out + err
    assert largest.name in out + err
    assert not newest.exists()
    assert (run / "checkpoints/step-00000040.damaged-0").is_dir()
    assert (run / "export/model.safetensors").is_file()
    out, _ = t5vae_command("export", run)
    assert "step-00000030" in out

    for path in retention.list_checkpoints(run / "checkpoints"):
        (path / "manifest.json").unlink()
    _, err = t5vae_command("export", run, code=2)
    assert "no valid checkpoint" in err
