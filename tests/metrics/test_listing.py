"""`t5vae runs`: which runs there are, and what their last lines say of them."""

import json
import os
import time

import pytest

from t5vae.metrics.listing import list_runs


@pytest.fixture(autouse=True)
def _now(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0 + 30)


def states(folder) -> dict[str, str]:
    return {os.path.relpath(row.run, folder): row.state for row in list_runs(str(folder))}


def test_runs_at_any_depth_are_listed_the_one_that_wrote_last_at_the_end(
    tmp_path, lines, write, t5vae
):
    write("newest", lines(ended=2_000_000_000.0))
    write("sweep/lr=0.1", lines(ended=1_999_990_000.0))
    write("sweep/deep/er", lines(ended=1_999_980_000.0))
    write("newest/checkpoints/step-10", lines())
    write("newest/again", lines(100, ended=1_999_999_000.0))
    code, out, err = t5vae("runs", tmp_path)
    assert (code, err) == (0, "")
    heading, *rows = out.splitlines()
    assert heading.split() == ["run", "state", "step", "loss", "tokens/s", "checkpoint", "updated"]
    names = [os.path.relpath(row.split()[0], tmp_path) for row in rows]
    assert names == ["sweep/deep/er", "sweep/lr=0.1", "newest/again", "newest"]
    cells = ["training", "500/1,000", "1.4283", "1,500", "400", "30", "s", "ago"]
    assert rows[-1].split()[1:] == cells


def test_one_run_is_shown_by_its_folder_or_by_a_link_to_it(tmp_path, lines, write):
    run = write("run", lines())
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "run").symlink_to(run)
    (run / "loop").symlink_to(tmp_path / "links")
    assert [row.run for row in list_runs(str(run))] == [str(run)]
    assert [row.run for row in list_runs(str(tmp_path / "links"))] == [
        str(tmp_path / "links" / "run")
    ]


def test_the_state_follows_from_the_steps_and_the_usual_time_between_lines(tmp_path, lines, write):
    slow = [line | {"time": 2_000_000_000.0 - 100 * (50 - n)} for n, line in enumerate(lines())]
    write("slow", [line | {"time": line["time"] - 150} for line in slow])
    write("slow and silent", [line | {"time": line["time"] - 400} for line in slow])
    write("silent", lines(ended=2_000_000_000.0 - 40))
    write("done", lines(100, ended=1e9))
    write("one line", lines(1))
    assert states(tmp_path) == {
        "slow": "training",
        "slow and silent": "stopped",
        "silent": "stopped",
        "done": "finished",
        "one line": "training",
    }


def test_lines_of_older_versions_are_dated_by_their_file(tmp_path, lines, write, t5vae):
    old = [
        {k: v for k, v in line.items() if k not in ("steps", "time", "checkpoint")}
        for line in lines()
    ]
    for name, age in (("fresh", 20), ("old", 7200)):
        file = write(name, old) / "metrics.jsonl"
        os.utime(file, (time.time() - age,) * 2)
    assert states(tmp_path) == {"old": "stopped", "fresh": "training"}
    _, out, _ = t5vae("runs", tmp_path / "old")
    assert out.splitlines()[1].split()[2:] == ["500/?", "1.4283", "1,500", "-", "2", "h", "ago"]


@pytest.mark.parametrize("content", [b"\xf2\x00\n", b"[1]\n", b'{"loss": 1}\n', None])
def test_a_damaged_run_does_not_hide_the_others(tmp_path, lines, write, t5vae, content):
    if content is None:
        (tmp_path / "bad" / "metrics.jsonl").mkdir(parents=True)
    else:
        write("bad", content)
    write("good", lines())
    assert states(tmp_path) == {"good": "training", "bad": "damaged"}
    code, out, err = t5vae("runs", tmp_path)
    assert code == 0
    assert len(out.splitlines()) == 3
    assert str(tmp_path / "bad" / "metrics.jsonl") in err
    assert len(err.splitlines()) == 1


def test_a_run_without_a_whole_line_has_just_begun(tmp_path, write):
    file = write("run", b'{"step": 10, "lo') / "metrics.jsonl"
    os.utime(file, (time.time(),) * 2)
    (row,) = list_runs(str(tmp_path))
    assert (row.state, row.step) == ("training", None)


def test_json_has_what_the_table_has_unrounded(tmp_path, lines, write, t5vae):
    run = write("run", [*lines(), lines()[-1] | {"loss": None}])
    _, out, _ = t5vae("runs", tmp_path, "--json")
    assert json.loads(out)["runs"] == [
        {
            "run": str(run),
            "state": "training",
            "updated": 2_000_000_000.0,
            "step": 500,
            "steps": 1000,
            "loss": None,
            "tokens_per_second": 1500.0,
            "checkpoint": 400,
            "problem": None,
        }
    ]


def test_a_folder_without_runs_is_refused(tmp_path, t5vae, monkeypatch):
    code, out, err = t5vae("runs", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"error: no run in {tmp_path}: there is no metrics.jsonl at or below it\n"
    monkeypatch.chdir(tmp_path)
    assert t5vae("runs")[2].startswith("error: no run in runs:")
