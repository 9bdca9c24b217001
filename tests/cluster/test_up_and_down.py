"""The cluster by hand: `make cluster-up`, sbatch from any shell, `make cluster-down`."""

import stat
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture
def taken_down(cluster, slurm):
    """The machine without the cluster, but with a slurm.conf of its own; and with it again.

    The shell's own fixture ends after this one, when the cluster is there again.
    """
    cluster.down()
    own = cluster.CONF
    fake = not own.exists()
    if fake:
        own.parent.mkdir(exist_ok=True)
        own.write_text("ClusterName=another\n")
        own.chmod(0o640)
    yield cluster
    cluster.down()
    if fake:
        own.unlink()
    cluster.up()


def make(target):
    subprocess.run(["make", "-C", ROOT, target], check=True, capture_output=True)


def traces(cluster):
    """What a cluster would leave on the machine; not the dead whom an idle init never buries."""
    commands = (["ip", "-brief", "link"], ["ip", "netns", "list"], ["ps", "-eo", "args"])
    said = [subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands]
    names = ("t5v", "slurmd", "slurmctld", "munged")
    living = [line for line in "".join(said).splitlines() if "<defunct>" not in line]
    lines = [line for line in living if any(name in line for name in names)]
    return (
        lines
        + ["its folder"] * cluster.ROOT.exists()
        + ["aside"] * cluster.aside(cluster.CONF).exists()
    )


def test_sbatch_in_any_shell_reaches_it_and_down_puts_everything_back(taken_down, slurm, tmp_path):
    own = taken_down.CONF
    before = (own.read_bytes(), stat.filemode(own.stat().st_mode), traces(taken_down))
    make("cluster-up")
    make("cluster-up")
    job = ("--wait", f"--chdir={ROOT}", f"--output={tmp_path}/%j.out", "slurm/train.sh")
    told = slurm.call("sbatch", *job, "data.shards=nowhere")
    assert told.returncode == 2, told.stderr
    (log,) = tmp_path.glob("*.out")
    first, *of_srun = log.read_text().splitlines()
    assert first.startswith("error: nowhere is no dataset")
    assert all(line.startswith("srun: ") for line in of_srun)
    make("cluster-down")
    assert before == (own.read_bytes(), stat.filemode(own.stat().st_mode), traces(taken_down))
    make("cluster-down")
