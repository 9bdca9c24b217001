"""The model card, of a run folder made by hand around an untrained model."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from typer.testing import CliRunner

from t5vae import cli
from t5vae.checkpoint.card import dataset_name, hub_name, write_card
from t5vae.config import Config
from t5vae.evaluation import evaluate_run
from t5vae.model import T5VAE
from t5vae.training.build import model_config

STEP = 30
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
NASTY = "a|b `c`\n---\n# *d* <script>"


@pytest.fixture(scope="module")
def configure(dataset) -> Callable[..., Config]:
    """A small run's configuration; sections given replace its own."""

    def make(**sections: dict) -> Config:
        whole = {
            "run": {"name": "small", "seed": 7},
            "data": {"shards": str(dataset), "global_batch_size": 16},
            "model": {"t5": T5, "latent_size": 8, "token_size": 4},
            "train": {"steps": 40},
            "eval": {"sequences": 20, "samples": 10, "interpolations": 2, "check": "regex:x|`y`"},
        }
        return Config(**{**whole, **sections})

    return make


@pytest.fixture(scope="module")
def finished(configure, tmp_path_factory) -> Path:
    """A run with an export of step 30 and an evaluation of it. Not to be changed."""
    run, config = tmp_path_factory.mktemp("runs") / "small", configure()
    shards = config.data.open()
    torch.manual_seed(0)
    T5VAE(model_config(config.model, config.objective, shards)).save_pretrained(run / "export")
    shards.tokenizer().save_pretrained(run / "export")
    (run / "export/SOURCE").write_text(f"step-{STEP:08d} 0123")
    (run / "config.yaml").write_text(config.dump())
    lines = [{"step": step, "loss": 100 + step, "mmd": None} for step in (10, 20, STEP, 40)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate_run(run)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of that run, to be changed."""
    return shutil.copytree(finished, tmp_path / "small")


@pytest.fixture
def card(run, configure) -> Callable[..., str]:
    """Writes the run's card, under a configuration with the sections given, and reads it."""

    def write(**sections: dict) -> str:
        (run / "config.yaml").write_text(configure(**sections).dump())
        write_card(run, run / "export")
        return (run / "export/README.md").read_text(encoding="utf-8")

    return write


def metadata(text: str) -> ModelCardData:
    return ModelCard(text).data


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """The cells of the only table, as Markdown reads them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert rows[1] == ["---"] * len(rows[0])
    assert {len(row) for row in rows} == {len(rows[0])}
    return rows


def test_the_front_matter_is_what_the_hub_reads(card, run):
    data = metadata(card())
    assert data.library_name == "transformers"
    assert {"t5vae", "t5-vae", "latent-space", "variational-autoencoder"} <= set(data.tags)
    assert data.base_model is None
    assert data.model_name == "small"
    report = json.loads((run / "eval.json").read_text())
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values["nats_per_token"] == report["nats_per_token"]
    assert values["gaussian_valid"] == report["gaussian"]["valid"]
    assert values["active_dimensions"] == report["active_dimensions"]
    first = data.eval_results[0]
    assert (first.dataset_name, first.dataset_split) == ("dataset", "valid")
    assert first.dataset_revision == report["made_from"]["shards_sha256"]


def test_a_figure_that_is_none_is_no_result(card, run):
    report = json.loads((run / "eval.json").read_text())
    report["valid"], report["mmd"] = None, float("nan")
    (run / "eval.json").write_text(json.dumps(report))
    found = {result.metric_type for result in metadata(card()).eval_results}
    assert "unique" in found
    assert not {"valid", "mmd"} & found


@pytest.mark.slow
def test_the_code_in_the_card_runs_where_the_export_was_moved_to(card, run, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", card(), flags=re.DOTALL))
    folder = shutil.move(run / "export", tmp_path / "downloaded")
    shutil.rmtree(run)
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(tuple(z.shape), len(halfway))"],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(2, 8) 1"
    assert "LatentSpace.load(" in code


def test_the_data_are_what_the_index_says(card, configure):
    (index,) = configure().data.open().indexes
    text = section(card(), "Data")
    _, _, *rows = table(text)
    wanted = [
        ["dataset", "1", name, f"{split.sequences:,}", f"{split.tokens:,}", f"`{index.sha256}`"]
        for name, split in index.splits.items()
    ]
    assert rows == wanted
    assert [row[2] for row in rows] == ["train", "valid"]
    assert "24 tokens" in text
    assert "byte-level BPE" in text
    assert "train:300" in text
    assert index.tokenizer_fingerprint in text


def test_a_mixture_names_each_of_its_shards_with_its_weight(card, dataset, damaged_dataset):
    weighted = [{"path": str(dataset), "weight": 3}, {"path": str(damaged_dataset), "weight": 1}]
    text = card(data={"shards": weighted})
    assert [row[:3] for row in table(section(text, "Data"))[2:]] == [
        ["dataset", "3", "train"],
        ["dataset", "3", "valid"],
        ["damaged", "1", "train"],
        ["damaged", "1", "valid"],
    ]
    assert metadata(text).eval_results[0].dataset_name == "dataset + damaged"


def test_without_its_shards_the_card_says_their_name_and_no_more(card, tmp_path):
    text = card(data={"shards": str(tmp_path / "gone/lines")})
    assert section(text, "Data").strip() == "- shards: lines\n- tokenizer: TokenizersBackend"
    assert "300 pieces" in section(text, "Model and training")


def test_shards_that_are_not_those_of_the_checkpoint_are_not_described(card, run, configure, save):
    sha256 = configure().data.open().sha256
    save(run / "checkpoints", STEP, {"shards": sha256})
    assert sha256 in section(card(), "Data")
    save(run / "checkpoints", STEP, {"shards": "f" * 64})
    assert sha256 not in section(card(), "Data")
    assert "sequences" not in section(card(), "Data")


def test_training_is_told_up_to_the_exported_step(card):
    text = section(card(), "Model and training")
    assert "steps: 30 of 40" in text
    assert "sequences seen: 480" in text
    assert "loss at step 30: 130" in text
    assert "mmd at step" not in text
    assert "step 40" not in text
    assert "seed: 7" in text
    assert "global_batch_size: 16" in text
    assert "started from: random weights" in text


def test_parameters_are_those_of_the_exported_file(card, run):
    model = T5VAE.from_pretrained(run / "export")
    assert f"parameters: {model.num_parameters():,}\n" in card()


def test_without_metrics_the_card_has_none(card, run):
    (run / "metrics.jsonl").unlink()
    text = section(card(), "Model and training")
    assert "sequences seen: 480" in text
    assert "loss at step" not in text


def test_the_evaluation_stands_beside_its_controls(card, run):
    report = json.loads((run / "eval.json").read_text())
    text = section(card(), "Evaluation")
    header, _, *rows = table(text)
    assert header == ["metric", "model", "95 %", "control", "meaning"]
    figures = {row[0]: row[1:4] for row in rows}
    trigram = report["controls"]["trigram"]
    assert figures["nats per token"] == [
        f"{report['nats_per_token']:.3f}",
        "{:.3f} to {:.3f}".format(*report["intervals"]["nats_per_token"]),
        f"trigram {trigram['nats_per_token']:.3f}",
    ]
    assert "20 held-out sequences, 10 samples, 2 interpolations" in text
    assert r"regex:x\|\`y\`" in text


@pytest.mark.parametrize("change", ["no file", "another model", "another schema"])
def test_figures_that_are_not_of_the_exported_model_are_left_out(card, run, change):
    report = json.loads((run / "eval.json").read_text())
    if change == "no file":
        (run / "eval.json").unlink()
    elif change == "another model":
        model = T5VAE.from_pretrained(run / "export")
        torch.nn.init.zeros_(model.get_input_embeddings().weight)
        model.save_pretrained(run / "export")
    else:
        (run / "eval.json").write_text(json.dumps(report | {"schema_version": 0}))
    text = card()
    assert "`t5vae eval RUN`" in section(text, "Evaluation")
    assert "|" not in section(text, "Evaluation")
    assert metadata(text).eval_results is None


def test_eval_writes_its_figures_into_the_card(card, run):
    (run / "eval.json").unlink()
    assert "Not evaluated" in card()
    result = CliRunner().invoke(cli.app, ["eval", str(run), "--samples", "5"])
    assert result.exit_code == 0, result.output
    text = (run / "export/README.md").read_text(encoding="utf-8")
    assert "5 samples" in section(text, "Evaluation")
    assert metadata(text).eval_results


def test_the_card_is_written_whole_and_beside_nothing_else(card, run):
    before = {path.name for path in (run / "export").iterdir()}
    first = card()
    assert {path.name for path in (run / "export").iterdir()} == before | {"README.md"}
    assert card() == first


def test_names_break_neither_the_front_matter_nor_the_text(card, dataset, tmp_path):
    shards = shutil.copytree(dataset, tmp_path / NASTY.replace("/", ""))
    name = " ".join(NASTY.splitlines())
    text = card(run={"name": name}, data={"shards": str(shards)})
    shown = r"a\|b \`c\` --- \# \*d\* \<script\>"
    assert f"\n# {shown}\n" in text
    assert table(section(text, "Data"))[2][0] == shown
    assert metadata(text).model_name == name
    assert metadata(text).eval_results[0].dataset_name == NASTY


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("data/lines", "lines"),
        ("/home/somebody/data/lines/", "lines"),
        ("file:///home/somebody/lines", "lines"),
        ("/", "shards"),
        ("s3://bucket/lines", "lines"),
        ("s3://AKIA:hunter2@bucket/lines/", "lines"),
        ("s3://AKIA:hun/ter2@bucket/lines", "lines"),
        ("s3://AKIA:hunter2@bucket", "bucket"),
        ("s3://AKIA:hun?ter2@bucket/lines", "shards"),
        ("s3://AKIA:hun/t?er2@bucket/lines", "shards"),
        ("https://host/lines?sig=hunter2", "lines"),
        ("https://host/lines?sig=hun/ter2", "lines"),
        ("https://host/lines?sig=me@hunter2", "shards"),
        ("https://host/lines/#hunter2", "lines"),
        ("simplecache::s3://AKIA:hunter2@bucket/lines", "lines"),
    ],
)
def test_of_a_location_only_the_last_part_is_named(location, name):
    assert dataset_name(location) == name


def test_no_secret_and_no_path_of_the_machine_gets_in(card, run, tmp_path):
    url = "memory://AKIA:hunter2@bucket/lines?token=hunter2"
    line = {"step": STEP, "loss": 1.5, f"epoch/{url}": 2}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    home = str(tmp_path)
    text = card(
        run={"name": "small", "output_dir": f"{home}/runs"},
        data={"shards": url, "cache_dir": home},
        model={"t5": T5, "base": f"{home}/private/t5"},
        deepspeed={"config": {"comet": {"enabled": True, "api_key": "hunter2"}}},
        launcher={"account": "hunter2"},
    )
    assert "loss at step 30: 1.5" in text
    for hidden in ("AKIA", "hunter2", home, str(Path.home()), os.getcwd()):
        assert hidden not in text
    assert "shards: lines" in text


def test_a_base_on_the_hub_is_named(card):
    text = card(model={"t5": T5, "base": "google/t5-v1_1-small"})
    assert metadata(text).base_model == "google/t5-v1_1-small"
    assert "started from: google/t5-v1_1-small" in text


def test_a_base_that_is_a_folder_is_not_named(card, tmp_path, monkeypatch):
    (tmp_path / "models/secret").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = card(model={"t5": T5, "base": "models/secret"})
    assert metadata(text).base_model is None
    assert "started from: a pretrained T5" in text
    assert "secret" not in text
    elsewhere = ["../t5", "./t5", "/nowhere/t5", "https://me:hunter2@host/t5", "a/b/c"]
    assert [hub_name(base) for base in elsewhere] == [None] * 5
