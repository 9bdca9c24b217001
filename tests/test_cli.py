"""The `t5vae` command: help, what it refuses, and how. Real models are in training/test_runs.py."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from typer.testing import CliRunner

import shards
from t5vae import cli
from t5vae.config import keys

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(path for path in CONFIGS.glob("*.yaml"))
COMMANDS = {
    "train": ["--ranks"],
    "quickstart": ["--config"],
    "runs": ["--json"],
    "plot": ["--key", "--x", "--out"],
    "track": ["--wandb", "--tensorboard"],
    "export": [],
    "eval": ["--json", "--samples", "--measure", "--shards"],
    "compare": ["--json"],
    "encode": ["--json", "--jsonl", "--file", "--column", "--out", "--device"],
    "decode": ["--json", "--jsonl", "-n", "--temperature", "--seed", "--device"],
    "reconstruct": ["--json", "--jsonl", "--file", "--device"],
    "interpolate": ["--json", "--jsonl", "--steps", "--method", "--device"],
    "grid": ["--json", "--jsonl", "--steps", "--method", "--device"],
    "sample": [
        "--json",
        "--jsonl",
        "-n",
        "--prior",
        "--temperature",
        "--check",
        "--seed",
        "--device",
    ],
    "neighbors": ["--json", "--jsonl", "-n", "--radius", "--device"],
    "nearest": ["--json", "--jsonl", "-n", "--corpus", "--file", "--device"],
    "direction": ["--json", "--jsonl", "--pairs", "--strength", "--file", "--device"],
    "fit-property": ["--json", "--function", "--file", "--values", "--kind", "--device"],
    "optimize": [
        "--json",
        "--jsonl",
        "--property",
        "--min",
        "--target",
        "--check",
        "--radius",
        "--device",
    ],
    "outliers": ["--json", "--jsonl", "-n", "--file", "--device"],
    "dedupe": ["--json", "--jsonl", "--radius", "--corpus", "--file", "--device"],
    "plan": ["--json", "--nodes", "--gpus-per-node", "--gpu-memory"],
    "doctor": ["--json"],
    "config ls": ["--json"],
    "config copy": [],
    "config show": ["--json", "--world-size"],
    "config schema": ["--json"],
    "shards build": ["--tokenizer", "--max-length", "--part"],
    "shards join": ["--workers"],
    "shards verify": [],
    "shards inspect": ["--json", "--order-version"],
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    tree = {
        "data": {"shards": str(tmp_path / "none"), "global_batch_size": 16},
        "run": {"output_dir": str(tmp_path / "run")},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def dataset(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"value_{i} = {i}\n" for i in range(60)))
    shards.build(lines, tmp_path / "data", tokenizer="byte", max_length=24, valid_fraction=0.1)
    return tmp_path / "data"


@pytest.fixture
def run_folder(tmp_path, config_file):
    """A run that was started, and has saved nothing yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_file.read_text())
    return folder


def test_help_lists_every_command():
    out = CliRunner().invoke(cli.app, ["--help"]).stdout
    for command in COMMANDS:
        assert command.split()[0] in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example_and_its_options(command):
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(
        cli.app, [*command.split(), "--help"]
    )
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"t5vae {command} " in result.stdout.replace("\n", " ") or command == "config schema"
    for option in COMMANDS[command]:
        assert option in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"], ["config", "schema"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import atexit, sys\nfrom t5vae.cli import main\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'pyarrow', 'sklearn', 'zuko'}\n"
        "atexit.register(lambda: print('loaded', heavy & set(sys.modules), file=sys.stderr))\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "loaded set()"


@pytest.mark.parametrize("command", [["train"], ["config", "show"]])
class TestConfigurations:
    def test_a_missing_file_is_refused(self, error_line, command):
        assert "none.yaml" in error_line(*command, "none.yaml")

    def test_an_unknown_key_is_refused_with_a_suggestion(self, error_line, command, config_file):
        line = error_line(*command, config_file, "train.step=5")
        assert "train.step;" in line
        assert "did you mean train.steps?" in line

    def test_micro_batches_that_do_not_fill_the_batch_are_refused(
        self, error_line, command, config_file
    ):
        line = error_line(*command, config_file, "data.micro_batch_size=5")
        assert "16" in line
        assert "5" in line

    def test_missing_shards_are_refused_with_the_command_that_builds_them(
        self, error_line, command, config_file, tmp_path
    ):
        line = error_line(*command, config_file)
        assert f"t5vae shards build SOURCE --out {tmp_path / 'none'}" in line

    def test_a_model_too_small_for_its_shards_is_refused(
        self, error_line, command, config_file, dataset
    ):
        settings = [f"data.shards={dataset}", "model.sequence_length=5"]
        line = error_line(*command, config_file, *settings)
        assert "model.sequence_length 5" in line
        assert "24" in line

    def test_debug_shows_where_it_went_wrong(self, t5vae, command):
        code, _, err = t5vae(*command, "none.yaml", "--debug")
        assert code == 2
        assert "Traceback" in err
        assert "none.yaml" in err.splitlines()[-1]


def test_a_batch_that_ranks_cannot_share_is_refused(error_line, config_file, dataset):
    line = error_line("config", "show", config_file, f"data.shards={dataset}", "--world-size", 3)
    assert "16" in line
    assert "3 ranks" in line


@pytest.mark.parametrize(
    "command",
    [
        *(
            "export",
            "eval",
            "compare",
            "sample",
            "encode",
            "reconstruct",
            "interpolate",
            "grid",
            "neighbors",
        ),
        *("nearest", "fit-property", "optimize", "outliers", "dedupe"),
    ],
)
class TestRunFolders:
    arguments: ClassVar = {
        **{name: ["x = 1"] for name in ("encode", "reconstruct", "neighbors", "nearest")},
        "interpolate": ["x = 1", "x = 2"],
        "grid": ["a", "b", "c", "d"],
        "fit-property": ["length"],
        "optimize": ["x = 1", "--property", "length"],
        **{name: ["x = 1"] for name in ("outliers", "dedupe")},
    }

    def test_a_folder_that_is_not_there_is_refused(self, error_line, command, tmp_path):
        line = error_line(command, tmp_path / "nowhere", *self.arguments.get(command, []))
        assert str(tmp_path / "nowhere") in line

    def test_a_folder_of_something_else_is_refused(self, error_line, command, tmp_path):
        (tmp_path / "letters").mkdir()
        line = error_line(command, tmp_path / "letters", *self.arguments.get(command, []))
        assert str(tmp_path / "letters") in line

    def test_a_run_without_what_is_needed_is_refused_with_what_to_do(
        self, error_line, command, run_folder
    ):
        line = error_line(command, run_folder, *self.arguments.get(command, []))
        expected = "train it further" if command == "export" else f"t5vae export {run_folder}"
        assert expected in line


def test_an_empty_standard_input_is_refused(error_line, run_folder):
    assert "standard input is empty" in error_line("reconstruct", run_folder)
    assert "standard input is empty" in error_line("reconstruct", run_folder, "-")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as in UTF-8 and C locales
def test_a_binary_standard_input_is_refused(error_line, run_folder, errors):
    binary = b"x = 1\n\xff\xfe\x00\x80\n"
    assert "not UTF-8 text" in error_line("reconstruct", run_folder, stdin=binary, errors=errors)


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "t5vae", "config", "schema"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: ")
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_installed_command_exits_with_2_and_one_line():
    command = Path(sys.executable).parent / "t5vae"
    done = subprocess.run([command, "config", "show", "none.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_config_show_prints_a_preset_and_what_follows_from_it(t5vae, preset, dataset):
    code, out, err = t5vae("config", "show", preset, *shards_of(preset, dataset), "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    config, derived = shown["config"], shown["derived"]
    assert config["run"]["name"] == preset.stem
    launcher = config["launcher"]
    assert derived["world_size"] == launcher["nodes"] * max(1, launcher["gpus_per_node"])
    batch = derived["micro_batch_size"] * derived["accumulation"] * derived["world_size"]
    assert batch == config["data"]["global_batch_size"]
    assert derived["parameters"] > 500_000
    assert derived["state_bytes_per_rank"] > 0


def shards_of(preset: Path, dataset: Path) -> list[str]:
    """Some name no sizes: they come from shards, which these must have."""
    return [f"data.shards={dataset}"] if preset.stem in ("quickstart", "vae") else []


def test_a_presets_name_is_its_file_and_what_it_is_for_is_listed(t5vae, dataset):
    settings = [f"data.shards={dataset}", "--json"]
    by_name = t5vae("config", "show", "quickstart", *settings)
    assert by_name == t5vae("config", "show", CONFIGS / "quickstart.yaml", *settings)
    listed = json.loads(t5vae("config", "ls", "--json")[1])["configs"]
    assert list(listed) == [path.stem for path in PRESETS]
    for name, text in listed.items():
        assert f"# {text[:40]}" in (CONFIGS / f"{name}.yaml").read_text()


def test_a_preset_is_copied_and_nothing_is_overwritten(t5vae, error_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert t5vae("config", "copy", "vae")[1] == "copied: vae.yaml\n"
    (tmp_path / "folder").mkdir()
    assert t5vae("config", "copy", "vae", "folder")[1] == "copied: folder/vae.yaml\n"
    for copied in ("vae.yaml", "folder/vae.yaml"):
        assert (tmp_path / copied).read_text() == (CONFIGS / "vae.yaml").read_text()
    assert "vae.yaml exists" in error_line("config", "copy", "vae")
    assert "cannot write no/vae.yaml" in error_line("config", "copy", "vae", "no/vae.yaml")
    assert "choose large, legacy" in error_line("config", "copy", "nothing")


def test_versions_are_told_without_a_command(t5vae):
    code, out, _ = t5vae("--version")
    told = dict(line.split() for line in out.splitlines())
    assert code == 0
    assert list(told) == [
        *("t5vae", "python", "torch", "transformers", "deepspeed"),
        *("webdataset", "submitit", "pydantic"),
    ]
    assert told["torch"] == version("torch")


def test_config_show_for_people_is_yaml_with_the_overrides_applied(t5vae, dataset):
    settings = [f"data.shards={dataset}", "train.steps=77", "--world-size", 2]
    code, out, _ = t5vae("config", "show", CONFIGS / "quickstart.yaml", *settings)
    assert code == 0
    shown = yaml.safe_load(out)
    assert shown["train"]["steps"] == 77
    assert shown["derived"]["world_size"] == 2
    assert shown["derived"]["vocab_size"] > 0
    assert shown["derived"]["train_sequences"] + 1 <= 60


def test_config_schema_names_every_key_and_what_it_means(t5vae):
    _, out, _ = t5vae("config", "schema")
    listed = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert listed == keys()
    assert "Sequences in one optimiser step" in out
    _, out, _ = t5vae("config", "schema", "--json")
    assert set(json.loads(out)["properties"]) == {key.split(".")[0] for key in keys()}


def test_damaged_shards_are_no_users_mistake_but_a_finding(t5vae, dataset):
    (dataset / "blocks.npy").unlink()
    code, out, _ = t5vae("shards", "verify", dataset)
    assert code == 1
    assert "blocks.npy" in out
