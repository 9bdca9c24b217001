"""Measure a whole training run beside its bare loop: speed, start, and the stall of a save.

    python benchmarks/train.py --quick --data DIR   # DIR keeps the shards
    python benchmarks/train.py --write
    python benchmarks/train.py --device cuda        # every CUDA device of this machine

Runs and bare loops (`_bare_loop.py`) are started by the deepspeed launcher, in turns. The lines
that they print are timed where they arrive, here: one clock for both.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from statistics import mean, median

import torch
from _launches import (
    CONFIG,
    FULL,
    QUICK,
    REAL_BATCHES,
    ROOT,
    Bench,
    Launch,
    on_cpu,
    on_cuda,
    prepare,
)
from _limit import PROFILED
from _report import Target, figure, installed, machine, publish, table

sys.path.insert(0, str(Path(__file__).parents[1]))  # `shards` is the package, not the script
from t5vae.checkpoint.manifest import read_manifest
from t5vae.checkpoint.retention import list_checkpoints
from t5vae.metrics.reading import read_metrics
from t5vae.training.precision import settle

DOC = ROOT / "docs" / "benchmarks" / "train.md"

WANTED = 0.93
LIMIT_OF = ROOT / "benchmarks" / "_limit.py"
SHARES = {"muon": 0.6, "adamw": 0.7}
"""Of the limit that a step should reach, by its optimiser."""
LOG_EVERY, SAVE_EVERY, SAVE_LOG_EVERY = 10, 10, 5
PIECE = 2**20
"""Bytes that the limit of a save writes and hashes at a time."""

HEAD = """\
# How fast training is

Printed by `python benchmarks/train.py --write` on this machine: {machine}

The limit of the loop is the bare loop, in which only the model, its optimiser and DeepSpeed are \
left; that of a save is to write and hash as many bytes on the same disk, fsync included.
"""

LOOP = """\
## The whole loop, on {place.title}

`{path}` ({parameters:,} parameters, {config.train.precision}, global batch \
{config.data.global_batch_size}, ZeRO stage {config.deepspeed.zero_stage}, \
`optim.name={config.optim.name}`) on {place.ranks} ranks{threads}: one-line statements of Python's \
standard library, {tokens:.1f} tokens a sequence, padded to {width}. The whole loop is \
`deepspeed train.py` with `log.every={every}`, no evaluation, and no checkpoint but the last, \
which is not timed. The bare loop has the same model, optimiser and DeepSpeed configuration, \
started in the same way: forward pass, `engine.backward`, `engine.step` on random ids of {real} \
real batches' shapes and lengths, in memory already; no data, MMD, noise, sums over \
ranks, schedule, log. Timed from step {effort.first} to step {effort.steps}; {effort.turns} turns \
of both, whose order alternates; medians, in brackets the least and the most, ratios turn by turn.

"""

SPLIT = """\
### Where the difference lies

In one process a rank, the bare loop and what a run has besides, one thing more each, take turns \
of {block} steps; medians of {rounds} turns, differences turn by turn, in brackets their \
quartiles. Alone: the same thing without a model, all ranks together. The sums over ranks are \
those of tokens, of the loss and of what tells ranks to stop, with the check that the loss is \
finite. Waiting for data is the run's own `data_wait`; a line of metrics.jsonl took {line:.2f} ms, \
and there is one every {every} steps. The rest is what these do not explain: the schedule, the \
thread that reads ahead, and noise, for the whole loop was timed in other processes.

"""

LIMIT = """\
## The limit of a step, on {place}

The operations of matrix products for real tokens, no pads, and the optimiser's own, each at the \
rate that products of its shape reach alone, in the run's precision, with all ranks multiplying at \
once (`_limit.py`; attention's scores do not count). A step is the whole loop's, as above; \
{turns} turns, medians, in brackets the least and the most, shares turn by turn.

"""

WHERE = """\

Where the time of a step goes, by torch's profiler on rank 0 over {steps} steps, which it slows:

"""

START = """\
## Start to first step, on {place}

Seconds from the launch to the first step's line, medians of {turns}, in brackets the least and \
the most. The first column ends with all modules imported and the shards open; {launcher:.1f} s \
of it are the deepspeed launcher's own. The engine's time has the process group's, and where a \
run resumes, the checkpoint's, which is verified and loaded. A first step warms up, and its line \
has to be logged.

"""

SAVES = """\
## The stall of a save, on {place}

Runs that save every {save} steps, {saves} times before the last: {models}. Stall: seconds that \
training waited for a save (`checkpoint_stall` of metrics.jsonl); committed: from its start until \
it was whole (`checkpoint_seconds`), and MB a second of that. Delay: how much longer {window} \
steps took with a save in them than without, by the medians, which also counts what a save in \
the background takes from the steps. The limit writes random bytes to files of the same sizes and \
takes their sha256, piece by piece, then fsync, a thread a file, four times after each run. \
Medians, in brackets the least and the most.

"""


def spread(values: list[float], digits: int) -> str:
    least, most = min(values), max(values)
    middle = f"{median(values):,.{digits}f}"
    return f"{middle} ({least:,.{digits}f} to {most:,.{digits}f})" if values[1:] else middle


# The loop

Section = tuple[str, list[Target]]


def loop(bench: Bench) -> Section:
    effort, first = bench.effort, bench.effort.first
    rates: dict[str, list[float]] = {"the bare loop": [], "the whole loop": []}
    settings = (f"train.steps={effort.steps}", f"log.every={LOG_EVERY}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    job = bench.job()
    config, _ = settle(job.config, job.settings, job.split, device, {})
    settings += (f"train.precision={config.train.precision}",)
    batch = config.data.global_batch_size
    waits, parameters = [], 0
    for turn in range(effort.turns):
        for side in list(rates)[:: 1 if turn % 2 else -1]:
            title = f"{side}, turn {turn + 1} of {effort.turns}"
            if side == "the bare loop":
                launch = bench.bare(title, "bare", effort.steps, *settings)
            else:
                launch = bench.train(title, *settings)
                records = read_metrics(bench.run_folder)
                waits.append(mean(r["data_wait"] for r in records if r["step"] > first))
                parameters = trained_parameters(launch)
                bench.forget_run()
            at = launch.steps()
            rates[side].append(batch * (effort.steps - first) / (at[effort.steps] - at[first]))
    bare, whole = rates.values()
    ratios = [ours / limit for ours, limit in zip(whole, bare, strict=True)]
    rows = [
        (
            side,
            spread(found, 1),
            f"{1000 * batch / median(found):,.1f}",
            "1" if found is bare else spread(ratios, 3),
        )
        for side, found in rates.items()
    ]
    threads = bench.place.environment.get("OMP_NUM_THREADS")
    real = list(chain(*json.loads(bench.lengths.read_text())))
    text = LOOP.format(
        path=" ".join((CONFIG, *bench.place.settings)),
        config=config,
        place=bench.place,
        effort=effort,
        parameters=parameters,
        threads=f", {threads} thread each" if threads else "",
        tokens=mean(chain(*(batch["lengths"] for batch in real))),
        width=" or ".join(map(str, sorted({batch["T"] for batch in real}))),
        every=LOG_EVERY,
        real=REAL_BATCHES,
    )
    header = ("", "sequences a second", "ms a step", "over the bare loop")
    what = f"{bench.place.title}, {bench.place.ranks} ranks: the whole loop over the bare loop"
    parts = split(bench, batch / median(bare), 1 / median(ratios), mean(waits))
    page = f"{text}{table(header, rows)}\n{parts}"
    return page, [Target(what, WANTED, median(ratios))]


def trained_parameters(launch: Launch) -> int:
    line = next(line for _, line in launch.lines if " parameters, " in line)
    return int(line.split(" parameters")[0].replace(",", ""))


def split(bench: Bench, bare_seconds: float, whole: float, wait: float) -> str:
    """What the whole loop has besides the bare one, in ms and as a share of the bare loop's step.

    Args:
        bare_seconds: a step of the bare loop.
        whole: a step of the whole loop over that.
        wait: share of the whole loop's time that waited for data.
    """
    rounds = bench.effort.rounds
    launch = bench.bare("parts of a step", "parts", rounds, f"log.every={LOG_EVERY}")
    bench.forget_run()
    printed = json.loads(next(line for _, line in launch.lines if line.startswith('{"block"')))
    seconds, alone = printed["turns"], printed["alone"]
    rows, explained = [], 0.0
    for name, title, without in (
        ("mmd", "MMD, with the gather of the codes", "bare"),
        ("noise", "latent noise", "mmd"),
        ("sums", "sums over ranks, checks", "noise"),
    ):
        turns = zip(seconds[name], seconds[without], seconds["bare"], strict=True)
        shares = sorted((more - less) / bare for more, less, bare in turns)
        low, high = shares[len(shares) // 4], shares[3 * len(shares) // 4]
        explained += median(shares)
        milliseconds = 1000 * median(shares) * bare_seconds
        share = f"{median(shares):+.1%} ({low:+.1%} to {high:+.1%})"
        rows.append((title, f"{milliseconds:,.2f}", share, f"{1000 * alone[name]:,.2f}"))
    others = {"waiting for data": wait * whole, "log": alone["line"] / LOG_EVERY / bare_seconds}
    others["the rest"] = whole - 1 - explained - sum(others.values())
    rows += [
        (title, f"{1000 * share * bare_seconds:,.2f}", f"{share:+.1%}", "")
        for title, share in (*others.items(), ("all", whole - 1))
    ]
    text = SPLIT.format(
        block=printed["block"], rounds=rounds, line=1000 * alone["line"], every=LOG_EVERY
    )
    return text + table(("", "ms a step", "of the bare loop's step", "ms alone"), rows)


# The limit


def limit(bench: Bench) -> Section:
    rows, targets, kinds = [], [], {}
    for optimizer, wanted in SHARES.items():
        setting = f"optim.name={optimizer}"
        steps, shares, found = [], [], []
        for turn in range(bench.effort.turns):
            title = f"limit with {optimizer}, turn {turn + 1} of {bench.effort.turns}"
            launch = bench.launch(title, LIMIT_OF, str(bench.lengths), *bench.settings(setting))
            found.append(json.loads(next(line for _, line in launch.lines if line[0] == "{")))
            run = bench.train(
                title, setting, f"train.steps={bench.effort.steps}", f"log.every={LOG_EVERY}"
            )
            bench.forget_run()
            at, first, last = run.steps(), bench.effort.first, bench.effort.steps
            steps.append((at[last] - at[first]) / (last - first))
            least = sum(part["seconds"] for part in found[-1]["limit"].values())
            shares.append(least / steps[-1])
        for part, first in found[0]["limit"].items():
            own = [turn["limit"][part]["seconds"] for turn in found]
            rows.append(
                (
                    f"{optimizer}: {'the model' if part == 'model' else 'its own'}",
                    f"{first['flops'] / 1e9:,.2f}",
                    milliseconds(own),
                    f"{first['flops'] / median(own) / 1e9:,.0f}",
                    "",
                )
            )
        rows.append((f"{optimizer}: a step", "", milliseconds(steps), "", spread(shares, 2)))
        kinds[optimizer] = found[-1]["where"]
        what = f"{bench.place.title}, {optimizer}, {found[0]['precision']}: share of the limit"
        targets.append(Target(what, wanted, median(shares)))
    header = ("", "billion operations a rank", "ms", "billion a second", "share of the limit")
    text = LIMIT.format(place=bench.place.title, turns=bench.effort.turns) + table(header, rows)
    names = list(kinds)
    parts = [
        (kind, *(f"{1000 * kinds[name][kind]:,.1f}" for name in names)) for kind in kinds[names[0]]
    ]
    text += WHERE.format(steps=PROFILED) + table(("ms a step", *names), parts)
    return text, targets


# The start


def start(bench: Bench) -> Section:
    found: dict[str, list[tuple[float, ...]]] = {"the bare loop": [], "a run": [], "resumed": []}
    launchers = []
    for turn in range(bench.effort.starts):
        once = f"{turn + 1} of {bench.effort.starts}"
        launch = bench.bare(f"start of the bare loop, {once}", "bare", 1)
        created = next(line for _, line in launch.lines if line.startswith("created "))
        launchers.append(float(created.split()[1]) - launch.started)
        found["the bare loop"].append(stages(launch, launch.at("imported"), "built"))
        for side, steps in (("a run", 1), ("resumed", 2)):
            settings = (f"train.steps={steps}", "log.every=1")
            launch = bench.train(f"start, {side}, {once}", *settings)
            logs = bench.run_folder / "logs"  # made as soon as modules and shards are there
            found[side].append(stages(launch, logs.stat().st_mtime, r"[\d,]+ parameters"))
            shutil.rmtree(logs)
        bench.forget_run()
    limits = [stage[-1] for stage in found["the bare loop"]]
    rows = []
    for side, times in found.items():
        over = [stage[-1] / limit for stage, limit in zip(times, limits, strict=True)]
        ratio = "1" if side == "the bare loop" else spread(over, 2)
        rows.append((side, *(spread(list(stage), 1) for stage in zip(*times, strict=True)), ratio))
    header = ("", "launch, imports", "engine", "first step", "all", "over the bare loop")
    text = START.format(
        place=bench.place.title, turns=bench.effort.starts, launcher=median(launchers)
    )
    return text + table(header, rows), []


def stages(launch: Launch, imported: float, built: str) -> tuple[float, ...]:
    """Seconds until modules were there, the engine, the first step, and their sum."""
    ends = launch.started, imported, launch.at(built), launch.at("step ")
    return (*(after - before for before, after in pairwise(ends)), ends[-1] - ends[0])


# Saves


def saves(bench: Bench) -> Section:
    models, rows = [], []
    for model, settings in bench.place.saved.items():
        for way, asynchronous in (("synchronous", "false"), ("asynchronous", "true")):
            title = f"{model}, {way}"
            launch = bench.train(
                f"saves, {title}",
                *settings,
                f"train.steps={SAVE_EVERY * bench.effort.saves + SAVE_LOG_EVERY}",
                f"log.every={SAVE_LOG_EVERY}",
                f"checkpoint.every={SAVE_EVERY}",
                f"checkpoint.asynchronous={asynchronous}",
            )
            records = read_metrics(bench.run_folder)
            stalls = [r["checkpoint_stall"] for r in records if "checkpoint_stall" in r]
            committed = [r["checkpoint_seconds"] for r in records if "checkpoint_seconds" in r]
            newest = list_checkpoints(bench.run_folder / "checkpoints")[-1]
            sizes = [file["bytes"] for file in read_manifest(newest)["files"].values()]
            bench.forget_run()
            limits = [write_and_hash(sizes, bench.folder / "written") for _ in range(4)]
            rows.append(
                (
                    title,
                    milliseconds(limits),
                    milliseconds(stalls),
                    figure(median(stalls) / median(limits)),
                    milliseconds(committed),
                    figure(sum(sizes) / 1e6 / median(committed)),
                    f"{1000 * delay_of_a_save(launch):,.0f}",
                )
            )
        words = f"{model}, {trained_parameters(launch):,} parameters, {sum(sizes) / 1e6:,.1f} MB"
        models.append(
            f"{words} in {len(sizes)} files" + (f" ({' '.join(settings)})" * bool(settings))
        )
    text = SAVES.format(
        place=bench.place.title,
        save=SAVE_EVERY,
        saves=bench.effort.saves,
        models="; ".join(models),
        window=SAVE_LOG_EVERY,
    )
    header = ("", "limit, ms", "stall, ms", "over the limit", "committed, ms", "MB/s", "delay, ms")
    return text + table(header, rows), []


def milliseconds(seconds: list[float]) -> str:
    return spread([1000 * value for value in seconds], 1)


def delay_of_a_save(launch: Launch) -> float:
    """How much longer the windows of steps after a save took than those before one, at the median.

    A save comes after the line of its step, so every second window begins with one.
    """
    at = launch.steps()
    windows = {step: at[step] - at[step - SAVE_LOG_EVERY] for step in at if step > SAVE_EVERY}
    after = [took for step, took in windows.items() if step % SAVE_EVERY]
    before = [took for step, took in windows.items() if step % SAVE_EVERY == 0]
    return median(after) - median(before)


def write_and_hash(sizes: list[int], folder: Path) -> float:
    """Seconds to write files of those sizes and to take their sha256, all at once, with fsync."""
    content = memoryview(os.urandom(max(sizes)))
    folder.mkdir()

    def write(number: int) -> None:
        digest = hashlib.sha256()
        with open(folder / str(number), "wb") as file:
            for begin in range(0, sizes[number], PIECE):
                piece = content[begin : min(begin + PIECE, sizes[number])]
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(len(sizes)) as pool:
        begin = time.perf_counter()
        list(pool.map(write, range(len(sizes))))
        seconds = time.perf_counter() - begin
    shutil.rmtree(folder)
    return seconds


# Report


def main() -> None:
    parts = {"loop": loop, "limit": limit, "start": start, "saves": saves}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few turns, to see that all runs")
    parser.add_argument("--only", help=f"some of {','.join(parts)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, help="a folder for shards and runs; shards are kept")
    parser.add_argument("--write", action="store_true", help=f"save as {DOC.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.device != "cpu":
        del parts["limit"]
    names = args.only.split(",") if args.only else list(parts)
    if unknown := set(names) - set(parts):
        parser.error(f"--only {','.join(unknown)}: choose from {','.join(parts)}")
    if args.write and (args.quick or args.only or args.device != "cpu"):
        parser.error("--write saves whole runs on the CPU: leave out --quick, --only and --device")

    with ExitStack() as stack:
        folder = args.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = on_cuda() if args.device == "cuda" else on_cpu()
        bench = Bench(place, QUICK if args.quick else FULL, folder.resolve())
        prepare(bench)
        sections = [parts[name](bench) for name in names]

    versions = installed(sys.executable, ("torch", "transformers", "deepspeed"))
    head = HEAD.format(machine=machine(versions))
    publish(head, sections, DOC if args.write else None)


if __name__ == "__main__":
    main()
