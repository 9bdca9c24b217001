"""What a build is asked for, and how its answer is told from another's."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from shards.read.orders import CHUNK
from shards.write.spool import ALL, Span, bound
from t5vae.common.errors import UserError

Overflow = Literal["drop", "truncate", "split"]
BadRows = Literal["error", "skip"]
MOST_PARTS = 10_000


@dataclass(frozen=True)
class Options:
    max_length: int
    valid_fraction: float
    overflow: Overflow
    dedupe: bool
    seed: int
    block_size: int | None
    shard_size: int

    def check(self) -> None:
        if not 2 <= self.max_length < 2**16:
            raise UserError(
                f"max_length {self.max_length}: choose 2 to 65,535 tokens, the end token counted"
            )
        if not 0 <= self.valid_fraction < 1:
            raise UserError(
                f"valid_fraction {self.valid_fraction}: choose a share from 0 to below 1"
            )
        if self.overflow not in get_args(Overflow):
            raise UserError(f"overflow {self.overflow!r}: choose drop, truncate or split")
        if self.block_size is not None and (self.block_size < 1 or self.block_size % CHUNK):
            raise UserError(f"block_size {self.block_size}: choose a multiple of {CHUNK}")


@dataclass(frozen=True)
class Part:
    """One of several parts of a build: a range of the keys, so of the order of the sequences."""

    number: int  # from 1 on
    of: int

    def __str__(self) -> str:
        return f"{self.number}-of-{self.of}"

    @property
    def span(self) -> Span:
        """The keys of its texts."""
        return bound(ALL, self.number - 1, self.of), bound(ALL, self.number, self.of)

    def check(self) -> None:
        if not 1 <= self.number <= self.of <= MOST_PARTS:
            raise UserError(
                f"part {self.number}/{self.of}: choose K/N, K from 1 to N, N up to {MOST_PARTS:,}"
            )


def difference(before: dict[str, Any], here: dict[str, Any]) -> str | None:
    """What tells a recipe from the one of an earlier build, in words; None where nothing does."""
    before, here = ({"bad_rows": "error"} | each for each in (before, here))
    for name, value in here.items():
        if before.get(name) != value:
            if name in ("files", "bytes", "input", "sha256"):
                return "another input"
            return f"{name} {before.get(name)}, not {value}"
    return None
