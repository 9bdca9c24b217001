"""What of a machine matters to training on it, in one page that can be pasted into an issue.

No path is shown, no value of a variable that may be a secret, and no name of a user or a host.
"""

import getpass
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from t5vae.cluster.scheduler import about_cluster
from t5vae.common.cpus import cpus
from t5vae.common.errors import first_line
from t5vae.common.files import SCRATCH
from t5vae.common.versions import installed, versions

OPTIONAL = ("liger-kernel", "triton", "rdkit", "tensorboard", "aiohttp", "s3fs", "gcsfs")
SHOWN = re.compile(r"CUDA_VISIBLE_DEVICES|DS_ACCELERATOR|OMP_NUM_THREADS|(GLOO|NCCL)_SOCKET_IFNAME")
NAMED = re.compile(r"(T5VAE|HF|WANDB|NCCL|TORCH|AWS)_\w+|(https?|no)_proxy", re.IGNORECASE)
START = "from t5vae.planning.doctor import start_alone; start_alone()"
PATIENCE = 120  # seconds for a process to start as training does
GIB = 2**30


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        rows: a line for each subject.
        problems: why training cannot start, and what to do; empty where it can.
    """

    rows: dict[str, str]
    problems: list[str]


def examine() -> Examination:
    """Look at this machine, and start a process as training does."""
    problems: list[str] = []
    rows = {
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": _cpu(),
        **_devices(problems),
        "slurm": about_cluster(),
        "disk": _disk(problems),
        "network": _network(),
        "optional": ", ".join(f"{name} {installed(name) or 'not there'}" for name in OPTIONAL),
        "set": _environment(),
    }
    if not problems:
        _start(problems)
    return Examination(
        {name: anonymous(text) for name, text in rows.items()}, [*map(anonymous, problems)]
    )


def anonymous(text: str) -> str:
    """Text with ~ for the home folder, and USER for the user's name."""
    home = Path.home()
    names = {home.name}
    if home.name:
        text = text.replace(str(home), "~")
    with suppress(KeyError, OSError):  # a number without a name
        names.add(getpass.getuser())
    for name in sorted(names - {""}, key=len, reverse=True):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "USER", text)
    return text


def start_alone() -> None:
    """Load what training loads, and meet in a process group of one."""
    import torch
    import torch.distributed as dist

    from t5vae.cluster.agreement import all_sum
    from t5vae.cluster.process_group import leave_process_group, start_process_group
    from t5vae.cluster.ranks import find_ranks
    from t5vae.training import loop  # noqa: F401  and so all that it needs

    device = start_process_group(find_ranks({}), PATIENCE)
    all_sum(1)
    dist.all_reduce(torch.ones(1, device=device))
    leave_process_group()


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = found[1] if found else name
    memory = psutil.virtual_memory()
    return (
        f"{name}, {cpus()} of {os.cpu_count()} cores for this process; "
        f"{memory.total / GIB:.0f} GiB of memory, {memory.available / GIB:.0f} free"
    )


def _devices(problems: list[str]) -> dict[str, str]:
    """Accelerators, and the precision that training would choose."""
    try:
        import torch

        from t5vae.config import load_config
        from t5vae.training.build import model_config
        from t5vae.training.precision import faster, model_products

        quickstart = load_config(
            "quickstart", ["model.vocab_size=4096", "model.sequence_length=16"]
        )
        settings = model_config(quickstart.model, quickstart.objective, None)
        tokens = settings.sequence_length * quickstart.data.global_batch_size
        found = torch.accelerator.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        device = torch.accelerator.current_accelerator() if found else torch.device("cpu")
        precision = faster(model_products(settings, tokens), device)[1]
    except Exception as error:  # a broken installation raises anything
        problems.append(
            f"{type(error).__name__}: {first_line(error)}: install t5vae again, in an environment "
            "of its own"
        )
        return {"devices": "what training needs does not load"}
    return {
        "devices": _accelerators(torch) if found else _no_accelerator(torch),
        "precision": precision,
    }


def _accelerators(torch: Any) -> str:
    if not torch.cuda.is_available():
        return f"{torch.accelerator.device_count()} {torch.accelerator.current_accelerator().type}"
    devices = [
        f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return f"{'; '.join(devices)}; CUDA {torch.version.cuda}"


def _no_accelerator(torch: Any) -> str:
    if not shutil.which("nvidia-smi"):
        return "none: trains on the CPU"
    why = "finds no device" if torch.version.cuda else "is built without CUDA"
    return f"none: trains on the CPU; the machine has nvidia-smi, but this torch {why}"


def _disk(problems: list[str]) -> str:
    if not os.access(".", os.W_OK):
        problems.append("this folder cannot be written: go to another one")
    try:
        scratch = shutil.disk_usage(tempfile.gettempdir()).free
    except FileNotFoundError:  # none of its candidates can be written
        scratch = 0
    if scratch < SCRATCH:
        problems.append(
            f"the temporary folder has {scratch / 2**20:.0f} MiB free: make room, or set TMPDIR"
        )
    here = shutil.disk_usage(".").free
    return f"{here / GIB:.1f} GiB free here, {scratch / GIB:.1f} in the temporary folder"


def _network() -> str:
    up = [name for name, stats in psutil.net_if_stats().items() if stats.isup and name != "lo"]
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        leads = "is not known"
    else:
        leads = f"leads to {'the loopback' if address.startswith('127.') else 'an address'}"
    return f"{', '.join(up) or 'no interface but the loopback'}; the host's own name {leads}"


def _environment() -> str:
    """Variables that change how training goes; of most their names alone."""
    shown = [f"{name}={os.environ[name]}" for name in sorted(filter(SHOWN.fullmatch, os.environ))]
    named = [name for name in sorted(os.environ) if NAMED.fullmatch(name)]
    return ", ".join([*shown, *(name for name in named if not SHOWN.fullmatch(name))]) or "nothing"


def _start(problems: list[str]) -> None:
    command = [sys.executable, "-P", "-c", START]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        problems.append(
            f"a process does not meet even itself within {PATIENCE} s: put this host's name into "
            "/etc/hosts, or name an interface that is up, as in GLOO_SOCKET_IFNAME=lo"
        )
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        problems.append(f"a process cannot start as training does: {last}")
