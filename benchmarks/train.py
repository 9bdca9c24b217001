"""Measure a whole training run beside its bare loop, and a step beside its limit, on a CPU.

    python benchmarks/train.py --quick --data DIR   # DIR keeps the shards
    python benchmarks/train.py --write

Runs, bare loops (`_bare_loop.py`) and limits (`_limit.py`) are started by the deepspeed launcher,
in turns. The lines that they print are timed where they arrive, here: one clock for all.
"""

import json
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from _launches import ON_CPU, QUICKSTART, Launch, build_shards
from _limit import PROFILED
from _report import ROOT, Block, Page, Target, installed, milliseconds, ratios, spread, table
from _timing import CPU

from t5vae.cluster.ranks import Ranks
from t5vae.config import load_config
from t5vae.metrics.reading import read_metrics
from t5vae.training.feed import open_feed
from t5vae.training.job import Job, resolve
from t5vae.training.precision import settle

RANKS = 2
REAL_BATCHES = 8
"""Real batches of a rank whose shapes and lengths the bare loop goes through."""
LOG_EVERY = 10
WANTED = 0.95
SHARES = {"muon": 0.6, "adamw": 0.7}
"""Of the limit that a step should reach, by its optimiser."""


class Effort(NamedTuple):
    """How much is measured."""

    turns: int
    steps: int
    rounds: int
    first: int = 10
    """Steps of a run that warm up."""


FULL, QUICK = Effort(turns=4, steps=60, rounds=20), Effort(turns=1, steps=20, rounds=2)


@dataclass(frozen=True)
class Bench:
    effort: Effort
    folder: Path

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    @property
    def lengths(self) -> Path:
        return self.folder / "lengths.json"

    def settings(self, *more: str) -> list[str]:
        every = (f"data.shards={self.folder / 'shards'}", f"run.output_dir={self.run_folder}")
        return [str(QUICKSTART), *every, "checkpoint.every=0", "eval.every=0", *more]

    def job(self, rank: int = 0) -> Job:
        path, *settings = self.settings()
        return resolve(load_config(path, settings), Ranks(rank, RANKS, rank, RANKS, "127.0.0.1", 0))

    def whole(self, title: str, *settings: str) -> Launch:
        more = (f"train.steps={self.effort.steps}", f"log.every={LOG_EVERY}", *settings)
        return Launch.of(title, RANKS, ON_CPU, ROOT / "train.py", *self.settings(*more))

    def beside(self, title: str, script: str, mode: tuple[str, ...], *settings: str) -> Launch:
        """A script of this folder, on batches like those of the run."""
        arguments = (*mode, str(self.lengths), *self.settings(f"log.every={LOG_EVERY}", *settings))
        return Launch.of(title, RANKS, ON_CPU, Path(__file__).with_name(script), *arguments)

    def step_seconds(self, launch: Launch) -> float:
        return launch.step_seconds(self.effort.first, self.effort.steps)

    def forget_run(self) -> None:
        shutil.rmtree(self.run_folder, ignore_errors=True)

    def prepare(self) -> None:
        """Build the shards unless they are there, and note the lengths of a few real batches."""
        build_shards(self.folder / "shards", 4096, 16)
        found = []
        for rank in range(RANKS):
            with open_feed(self.job(rank), CPU).stream as stream:
                batches = [next(stream) for _ in range(REAL_BATCHES)]
            found.append([{"T": b.ids.shape[1], "lengths": b.lengths.tolist()} for b in batches])
        self.lengths.write_text(json.dumps(found))
        self.forget_run()


# The loop


def loop(bench: Bench) -> Block:
    effort = bench.effort
    found: dict[str, list[float]] = {"the bare loop": [], "the whole loop": []}
    job = bench.job()
    config, _ = settle(job.config, job.settings, job.split, CPU, {})
    precision = f"train.precision={config.train.precision}"
    batch = config.data.global_batch_size
    waits, parameters = [], ""
    for turn in range(effort.turns):
        for side in list(found)[:: 1 if turn % 2 else -1]:
            title = f"{side}, turn {turn + 1} of {effort.turns}"
            if side == "the bare loop":
                mode = ("bare", str(effort.steps))
                launch = bench.beside(title, "_bare_loop.py", mode, precision)
            else:
                launch = bench.whole(title, precision)
                records = read_metrics(bench.run_folder)
                waits.append(mean(r["data_wait"] for r in records if r["step"] > effort.first))
                parameters = launch.line(" parameters, ").split(" parameters")[0]
                bench.forget_run()
            found[side].append(bench.step_seconds(launch))
    bare, whole = found.values()
    shares = ratios(bare, whole)
    rows = [
        (
            side,
            spread([batch / step for step in steps], 1),
            f"{1000 * median(steps):,.1f}",
            "1" if steps is bare else spread(shares, 3),
        )
        for side, steps in found.items()
    ]
    real = list(chain(*json.loads(bench.lengths.read_text())))
    text = (
        f"{parameters} parameters, {config.train.precision}, global batch {batch}, ZeRO stage "
        f"{config.deepspeed.zero_stage}, `optim.name={config.optim.name}`, "
        f"{mean(chain(*(each['lengths'] for each in real))):.1f} tokens a sequence, padded to "
        f"{' or '.join(map(str, sorted({each['T'] for each in real})))}; {effort.turns} turns.\n\n"
    )
    header = ("", "sequences a second", "ms a step", "over the bare loop")
    what = f"the CPU, {RANKS} ranks: the whole loop over the bare loop"
    parts = split(bench, median(bare), 1 / median(shares), mean(waits))
    targets = [Target(what, WANTED, median(shares))]
    return Block("loop", f"{text}{table(header, rows)}\n{parts}", targets)


def split(bench: Bench, bare_seconds: float, whole: float, wait: float) -> str:
    """What the whole loop has besides the bare one, in ms and as a share of the bare loop's step.

    Args:
        bare_seconds: a step of the bare loop.
        whole: a step of the whole loop over that.
        wait: share of the whole loop's time that waited for data.
    """
    rounds = bench.effort.rounds
    launch = bench.beside("parts of a step", "_bare_loop.py", ("parts", str(rounds)))
    bench.forget_run()
    printed = json.loads(launch.line('{"block"'))
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
        more = f"{1000 * median(shares) * bare_seconds:,.2f}"
        share = f"{median(shares):+.1%} ({low:+.1%} to {high:+.1%})"
        rows.append((title, more, share, f"{1000 * alone[name]:,.2f}"))
    others = {"waiting for data": wait * whole, "log": alone["line"] / LOG_EVERY / bare_seconds}
    others["the rest"] = whole - 1 - explained - sum(others.values())
    rows += [
        (title, f"{1000 * share * bare_seconds:,.2f}", f"{share:+.1%}", "")
        for title, share in (*others.items(), ("all", whole - 1))
    ]
    text = f"{rounds} turns; a line of metrics.jsonl took {1000 * alone['line']:.2f} ms.\n\n"
    return text + table(("", "ms a step", "of the bare loop's step", "ms alone"), rows)


# The limit


def limit(bench: Bench) -> Block:
    turns = bench.effort.turns
    rows, targets, kinds = [], [], {}
    for optimizer, wanted in SHARES.items():
        setting = f"optim.name={optimizer}"
        steps, found = [], []
        for turn in range(turns):
            title = f"limit with {optimizer}, turn {turn + 1} of {turns}"
            launch = bench.beside(title, "_limit.py", (), setting)
            found.append(json.loads(launch.line('{"limit"')))
            steps.append(bench.step_seconds(bench.whole(title, setting)))
            bench.forget_run()
        least = [sum(part["seconds"] for part in each["limit"].values()) for each in found]
        shares = ratios(least, steps)
        for part, first in found[0]["limit"].items():
            own = [each["limit"][part]["seconds"] for each in found]
            what = f"{optimizer}: {'the model' if part == 'model' else 'its own'}"
            operations = f"{first['flops'] / 1e9:,.2f}"
            rate = f"{first['flops'] / median(own) / 1e9:,.0f}"
            rows.append((what, operations, milliseconds(own), rate, ""))
        rows.append((f"{optimizer}: a step", "", milliseconds(steps), "", spread(shares, 2)))
        kinds[optimizer] = found[-1]["where"]
        what = f"the CPU, {optimizer}, {found[0]['precision']}: share of the limit"
        targets.append(Target(what, wanted, median(shares)))
    header = ("", "billion operations a rank", "ms", "billion a second", "share of the limit")
    parts = [
        (kind, *(f"{1000 * kinds[name][kind]:,.1f}" for name in kinds))
        for kind in next(iter(kinds.values()))
    ]
    text = (
        f"{turns} turns of {bench.effort.steps} steps:\n\n{table(header, rows)}\n"
        f"Where the time of a step goes, by torch's profiler on rank 0 over {PROFILED} steps, "
        f"which it slows:\n\n{table(('ms a step', *kinds), parts)}"
    )
    return Block("limit", text, targets)


def main() -> None:
    parts = {"loop": loop, "limit": limit}
    quick = "few turns, to see that all runs"
    page = Page(__doc__, "benchmarks/train.md", quick=quick, only=parts, apart=True)
    page.add_argument("--data", type=Path, help="a folder for shards and runs; shards are kept")
    args = page.options()
    with ExitStack() as stack:
        folder = args.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(QUICK if args.quick else FULL, folder.resolve())
        bench.prepare()
        blocks = [parts[name](bench) for name in args.only]
    page.publish(blocks, installed("torch", "transformers", "deepspeed"))


if __name__ == "__main__":
    main()
