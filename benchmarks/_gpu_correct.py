"""Sections of `gpu.py` that say whether what a GPU computes is right; none of them is timed.

Cases and formulas are those of the tests.
"""

import gc
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import test_epps_pulley
import test_table
import torch
from _gpu_worker import Bench, Part, tried
from _launches import QUICKSTART, T5_SMALL, TOY
from _mmd_peers import Peak
from _report import ROOT, Target, figure, table
from _step import loss_of, weights_of
from test_execution import fused_and_plain, make_model, sequences
from test_table import Case, Errors
from torch import Tensor

from t5vae.cluster.process_group import start_process_group
from t5vae.cluster.ranks import find_ranks
from t5vae.config import load_config
from t5vae.model import T5VAE
from t5vae.objective import sliced_epps_pulley
from t5vae.planning.plan import plan
from t5vae.training.budget import take_apart
from t5vae.training.build import is_installed
from t5vae.training.engine import backward, schedule, set_learning_rate, update
from t5vae.training.feed import open_feed
from t5vae.training.job import Job, resolve
from t5vae.training.outcome import Outcomes
from t5vae.training.start import build

# MMD

ROUNDED = Errors(1e-4, 1e-2)
"""The most that factors of 11 bits may cost."""

MMD = """\
Cases of `tests/objective/test_table.py`: four kernels, three priors, both estimators, D of 1 to \
1,000, {counts} codes. An error of the value is a share of the summed magnitude of its terms, one \
of the gradient a share of its norm in fp64; degenerate are codes that are all zero, equal, \
collapsed, huge or far apart. Beyond are cases above 1e-6 and 1e-5 (1e-2 where codes have 16 \
bits; 1e-4 and 1e-2 where the products' factors are rounded to 11).

"""


@dataclass(frozen=True)
class Way:
    """How MMD is computed."""

    title: str
    implementation: str
    dtype: torch.dtype = torch.float32
    rounded: bool = False


WAYS = (
    Way("blocked, fp32", "blocked"),
    Way("blocked, bf16 codes", "blocked", torch.bfloat16),
    Way("blocked, fp16 codes", "blocked", torch.float16),
    Way("blocked, fp32, in a run whose model is in tf32", "blocked"),
    Way("Triton, fp16 factors", "triton", rounded=True),
    Way("Triton, bf16 codes", "triton", torch.bfloat16, rounded=True),
    Way("Triton, fp16 codes", "triton", torch.float16, rounded=True),
)


def errors(bench: Bench) -> Iterator[Part]:
    """The MMD table."""
    cases = test_table.BLOCKED
    if bench.smoke:
        cases = [case for case in cases if case.count <= 70 and case.dimensions <= 64][::4]
    counts = sorted({case.count for case in cases})
    text = MMD.format(counts=", ".join(map(str, counts)))
    rows: list[tuple[str, ...]] = []
    targets = []
    for way in WAYS:
        if not bench.on_gpu and way.implementation == "triton":
            continue
        found = tried(measured, cases, way, bench)
        wrong = math.nan
        if isinstance(found, str):
            rows.append((way.title, found))
        else:
            beyond = [case for case, error in found.items() if is_beyond(error, case, way)]
            print(f"{way.title}, beyond: {', '.join(map(str, beyond[:9]))}")
            rows.append((way.title, str(len(found)), *worst(found), str(len(beyond))))
            wrong = len(beyond) if found else math.nan
        targets.append(Target(f"MMD, {way.title}: cases beyond", 0, wrong, at_most=True))
        header = ("", "cases", "value", "gradient", "value, degenerate", "gradient, degenerate")
        yield Part("table", text + table((*header, "beyond"), rows), tuple(targets))


def measured(cases: list[Case], way: Way, bench: Bench) -> dict[Case, Errors]:
    """Cases in a way's precision, a quarter of them in 16 bits, as many as there is time for."""
    own = [case._replace(dtype=way.dtype) for case in cases]
    found: dict[Case, Errors] = {}
    with matmul_precision("high" if way.title.endswith("tf32") else "highest"):
        for case in own if way.dtype == torch.float32 else own[::4]:
            if bench.left < 0:
                break
            found[case] = test_table.measure(case, way.implementation, bench.device)
    return found


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def is_beyond(error: Errors, case: Case, way: Way) -> bool:
    most = ROUNDED if way.rounded else test_table.bounds(case)
    return not (error.value <= most.value and error.gradient <= most.gradient)


def worst(found: dict[Case, Errors]) -> Iterator[str]:
    """The largest error of the value and of the gradient, of usual codes and of degenerate ones."""
    usual = [error for case, error in found.items() if case.codes in ("usual", "prior")]
    others = [error for case, error in found.items() if case.codes not in ("usual", "prior")]
    for group in (usual, others):
        for values in zip(*group, strict=True) if group else ((), ()):
            yield f"{max(values):.1e}" if values else ""


# The other losses

SCALE = 2.0**16
"""Of a loss, lest its gradient in fp16 vanish: DeepSpeed's first."""

EPPS_PULLEY = """\
Epps-Pulley, 256 slices and the axes, of codes of 64 numbers, beside the formula in fp64.

"""
CROSS_ENTROPY = """\
Liger's fused linear cross-entropy beside the plain one in the same precision, {vocabulary:,} \
tokens, width 512; the gradient is the worst parameter's; memory, the fused one's over the plain \
one's.

"""


def losses(bench: Bench) -> Iterator[Part]:
    """Epps-Pulley against its formula, and the fused cross-entropy against the plain one."""
    rows, targets = [], []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z_ND = test_epps_pulley.codes(64 if bench.smoke else 512, 64).to(bench.device, dtype)
        value = sliced_epps_pulley(z_ND.requires_grad_(), slices=256, generator_seed=3)
        (scaled_ND,) = torch.autograd.grad(SCALE * value, z_ND)
        right, right_ND = test_epps_pulley.reference(
            z_ND.cpu().float(), test_epps_pulley.directions(64, 256, True, 3)
        )
        off = abs(value.item() - right.item())
        error = ((scaled_ND.cpu().double() / SCALE - right_ND).norm() / right_ND.norm()).item()
        name = str(dtype).removeprefix("torch.")
        rows.append((name, f"{off:.1e}", f"{error:.1e}"))
        most = 1e-5 if dtype == torch.float32 else 1e-2
        targets.append(Target(f"Epps-Pulley, {name}: the gradient", most, error, at_most=True))
    header = ("codes", "the value is off by", "the gradient by, of its norm")
    yield Part("Epps-Pulley", EPPS_PULLEY + table(header, rows), tuple(targets))
    if bench.on_gpu and is_installed("liger-kernel"):
        yield cross_entropy()


def cross_entropy() -> Part:
    rows, targets, vocabulary = [], [], 32_128
    for dtype in (torch.float32, torch.bfloat16):
        wide = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 8}
        model = make_model(vocabulary=vocabulary, **wide).to("cuda", dtype)
        ids_BT = sequences([34, 5, 17, 30] * 64, vocabulary).cuda()
        found = fused_and_plain(model, ids_BT, ignored=True)
        peaks = [peak_of(model, ids_BT, fused) for fused in (False, True)]
        name = str(dtype).removeprefix("torch.")
        off = abs(found.fused_loss / found.loss - 1)
        memory = f"{peaks[1] / peaks[0]:.2f}"
        rows.append((name, f"{off:.1e}", f"{found.gradient:.1e}", memory))
        most = 1e-5 if dtype == torch.float32 else 5e-2
        what = f"fused cross-entropy, {name}: the gradient"
        targets.append(Target(what, most, found.gradient, at_most=True))
    header = (
        "",
        "the loss is off by",
        "the gradient by, of its norm",
        "peak memory over the plain",
    )
    text = CROSS_ENTROPY.format(vocabulary=vocabulary) + table(header, rows)
    return Part("cross-entropy", text, tuple(targets))


def peak_of(model: T5VAE, ids_BT: Tensor, fused: bool) -> int:
    """Bytes that a forward and backward pass needs more than there were before."""
    model.fused_cross_entropy = fused
    peak = Peak(ids_BT.device)
    model(ids_BT, mode="score").loss.backward()
    return peak.extra()


# Engines

COMBINATIONS = (
    (1, "muon", "bf16"),
    (0, "adamw", "fp32"),
    (2, "adamw", "bf16"),
    (0, "muon", "fp16"),
    (1, "adamw", "fp16"),
    (2, "muon", "fp32"),
    (3, "muon", "bf16"),
    (3, "adamw", "fp32"),
)
"""All pairs of stage and optimiser, and of optimiser and precision; two precisions a stage."""
REFERENCE = "0, adamw, fp32"
COUNTED = 5

ENGINES = """\
`configs/quickstart.yaml` with a T5 of width {t5.d_model}, {t5.num_layers} + {t5.num_layers} \
layers, {config.data.global_batch_size} lines a step, on one rank, {steps} steps each, one engine \
after another in one process. All begin with the same weights. Planned is `t5vae plan`'s peak; \
measured, what torch held at most above what it held before. Reads are those at which the device \
makes the host wait, of the last {counted} steps (`torch.cuda.set_sync_debug_mode`), optimiser \
included.

"""
READS = """\
Where they are, stage 1, Muon, bf16, reads a step:

"""


@dataclass
class Trained:
    """What an engine did.

    Attributes:
        peak: bytes; 0 on a CPU.
        reads: by place, over the last steps.
    """

    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    peak: int = 0
    reads: Counter[str] = field(default_factory=Counter)


def engines(bench: Bench) -> Iterator[Part]:
    """Twenty steps of each combination."""
    # Before any engine: what is made after one of stage 3 has its weights dealt out too.
    jobs = {
        ", ".join(map(str, each)): engine_job(bench, *each)
        for each in COMBINATIONS
        if bench.on_gpu or "fp16" not in each
    }
    peaks = {
        title: plan(job.config, nodes=1, gpus_per_node=1).memory.peak for title, job in jobs.items()
    }
    device = start_process_group(find_ranks({}))
    found: dict[str, Trained | str] = {}
    for title, job in jobs.items():
        if bench.left < 0:
            break
        found[title] = own = tried(train, job, bench, device)
        yield engine_table(jobs, peaks, found)
        if len(found) == 1 and isinstance(own, Trained):
            reads = own.reads.most_common()
            places = [(place, f"{count / COUNTED:.1f}") for place, count in reads]
            yield Part("reads", READS + table(("place", "reads a step"), places))


def engine_table(
    jobs: dict[str, Job], peaks: dict[str, int], found: dict[str, Trained | str]
) -> Part:
    """What the engines did so far, beside their planned peaks."""
    config = next(iter(jobs.values())).config
    text = ENGINES.format(
        config=config, t5=config.model.t5, steps=config.train.steps, counted=COUNTED
    )
    if left_out := jobs.keys() - found.keys():
        text += f"{len(left_out)} more were left out: the time was over.\n\n"
    rows: list[tuple[str, ...]] = []
    targets, over, firsts = [], [], []
    for title, trained in found.items():
        what = f"engine {title}: the last loss over the first"
        if isinstance(trained, str):
            rows.append((title, trained))
            targets.append(Target(what, 0.98, math.nan, at_most=True))
            continue
        firsts.append(trained.losses[0])
        measured = ("", "")
        if trained.peak:
            over.append(peaks[title] / trained.peak)
            measured = figure(trained.peak / 2**20), f"{over[-1]:.2f}"
        first, *_, last = trained.losses
        losses = (f"{first:.4f}", f"{last:.4f}", str(trained.skipped))
        reads = f"{trained.reads.total() / COUNTED:.1f}"
        rows.append((title, *losses, figure(peaks[title] / 2**20), *measured, reads))
        targets.append(Target(what, 0.98, last / first, at_most=True))
    if isinstance(reference := found.get(REFERENCE), Trained):
        off = max(abs(first / reference.losses[0] - 1) for first in firsts)
        what = "engines: how far a first loss is from that in fp32, of it"
        targets.append(Target(what, 0.02, off, at_most=True))
    if over:
        targets.append(Target("engines: planned over measured memory, the least", 1, min(over)))
    header = ("stage, optimiser, precision", "first loss", "last loss", "steps skipped")
    memory = ("planned, MiB", "measured, MiB", "planned over measured", "reads a step")
    return Part("table", text + table((*header, *memory), rows), tuple(targets))


def engine_job(bench: Bench, stage: int, optimizer: str, precision: str) -> Job:
    config = load_config(
        QUICKSTART,
        [
            *(TOY if bench.smoke else T5_SMALL),
            f"data.shards={bench.lines}",
            f"data.global_batch_size={32 if bench.smoke else 256}",
            f"run.output_dir={bench.scratch / 'run'}",
            f"train.steps={10 if bench.smoke else 20}",
            f"train.precision={precision}",
            f"deepspeed.zero_stage={stage}",
            f"optim.name={optimizer}",
            "optim.muon_precision=fp32",
            "optim.warmup=0",
        ],
    )
    return resolve(config, find_ranks({}))


def train(job: Job, bench: Bench, device: torch.device) -> Trained:
    """Steps as the training loop takes them, logging and saving apart."""
    found = Trained()
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found.peak = -torch.cuda.memory_allocated()
    engine, config = build(job, device), job.config
    loss = loss_of(config, 1, device)
    with closing(open_feed(job, device)) as feed:
        for number in range(job.steps):
            batches = feed.read()
            set_learning_rate(engine, schedule(number, job.steps, config.optim))
            counting = number >= job.steps - COUNTED
            with host_reads(found.reads if counting and bench.on_gpu else None):
                loss.begin(feed.position, feed.agree(batches).tokens, weights_of(config.objective))
                backward(engine, loss(engine, batches[0], 0))
                update(engine)
            applied = engine.was_step_applied()
            outcome = loss.end(number, applied, None, {})
            (known,) = Outcomes(loss.shares).after(outcome, wait=True)
            found.losses.append(known.figures()["loss"])
            found.skipped += not applied
    if bench.on_gpu:
        found.peak += torch.cuda.max_memory_allocated()
    take_apart(engine)
    return found


@contextmanager
def host_reads(found: Counter[str] | None) -> Iterator[None]:
    """Count where the host waits for a CUDA device, by file and line; None counts nothing."""
    if found is None:
        yield
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(place_of(w) for w in told if "synchronizing CUDA operation" in str(w.message))


def place_of(warning: warnings.WarningMessage) -> str:
    """Its file, below the root or the packages' folder, and line."""
    path = Path(warning.filename)
    parts = path.parts
    for root in ("site-packages", "site", ROOT.name):
        if root in parts:
            path = Path(*parts[len(parts) - parts[::-1].index(root) :])
            break
    return f"{path}:{warning.lineno}"
