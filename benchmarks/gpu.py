"""Is it right, fast and good on a GPU: everything, measured in nine minutes.

    python benchmarks/gpu.py --prepare           # shards and tokenizers, into --data
    python benchmarks/gpu.py                     # on one GPU; needs no network
    python benchmarks/gpu.py --only step,codes   # these sections again
    python benchmarks/gpu.py --smoke             # all of it at toy size, on a CPU

Sections share the minutes, start-up included, and what one leaves over the next ones have. Each
table is printed and written to --out as soon as it is there; a section that fails or runs out of
its time is told and passed over. OUT/gpu.md is the page of all sections that OUT has, also of
earlier calls.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any, NamedTuple

from _data import generated_lines, write_lines
from _launches import ON_CPU, build_shards
from _report import ROOT, Target, chosen, installed, machine, target_table

from t5vae.common.errors import UserError
from t5vae.common.files import write_whole

WORKER = Path(__file__).with_name("_gpu_worker.py")
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "liger_kernel")
GRACE = 5.0
"""Seconds that a section may take longer than it has before it is ended."""
TOY_SECONDS = 3600.0
"""At toy size it is a hang that ends a section."""


class Section(NamedTuple):
    title: str
    module: str
    seconds: float
    """Of nine minutes; what counts is the share."""


SECTIONS = {
    "errors": Section("MMD, value and gradient", "_gpu_correct", 30),
    "losses": Section("Epps-Pulley and the fused cross-entropy", "_gpu_correct", 20),
    "engines": Section("Engines", "_gpu_correct", 70),
    "resumed": Section("Killed and resumed", "_gpu_runs", 120),
    "products": Section("MMD beside two products", "_gpu_fast", 60),
    "step": Section("A training step of T5-base", "_gpu_step", 120),
    "codes": Section("Encoding and decoding", "_gpu_fast", 40),
    "gather": Section("A rank's share of MMD over 64 ranks", "_gpu_fast", 20),
    "quality": Section("A T5-small's space", "_gpu_quality", 180),
}
STAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "Correct": (("errors", "losses", "engines"), ("resumed",)),
    "Fast": (("products", "step", "codes", "gather"),),
    "Good": (("quality",),),
}
"""In this order; a stage's lanes run side by side, so nothing is timed where there are two."""
SMOKE = {
    "All": (
        ("errors", "losses", "products", "step", "codes", "gather", "quality", "engines"),
        ("resumed",),
    ),
}
"""At toy size nothing is timed, and what costs most is to import. After its engines of stage 3 a
process makes no others."""

HEAD = """\
# On a GPU

Printed by `python benchmarks/gpu.py` on {device}: {machine}

"""


class Worker:
    """A process that carries out sections; what it prints goes to a log."""

    def __init__(self, sections: tuple[str, ...], log: Path):
        modules = [f"{name}={SECTIONS[name].module}" for name in sections]
        self.answers: Queue[dict[str, Any]] = Queue()
        with open(log, "a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), *modules],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, lines: IO[str]) -> None:
        for line in lines:
            self.answers.put(json.loads(line))
        self.answers.put({"ended": "failed: its process ended"})

    def order(self, **order: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # that its process ended is told by its answers
            print(json.dumps(order), file=self.process.stdin, flush=True)

    def close(self) -> None:
        """End it, and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Board:
    """What has been found: printed as it comes, and kept in a folder."""

    def __init__(self, out: Path):
        self.out, self.lock = out, threading.Lock()
        self.machine, self.device = machine(installed(*PACKAGES)), ""
        self.failed: list[str] = []

    def put(self, name: str, part: list[Any]) -> None:
        title, text, targets = part
        with self.lock:
            found = self.read(name)
            found["parts"][title] = {"text": text, "targets": targets}
            self._write(name, found)

    def end(self, name: str, ended: str, seconds: float) -> None:
        with self.lock:
            found = self.read(name) | {"ended": ended, "seconds": seconds}
            self._write(name, found)
            print(f"{section_text(name, found)}\n{name}: {ended}, {seconds:.0f} s\n", flush=True)
            if ended.startswith("failed"):
                self.failed.append(name)

    def read(self, name: str) -> dict[str, Any]:
        path = self.out / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {"parts": {}}

    def forget(self, name: str) -> None:
        (self.out / f"{name}.json").unlink(missing_ok=True)

    def _write(self, name: str, found: dict[str, Any]) -> None:
        write_whole(self.out / f"{name}.json", json.dumps(found, indent=1))
        write_whole(self.out / "gpu.md", self.page())

    def page(self) -> str:
        targets, texts = [], []
        for stage, lanes in STAGES.items():
            texts.append(f"## {stage}\n")
            for name in (name for lane in lanes for name in lane):
                found = self.read(name)
                if not found["parts"] and "ended" not in found:
                    continue
                texts.append(section_text(name, found))
                for part in found["parts"].values():
                    targets += [Target(*target) for target in part["targets"]]
        head = HEAD.format(device=self.device, machine=self.machine)
        met = target_table(targets) if targets else ""
        return head + "\n".join((met, *filter(None, texts)))


def section_text(name: str, found: dict[str, Any]) -> str:
    ended = found.get("ended", "under way")
    told = "" if ended == "whole" else f"**{ended[0].upper()}{ended[1:]}.**\n"
    texts = (part["text"] for part in found["parts"].values())
    return "\n".join(filter(None, (f"### {SECTIONS[name].title}\n", told, *texts)))


class Call:
    """All stages; each one's workers are started while the one before is under way."""

    def __init__(self, data: Path, scratch: Path, smoke: bool, board: Board):
        self.order = {"data": str(data.resolve()), "out": str(board.out.resolve()), "smoke": smoke}
        self.scratch, self.board = scratch, board
        self.workers: list[Worker] = []
        self.over = False

    def run(self, only: list[str], end: float) -> None:
        """Carry out these sections until that time."""
        plan = SMOKE if self.order["smoke"] else STAGES
        chosen = [[tuple(n for n in lane if n in only) for lane in each] for each in plan.values()]
        stages = [kept for lanes in chosen if (kept := [lane for lane in lanes if lane])]
        try:
            ahead = self._start(stages[0])
            for number, lanes in enumerate(stages):
                workers = ahead
                ahead = self._start(stages[number + 1]) if stages[number + 1 :] else []
                longest = [max(map(needed, others)) for others in stages[number:]]
                stage_end = time.time() + share(end, longest)
                threads = [
                    threading.Thread(target=self._lane, args=(lane, worker, stage_end), daemon=True)
                    for lane, worker in zip(lanes, workers, strict=True)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            self.over = True
            for worker in self.workers:
                worker.close()

    def _start(self, lanes: list[tuple[str, ...]]) -> list[Worker]:
        workers = [Worker(lane, self.board.out / f"{'-'.join(lane)}.log") for lane in lanes]
        self.workers += workers
        return workers

    def _lane(self, lane: tuple[str, ...], worker: Worker, end: float) -> None:
        """Sections one after another; a worker of which one failed makes room for a new one."""
        for place, name in enumerate(lane):
            began = time.time()
            seconds = share(end, [SECTIONS[other].seconds for other in lane[place:]])
            self.board.forget(name)
            worker.order(name=name, seconds=seconds, scratch=str(self.scratch / name), **self.order)
            ended = self._listen(name, worker, began + seconds + GRACE)
            self.board.end(name, ended, time.time() - began)
            if ended != "whole":
                worker.close()
                if lane[place + 1 :] and not self.over:
                    (worker,) = self._start([lane[place + 1 :]])

    def _listen(self, name: str, worker: Worker, end: float) -> str:
        """Take a section's parts until it ends, or has to."""
        while True:
            try:
                answer = worker.answers.get(timeout=max(0.0, end - time.time()))
            except Empty:
                return "cut: its time was over"
            if "device" in answer:
                self.board.device = answer["device"]
            elif "part" in answer:
                self.board.put(name, answer["part"])
            else:
                return answer["ended"]


def needed(lane: tuple[str, ...]) -> float:
    return sum(SECTIONS[name].seconds for name in lane)


def share(end: float, seconds: list[float]) -> float:
    """The first one's seconds, where all together have until then."""
    return max(0.0, end - time.time()) * seconds[0] / sum(seconds)


def prepare(data: Path, smoke: bool) -> None:
    """Build the shards that the sections need, unless they are there."""
    source, form, pieces = None, "python", 4096
    data.mkdir(parents=True, exist_ok=True)
    if smoke:
        source, form, pieces = write_lines(data / "lines.txt", generated_lines(4000)), "text", 512
    for name, length in (("lines", 32), ("short-lines", 20)):
        build_shards(data / name, pieces, length, source, form)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="all of it, start-up included")
    parser.add_argument("--only", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--data", type=Path, help="of --prepare; default data/gpu")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="for the tables")
    parser.add_argument("--prepare", action="store_true", help="build what is needed, and end")
    parser.add_argument("--smoke", action="store_true", help="at toy size, on the CPU")
    args = parser.parse_args()
    args.only = chosen(parser, args.only, SECTIONS)
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes {args.minutes:g}: give more than 0")
    data = args.data or (args.out / "data" if args.smoke else ROOT / "data" / "gpu")
    there = (data / "short-lines" / "index.json").is_file()
    try:
        if args.prepare or (args.smoke and not there):
            prepare(data, args.smoke)
        elif not there:
            parser.error(f"nothing is prepared in {data}: use --prepare --data {data}")
        if args.prepare:
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        parser.error(str(error))
    if args.smoke:
        os.environ |= ON_CPU | {"TORCHDYNAMO_DISABLE": "1"}
    board = Board(args.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds = TOY_SECONDS if args.smoke else 60 * args.minutes - GRACE
    end = time.time() + seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        Call(data, Path(scratch), args.smoke, board).run(args.only, end)
    print(f"\n{args.out / 'gpu.md'}")
    if board.failed:
        print(f"failed: {', '.join(board.failed)}; see {args.out}/*.log", file=sys.stderr)
    return 1 if board.failed else 0


if __name__ == "__main__":
    sys.exit(main())
