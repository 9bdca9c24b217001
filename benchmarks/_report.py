"""What the benchmarks share to report: options, targets, tables, versions, the machine, pages.

The words of a page stand in docs/. A benchmark prints what it found, and --write puts that
between the page's marks: a line `<!-- name -->` and the next `<!-- end -->`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `shards` is the package, not the script beside this file

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


class Block(NamedTuple):
    """What a page has between two marks."""

    name: str
    text: str
    targets: Sequence[Target] = ()


def figure(value: float) -> str:
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f}"


def short(value: float) -> str:
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and in brackets the least and the most of several."""
    least, middle, most = (f"{of(values):,.{digits}f}" for of in (min, median, max))
    return f"{middle} ({least} to {most})" if values[1:] else middle


def milliseconds(seconds: Iterable[float]) -> str:
    return spread([1000 * value for value in seconds], 1)


def ratios(above: Iterable[float], below: Iterable[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    rule = ("---", *("---:" for _ in header[1:]))
    whole = (row + ("",) * (len(header) - len(row)) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *whole)) + "\n"


def target_table(targets: Iterable[Target]) -> str:
    return table(("target", "wanted", "measured", ""), [target.row() for target in targets])


class Page(argparse.ArgumentParser):
    """The options of a benchmark, and the page that it fills.

    Args:
        docstring: of the script; its first line is told.
        path: of the page below docs/.
        quick: what --quick does, if anything.
        only: what --only chooses from.
        apart: each block has its own machine and targets, so that each can be renewed alone.
    """

    def __init__(
        self,
        docstring: str | None,
        path: str,
        quick: str = "",
        only: Iterable[str] = (),
        apart: bool = False,
    ):
        super().__init__(description=(docstring or "").splitlines()[0])
        self.path, self.only, self.apart = ROOT / "docs" / path, tuple(only), apart
        self.set_defaults(quick=False, only=None)
        if quick:
            self.add_argument("--quick", action="store_true", help=quick)
        if self.only:
            self.add_argument("--only", help=f"some of {','.join(self.only)}")
        self.add_argument("--write", action="store_true", help=f"into docs/{path}")

    def options(self) -> argparse.Namespace:
        self.args = self.parse_args()
        if self.args.write and (self.args.quick or (self.args.only and not self.apart)):
            self.error("--write saves whole runs: leave out --quick and --only")
        self.args.only = chosen(self, self.args.only, self.only)
        return self.args

    def publish(self, blocks: Sequence[Block], versions: dict[str, str], more: str = "") -> None:
        """Print the blocks, and fill the page with them if told to; `more` of the machine."""
        here = f"{machine(versions)} {more}".rstrip() + "\n"
        if self.apart:
            blocks = [
                block._replace(text="\n".join((here, block.text, target_table(block.targets))))
                if block.targets
                else block._replace(text=f"{here}\n{block.text}")
                for block in blocks
            ]
        else:
            targets = list(chain(*(block.targets for block in blocks)))
            met = [Block("targets", target_table(targets))] if targets else []
            blocks = [Block("machine", here), *met, *blocks]
        for block in blocks:
            print(f"{block.name}\n\n{block.text}")
        if self.args.write:
            self.path.write_text(filled(self.path.read_text(), blocks))


def filled(page: str, blocks: Iterable[Block]) -> str:
    """A page with blocks between its marks.

    Raises:
        ValueError: it has no marks of a block.
    """
    for block in blocks:
        before, mark, rest = page.partition(f"<!-- {block.name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"no <!-- {block.name} --> with an <!-- end --> in the page")
        page = f"{before}{mark}\n{block.text.rstrip()}\n\n{end}{after}"
    return page


def chosen(parser: argparse.ArgumentParser, only: str | None, names: Iterable[str]) -> list[str]:
    """What --only names, or everything."""
    names = list(names)
    found = only.split(",") if only else names
    if unknown := sorted(set(found) - set(names)):
        parser.error(f"--only {','.join(unknown)}: choose from {','.join(names)}")
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr)


def output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def installed(*packages: str, python: str = sys.executable) -> dict[str, str]:
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
