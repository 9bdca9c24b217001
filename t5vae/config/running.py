"""The sections that say how a run goes: its data, steps, checkpoints, and what it tells."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from t5vae.common.errors import UserError
from t5vae.common.section import Interval, Line, Place, Section
from t5vae.common.seeds import FIRST_SEED, LAST_SEED

if TYPE_CHECKING:
    from shards import Dataset


class Run(Section):
    name: Line = ""
    """Name of the run; empty takes the configuration file's."""
    output_dir: Place = ""
    """The run's folder; empty means runs/NAME."""
    seed: int = Field(default=0, ge=FIRST_SEED, le=LAST_SEED)
    """Seeds weights, data order and noise."""

    @field_validator("name", "output_dir", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return "" if value is None else value


class Source(Section):
    """One dataset of a mixture."""

    path: Place
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is dealt.

    Attributes:
        sequences: of the global batch.
        ranks: that it is dealt to.
        micro: sequences of one rank in one forward pass.
        accumulation: micro batches of one rank in one step.
    """

    sequences: int
    ranks: int
    micro: int
    accumulation: int

    @property
    def parts(self) -> int:
        """Micro batches of all ranks in one step."""
        return self.ranks * self.accumulation


class Data(Section):
    shards: Annotated[
        Annotated[Place, Tag("path")]
        | Annotated[list[Source], Field(min_length=1), Tag("mixture")],
        Discriminator(lambda value: "mixture" if isinstance(value, list) else "path"),
    ]
    """Folder or URL of shards that `t5vae shards build` made; or a list of them, or of
    {path, weight}: the share of each among the sequences, relative to the others'."""
    global_batch_size: int = Field(default=256, ge=2)
    """Sequences in one optimiser step, over all ranks and micro batches."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences in one forward pass of one rank; null takes global_batch_size / ranks."""
    sort_by_length: bool = False
    """Deal each rank's rows of a global batch to its micro batches by length: less padding, and
    each micro step has its own lengths."""
    on_corrupt: Literal["error", "skip"] = "error"
    """What a damaged block does: stop the run, or count as rows of weight 0."""
    cache_dir: Place | None = None
    """Each node's folder for copies of remote shards; null takes T5VAE_CACHE or ~/.cache/t5vae."""
    cache_gib: float = Field(default=256, gt=0)
    """The most that folder may hold, in GiB."""
    _looked_for: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        """Of the shards, one or several."""
        if isinstance(self.shards, str):
            return [self.shards]
        return [source.path for source in self.shards]

    def open(self) -> "Dataset":
        """Open the shards.

        Raises:
            UserError: where there are none, or several that do not go together.
        """
        from shards import Cache, open_dataset

        limit = round(self.cache_gib * 2**30)
        cache = Cache(Path(self.cache_dir), limit) if self.cache_dir else Cache(limit_bytes=limit)
        place = self.shards
        try:
            if isinstance(place, str):
                return open_dataset(place, cache)
            return open_dataset([source.model_dump() for source in place], cache)
        except UserError as error:
            if not self._looked_for:
                raise
            raise UserError(f"{error}; looked for at {' and '.join(self._looked_for)}") from None

    def split(self, ranks: int) -> BatchSplit:
        """How the global batch is dealt to ranks.

        Raises:
            UserError: where it cannot be dealt evenly; the line says what can.
        """
        nearest, *others = self.fitting(ranks)
        if self.is_dealt(nearest):
            return nearest
        batch, micro = self.global_batch_size, self.micro_batch_size
        told = f" in micro batches of {micro}" if micro else ""
        ways = ", or ".join(self.typed(split) for split in (nearest, *others))
        raise UserError(
            f"data.global_batch_size {batch} cannot be dealt to {ranks} ranks{told}; use {ways}"
        )

    def fitting(self, ranks: int) -> list[BatchSplit]:
        """Batches that can be dealt to ranks, from the nearest on; the first is ours if it can be.

        One keeps the global batch where ranks divide it, with a smaller micro batch if it must;
        others keep the micro batch, unless a rank's share of ours is less than that.
        """
        batch, micro = self.global_batch_size, self.micro_batch_size
        share, rest = divmod(batch, ranks)
        unit = micro or 1
        shares = {share // unit * unit, share // unit * unit + unit}
        if not rest or share < unit:
            shares.add(max(1, share))
        found = []
        for own in shares - {0}:
            rows = next(rows for rows in range(min(micro or own, own), 0, -1) if own % rows == 0)
            found.append(BatchSplit(own * ranks, ranks, rows, own // rows))
        return sorted(found, key=lambda split: (abs(split.sequences - batch), split.sequences))

    def is_dealt(self, split: BatchSplit) -> bool:
        """Whether a batch is the one that is configured."""
        return (split.sequences, self.micro_batch_size or split.micro) == (
            self.global_batch_size,
            split.micro,
        )

    def typed(self, split: BatchSplit) -> str:
        """What of these settings a batch needs otherwise, as it is typed."""
        keys = {"data.global_batch_size": (self.global_batch_size, split.sequences)}
        if self.micro_batch_size:
            keys["data.micro_batch_size"] = (self.micro_batch_size, split.micro)
        return " ".join(f"{key}={new}" for key, (old, new) in keys.items() if new != old)


class Train(Section):
    steps: int = Field(default=10_000, ge=1)
    """Optimiser steps of the whole run."""
    minutes: float | None = Field(default=None, gt=0)
    """In place of steps: so many as are done in these minutes, from the start of the process on,
    evaluations and saves included; fixed before the first one, by a trial of a few."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Of weights and activations; bf16 and fp16 keep fp32 weights for the optimiser, and fp32
    multiplies in TF32 on CUDA. null: bf16 where the model's products are 1.2 times as fast in it on
    the slowest rank, timed at the start, else fp32; a run that goes on keeps its own."""
    max_bad_steps: int = Field(default=10, ge=0)
    """Steps in a row that are skipped (a loss or gradient is not finite) or spike, before the run
    stops; 0 never stops it."""
    spike: float = Field(default=5.0, ge=0)
    """A cross-entropy or gradient norm this many times its running mean is a spike; 0 for none."""
    timeout: int = Field(default=600, ge=1)
    """Seconds after which a rank that waits for others gives up, and the run ends."""
    deterministic: bool = False
    """Only algorithms that sum in the same order every time: a run that is resumed, or repeated,
    then gives the same bits on an accelerator too, somewhat slower."""
    profile: tuple[int, int] | None = None
    """First and last step, from 1, of a profile: [10, 12]; null for none."""

    @property
    def half(self) -> bool:
        """Whether weights and activations have 16 bits."""
        return self.precision in ("bf16", "fp16")


class DeepSpeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is dealt to the ranks: 0 nothing, 1 the optimiser's state, 2 the gradients too, 3 the
    weights too."""
    offload_optimizer: bool = False
    """Keep the optimiser's state and the fp32 weights in host memory, and update there; not for
    stage 0."""
    offload_parameters: bool = False
    """Keep the weights in host memory too; stage 3."""
    config: (
        Annotated[
            Annotated[Place, Tag("file")] | Annotated[dict[str, Any], Tag("settings")],
            Discriminator(lambda value: "settings" if isinstance(value, dict) else "file"),
        ]
        | None
    ) = None
    """A DeepSpeed configuration, or its JSON file, merged under ours; conflicts are refused."""


class Checkpoint(Section):
    every: Interval = 1000
    """Steps between checkpoints; one is always saved at the end. 0 for none in between."""
    keep_last: int = Field(default=3, ge=1)
    """So many of the newest are kept."""
    keep_every: Interval = 0
    """Also keep those of steps that this divides; 0 for none."""
    keep_best: bool = True
    """Also keep the one with the lowest held-out loss, where eval.every measures it."""
    asynchronous: bool = False
    """Copy the state, and write it while training goes on. A crash meanwhile goes back to the
    checkpoint before; the copy needs host memory."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a save that fails, as on a full disk, does to the run; the last one always stops it."""
    resume: Literal["auto", "never", "weights"] = "auto"
    """auto goes on from the newest valid checkpoint; never refuses a folder that holds any;
    weights starts a new run, from the weights of `source` alone."""
    source: Place | None = None
    """For resume weights: a run or one of its checkpoints; null sets this folder's own run aside
    and starts from its newest checkpoint."""


class Eval(Section):
    every: Interval = 0
    """Steps between evaluations during training, which precede each due checkpoint and the last
    one too; 0 for none."""
    sequences: int = Field(default=1000, ge=2)
    """Held-out sequences to evaluate."""
    decoded: int = Field(default=64, ge=1)
    """Of these, how many are decoded in an evaluation during training; as many samples are drawn,
    and as many texts made on paths."""
    samples: int | None = Field(default=None, ge=1)
    """Draws from each prior in `t5vae eval`; null for 10,000 on an accelerator, else 2,000."""
    interpolations: int = Field(default=100, ge=1)
    """Paths between held-out sequences in `t5vae eval`."""
    check: str | None = None
    """What makes a decoded text valid: python, json, smiles, regex:..., or a dotted path."""
    measure: str = "length"
    """What the linear probe of `t5vae eval` predicts and its map shows: length, calls, names, logp,
    qed, or a dotted path."""


class Log(Section):
    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases: online with a key, offline without."""
    tensorboard: bool = False
    """Write TensorBoard's event files too."""
