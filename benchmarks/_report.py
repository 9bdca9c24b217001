"""What the benchmarks share to report: targets, tables, versions, the machine."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")
"""What /proc/cpuinfo calls vector units, the widest first."""


class Target(NamedTuple):
    """A figure, and what it should at least, or at most, be."""

    what: str
    wanted: float
    measured: float
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def row(self) -> tuple[str, ...]:
        wanted = f"at {'most' if self.at_most else 'least'} {figure(self.wanted)}"
        return self.what, wanted, figure(self.measured), "met" if self.is_met else "**not met**"


def figure(value: float) -> str:
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f}"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    rule = ("---", *("---:" for _ in header[1:]))
    whole = (row + ("",) * (len(header) - len(row)) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *whole)) + "\n"


def target_table(targets: Iterable[Target]) -> str:
    return table(("target", "wanted", "measured", ""), [target.row() for target in targets])


def publish(
    head: str, sections: Iterable[tuple[str, Sequence[Target]]], doc: Path | None = None
) -> None:
    """Print a page, its targets first, and save it where `doc` says."""
    texts, targets = zip(*sections, strict=True)
    page = "\n".join((head, target_table(chain(*targets)), *texts))
    print(page)
    if doc:
        doc.parent.mkdir(exist_ok=True)
        doc.write_text(page)


def output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def installed(python: str, packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that a Python has."""
    code = (
        "import sys, json, importlib.metadata as m\n"
        "have = {d.name.lower(): d.version for d in m.distributions() if d.name}\n"
        "print(json.dumps({name: have[name] for name in sys.argv[1:] if name in have}))"
    )
    return json.loads(output([python, "-c", code, *packages]))


def machine(versions: dict[str, str]) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    words = set(" ".join(line for line in lines if line.startswith(("flags", "Features"))).split())
    vectors = next((name for name in VECTORS if name in words), "no vector units known")
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {vectors}, "
        f"{platform.system()}, Python {platform.python_version()}, {packages}."
    )
