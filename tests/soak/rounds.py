"""What a soak of kills does, drawn from its seed: rounds, each with a layout and a few kills."""

import random
from dataclasses import dataclass
from typing import Any

from tests.training._slow_saves import EVALUATION, POINTS, RANK_0_ALONE

BATCH = 24  # sequences of a step
EVERY = 6  # steps between checkpoints
LAUNCHERS = ("ranks", "slurm", "deepspeed", "torchrun", "slurm", "deepspeed")
WORLDS = {"slurm": (2, 3)}  # of others 1 too
VICTIMS = {
    "ranks": ("rank", "rank", "rank", "all ranks"),
    "slurm": ("host", "rank", "launcher", ("host", "all ranks")),
    "deepspeed": ("rank", "rank", "launcher", ("launcher", "all ranks")),
    "torchrun": ("rank", "rank", "launcher", ("launcher", "all ranks")),
}
MOMENTS = {
    "start": "starting",
    "step": "in a step",
    "save": "in a save",
    "evaluation": "in an evaluation",
}
STARTUP = {"ranks": 1.0}  # seconds; other launchers':
LONG_STARTUP = 8.0
BRAKED = 20  # steps that are done at most while a second start is refused


@dataclass(frozen=True)
class Kill:
    """Whom to kill, and when.

    Attributes:
        victim: a rank, all of them, a process of the launcher, a host.
        moment: a key of MOMENTS.
        rank: the victim.
        which: of launcher's processes or of hosts, as a share of them.
        point: of a save or of an evaluation, where a rank pauses.
        number: of that save or evaluation, since the start.
        pauses: the rank that pauses.
        steps: done since the start.
        seconds: that follow.
        back: seconds after which a host comes back, once SLURM takes it for lost.
        forks: the second start beside ranks without a launcher has none either, and is soon there.
    """

    victim: str
    moment: str
    rank: int
    which: float
    seconds: float
    point: str = ""
    number: int = 1
    pauses: int = 0
    steps: int = 0
    back: float = 0.0
    forks: bool = False

    @property
    def when(self) -> str:
        """For people."""
        return MOMENTS[self.moment] + (f" ({self.point})" if self.point else "")


@dataclass(frozen=True)
class Round:
    """A part of the run in one layout.

    Attributes:
        world: ranks; under SLURM, each is on a host of its own.
        is_killed: its last kill is followed by the next round, in another layout.
    """

    number: int
    launcher: str
    world: int
    zero_stage: int
    asynchronous: bool
    kills: tuple[Kill, ...]
    is_killed: bool

    @property
    def steps(self) -> int:
        """So many that each kill comes before the last one."""
        braked = sum(kill.victim == "launcher" for kill in self.kills)
        return EVERY * (4 * len(self.kills) + 2) + BRAKED * braked

    @property
    def most_lost(self) -> int:
        """Steps that a kill may cost."""
        return EVERY * (2 if self.asynchronous else 1)

    def settings(self, until: int) -> list[str]:
        """The overrides of its start."""
        return [
            f"train.steps={until}",
            f"deepspeed.zero_stage={self.zero_stage}",
            f"checkpoint.asynchronous={str(self.asynchronous).lower()}",
        ]

    def layout(self) -> dict[str, Any]:
        return {
            "launcher": self.launcher,
            "ranks": self.world,
            "hosts": self.world if self.launcher == "slurm" else 1,
            "zero_stage": self.zero_stage,
            "asynchronous": self.asynchronous,
        }


def draw_round(seed: int, number: int) -> Round:
    """A round of a soak; it has another number of ranks than the one before."""
    before = draw_round(seed, number - 1).world if number else 0
    chance = random.Random(f"{seed} {number}")
    launcher = LAUNCHERS[number % len(LAUNCHERS)]
    world = chance.choice([w for w in WORLDS.get(launcher, (1, 2, 3)) if w != before])
    kinds = [kind if isinstance(kind, str) else chance.choice(kind) for kind in VICTIMS[launcher]]
    moments = chance.sample(list(MOMENTS), len(kinds))
    return Round(
        number,
        launcher,
        world,
        zero_stage=chance.randrange(4),
        asynchronous=chance.random() < 0.5,
        kills=tuple(
            draw_kill(chance, launcher, world, victim, moment)
            for victim, moment in zip(kinds, moments, strict=True)
        ),
        is_killed=chance.random() < 0.4,
    )


def draw_kill(chance: random.Random, launcher: str, world: int, victim: str, moment: str) -> Kill:
    """A kill of some victim at some moment."""
    where: dict[str, Any] = {"pauses": chance.randrange(world), "back": chance.uniform(0, 10)}
    where["forks"] = launcher == "slurm" or chance.random() < 0.5
    most = 0.5
    if moment == "start":
        most = STARTUP.get(launcher, LONG_STARTUP)
    elif moment == "step":
        where["steps"], most = chance.randint(1, EVERY + 2), 0.05
    elif moment == "save":
        where["point"] = point = chance.choice(POINTS)
        where["number"] = 3 if point == "while the old one is deleted" else chance.randint(1, 2)
        if point in RANK_0_ALONE:
            where["pauses"] = 0
    else:
        where["point"], where["number"] = chance.choice(EVALUATION), chance.randint(1, 3)
    rank, which, seconds = chance.randrange(world), chance.random(), chance.uniform(0, most)
    return Kill(victim, moment, rank, which, seconds, **where)
