"""Simulate a thousand ranks and a billion sequences on this machine, one rank at a time.

    python benchmarks/scale.py --quick
    python benchmarks/scale.py --only data,nodes --write

Everything is the product's own code: rank counts enter its functions as arguments, and indexes,
stores and manifests are made to size. No process runs a rank.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import _scale_data as data
from _report import Block, Page, Target, figure, installed, output, say, short, table

AMONG = (1, 3, 8, 60, 128, 1024)
MIB = 2**20


def alone(action: str, *numbers: int) -> dict[str, float]:
    """What an action of `_scale_data` finds in a process of its own."""
    path = Path(data.__file__)
    return json.loads(output([sys.executable, str(path), action, *map(str, numbers)]))


def data_of_ranks(quick: bool) -> Block:
    ranks = (1, 1024) if quick else (1, 8, 64, 256, 1024)
    found = [alone("rank", count) for count in ranks]
    rows = [
        (
            f"{row['ranks']:,}",
            figure(row["index_seconds"]),
            short(row["index_mib"]),
            figure(row["first_seconds"]),
            figure(1000 * row["step_seconds"]),
            short(row["stream_mib"]),
            f"{row['files']:,.0f}",
            short(row["bytes"] / 1e6),
        )
        for row in found
    ]
    header = (
        "ranks",
        "index, s",
        "index, MiB",
        "first batch, s",
        "a step, ms",
        "stream, MiB",
        "files",
        "MB read",
    )
    last = found[-1]
    targets = [
        Target("1,024 ranks: seconds to the first batch", 1, last["first_seconds"], at_most=True),
        Target("1,024 ranks: MiB of the stream", 64, last["stream_mib"], at_most=True),
    ]
    return Block("data", table(header, rows), targets)


def data_of_nodes(quick: bool) -> Block:
    nodes = (16, 128) if quick else (1, 2, 7, 16, 60, 96, 100, 125, 128)
    found = [data.of_a_node(count, 3) for count in nodes]
    before = [data.of_a_node(count, 2) for count in nodes[-1:]]
    rows = [
        (
            f"{row['nodes']:,}, order {row['order']}",
            f"{data.RANKS_OF_A_NODE * row['nodes']:,}",
            f"{row['over_fair']:.3f}",
            f"{row['whole_shards']:.2f}",
            f"{row['whole_large_shards']:.2f}",
        )
        for row in (*found, *before)
    ]
    header = (
        "nodes",
        "ranks",
        "bytes over a fair share",
        "if shards were copied whole, of 0.3 MB",
        "of 256 MiB",
    )
    most = max(row["over_fair"] for row in found)
    target = Target("a node's bytes in an epoch over its fair share, the most", 1.1, most, True)
    return Block("nodes", table(header, rows), [target])


def restarts(quick: bool) -> Block:
    found = data.restarts(6 if quick else 200, AMONG)
    header = ("restarts", *(f"at {world:,}" for world in AMONG), "steps that differ")
    counts = [found[f"at {world}"] for world in AMONG]
    row = (f"{found['restarts']}", *(f"{count:.0f}" for count in counts), f"{found['wrong']:.0f}")
    target = Target("steps that differ from one rank's, of all restarts", 0, found["wrong"], True)
    return Block("restarts", table(header, [row]), [target])


def evaluation(quick: bool) -> Block:
    sizes = (10**6, 10**7) if quick else (10**7, 10**8, 10**9)
    found = [alone("evaluation", size) for size in sizes]
    rows = [
        (
            f"{row['sequences']:,.0f}",
            figure(row["seconds"]),
            f"{row['sequences'] / row['seconds'] / 1e6:.1f}",
            short(row["peak_mib"]),
        )
        for row in found
    ]
    most = max(row["peak_mib"] for row in found)
    target = Target("looking for texts in the training set: MiB of the process", 2048, most, True)
    return Block("evaluation", table(("sequences", "s", "million/s", "MiB"), rows), [target])


SECTIONS: dict[str, Callable[[bool], Block]] = {
    "data": data_of_ranks,
    "nodes": data_of_nodes,
    "restarts": restarts,
    "evaluation": evaluation,
}


def main() -> None:
    page = Page(
        __doc__, "benchmarks/scale.md", quick="smaller and fewer", only=SECTIONS, apart=True
    )
    args = page.options()
    for name in args.only:
        say(name)
        page.publish([SECTIONS[name](args.quick)], installed("numpy", "torch"))


if __name__ == "__main__":
    main()
