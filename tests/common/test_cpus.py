"""CPUs that a process may use, by a real cgroup and by the files of others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5vae.common.cpus import cpus

ALL = len(os.sched_getaffinity(0))


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A file system with these files, on a machine of 64 CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))

    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def v1(quota: int, period: int = 100_000) -> dict[str, str]:
    return {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": f"{period}\n"}


def below(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}/{name}": text for name, text in files.items()}


V2, V1 = "0::/\n", "5:memory:/docker/a1\n4:cpu,cpuacct:/docker/a1\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 64),
        (V2, below("", {"cpu.max": "max 100000\n"}), 64),
        (V2, below("", {"cpu.max": "200000 100000\n"}), 2),
        (V2, below("", {"cpu.max": "150000 100000\n"}), 2),
        (V2, below("", {"cpu.max": "1000 100000\n"}), 1),
        (V2, below("", {"cpu.max": "9900000 100000\n"}), 64),
        ("0::/pod/own\n", below("pod/own", {"cpu.max": "800000 100000\n"}), 8),
        ("0::/pod/own\n", below("pod", {"cpu.max": "300000 100000\n"}), 3),
        ("0::/../../host\n", below("", {"cpu.max": "300000 100000\n"}), 3),
        (V1, below("cpu,cpuacct/docker/a1", v1(400_000)), 4),
        (V1, below("cpu,cpuacct", v1(250_000)), 3),  # in a container: not as the host names it
        (V1, below("cpu,cpuacct", v1(-1)), 64),
        (V1, below("cpu,cpuacct", v1(-1)) | below("cpu,cpuacct/docker", v1(50_000, 10_000)), 5),
    ],
)
def test_a_quota_counts_in_whole_cpus(system, groups, files, expected):
    assert cpus(system({"proc/self/cgroup": groups, **files})) == expected


def test_here_it_is_no_more_than_this_process_may_run_on():
    assert 1 <= cpus() <= ALL


@pytest.fixture
def rationed():
    """A command's start, which runs it in a cgroup of half a CPU."""
    top = Path("/sys/fs/cgroup")
    is_v2 = (top / "cgroup.controllers").exists()
    group = (top if is_v2 else top / "cpu") / f"t5vae-test-{os.getpid()}"
    limits = {"cpu.max": "50000 100000"} if is_v2 else {"cpu.cfs_quota_us": "50000"}
    try:
        group.mkdir()
        for name, text in limits.items():
            (group / name).write_text(text)
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    group.rmdir()


def test_a_real_cgroup_is_seen(rationed):
    program = "from t5vae.common.cpus import cpus; print(cpus())"
    command = [*rationed, sys.executable, "-c", program]
    assert subprocess.check_output(command, text=True) == "1\n"
