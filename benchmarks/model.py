"""Measure a T5VAE's training step beside a T5's, and its decoding beside the original's.

    python benchmarks/model.py --quick
    python benchmarks/model.py --write

On a CPU at T5-small size in fp32; where there is a CUDA device also at T5-base size in bf16.

Shapes: B sequences, D latent size.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from _model_work import (
    BASE,
    LATENT,
    LENGTH,
    SHORTEST,
    SMALL,
    TINY,
    Place,
    Size,
    TrainingStep,
    bare_t5,
    batch,
    compile_layers,
    configuration,
    decode_batch,
    decode_operations,
    decode_original,
    part_seconds,
    parts,
    product_rate,
    start_process_group,
    t5_operations,
    t5_step,
    t5vae,
    t5vae_step,
)
from _report import Target, figure, installed, machine, table

from shards import Batch
from t5vae.model.flops import training_flops

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "benchmarks" / "model.md"

WANTED_STEP, WANTED_DECODE = 1.05, 50
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Operations a second of dense bf16 products, by the makers' data sheets."""
KINDS = {True: "all rows full", False: "real lengths"}

HEAD = """\
# How fast the model is

Printed by `python benchmarks/model.py --write` on this machine: {machine} On the CPU torch has {threads} \
threads.
"""

TRAINING = """\
## A training step: {size} on {place}

Forward, backward and AdamW's step of T5VAE (T = {length}, D = {latent}, cross-entropy plus MMD of \
the codes with kernel `imq` and the closed-form prior, latent noise), as `t5vae/training/losses.py` \
has it on one process, DeepSpeed apart; beside transformers' `T5ForConditionalGeneration` of the \
same size on the same {rows:,} rows, with the same optimizer and attention, its input's pads masked, \
its labels' pads -100 and no cache. Random weights, {dtype}. \
In every turn T5 is timed before and after the others, whose order alternates; a ratio is to the \
mean of the two, figures are medians of {turns} turns, in brackets the least and the most. Rows are \
{length} tokens long, or padded to that from lengths uniform on {shortest} to {length} (mean \
{mean:.2f} here).

Operations are those of the matrix products that the step needs \
(`t5vae.model.flops.training_flops`). {limit}
"""

CPU_LIMIT = """\
The share of the limit is the time they take at {rate:,.0f} billion a second over the step's time; \
that is the rate of the faster of the model's two largest products, alone, into a buffer that is \
there already, the median of several in this run.\
"""
GPU_LIMIT = """\
MFU is what they are a second, over the {peak:,.0f} trillion bf16 operations a second that the \
maker gives for this device; the model's largest product alone reaches {rate:.0%} of that. Memory \
is the most that torch had allocated in a step, weights, gradients and optimizer's state included. \
Weights and gradients are bf16, AdamW works on fp32 copies of both.\
"""

SPLIT = """\
### Where the difference lies

Parts that differ, forward and backward, each timed alone with random inputs (medians of 3), in \
milliseconds; and over the whole step of T5.

"""

DECODING = """\
## Decoding: {size} on {place}

T = {length}, greedy, {dtype}, random weights: an end token comes as seldom as any other, so nearly \
all {length} tokens are made ({made:.1f} a latent on average). The original's way is batch 1 without \
a cache: for each latent expand it, then run decoder and output layer over all tokens so far, \
append the likeliest last token, until that is the end token; timed on {few} of the {latents} \
latents. The same model decodes all {latents} by `model.generate(latent=z, do_sample=False)`. \
Medians of {turns} turns in which each way is timed. Operations are torch's count of the matrix \
products.

Both ways give the same ids in {identical:.1%} of the {few} rows ({distinct} of these \
{few} are distinct). Without the cache a latent takes {by_cache:.1f} times the operations, so that \
the rest, a factor of {by_batching:.1f}, is the batch's.

"""

NO_DEVICE = """\
## On a GPU

There was none on this machine.
"""


@dataclass
class Times:
    """A contender's steps, and of T5's before and after each the mean."""

    seconds: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        return [mine / t5 for mine, t5 in zip(self.seconds, self.beside, strict=True)]

    def cell(self) -> str:
        if not self.beside:
            return "1"
        return f"{self.ratio:.3f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"


Measured = dict[str, dict[bool, Times]]
Build = Callable[[], TrainingStep]
T5 = "T5"


# Training


def contenders(size: Size, place: Place) -> Iterator[dict[str, Build]]:
    """Groups of what is timed together; on a GPU one by one, so that memory can be told apart."""

    def of(bottleneck: str, fused: bool = False, compiled: bool = False) -> Build:
        def build() -> TrainingStep:
            model = t5vae(size, bottleneck, place)
            model.fused_cross_entropy = fused
            if compiled:
                model.compile_layers()
            return t5vae_step(model, place)

        return build

    def compiled_t5() -> TrainingStep:
        model = bare_t5(size, place)
        compile_layers(model)
        return t5_step(model, place)

    plain = {f"T5VAE, {name}": of(name) for name in ("flatten", "attention")}
    if not place.on_gpu:
        yield plain
        return
    for title, build in plain.items():
        yield {title: build}
    if find_spec("liger_kernel"):
        yield {"T5VAE, flatten, fused cross-entropy": of("flatten", fused=True)}
    yield {"T5, compiled": compiled_t5}
    yield {"T5VAE, flatten, compiled": of("flatten", compiled=True)}
    if find_spec("liger_kernel"):
        yield {"T5VAE, flatten, compiled, fused cross-entropy": of("flatten", True, True)}


def built(build: Build, place: Place, data: Batch) -> tuple[TrainingStep, int]:
    """A step that is warm, and the memory it takes on a GPU."""
    if not place.on_gpu:
        step = build()
        step(data)
        return step, 0
    before = torch.cuda.memory_allocated()
    step = build()
    for _ in range(3):
        step(data)
    torch.cuda.reset_peak_memory_stats()
    step(data)
    return step, torch.cuda.max_memory_allocated() - before


def measured_steps(size: Size, place: Place) -> tuple[Measured, dict[str, int], list[float]]:
    """The times and the memory of every contender, and the rates of products in between."""
    batches = {full: batch(size, full) for full in KINDS}
    t5, memory = built(lambda: t5_step(bare_t5(size, place), place), place, batches[True])
    found: Measured = {T5: {full: Times() for full in KINDS}}
    peaks, rates = {T5: memory}, []
    for group in contenders(size, place):
        steps = {}
        for title, build in group.items():
            print(f"{size.name}: {title}", file=sys.stderr)
            steps[title], peaks[title] = built(build, place, batches[True])
            found[title] = {full: Times() for full in KINDS}
        for full, data in batches.items():
            if place.on_gpu:
                for step in (t5, *steps.values()):
                    step(data)
            before = place.seconds(lambda data=data: t5(data))
            for turn in range(size.turns):
                order = list(steps) if turn % 2 == 0 else list(reversed(steps))
                for title in order:
                    taken = place.seconds(lambda step=steps[title], data=data: step(data))
                    found[title][full].seconds.append(taken)
                after = place.seconds(lambda data=data: t5(data))
                for title in order:
                    found[title][full].beside.append((before + after) / 2)
                found[T5][full].seconds.append(before)
                before = after
                rates.append(product_rate(size, place, 1))
        del steps
        gc.collect()
        if place.on_gpu:
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    return found, peaks, rates


def training(size: Size, place: Place) -> tuple[str, list[Target]]:
    found, peaks, rates = measured_steps(size, place)
    rate = peak = median(rates)
    if place.on_gpu:
        known = [rate for name, rate in PEAKS.items() if name in torch.cuda.get_device_name()]
        peak = known[0] if known else rate
    texts, targets = [], []
    for full, kind in KINDS.items():
        data = batch(size, full)
        of_t5 = t5_operations(size)
        rows = []
        for title, times in found.items():
            needed = of_t5
            if title.startswith("T5VAE"):
                model = configuration(size, title.split(", ")[1])
                needed = training_flops(
                    model, size.rows, LENGTH, LENGTH, scored_tokens=int(data.lengths.sum())
                )
            seconds = median(times[full].seconds)
            cells = [
                title,
                f"{1e3 * seconds:,.1f}" if place.on_gpu else f"{seconds:,.3f}",
                times[full].cell(),
                f"{needed / of_t5:.3f}",
                f"{needed / seconds / peak:.1%}",
            ]
            rows.append((*cells, f"{peaks[title] / 2**30:,.1f}") if place.on_gpu else tuple(cells))
            if title.count(",") == 1 and title.startswith("T5VAE"):
                what = f"{size.name}, {title}, {kind}: a step over T5's"
                targets.append(Target(what, WANTED_STEP, times[full].ratio, at_most=True))
        header = ("", "ms" if place.on_gpu else "s", "over T5", "operations over T5's")
        header += ("MFU", "GiB") if place.on_gpu else ("share of the limit",)
        texts += [f"### {kind.capitalize()}\n", table(header, rows)]
    limit = GPU_LIMIT if place.on_gpu else CPU_LIMIT
    share = rate / peak if place.on_gpu else rate / 1e9
    head = TRAINING.format(
        size=size.name,
        place=name_of(place),
        rows=size.rows,
        length=LENGTH,
        latent=LATENT,
        shortest=SHORTEST,
        mean=batch(size, full=False).lengths.float().mean().item(),
        turns=size.turns,
        dtype=name_of_dtype(place),
        limit=limit.format(rate=share, peak=peak / 1e12),
    )
    of_step = {full: median(found[T5][full].seconds) for full in KINDS}
    return "\n".join((head, *texts, split(size, place, of_step))), targets


def split(size: Size, place: Place, of_step: dict[bool, float]) -> str:
    """The table of the parts of a step, for both kinds of batch."""
    t5, model = bare_t5(size, place), t5vae(size, "flatten", place)
    rows: dict[str, list[str]] = {}
    for full in KINDS:
        rest = 0.0
        for name, (of_t5, of_t5vae) in parts(t5, model, batch(size, full), place).items():
            theirs, ours = (part_seconds(part, place) for part in (of_t5, of_t5vae))
            rest += ours - theirs
            cells = [f"{1e3 * theirs:,.1f}", f"{1e3 * ours:,.1f}"]
            cells.append(f"{(ours - theirs) / of_step[full]:+.2%}")
            rows.setdefault(name, [name]).extend(cells)
        rows.setdefault("all", ["sum"]).extend(["", "", f"{rest / of_step[full]:+.2%}"])
    columns = ("T5, {}", "T5VAE, {}", "difference over T5's step")
    header = ("", *(column.format(kind) for kind in KINDS.values() for column in columns))
    return SPLIT + table(header, [tuple(row) for row in rows.values()])


# Decoding


@torch.inference_mode()
def decoding(size: Size, place: Place) -> tuple[str, list[Target]]:
    print(f"{size.name}: decoding", file=sys.stderr)
    model = t5vae(size, "flatten", place).eval()
    draw = torch.Generator().manual_seed(0)
    z_BD = torch.randn(size.latents, LATENT, generator=draw).to(place.device, place.dtype)

    def one_by_one(decode: Callable, count: int) -> Callable[[], list[torch.Tensor]]:
        return lambda: [decode(model, z_1D)[0] for z_1D in z_BD[:count].split(1)]

    few = size.few
    ways = {
        "the original's, one by one": (one_by_one(decode_original, few), few),
        "`generate`, one by one": (one_by_one(decode_batch, few), few),
        f"`generate`, {size.latents} in a batch": (lambda: decode_batch(model, z_BD), len(z_BD)),
    }
    slow, _, fast = ways
    expected = ways[slow][0]()
    ids_BT = ways[fast][0]()
    same = [torch.equal(mine[: len(row)], row) for mine, row in zip(ids_BT, expected, strict=False)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    turns = 3
    for _ in range(turns):
        for name, (run, count) in ways.items():
            seconds[name].append(place.seconds(run) / count)
    operations = dict(
        zip(
            ways,
            (
                decode_operations(decode_original, model, z_BD[:1]),
                decode_operations(decode_batch, model, z_BD[:1]),
                decode_operations(decode_batch, model, z_BD[:2]),
            ),
            strict=True,
        )
    )
    rows = []
    for name in ways:
        ratios = [s / own for s, own in zip(seconds[slow], seconds[name], strict=True)]
        own = median(seconds[name])
        speed = f"{median(ratios):,.1f} ({min(ratios):,.1f} to {max(ratios):,.1f})"
        rows.append(
            (
                name,
                figure(1e3 * own),
                speed if name != slow else "1",
                figure(operations[name] / 1e9),
                figure(operations[name] / own / 1e9),
            )
        )
    speed_up = median([s / own for s, own in zip(seconds[slow], seconds[fast], strict=True)])
    by_cache = operations[slow] / operations[fast]
    text = DECODING.format(
        size=size.name,
        place=name_of(place),
        dtype=name_of_dtype(place),
        length=LENGTH,
        made=sum(len(row) for row in expected) / few,
        few=few,
        latents=size.latents,
        turns=turns,
        identical=sum(same) / few,
        distinct=len({tuple(row.tolist()) for row in expected}),
        by_cache=by_cache,
        by_batching=speed_up / by_cache,
    )
    header = ("", "ms a latent", "times as fast", "billion operations", "billion a second")
    what = f"{size.name}: decoding {size.latents} latents, times as fast as the original's way"
    return text + table(header, rows), [Target(what, WANTED_DECODE, speed_up)]


# Report


def name_of(place: Place) -> str:
    return torch.cuda.get_device_name() if place.on_gpu else "the CPU"


def name_of_dtype(place: Place) -> str:
    return "bf16" if place.on_gpu else "fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all runs")
    parser.add_argument("--write", action="store_true", help=f"save as {DOC.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.write and args.quick:
        parser.error("--write saves whole runs: leave out --quick")

    start_process_group()
    work = [(SMALL, Place(torch.device("cpu"), torch.float32))]
    if torch.cuda.is_available():
        work.append((BASE, Place(torch.device("cuda"), torch.bfloat16)))
    sections = []
    for size, place in work:
        chosen = TINY if args.quick else size
        sections += [training(chosen, place), decoding(chosen, place)]
    if not torch.cuda.is_available():
        sections.append((NO_DEVICE, []))
    texts, targets = zip(*sections, strict=True)

    versions = installed(sys.executable, ("torch", "transformers", "liger-kernel"))
    head = HEAD.format(machine=machine(versions), threads=torch.get_num_threads())
    rows = [target.row() for target in chain(*targets)]
    page = "\n".join((head, table(("target", "wanted", "measured", ""), rows), *texts))
    print(page)
    if args.write:
        DOC.write_text(page)


if __name__ == "__main__":
    main()
