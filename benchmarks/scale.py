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

import _scale_build
import _scale_checkpoint
import _scale_data as data
import _scale_mmd
import _scale_ranks
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
            f"{row['bytes'] * row['ranks'] / found[0]['bytes']:.3f}",
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
        "over a straight line",
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


def checkpoints(quick: bool) -> Block:
    found = _scale_checkpoint.rows((64,) if quick else (1, 8, 64, 1024))
    rows = [
        (
            f"ZeRO {row['stage']}, {row['ranks']:,}",
            short(row["manifest"] / 1e3),
            short(row["hashed"] / 1e6),
            f"{row['opened']:,}",
            short(row["header"] / 1e3),
            f"{row['opened_by_fewer']:,}",
            f"{row['opened_before']:,}",
            short(row["headers_before"] / 1e6),
        )
        for row in found
    ]
    header = (
        "ranks",
        "manifest, kB",
        "hashed, MB",
        "files opened",
        "header, kB",
        "files opened by 3/4 as many ranks, at most",
        "files opened before",
        "headers before, MB",
    )
    largest = max(found, key=lambda row: row["manifest"])
    targets = [
        Target("1,024 ranks: MB of the manifest", 1, largest["manifest"] / 1e6, at_most=True),
        Target("files that a rank opens", 1, max(row["opened"] for row in found), at_most=True),
    ]
    return Block("checkpoints", table(header, rows), targets)


def stores(quick: bool) -> Block:
    found = _scale_ranks.rows((1, 8) if quick else (1, 8, 64, 1024))
    rows = [
        (
            f"{row['phase']}, {row['ranks']:,}",
            f"{row['other_calls']:,}",
            f"{row['other_keys']:,}",
            f"{row['speaker_calls']:,}",
            f"{row['speaker_keys']:,}",
            f"{row['all_calls']:,}",
        )
        for row in found
    ]
    header = (
        "phase, ranks",
        "calls of a rank",
        "keys in them",
        "calls of the one with most",
        "keys in them",
        "calls of all",
    )
    return Block("stores", table(header, rows))


def mmd(quick: bool) -> Block:
    found = _scale_mmd.rows(N=8192, D=256, worlds=(64,)) if quick else _scale_mmd.rows()
    rows = [
        (
            f"{row['ranks']:,}",
            f"{row['rows']:,}",
            figure(row["seconds"]),
            f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
            short(row["MiB"]),
            short(row["codes_MiB"]),
        )
        for row in found
    ]
    header = ("ranks", "rows of one", "s", "over its products", "MiB", "MiB of all codes")
    return Block("mmd", table(header, rows))


def merges(quick: bool) -> Block:
    found = _scale_build.rows((256,) if quick else (64, 256, 1024, 4096))
    header = ("runs", "opens to merge", "runs left", "buckets", "opens to read them", "before")
    names = ("runs", "merging", "left", "buckets", "reading", "before")
    return Block("merges", table(header, [tuple(f"{row[n]:,}" for n in names) for row in found]))


SECTIONS: dict[str, Callable[[bool], Block]] = {
    "data": data_of_ranks,
    "nodes": data_of_nodes,
    "restarts": restarts,
    "evaluation": evaluation,
    "checkpoints": checkpoints,
    "stores": stores,
    "mmd": mmd,
    "merges": merges,
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
