"""A soak: one run, killed again and again, that must end as if it never was.

    python -m tests.soak.kills --kills 100 FOLDER
    python -m tests.soak.kills --summary FOLDER

Ranks, launchers and hosts of the test cluster (tests/cluster; as root) are killed at random
moments, and each round of a few kills goes on with another number of ranks. A golden copy of the
run goes through each round undisturbed. At the end of a round metrics, files of checkpoints and
sequences are compared with its, bit for bit, and the sequences of the whole run with the order of
the dataset.

FOLDER/kills.jsonl gets the seed, a line for each kill once the run has gone on after it, and one
for each round. The same command on the same folder goes on. The first expectation that is not met
ends it with code 1, and all is left as it is.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import shards
from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import read_manifest, verify
from t5vae.metrics.reading import read_metrics
from tests.cluster import cluster
from tests.launching import (
    exact_metrics,
    free_port,
    lines_written,
    rank_starter,
    run_of,
    small_config,
    steps_saved,
)
from tests.soak.launchers import (
    MARK,
    ORPHANED,
    Attempt,
    Forked,
    Job,
    Local,
    Slurm,
    bring_back,
    die,
    kill_all,
    name_of,
)
from tests.soak.reads import Reads, is_cut_short, last_read, last_step, lines, served
from tests.soak.rounds import BATCH, EVERY, MOMENTS, Kill, Round, draw_round
from tests.soak.summary import summary

SEQUENCES = 400  # of the dataset, those held out included


class UnmetError(Exception):
    """The run is not as it must be."""


def expect(holds: object, what: str) -> None:
    if not holds:
        raise UnmetError(what)


class Soak:
    """A run in a folder, and what was done to it.

    Args:
        fork: starts ranks by themselves.
    """

    def __init__(self, folder: Path, fork: Callable[..., Any]):
        self.folder, self.fork = folder, fork
        self.log = folder / "kills.jsonl"
        self.dataset = folder / "dataset"
        self.brake = folder / "brake"
        self.brake.unlink(missing_ok=True)
        if not self.log.exists():
            self.prepare()
        os.truncate(self.log, self.log.read_bytes().rfind(b"\n") + 1)  # a line cut short
        self.config = folder / "small.yaml"
        self.run = run_of(self.config)
        self.seed = lines(self.log)[0]["seed"]
        expect("why" not in lines(self.log)[-1], f"{self.log} ends with a failure: look into it")
        self.pending: list[dict[str, Any]] = []
        self.slurm: Slurm | None = None
        self.back: Timer | None = None  # a host's

    def prepare(self) -> None:
        """Make the dataset and the configuration, and draw a seed."""
        texts = [f"v{i} = f{i % 7}({i * i})" for i in range(SEQUENCES)]
        (self.folder / "lines.txt").write_text("\n".join(texts) + "\n")
        options = {"max_length": 16, "valid_fraction": 0.1, "block_size": 32}
        shutil.rmtree(self.dataset, ignore_errors=True)
        shards.build(self.folder / "lines.txt", self.dataset, tokenizer="train:300", **options)
        small_config(
            self.folder,
            self.dataset,
            data={"shards": str(self.dataset), "global_batch_size": BATCH},
            optim={"name": "adamw", "schedule": "constant"},
            train={"timeout": 120},
            checkpoint={"every": EVERY, "keep_last": 2, "keep_best": False},
            eval={"every": 10, "sequences": 16, "decoded": 2},
            launcher={"max_restarts": 1000},
        )
        self.write(seed=random.SystemRandom().getrandbits(32), steps_between_saves=EVERY)

    def write(self, **line: Any) -> None:
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def kills(self, **of: Any) -> list[dict[str, Any]]:
        """Those done, of one round or of all."""
        done = [line for line in lines(self.log) if "kill" in line]
        return [line for line in done if all(line[key] == value for key, value in of.items())]

    def soak(self, kills: int) -> None:
        """Go through rounds until there were so many kills."""
        number = sum("until" in line for line in lines(self.log))
        while len(self.kills()) < kills:
            self.go_through(draw_round(self.seed, number))
            number += 1
        if self.pending:  # of a last round that ended by a kill
            self.go_through(draw_round(self.seed, number), most=0)

    def go_through(self, round: Round, most: int | None = None) -> None:
        """A round; `most` kills of it at most."""
        folder = self.folder / f"rounds/{round.number:03}"
        plan = self.plan(round, folder)
        start, until = plan["start"], plan["start"] + round.steps
        done = len(self.kills(round=round.number)) + sum(
            kill["round"] == round.number for kill in self.pending
        )
        for number, kill in enumerate(round.kills[:most]):
            if number >= done and not self.is_done(until):
                self.kill(round, until, folder, kill)
        is_killed = round.is_killed and most is None and not self.is_done(until)
        if not is_killed:
            attempt = self.start(round, until, folder)
            code = attempt.end()
            self.resolve(attempt)
            expect(code in (0, "COMPLETED", [0] * round.world), f"ends with {code}")
            expect(not self.pending, f"nothing is known of {self.pending}")
            expect(last_step(self.run) == until, f"ends after step {last_step(self.run)}")
        elif self.slurm and self.slurm.job:
            Job(self.slurm, self.slurm.job, round.world, folder, folder).kill()
        found = self.compare(round, folder, start)
        self.write(
            round=round.number,
            **round.layout(),
            start=start,
            until=last_step(self.run),
            ended_by="a kill" if is_killed else "its last step",
            seconds=round_to(time.time() - plan["time"]),
            **found,
            verdict="bit-equal",
        )
        shutil.rmtree(folder / "golden")

    def is_done(self, until: int) -> bool:
        """Whether a run was faster than a kill."""
        return until in steps_saved(self.run)

    def plan(self, round: Round, folder: Path) -> dict[str, Any]:
        """Where a round starts; a copy of the run has gone through it undisturbed."""
        written = folder / "plan.json"
        if not written.exists():
            shutil.rmtree(folder, ignore_errors=True)
            golden = folder / "golden"
            (golden / "reads").mkdir(parents=True)
            if self.run.exists():
                shutil.copytree(self.run, golden / "run")
            start = max(steps_saved(self.run), default=0)
            plan = {"start": start, "time": time.time()}
            settings = [*round.settings(start + round.steps), "checkpoint.keep_last=1000"]
            settings.append(f"run.output_dir={golden}/run")
            ranks = self.fork(round.world, self.config, *settings, record=str(golden / "reads"))
            expect(ranks.end() == [0] * round.world, f"the golden run fails: {ranks.output()}")
            written.write_text(json.dumps(plan))
        return json.loads(written.read_text())

    def start(
        self,
        round: Round,
        until: int,
        folder: Path,
        launcher: str = "",
        port: int = 0,
        **asked: Any,
    ) -> Attempt:
        """The next attempt of a round, or a second start beside it."""
        launcher = launcher or round.launcher
        own = folder / f"attempt-{len(list(folder.glob('attempt-*'))):03}"
        own.mkdir()
        asked |= {"record": str(own), "brake": str(self.brake)}
        world, settings = round.world, round.settings(until)
        if launcher == "ranks":
            return Forked(self.fork(world, self.config, *settings, **asked), world, own)
        if launcher == "slurm":
            self.slurm = self.slurm or Slurm(self.folder)
            return self.slurm.start(world, own, asked, self.config, *settings)
        return Local(launcher, port or free_port(), world, own, asked, self.config, *settings)

    # Kills.

    def kill(self, round: Round, until: int, folder: Path, kill: Kill) -> None:
        """Start the run, kill what is to be killed, and wait until nothing is left of it."""
        marker = folder / "paused"
        marker.unlink(missing_ok=True)
        port = free_port()
        pause = {"point": kill.point, "save": kill.number, "rank": kill.pauses}
        asked = {"pause": {**pause, "marker": str(marker)}} if kill.point else {}
        if kill.moment == "start":
            self.brake.touch()  # or it would be done before it is killed
        attempt = self.start(round, until, folder, port=port, **asked)
        self.reach(attempt, kill, marker)
        self.resolve(attempt)
        late = kill.moment == "start" and attempt.first  # it has begun meanwhile
        moment = MOMENTS["step"] if late else kill.when
        line = {"round": round.number, **round.layout(), "victim": kill.victim, "moment": moment}
        if kill.victim == "launcher":
            self.brake.touch()
        began = time.time()
        line["killed"] = self.execute(attempt, kill)
        marker.unlink(missing_ok=True)  # the rank that pauses goes on
        if kill.victim == "launcher":
            line["second_start"] = self.start_again(round, until, folder, attempt, port, kill.forks)
            self.brake.unlink()
        else:
            self.brake.unlink(missing_ok=True)
            attempt.wait_for_ranks()
            line["seconds"] = round_to(time.time() - began)
        line["ended"] = attempt.end()
        if self.back:
            self.back.join()
        if round.launcher == "ranks":
            self.expect_alike(round, kill, line["ended"])
        self.resolve(attempt)
        begun = attempt.first is not None
        line["step"] = last_step(self.run) if begun else max(steps_saved(self.run), default=0)
        line["time"], line["most"] = round_to(began), round.most_lost
        self.pending.append(line)
        expect("damaged" not in attempt.output(), "a checkpoint is called damaged")
        self.check_files()

    def reach(self, attempt: Attempt, kill: Kill, marker: Path) -> None:
        """Wait for the moment of a kill."""
        if kill.moment == "start":
            there = {
                "rank": lambda: kill.rank in attempt.ranks(),
                "all ranks": lambda: len(attempt.ranks()) == attempt.world,
                "launcher": lambda: attempt.launchers(),
                "host": lambda: attempt.launchers(),
            }
            attempt.wait(there[kill.victim], 0.1)
        elif kill.moment == "step":
            attempt.wait(lambda: attempt.first and attempt.last >= attempt.first + kill.steps)
        else:
            attempt.wait(marker.exists)
        time.sleep(kill.seconds)

    def execute(self, attempt: Attempt, kill: Kill) -> str:
        """Kill; whom."""
        if kill.victim == "host":
            hosts = attempt.hosts()
            host = hosts[int(kill.which * len(hosts))]
            cluster.kill_node(host)
            self.back = Timer(kill.back, bring_back, [host])
            self.back.start()
            return host
        if kill.victim == "launcher":
            processes = attempt.launchers()
            process = processes[int(kill.which * len(processes))]
            name = name_of(process)
            die(process)
            return name
        ranks = attempt.ranks()
        chosen = sorted(ranks) if kill.victim == "all ranks" else [kill.rank]
        for rank in chosen:
            expect(rank in ranks, f"rank {rank} has ended by itself:\n{attempt.output()}")
            die(ranks[rank])
        return f"rank {', '.join(map(str, chosen))}"

    def start_again(
        self, round: Round, until: int, folder: Path, first: Attempt, port: int, forks: bool
    ) -> str:
        """Start the run a second time while ranks without their launcher may live: what it says.

        It trains only where they have ended. Then all of it is killed.
        """
        told = "not tried: no rank was left"
        if first.ranks():
            second = self.start(round, until, folder, "ranks" if forks else "", port)
            while second.is_alive() and second.first is None:
                time.sleep(0.05)
            if second.first is not None:
                before = first.reads()
                time.sleep(3)  # a step takes one, with the brake
                expect(first.reads() == before, "a second start trains beside the first one")
                told = "trained: the ranks had ended"
            else:
                code = second.end()
                errors = {line for line in second.output().splitlines() if "error: " in line}
                told = f"refused ({code}): {' / '.join(sorted(errors))}"
                expect(len(errors) == 1, f"a second start says\n{second.output()}")
            second.kill()
        deadline = time.monotonic() + (ORPHANED if isinstance(first, Job) else 2)
        while (first.is_alive() or first.ranks()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if first.is_alive() or first.ranks():
            left = f"{len(first.ranks())} ranks" if first.ranks() else "what started them"
            told += f"; {left} did not end and had to be killed"
            first.kill()
        return told

    def expect_alike(self, round: Round, kill: Kill, codes: list[int]) -> None:
        """Once ranks have met, those that were not killed end with the same code."""
        left = [code for rank, code in enumerate(codes) if rank != kill.rank]
        if kill.victim == "rank" and kill.moment != "start":
            expect(set(left) <= {1}, f"the ranks end with {codes}")

    # What must hold.

    def resolve(self, attempt: Attempt) -> None:
        """Where a run has gone on after kills before; write them down."""
        if not self.pending:
            return
        if (first := attempt.first) is not None:
            resumed = first - 1
        elif "already trained" in attempt.output():
            resumed = last_step(self.run)
        else:
            return
        for number, line in enumerate(self.pending, len(self.kills()) + 1):
            lost = line["step"] - resumed
            held = 0 <= lost <= line["most"]
            verdict = "goes on" if held else "LOST"
            self.write(kill=number, **line, resumed=resumed, lost=lost, verdict=verdict)
            expect(held, f"kill {number}, at step {line['step']}, goes on after step {resumed}")
        self.pending = []

    def check_files(self) -> None:
        """Checkpoints are whole, and each step has one line of metrics."""
        for left in retention.list_checkpoints(self.run / "checkpoints"):
            problem = verify(left)
            expect(problem is None, f"{left}: {problem}")
        steps = [line["step"] for line in read_metrics(self.run)] if lines_written(self.run) else []
        expect(steps == list(range(1, len(steps) + 1)), f"metrics.jsonl has steps {steps}")

    def compare(self, round: Round, folder: Path, start: int) -> dict[str, int]:
        """Compare a round with the golden one, and all that was read with the dataset's order.

        Returns:
            How many sequences of the whole run are lost, and how many repeated.
        """
        self.check_files()
        golden, until = folder / "golden/run", last_step(self.run)
        pairs = zip(exact_metrics(self.run), exact_metrics(golden), strict=False)
        for number, (own, wanted) in enumerate(pairs, 1):
            expect(own == wanted or is_cut_short(own, wanted), f"step {number}: {own} {wanted}")
        for step in steps_saved(self.run):
            name = f"checkpoints/step-{step:08d}"
            if step > start and (golden / name).exists():
                own, wanted = (read_manifest(run / name)["files"] for run in (self.run, golden))
                expect(own == wanted, f"the checkpoint of step {step} differs")
        wanted = served([Reads(round.world, golden.parent / "reads")])
        # Ranks whose launcher was killed may train after a start that came later.
        attempts = sorted((self.folder / "rounds").glob("*/attempt-*"), key=last_read)
        read = served([Reads(3, own) for own in attempts])
        for step in range(start + 1, until + 1):
            expect(read.get(step) == wanted[step], f"step {step} read {read.get(step)}")
        order = iter(
            shards.ShardStream(
                str(self.dataset), seed=0, global_batch_size=BATCH, micro_batch_size=1
            )
        )
        lost, repeated = 0, 0
        for step in range(1, until + 1):
            due = Counter(int(next(order).sequence[0]) for _ in range(BATCH))
            found = Counter(each for part in read.get(step, {}).values() for each in part)
            lost, repeated = lost + (due - found).total(), repeated + (found - due).total()
        expect(lost == repeated == 0, f"{lost} sequences are lost, {repeated} repeated")
        return {"sequences_lost": lost, "sequences_repeated": repeated}


def round_to(seconds: float) -> float:
    return round(seconds, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--summary", action="store_true", help="show what was done so far")
    chosen = parser.parse_args()
    folder = chosen.folder.absolute()
    if chosen.summary:
        print(summary(folder))
        return 0
    kill_all(folder)
    shutil.rmtree(folder / "ranks", ignore_errors=True)
    (folder / "ranks").mkdir(parents=True)
    try:
        with rank_starter(folder / "ranks", **{MARK: f"{folder}/ranks/"}) as fork:
            soak = Soak(folder, fork)
            try:
                soak.soak(chosen.kills)
            except (UnmetError, AssertionError) as error:
                soak.write(verdict="failed", why=str(error))
                raise
    except (UnmetError, AssertionError, cluster.RefusalError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if soak.slurm and not soak.slurm.was_up:
        cluster.down()
    print(summary(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
