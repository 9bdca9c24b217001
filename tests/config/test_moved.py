"""A run's own config.yaml, read in another folder, or after the run or its project moved."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

import shards
from t5vae.common.errors import UserError
from t5vae.config import Config, load_config

RUN = Path("runs/a")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    (folder / "lines.txt").write_text("".join(f"value_{n} = {n}\n" for n in range(60)))
    shards.build(folder / "lines.txt", folder / "lines", tokenizer="byte", max_length=30)
    return folder / "lines"


@pytest.fixture
def project(built, tmp_path, monkeypatch):
    """The working folder, in which the run runs/a started."""
    folder = tmp_path / "project"
    shutil.copytree(built, folder / "data/lines")
    monkeypatch.chdir(folder)
    (folder / "a.yaml").write_text("data: {shards: data/lines}\n")
    start(load_config("a.yaml"))
    return folder


def start(config: Config) -> None:
    """As training does."""
    (config.run_dir / "checkpoints").mkdir(parents=True)
    config.write()


def place_of(config: Config) -> Path:
    """Where its shards are found."""
    return Path(config.data.open().path).resolve()


def test_a_run_is_read_as_it_was_written(project):
    written = load_config(RUN / "config.yaml")
    assert written == load_config("a.yaml")
    assert written.dump() == load_config("a.yaml").dump()
    assert "started_in" not in written.dump()


def test_a_copy_of_a_run_is_a_run_of_its_own(project):
    shutil.copytree(RUN, "moved")
    moved = load_config("moved/config.yaml")
    assert moved.run_dir == Path("moved")
    assert moved.run.name == "a"
    assert moved.data == load_config("a.yaml").data
    moved.write()
    assert load_config("moved/config.yaml") == moved
    assert load_config(RUN / "config.yaml").run_dir == RUN


def test_a_run_that_is_read_inside_its_folder_is_that_one(project, monkeypatch):
    monkeypatch.chdir(RUN)
    config = load_config("config.yaml")
    assert config.run_dir.samefile(project / RUN)
    assert place_of(config) == project / "data/lines"


def test_what_is_said_wins_over_the_folder(project):
    shutil.copytree(RUN, "moved")
    overrides = ["run.output_dir=other", "data.shards=data/none"]
    config = load_config("moved/config.yaml", overrides)
    assert (config.run_dir, config.data.shards) == (Path("other"), "data/none")
    settings = {"run.output_dir": "third"}
    assert load_config("moved/config.yaml", overrides, settings).run_dir == Path("third")


@pytest.mark.parametrize("to", ["project/moved", "elsewhere/deep/down", "up"])
def test_a_run_is_read_from_any_folder_wherever_it_lies(project, tmp_path, monkeypatch, to):
    shutil.copytree(RUN, tmp_path / to)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    for run in (tmp_path / to, project / RUN):
        config = load_config(run / "config.yaml")
        assert config.run_dir == run
        assert place_of(config) == project / "data/lines"


@pytest.mark.parametrize("old_remains", [True, False])
def test_a_project_that_moved_as_a_whole_has_its_own_data(
    project, tmp_path, monkeypatch, old_remains
):
    shutil.copytree(project, tmp_path / "new/home")
    monkeypatch.chdir(tmp_path / "new")
    if not old_remains:
        shutil.rmtree(project)
    config = load_config(tmp_path / "new/home" / RUN / "config.yaml")
    assert place_of(config) == tmp_path / "new/home/data/lines"
    assert place_of(load_config("home/runs/a/config.yaml")) == tmp_path / "new/home/data/lines"


def test_after_a_move_the_present_folder_is_written_down(project, tmp_path, monkeypatch):
    shutil.copytree(RUN, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    load_config("moved/config.yaml").write()
    written = yaml.safe_load(Path("moved/config.yaml").read_text())
    assert written["run"]["started_in"] == str(tmp_path)
    assert written["run"]["output_dir"] == "moved"
    assert written["data"]["shards"] == str(project / "data/lines")
    assert place_of(load_config("moved/config.yaml")) == project / "data/lines"


def test_what_is_nowhere_is_told_with_the_places(project, tmp_path, monkeypatch):
    shutil.copytree(RUN, tmp_path / "moved/far/away")
    shutil.rmtree("data")
    monkeypatch.chdir(tmp_path)
    config = load_config("moved/far/away/config.yaml")
    assert config.data.shards == "data/lines"
    with pytest.raises(UserError) as caught:
        config.data.open()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(project / "data/lines") in message
    assert str(tmp_path / "data/lines") in message
    with pytest.raises(UserError) as caught:
        load_config("moved/far/away/config.yaml", ["data.shards=none"]).data.open()
    assert "looked for" not in str(caught.value)


def test_each_dataset_of_a_mixture_is_found_and_a_url_stays(project, tmp_path, monkeypatch):
    mixture = "[data/lines, {path: data/gone}, {path: s3://bucket/data}]"
    start(load_config("a.yaml", ["run.name=b", f"data.shards={mixture}"]))
    monkeypatch.chdir(tmp_path)
    data = load_config(project / "runs/b/config.yaml").data
    assert data.paths == [str(project / "data/lines"), "data/gone", "s3://bucket/data"]


@pytest.mark.parametrize("absolute", [False, True])
def test_what_lies_in_the_run_moves_with_it(project, tmp_path, monkeypatch, absolute):
    own = str(project / "runs/b") if absolute else "runs/b"
    given = [f"run.output_dir={own}", f"model.base={own}/base", "deepspeed.config=ds.json"]
    start(load_config("a.yaml", given))
    (Path(own) / "base").mkdir()
    Path("ds.json").write_text("{}")
    shutil.move(own, tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    config = load_config("b/config.yaml")
    assert config.run_dir == Path("b")
    assert Path(config.model.base).samefile("b/base")
    assert config.deepspeed.config == str(project / "ds.json")


def test_a_name_on_the_hub_stays_a_name(project, tmp_path, monkeypatch):
    start(load_config("a.yaml", ["run.name=b", "model.base=google/t5-v1_1-small"]))
    monkeypatch.chdir(tmp_path)
    assert load_config(project / "runs/b/config.yaml").model.base == "google/t5-v1_1-small"


def test_a_run_behind_a_link_is_the_same(project, tmp_path, monkeypatch):
    shutil.move("runs", tmp_path / "scratch")
    os.symlink(tmp_path / "scratch", "runs")
    assert load_config(RUN / "config.yaml") == load_config("a.yaml")
    monkeypatch.chdir("/")
    assert place_of(load_config(tmp_path / "scratch/a/config.yaml")) == project / "data/lines"


def older(run: Path) -> None:
    """As a run was written that told no working folder."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["run"]["started_in"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def test_an_older_run_is_known_by_its_checkpoints(project, tmp_path, monkeypatch):
    older(RUN)
    assert load_config(RUN / "config.yaml") == load_config("a.yaml")
    shutil.copytree(RUN, "moved")
    assert load_config("moved/config.yaml").run_dir == Path("moved")
    monkeypatch.chdir(tmp_path)
    assert place_of(load_config(project / RUN / "config.yaml")) == project / "data/lines"


@pytest.mark.parametrize(
    ("text", "folder", "says"),
    [
        ("data: {shards: x}\n", "checkpoints", "runs/config"),
        ("data: {shards: x}\nrun: {output_dir: out}\n", "checkpoints", "out"),
        ("data: {shards: x}\nrun: {name: b, output_dir: out}\n", "data", "out"),
    ],
)
def test_a_file_that_no_run_wrote_says_itself_where_the_run_is(project, text, folder, says):
    Path("mine", folder).mkdir(parents=True)
    Path("mine/config.yaml").write_text(text)
    assert load_config("mine/config.yaml").run_dir == Path(says)


def test_a_copy_of_the_file_under_another_name_is_a_configuration(project):
    shutil.copy(RUN / "config.yaml", "again.yaml")
    assert load_config("again.yaml") == load_config("a.yaml")


@pytest.mark.parametrize("run", ["[a]", "7", "{started_in: x, name: [b], output_dir: c}"])
def test_a_section_that_no_run_wrote_is_refused_in_one_line(project, run):
    (RUN / "config.yaml").write_text(f"data: {{shards: x}}\nrun: {run}\n")
    with pytest.raises(UserError) as caught:
        load_config(RUN / "config.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_data_of_an_older_pickle_open_and_say_what_is_missing(project):
    data = load_config("a.yaml", ["data.shards=none"]).data
    state = data.__getstate__() | {"__pydantic_private__": None}
    again = data.model_copy()
    again.__setstate__(state)
    assert again == data
    with pytest.raises(UserError, match="none is no dataset"):
        again.open()
