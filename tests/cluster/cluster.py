"""A real SLURM of several hosts on one machine: `python3 cluster.py packages | up | down`.

Each host is a network namespace with an address on a bridge, and a slurmd with a host name and an
/etc/hosts of its own. As root, with Debian's slurm-wlm, munge and iproute2. All files lie in
`ROOT`; of the machine's own, slurm.conf and gres.conf in /etc/slurm are set aside, so that sbatch
in any shell reaches this cluster, and put back by `down`. Each node's GPUs are files.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path("/run/t5vae-cluster")
STATE = ROOT / "state.json"
CONF = Path("/etc/slurm/slurm.conf")
GRES = CONF.with_name("gres.conf")
ASIDE = ".before-t5vae"  # after the name of a file of the machine's own
NAMESPACES = Path("/run/netns")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
BRIDGE = "t5vae0"
ADDRESS = "10.77.0.{}".format
GPUS = 2
MOST = 200  # nodes, which share the last byte of the address
PATIENCE = 60  # seconds until all nodes must be idle, or a process must have ended

SLURM_CONF = """\
ClusterName=t5vae
SlurmctldHost=ctl({controller})
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Credentials expire soon, or a requeued job would wait two minutes.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/ctl
SlurmctldPidFile={root}/ctl.pid
SlurmdSpoolDir={root}/%n
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/ctl.log
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
GresTypes=gpu
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
KillWait=20
InactiveLimit=0
MinJobAge=300
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 DefaultTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF DefaultTime=60 State=UP
"""


class RefusalError(Exception):
    """What whoever runs this can mend."""


def packages() -> None:
    """Install Debian's packages, where a program is missing."""
    if not _missing():
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise RefusalError(f"{', '.join(_missing())} missing; root installs them with apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in ("update -q", "install -q -y --no-install-recommends slurm-wlm munge iproute2"):
        if subprocess.run(["apt-get", *command.split()], env=environment).returncode:
            raise RefusalError(f"apt-get {command} fails")


def _require_root() -> None:
    command = ["unshare", "--net", "--uts", "--mount", "true"]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise RefusalError("a cluster of network namespaces needs root")


def _missing() -> list[str]:
    return [program for program in PROGRAMS if not shutil.which(program)]


def is_up() -> bool:
    """Whether everything that `up` started still runs."""
    return STATE.exists() and all(_is_alive(daemon) for daemon in _daemons().values())


def up(nodes: int = 3) -> None:
    """Start a controller and some nodes, and wait until they are idle."""
    if not 1 <= nodes <= MOST:
        raise RefusalError(f"a cluster has 1 to {MOST} nodes, not {nodes}")
    _require_root()
    if _missing():
        raise RefusalError(f"{', '.join(_missing())} missing: make cluster-packages")
    if is_up():
        return
    down()
    names = [f"node{number}" for number in range(1, nodes + 1)]
    try:
        _begin(names)
    except (TimeoutError, subprocess.CalledProcessError) as error:
        logs = [f"{log.name}: {line}" for log in sorted(ROOT.glob("*.out")) for line in _tail(log)]
        down()
        raise SystemExit("\n".join([f"the cluster does not come up: {error}", *logs])) from None


def _begin(names: list[str]) -> None:
    ROOT.mkdir()
    _save({"nodes": names, "made_namespaces": not NAMESPACES.exists(), "daemons": {}})
    _connect(names)
    _write_files(names)
    _start("munged", "munged", "--foreground", "--force", *_munge_files())
    _wait("munge", (ROOT / "munge.socket").exists)
    _start("slurmctld", *_host("ctl"), "exec slurmctld -D")
    for name in names:
        start_node(name)
    _wait("the nodes", lambda: idle() == len(names))


def _tail(log: Path) -> list[str]:
    return log.read_text().splitlines()[-8:]


def _munge_files() -> list[str]:
    key = ROOT / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    kinds = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return [f"--key-file={key}", *(f"--{kind}={ROOT}/munge.{end}" for kind, end in kinds.items())]


def _write_files(names: list[str]) -> None:
    hosts = ["127.0.0.1 localhost", f"{ADDRESS(1)} ctl"]
    hosts += [f"{_address(name)} {name}" for name in names]
    (ROOT / "hosts").write_text("\n".join(hosts) + "\n")
    lines = [
        f"NodeName={name} NodeAddr={_address(name)} NodeHostname={name} CPUs=1 RealMemory=4000 "
        f"Gres=gpu:{GPUS}"
        for name in names
    ]
    for number in range(GPUS):
        (ROOT / f"gpu{number}").touch()
    CONF.parent.mkdir(exist_ok=True)
    text = SLURM_CONF.format(controller=ADDRESS(1), root=ROOT, nodes="\n".join(lines))
    gpus = f"Name=gpu File={ROOT}/gpu[0-{GPUS - 1}]\n"
    for file, content in ((CONF, text), (GRES, gpus)):
        if file.exists():
            file.rename(aside(file))
        file.write_text(content)


def aside(file: Path) -> Path:
    """Where a file of the machine's own lies meanwhile."""
    return file.with_name(file.name + ASIDE)


def _address(name: str) -> str:
    return ADDRESS(10 + int(name.removeprefix("node")))


def _connect(names: list[str]) -> None:
    _ip(f"link add {BRIDGE} type bridge")
    _ip(f"addr add {ADDRESS(1)}/24 dev {BRIDGE}")
    _ip(f"link set {BRIDGE} up")
    for name in names:
        _ip(f"netns add t5vae-{name}")
        _ip(f"link add t5v-{name} type veth peer name eth0 netns t5vae-{name}")
        _ip(f"link set t5v-{name} master {BRIDGE} up")
        _ip(f"-n t5vae-{name} addr add {_address(name)}/24 dev eth0")
        _ip(f"-n t5vae-{name} link set eth0 up")
        _ip(f"-n t5vae-{name} link set lo up")


def _ip(command: str) -> str:
    return subprocess.run(
        ["ip", *command.split()], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _host(name: str) -> list[str]:
    """What runs a shell under a host name and a hosts file of its own; the command follows."""
    before = f'hostname {name}; mount --bind {ROOT}/hosts /etc/hosts; eval "$0"'
    return ["unshare", "--uts", "--mount", "sh", "-c", before]


def start_node(name: str) -> None:
    """Start a node's slurmd."""
    # Not `ip netns exec`, which mounts /sys anew: slurmd would find no cgroups.
    inside = ["nsenter", f"--net={NAMESPACES}/t5vae-{name}"]
    _start(name, *inside, *_host(name), f"exec slurmd -D -N {name}")


def _start(name: str, *command: str) -> None:
    """Start what outlives this process, and write down which process it is."""
    with open(ROOT / f"{name}.out", "a") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
    state = json.loads(STATE.read_text())
    state["daemons"][name] = [process.pid, _started(process.pid)]
    _save(state)


def _save(state: dict) -> None:
    """Write the state whole or not at all, so that `down` can always read it."""
    whole = STATE.with_suffix(".new")
    whole.write_text(json.dumps(state))
    whole.replace(STATE)


def _daemons() -> dict[str, list]:
    return json.loads(STATE.read_text())["daemons"]


def node_names() -> list[str]:
    """The cluster's nodes."""
    return json.loads(STATE.read_text())["nodes"]


def _started(pid: int) -> str | None:
    """When a process started, which tells it from a later one of the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] == "Z" else stat[19]


def _is_alive(daemon: list) -> bool:
    pid, started = daemon
    return _started(pid) == started


def idle() -> int:
    """How many nodes are well and have nothing to do."""
    return _states().count("idle")


def is_down(name: str) -> bool:
    """Whether SLURM takes a node for lost."""
    return _states(f"--nodes={name}")[0].startswith("down")


def _states(*options: str) -> list[str]:
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", *options]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def _wait(what: str, seen: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not seen():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: waited for {PATIENCE} s")
        time.sleep(0.1)


def pids(name: str) -> list[int]:
    """All processes on a node."""
    return [int(pid) for pid in _ip(f"netns pids t5vae-{name}").split()]


def kill_node(name: str) -> None:
    """End a node's slurmd and all of its tasks at once, as a crash would."""
    while found := pids(name):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def cut(name: str) -> None:
    """Take a node's network away."""
    _ip(f"link set t5v-{name} down")


def mend(name: str) -> None:
    """Give a node its network back."""
    _ip(f"link set t5v-{name} up")


def in_node(name: str, *command: str) -> subprocess.CompletedProcess:
    """Run a command on a node, in the namespaces of its slurmd."""
    pid = _daemons()[name][0]
    inside = ["nsenter", f"--target={pid}", "--net", "--uts", "--mount"]
    return subprocess.run([*inside, *command], capture_output=True, text=True)


def down() -> None:
    """End what `up` started, and put back what it changed."""
    _require_root()
    if STATE.exists():
        state = json.loads(STATE.read_text())
        # A namespace takes its links with it, but late: the next `up` would meet them.
        there = {name for _, name in socket.if_nameindex()}
        for link in there.intersection([BRIDGE, *(f"t5v-{name}" for name in state["nodes"])]):
            _ip(f"link delete {link}")
        for name in state["nodes"]:
            if (NAMESPACES / f"t5vae-{name}").exists():
                kill_node(name)
                _ip(f"netns delete t5vae-{name}")
        for daemon in state["daemons"].values():
            if _is_alive(daemon):
                os.kill(daemon[0], signal.SIGKILL)
        _wait("an end", lambda: not any(_is_alive(d) for d in state["daemons"].values()))
        # Others may have made namespaces since.
        if state["made_namespaces"] and NAMESPACES.exists() and not any(NAMESPACES.iterdir()):
            subprocess.run(["umount", NAMESPACES], check=False, capture_output=True)
            NAMESPACES.rmdir()
    if ROOT.exists():
        shutil.rmtree(ROOT)
    for file in (CONF, GRES):
        if aside(file).exists():
            aside(file).rename(file)
        elif file.exists() and f"={ROOT}/" in file.read_text():
            file.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("packages", help="install Debian's packages where they are missing")
    commands.add_parser("up", help="start it").add_argument("--nodes", type=int, default=3)
    commands.add_parser("down", help="end it, and put back what was changed")
    chosen = parser.parse_args()
    os.umask(0o022)  # every user's sbatch reads slurm.conf
    try:
        if chosen.command == "packages":
            packages()
            print("SLURM's programs are installed")
        elif chosen.command == "down":
            down()
        else:
            told = "is up already" if is_up() else "is up"
            up(chosen.nodes)
            nodes = ", ".join(f"{name} ({_address(name)})" for name in node_names())
            print(f"SLURM {told}: {nodes}; logs in {ROOT}")
            print("use it: sbatch slurm/train.sh; end it: make cluster-down")
    except RefusalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
