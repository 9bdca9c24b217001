"""Every section of a configuration, with its keys, their ranges, and what goes with what."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from shards.errors import UserError
from shards.records import write_whole

if TYPE_CHECKING:
    from shards import Dataset

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Interval = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Run(Section):
    name: str = ""
    """Name of the run; empty takes the configuration file's."""
    output_dir: str = ""
    """The run's folder; empty means runs/NAME."""
    seed: int = 0
    """Seeds weights, data order and noise."""


class Source(Section):
    """One dataset of a mixture."""

    path: str
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Data(Section):
    shards: Annotated[
        Annotated[str, Tag("path")] | Annotated[list[Source], Field(min_length=1), Tag("mixture")],
        Discriminator(lambda value: "mixture" if isinstance(value, list) else "path"),
    ]
    """Folder or URL of shards that `t5vae shards build` made; or a list of them, or of
    {path, weight}: the share of each among the sequences, relative to the others'."""
    global_batch_size: int = Field(default=256, ge=2)
    """Sequences in one optimiser step, over all ranks and micro batches."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences in one forward pass of one rank; null takes global_batch_size / ranks."""
    sort_by_length: bool = False
    """Deal the rows of each global batch to ranks and micro batches by length: less padding, but
    every rank reads every block, and with accumulation each micro step has its own lengths."""
    on_corrupt: Literal["error", "skip"] = "error"
    """What a damaged block does: stop the run, or count as rows of weight 0."""
    cache_dir: str | None = None
    """Each node's folder for copies of remote shards; null takes T5VAE_CACHE or ~/.cache/t5vae."""
    cache_gib: float = Field(default=256, gt=0)
    """The most that folder may hold."""

    def open(self) -> "Dataset":
        """Open the shards.

        Raises:
            UserError: where there are none, or several that do not go together.
        """
        from shards import Cache, open_dataset

        limit = round(self.cache_gib * 2**30)
        cache = Cache(Path(self.cache_dir), limit) if self.cache_dir else Cache(limit_bytes=limit)
        if isinstance(self.shards, str):
            return open_dataset(self.shards, cache)
        return open_dataset([source.model_dump() for source in self.shards], cache)


class T5(Section):
    """The T5 inside, in transformers' names; null takes `model.base`'s, or T5-small's without."""

    d_model: int | None = Field(default=None, ge=1)
    d_kv: int | None = Field(default=None, ge=1)
    d_ff: int | None = Field(default=None, ge=1)
    num_layers: int | None = Field(default=None, ge=1)
    num_decoder_layers: int | None = Field(default=None, ge=1)
    """Null takes num_layers, or the base's."""
    num_heads: int | None = Field(default=None, ge=1)
    feed_forward_proj: Literal["relu", "gated-gelu", "gated-silu"] | None = None
    dropout_rate: Fraction | None = None
    """Null takes the base's, or 0 without."""


class Model(Section):
    base: str | None = None
    """A pretrained T5, T5 v1.1, Flan-T5, ByT5, mT5 or UMT5 to start from: a folder, or a Hugging
    Face name. Its tokenizer must be the shards'. Null for random weights."""
    t5: T5 = T5()
    vocab_size: int | None = Field(default=None, ge=4)
    """Null takes the shards' tokenizer's."""
    sequence_length: int | None = Field(default=None, ge=1)
    """T, tokens of the longest sequence, end token included; null takes the shards' max_length."""
    latent_size: int = Field(default=128, ge=1)
    """D, coordinates of the latent code."""
    bottleneck: Literal["flatten", "attention"] = "flatten"
    token_size: int = Field(default=64, ge=1)
    """Width of a token inside "flatten"."""
    expansion_rank: int | None = Field(default=None, ge=1)
    """Rank per token of the map from code to memory in "flatten"; null for full rank."""
    memory_length: int = Field(default=8, ge=1)
    """M, tokens the decoder attends to under "attention"; "flatten" makes T of them."""
    squash: Literal["tanh"] | None = None
    """Bounds every coordinate u to s tanh(u / s), s = squash_scale."""
    squash_scale: float = Field(default=1.0, gt=0)
    normalize: bool = False
    """Scale every code to norm sqrt(D), so that the encoder cannot grow codes out of the noise."""
    mask_padding: bool = True
    """Hide pads from the encoder and the bottleneck."""
    gradient_checkpointing: bool = False
    """Compute the layers' activations again in the backward pass, to save memory."""
    compile: bool = False
    """torch.compile the layers of the encoder and the decoder."""
    fused_cross_entropy: bool | None = None
    """Never store all logits, by liger-kernel on CUDA; null does so where that is installed."""


class MMD(Section):
    kernel: Literal["rbf", "multi_rbf", "imq", "legacy"] = "imq"
    prior: Literal["normal", "uniform", "sampled"] = "normal"
    """N(0, sigma^2 I) or uniform on (-sigma, sigma)^D, in closed form; or draws of the former."""
    estimator: Literal["u", "v"] = "u"
    sigma: float = Field(default=1.0, gt=0)
    weight: float = Field(default=10.0, ge=0)
    schedule: Literal["constant", "linear", "sigmoid"] = "constant"
    """weight(step): constant; linear, from 0 over `warmup`; sigmoid(slope * step - offset)."""
    warmup: Fraction = 0.1
    """Share of the steps over which "linear" rises."""
    slope: float = 0.0025
    offset: float = 6.25
    implementation: Literal["blocked", "triton"] = "blocked"
    """triton: fused, on CUDA devices alone."""


class EppsPulley(Section):
    weight: float = Field(default=0.0, ge=0)
    slices: int = Field(default=256, ge=0)
    """Random directions, new ones in every step."""
    axes: bool = True
    """The coordinate axes too."""


class Objective(Section):
    mmd: MMD = MMD()
    epps_pulley: EppsPulley = EppsPulley()
    """A second regulariser, which sees the axes and tails that MMD does not."""
    reconstruction: Literal["mean", "sum"] = "mean"
    """Cross-entropy per real token of the global batch, or its sum, as the original had it."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of the Gaussian added to the code in training."""
    input_mask: Fraction = 0.0
    """Share of encoder input tokens replaced by the unknown token in training."""
    word_dropout: Fraction = 0.0
    """The same for the decoder's input tokens."""


class Optim(Section):
    name: Literal["adamw", "lion", "muon"] = "muon"
    """adamw or lion for all weights, or muon for the matrices between embedding and logits and
    adamw for the rest."""
    lr: float = Field(default=2e-3, gt=0)
    """AdamW's or Lion's learning rate."""
    muon_lr: float = Field(default=6e-3, gt=0)
    """Muon's: the spectral norm of an update."""
    momentum: Fraction = 0.95
    """Muon's."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    """Not applied to norms and biases."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    final_lr: Fraction = 0.0
    """Share of `lr` at the end of the schedule, just past the last step."""
    gradient_clipping: float | None = Field(default=None, ge=0)
    """Largest norm of the gradient, 0 for no clipping; null means 1, and 0 with muon."""


class Train(Section):
    steps: int = Field(default=10_000, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    max_bad_steps: int = Field(default=10, ge=0)
    """Steps in a row that are skipped (a loss or gradient is not finite) or spike, before the run
    stops; 0 never stops it."""
    spike: float = Field(default=5.0, ge=0)
    """A cross-entropy or gradient norm this many times its running mean is a spike; 0 for none."""
    timeout: int = Field(default=600, ge=1)
    """Seconds after which a rank that waits for others gives up, and the run ends."""


class DeepSpeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    """Keep the optimiser's state and the fp32 weights in host memory, and update there; not for
    stage 0."""
    offload_parameters: bool = False
    """Keep the weights in host memory too; stage 3."""
    config: str | dict[str, Any] | None = None
    """A DeepSpeed configuration, or its JSON file, merged under ours; conflicts are refused."""


class Checkpoint(Section):
    every: Interval = 1000
    """Steps between checkpoints; one is always saved at the end. 0 for none in between."""
    keep_last: int = Field(default=3, ge=1)
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
    source: str | None = None
    """For resume weights: a run or one of its checkpoints; null sets this folder's own run aside
    and starts from its newest checkpoint."""


class Eval(Section):
    every: Interval = 0
    """Steps between measurements of the held-out loss; 0 for none."""
    sequences: int = Field(default=1000, ge=2)
    """Held-out sequences to evaluate."""
    samples: int = Field(default=10_000, ge=1)
    """Draws from the prior in `t5vae eval`."""
    interpolations: int = Field(default=100, ge=1)
    check: str | None = None
    """What makes a decoded text valid: python, json, smiles, regex:..., or a dotted path."""


class Log(Section):
    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases: online with a key, offline without."""


def minutes(time: Any) -> Any:
    """SLURM's ways to write a time, such as 90, 1:30:00 or 2-12, in minutes, rounded up.

    Raises:
        ValueError: for text that is none of them.
    """
    if not isinstance(time, str):
        return time
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not found:
        raise ValueError("write minutes, hours:minutes:seconds, or days-hours")
    days, *rest = found.groups()
    given = [int(part) for part in rest if part is not None]
    if days is None and len(given) < 3:  # minutes[:seconds]
        given = [0, *given]
    hours, mins, secs = given + [0] * (3 - len(given))
    return int(days or 0) * 1440 + hours * 60 + mins + math.ceil(secs / 60)


class Launcher(Section):
    """What `t5vae-launch submit` asks SLURM for."""

    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    """One rank a GPU; 0 for one rank a node, on CPU."""
    cpus_per_task: int = Field(default=1, ge=1)
    time: Annotated[int, BeforeValidator(minutes), Field(ge=1)] = 60
    """Time limit in minutes, or as SLURM writes it: 24:00:00, 2-12. The job then goes on in a new
    turn."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Hosts to leave out."""
    gres: str | None = None
    """Generic resources of a node, where GPUs are asked for that way: gpu:a100:8."""
    mem: str | None = None
    """Memory of a node: 64G; 0 for all of it."""
    mail_user: str | None = None
    mail_type: str | None = None
    """When to write to mail_user: BEGIN, END, FAIL, REQUEUE, ALL."""
    array_parallelism: int | None = Field(default=None, ge=1)
    """How many runs of a sweep train at once; null for all."""
    slurm: dict[str, str | int | bool] | None = None
    """Any other option of sbatch, by its long name: {reservation: friday, exclusive: true}."""
    srun_args: list[str] = []
    """Options of srun, such as a container's: [--container-image=t5vae.sqsh]."""
    setup: list[str] = []
    """Lines of shell before training, on the first node: [module load cuda]."""
    python: str | None = None
    """Command in place of this environment's python: apptainer exec --nv t5vae.sif python."""
    interface: str | None = None
    """Network interface that ranks talk over; null takes the one that leads to the other hosts."""
    signal_delay: int = Field(default=120, ge=1)
    """Seconds before the time limit at which SLURM warns the job, so that it saves."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts in a row of one job, without a new checkpoint, before it gives up."""
    exclude_unhealthy: bool = False
    """Queue the run again without the nodes that fail the check before training."""


class Config(Section):
    """One run."""

    run: Run = Run()
    data: Data
    model: Model = Model()
    objective: Objective = Objective()
    optim: Optim = Optim()
    train: Train = Train()
    deepspeed: DeepSpeed = DeepSpeed()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()
    launcher: Launcher = Launcher()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        micro, batch = self.data.micro_batch_size, self.data.global_batch_size
        if micro and batch % micro:
            raise ValueError(
                f"data.global_batch_size {batch} is not a multiple of data.micro_batch_size {micro}"
            )
        if self.optim.name == "muon" and self.optim.gradient_clipping:
            raise ValueError(
                "optim.gradient_clipping goes with optim.name adamw: muon's updates have a fixed "
                "norm, which DeepSpeed would clip in place of the gradient's; leave it out"
            )
        if self.model.compile and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "model.compile does not go with deepspeed.zero_stage 3, whose gathering of weights "
                "splits every layer into single operations: leave one out"
            )
        stage = self.deepspeed.zero_stage
        if self.train.precision == "fp16" and stage == 0:
            raise ValueError(
                "train.precision fp16 needs deepspeed.zero_stage 1, 2 or 3: without ZeRO, "
                "DeepSpeed divides gradients by a loss scale that it has not applied"
            )
        if self.deepspeed.offload_optimizer and stage == 0:
            raise ValueError("deepspeed.offload_optimizer needs deepspeed.zero_stage 1, 2 or 3")
        if self.deepspeed.offload_parameters and stage != 3:
            raise ValueError("deepspeed.offload_parameters needs deepspeed.zero_stage 3")
        if self.checkpoint.source and self.checkpoint.resume != "weights":
            raise ValueError("checkpoint.source needs checkpoint.resume weights")
        other = self.objective.epps_pulley
        if other.weight and not (other.slices or other.axes):
            raise ValueError("objective.epps_pulley needs directions: set slices, axes or both")
        mmd = self.objective.mmd
        bound = self.model.squash_scale
        fits = bound > mmd.sigma or mmd.prior == "uniform" or mmd.kernel == "legacy"
        if self.model.squash and not fits:
            raise ValueError(
                f"model.squash bounds codes to (-{bound:g}, {bound:g}), which cannot match the "
                f"prior N(0, {mmd.sigma:g}^2 I): use no squash, model.squash_scale 3 or more, or "
                "objective.mmd.prior uniform (only kernel legacy allows both)"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.run.output_dir or Path("runs") / self.run.name)

    def accumulation(self, world_size: int) -> int:
        """Micro batches of one rank in one step.

        Raises:
            UserError: where the global batch cannot be dealt evenly to `world_size` ranks.
        """
        batch = self.data.global_batch_size
        if batch % world_size:
            raise UserError(
                f"data.global_batch_size {batch} cannot be dealt to {world_size} ranks; "
                f"use a multiple of {world_size}"
            )
        micro = self.data.micro_batch_size or batch // world_size
        if batch % (micro * world_size):
            raise UserError(
                f"data.global_batch_size {batch} is not a multiple of data.micro_batch_size "
                f"{micro} x {world_size} ranks = {micro * world_size}"
            )
        return batch // (micro * world_size)

    def dump(self) -> str:
        """The whole configuration as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def write(self) -> None:
        """Save the whole configuration as config.yaml in the run's folder, atomically."""
        write_whole(self.run_dir / "config.yaml", self.dump())
