"""Every place where a rank touches storage or a socket once ranks have met, and how it may fail."""

from dataclasses import dataclass
from pathlib import PurePosixPath

BOTH, FIRST, EITHER = (0, 1), (0,), (None,)


@dataclass(frozen=True)
class Fault:
    """How calls fail.

    Attributes:
        error: a name of errno, or "hang".
        times: how many of them; 0 for all.
    """

    error: str
    times: int = 0

    def __str__(self) -> str:
        return self.error + {0: "", 1: "-once", 2: "-twice"}[self.times]


EIO, ESTALE, ENOSPC, EACCES = Fault("EIO"), Fault("ESTALE"), Fault("ENOSPC"), Fault("EACCES")
ENOSYS, ENOTEMPTY, RESET = Fault("ENOSYS"), Fault("ENOTEMPTY"), Fault("ECONNRESET")
EIO_ONCE, STALE_TWICE, FULL_ONCE = Fault("EIO", 1), Fault("ESTALE", 2), Fault("ENOSPC", 1)
HANG = Fault("hang")

FAULTS = {
    "open": (STALE_TWICE, EIO, EACCES, HANG),
    "read": (EIO_ONCE, ESTALE, HANG),
    "write": (EIO_ONCE, EIO, ENOSPC, HANG),
    "sync": (EIO_ONCE, EIO, ENOSPC, HANG),
    "rename": (STALE_TWICE, EIO, EACCES, ENOSPC, HANG),
    "delete": (EIO_ONCE, EIO, EACCES, ENOTEMPTY, HANG),
    "mkdir": (EIO_ONCE, ESTALE, EACCES, ENOSPC, HANG),
    "list": (STALE_TWICE, EIO, EACCES, HANG),
    "stat": (STALE_TWICE, EIO, EACCES, HANG),
    "lock": (ENOSYS, EIO_ONCE, EIO, HANG),
    "truncate": (EIO_ONCE, EIO, ENOSPC, HANG),
    "connect": (RESET, HANG),
    "send": (RESET, HANG),
    "recv": (RESET, HANG),
}
"""What can happen to each kind of call."""


@dataclass(frozen=True)
class End:
    """How a run ends.

    Attributes:
        code: of all ranks; None where each may have found it, 1, or be done before it does, 0.
        says: what its line holds; of a run that ends well, what it is told to lack.
        lines: that say what went wrong, at most.
    """

    code: int | None
    says: str = ""
    lines: int = 1


GOES_ON = End(0)
SHORT = End(0, "lacks the last lines")
STORAGE = End(1, "storage fails")
MEND = End(2)
LOST = End(1, "rank {rank} of 2 on {host}")

NEEDED = {
    **dict.fromkeys((EIO_ONCE, STALE_TWICE, ENOSYS), GOES_ON),
    **dict.fromkeys((EIO, ESTALE), STORAGE),
    **dict.fromkeys((EACCES, ENOSPC), MEND),
    HANG: LOST,
}
"""What a run cannot do without: it waits for a while."""

UNSURE = NEEDED | {EACCES: GOES_ON}
"""What only says whether the dataset was replaced, which need not be told."""

KEPT = NEEDED | dict.fromkeys((EIO, ENOSPC), SHORT)
"""What waits in memory until it can be written."""

SPARED = {fault: GOES_ON for faults in FAULTS.values() for fault in faults} | {HANG: LOST}
"""What a run does without: old checkpoints that stay, texts that are not kept."""

PARTED = {RESET: End(1, lines=2), HANG: End(1, lines=2)}
"""What leaves ranks without a word of each other: each says what it knows."""

PEERS = {RESET: End(1), HANG: End(1)}
"""What only another start can mend."""

LEAVING = dict.fromkeys((RESET, HANG), End(None, lines=2))
"""What a rank hears from the store now and then, and says as it leaves, when all is saved."""


@dataclass(frozen=True)
class Place:
    """A file, or a kind of file, in a phase of a run (see `_ranks.py`).

    Attributes:
        phase: when it is touched.
        path: its end, as `PurePosixPath.match` takes it; `dataset` and `run` are the folders.
        operations: as faults.c calls them.
        ranks: that touch it; None where it is either, by chance.
        ends: how a run ends after each fault.
        after: calls that go through before.
        lasts: whether it is touched in later phases too, whenever there is something to say.
    """

    phase: str
    path: str
    operations: tuple[str, ...]
    ranks: tuple[int | None, ...]
    ends: dict[Fault, End]
    after: int = 0
    lasts: bool = False

    def holds(self, rank: int, phase: str, operation: str, path: str) -> bool:
        """Whether a call is made here."""
        ranks = rank in self.ranks or None in self.ranks
        when = self.lasts or phase == self.phase
        return (
            ranks and when and operation in self.operations and PurePosixPath(path).match(self.path)
        )


STEP = "step-????????"
NEW = ("open", "write", "rename")
READ = ("open", "read")
PLACES = (
    # The run's folder is claimed.
    Place("start", "run/.lock", READ, BOTH, NEEDED),
    Place("start", "run/.lock", ("lock", "truncate", "write", "sync"), FIRST, NEEDED),
    Place("start", "run/attempts.jsonl", READ, FIRST, NEEDED),
    Place("start", "run/attempts.jsonl.*.tmp", NEW, FIRST, NEEDED),
    Place("start", "run/checkpoints", ("mkdir",), FIRST, SPARED),  # which is there
    Place("start", "run/checkpoints", ("stat", "list"), FIRST, NEEDED),
    Place("start", f"checkpoints/{STEP}/manifest.json", READ, FIRST, NEEDED),
    # What follows from it.
    Place("start", "logs/rank-*.log", ("open",), BOTH, SPARED),
    Place("start", "logs/rank-*.log", ("write",), BOTH, SPARED, lasts=True),
    Place("start", "run/config.yaml.*.tmp", NEW, FIRST, NEEDED),
    Place("start", "dataset", ("stat",), BOTH, SPARED),  # for links, which none has
    Place("start", "dataset/blocks.npy", ("stat", *READ), BOTH, NEEDED),
    Place("start", "dataset/index.json", ("stat", *READ), BOTH, UNSURE),
    Place("start", "dataset/valid-*.tar", ("stat", *READ), BOTH, NEEDED),
    Place("start", "dataset/tokenizer", ("stat", "list"), BOTH, NEEDED),
    Place("start", "dataset/tokenizer/*", ("stat", *READ), BOTH, NEEDED),
    Place("start", "socket:store", ("send", "recv"), BOTH, PARTED),
    Place("start", "socket:peer", ("connect",), EITHER, PEERS),
    Place("start", "socket:peer", ("send", "recv"), BOTH, PEERS),
    # Resuming.
    Place("resume", "run/checkpoints", ("list",), FIRST, NEEDED),
    Place("resume", f"checkpoints/{STEP}/manifest.json", READ, FIRST, NEEDED),
    Place("resume", f"checkpoints/{STEP}/rank-*.safetensors", ("stat", *READ), BOTH, NEEDED),
    Place("resume", "run/metrics.jsonl", ("stat", *READ), FIRST, NEEDED),
    Place("resume", "run/metrics.jsonl.*.tmp", NEW, FIRST, NEEDED),
    Place("resume", "socket:peer", ("send", "recv"), BOTH, PEERS),
    # Steps.
    Place("step", "dataset/train-*.tar", ("stat", *READ), BOTH, NEEDED),
    Place("step", "run/metrics.jsonl", ("stat", "open", "write"), FIRST, KEPT),
    Place("step", "run/samples", ("stat", "mkdir"), FIRST, SPARED),
    Place("step", f"samples/{STEP}.json.*.tmp", NEW, FIRST, SPARED),
    Place("step", "run/.lock", ("truncate",), FIRST, SPARED | {HANG: GOES_ON}),
    Place("step", "socket:store", ("send", "recv"), BOTH, LEAVING),
    Place("step", "socket:peer", ("send", "recv"), BOTH, PEERS),
    # An evaluation.
    Place("evaluation", "socket:peer", ("send", "recv"), BOTH, PEERS),
    # A save.
    Place("save", f"checkpoints/{STEP}.tmp", ("mkdir", "stat"), FIRST, NEEDED),
    Place("save", f"checkpoints/{STEP}.tmp", ("open", "sync", "rename"), FIRST, NEEDED),
    Place("save", f"{STEP}.tmp/rank-*.safetensors", ("open", "write", "sync"), BOTH, NEEDED),
    Place("save", f"{STEP}.tmp/rank-*.safetensors", ("write",), BOTH, NEEDED, after=6),
    Place("save", f"{STEP}.tmp/manifest.json", ("open", "write", "sync"), FIRST, NEEDED),
    Place("save", "run/checkpoints", ("open", "sync"), FIRST, NEEDED),
    Place("save", "socket:peer", ("send", "recv"), BOTH, PEERS),
    # Old checkpoints are deleted.
    Place("save", "run/checkpoints", ("list",), FIRST, SPARED),
    Place("save", f"checkpoints/{STEP}", ("stat", "rename"), FIRST, SPARED),
    Place("save", f"checkpoints/{STEP}/manifest.json", READ, FIRST, SPARED),
    Place("save", f"checkpoints/{STEP}.deleted", ("stat", "open", "list", "delete"), FIRST, SPARED),
    Place("save", f"{STEP}.deleted/*", ("delete",), FIRST, SPARED),
)


@dataclass(frozen=True)
class Case:
    """One fault, in one place, on one rank."""

    place: Place
    operation: str
    fault: Fault
    rank: int | None

    @property
    def end(self) -> End:
        return self.place.ends[self.fault]

    def __str__(self) -> str:
        path = self.place.path.replace("?", "").replace("*", "").replace("/", "|")
        after = f"-after-{self.place.after}" if self.place.after else ""
        return f"{self.place.phase}:{self.operation}{after}:{path}:{self.fault}:rank-{self.rank}"

    def is_met_by(self, rank: int, phase: str, operation: str, path: str) -> bool:
        """Whether a call is one of those that fail."""
        alike = operation == self.operation and self.rank in (rank, None)
        return alike and self.place.holds(rank, phase, operation, path)

    def asked(self) -> dict:
        """As `_ranks.py` takes it."""
        return {
            "phase": self.place.phase,
            "rank": self.rank,
            "operation": self.operation,
            "path": self.place.path,
            "error": self.fault.error,
            "after": self.place.after,
            "times": self.fault.times,
        }


ALL_CASES = [
    Case(place, operation, fault, rank)
    for place in PLACES
    for operation in place.operations
    for fault in FAULTS[operation]
    for rank in place.ranks
]


def some_of_each() -> list[Case]:
    """One case of each phase, kind of call and way to end; places, faults and ranks take turns."""
    alike: dict[tuple[str, str, End], list[Case]] = {}
    for case in ALL_CASES:
        alike.setdefault((case.place.phase, case.operation, case.end), []).append(case)
    chosen = []
    for turn, group in enumerate(alike.values()):
        of_rank = [case for case in group if case.rank == turn % 2] or group
        chosen.append(of_rank[turn % len(of_rank)])
    return chosen
