"""The table of backends: what a new one takes, and that each keeps its words to itself."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher.cli
from launcher.backend import State
from launcher.backends import BACKENDS

ROOT = Path(__file__).parents[2]
WORDS = re.compile(r"\b(squeue|sacct|scancel|sbatch|scontrol)\b|SLURM_")


class Pods:
    """A third backend, whole: a job is a file in a folder that something else would read."""

    def __init__(self, folder):
        self.folder = folder

    def require(self):
        self.folder.mkdir(exist_ok=True)

    def queue(self, tasks, folder, after):
        ids = []
        for task in tasks:
            ids.append(f"{task.config.run.name}-{len(list(self.folder.iterdir()))}")
            (self.folder / ids[-1]).write_text(f"after {after}\n{task.config.dump()}")
        return ids

    def script(self, configs, folder):
        return f"kind: Job of {len(configs)}"

    def enter(self):
        pass

    def states(self, ids):
        return {job: State("Running", "pod") for job in ids if (self.folder / job).read_text()}

    def home(self, job):
        return None

    def cancel(self, ids):
        for job in ids:
            (self.folder / job).write_text("")

    def log(self, folder, job, rank):
        return Path(folder).parent / f"{job}.{rank}"


@pytest.fixture
def pods(tmp_path, monkeypatch):
    """`--cluster pods`, whose jobs lie in a folder pods/."""
    monkeypatch.setenv("COLUMNS", "120")  # of help, unbroken
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "pods", Pods(tmp_path / "pods"))
        importlib.reload(launcher.cli)
        yield tmp_path / "pods"
    importlib.reload(launcher.cli)


def test_a_third_backend_is_a_line_in_the_table(config_file, pods, launch):
    on = ("--cluster", "pods")
    assert "slurm|local|pods" in launch("submit", "--help")[1]
    assert launch("submit", config_file, *on, "--dry-run")[1] == "kind: Job of 1\n"
    assert not pods.exists()

    assert launch("submit", config_file, *on, "--nodes", 2)[1].splitlines() == [
        "job tiny-0 on pods: 2 x 1 ranks",
        "log:    runs/tiny/tiny-0.0",
        "follow: t5vae-launch logs -f runs/tiny",
    ]
    assert re.search(r"^tiny-0 +Running +pod .* runs/tiny$", launch("status")[1], re.M)
    code, _, err = launch("submit", config_file, *on)
    assert (code, "held by job tiny-0" in err) == (2, True)
    assert "job tiny-1 on pods" in launch("resume", "runs/tiny", *on, "--force")[1]
    assert (pods / "tiny-1").read_text().startswith("after ['tiny-0']\n")
    (config_file.parent / "runs/tiny/tiny-1.0").write_text("step 1\n")
    assert launch("logs", "tiny-1")[1] == "step 1\n"

    assert launch("cancel", "tiny-0")[0] == launch("cancel", "runs/tiny")[0] == 0
    assert launch("cancel", "runs/tiny")[0] == 2
    rows = launch("status", "runs/tiny")[1].splitlines()[1:]
    assert [row.split()[:2] for row in rows] == [["tiny-0", "ENDED"], ["tiny-1", "ENDED"]]


def test_a_sweep_goes_to_a_third_backend_in_its_order(config_file, pods, launch):
    seeds = ",".join(map(str, range(11)))
    told = launch("submit", config_file, "--cluster", "pods", "--sweep", f"run.seed={seeds}")[1]
    rows = launch("status")[1].splitlines()[1:]
    assert [row.split()[0] for row in rows] == re.findall("^job (.*) on", told, re.M)
    assert len(rows) == 11


def strings(source: str) -> Iterator[str]:
    """A module's strings, but for what only a reader sees: docstrings and an option's help."""
    tree = ast.parse(source)
    read = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) or (isinstance(node, ast.keyword) and node.arg == "help")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in read:
            yield node.value


def test_every_string_is_seen_but_what_only_a_reader_sees():
    source = '''
"""module"""
A = ["a", f"b{A!r:>3}"]
class C:
    """class"""
    field: str = "c"
    """field"""
    def f(self, x: Annotated[str, Option("d", help="option")] = "e"):
        """function"""
        run("f", name="g")
'''
    assert sorted(set(strings(source)) - {">3"}) == list("abcdefg")


def test_only_the_backend_and_the_scheduler_speak_slurm():
    found = {
        str(path.relative_to(ROOT))
        for package in ("launcher", "shards", "t5vae")
        for path in (ROOT / package).rglob("*.py")
        if any(WORDS.search(text) for text in strings(path.read_text()))
    }
    assert found == {"launcher/sbatch.py", "launcher/slurm.py", "t5vae/cluster/scheduler.py"}
