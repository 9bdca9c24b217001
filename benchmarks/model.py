"""Measure a T5VAE's training step beside a T5's, and its decoding beside the original's.

    python benchmarks/model.py --quick
    python benchmarks/model.py --write

On the CPU at T5-small size in fp32; where there is a CUDA device, on it too, at T5-base size in
bf16.

Shapes: B latents, D latent size, T tokens.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median

import _model_work as work
import torch
import torch.distributed as dist
from _model_work import LATENT, LENGTH, SHORTEST, Place, Size, TrainingStep
from _report import Target, figure, installed, machine, publish, table
from torch import Tensor

from shards import Batch
from t5vae.model.flops import training_flops
from t5vae.training.meter import peak_flops

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "benchmarks" / "model.md"

WANTED_STEP, WANTED_DECODE = 1.05, 50
KINDS = {True: "all rows full", False: "real lengths"}
T5 = "T5"

HEAD = """\
# How fast the model is

Printed by `python benchmarks/model.py --write` on this machine: {machine} torch has {threads} \
threads on the CPU.
"""

TRAINING = """\
## A training step, {size} on {place}

Forward, backward and AdamW of T5VAE as `t5vae/training/step.py` has it on one process, \
DeepSpeed apart: cross-entropy, MMD of the codes (kernel `imq`, closed-form prior), latent noise; \
T = {length}, D = {latent}, {rows:,} rows, {dtype}, random weights. Beside it transformers' \
`T5ForConditionalGeneration` of the same size on the same batch, with the same optimizer and \
attention, its input's pads masked, its labels' pads -100, no cache. Rows have {length} tokens, \
or are padded to that from lengths uniform on {shortest} to {length} (mean {mean:.2f} here). In \
every turn T5 is timed before and after the others, whose order alternates, and a ratio is to the \
mean of the two; figures are medians of {turns} turns, in brackets the least and the most.

Operations are those of the step's matrix products (`t5vae.model.flops.training_flops`). {limit}
"""

CPU_LIMIT = """\
The share of the limit is the time they take at {rate:,.0f} billion a second over the step's: \
that rate has the faster of the model's two largest products, alone, into a buffer that is there \
already, in this run."""

GPU_LIMIT = """\
MFU is the step's operations a second over {peak:,.0f} trillion, the device's bf16 peak; the \
faster of the model's two largest products alone reaches {share:.0%} of that. Weights and \
gradients are bf16; AdamW works on fp32 copies of both. Memory is the most that was allocated in \
a step with full rows: weights, gradients and the optimizer's state are in it. Compiled: \
`compile_layers()`, for T5 the same."""

SPLIT = """\
### Where the difference lies

Parts that differ, forward and backward, each alone on random inputs, in milliseconds (medians of \
3); and the difference over T5's step.

"""

DECODING = """\
## Decoding, {size} on {place}

T = {length}, D = {latent}, greedy, {dtype}. The original's way takes one latent at a time: \
expand it, run decoder and output layer over all tokens so far, without a cache, append the \
likeliest last token, stop at the end token. It is timed on {few} latents. `generate` is \
`model.generate(latent=z, do_sample=False)` of the same model. Weights are random, the output \
layer's its own so that latents differ in their ids; the end token is as unlikely as any, and \
{made:.1f} tokens are made of a latent. Medians of {turns} turns of all ways, in brackets the \
least and the most. Operations are those of matrix products, as torch counts them.

In a batch {same:.1%} of the {few} latents get the same ids as by the original's way, {distinct} \
of which are distinct. The cache saves a factor of {by_cache:.1f} by operations; the rest, a \
factor of {by_batch:.1f}, is the batch's.

"""

NO_DEVICE = """\
## On a GPU

There was none on this machine.
"""


@dataclass
class Times:
    """Seconds, and those of what is compared with in the same turn."""

    seconds: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    def over(self) -> list[float]:
        return [own / other for own, other in zip(self.seconds, self.beside, strict=True)]


def spread(values: list[float], digits: int) -> str:
    least, most = min(values), max(values)
    return f"{median(values):,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


# Training

Build = Callable[[], TrainingStep]


def contenders(size: Size, place: Place) -> Iterator[dict[str, Build]]:
    """Groups of what is there at a time: on a GPU one, so that its memory can be told."""

    def of(bottleneck: str, fused: bool = False, compiled: bool = False) -> TrainingStep:
        model = work.t5vae(work.configuration(size, bottleneck), place)
        model.fused_cross_entropy = fused
        if compiled:
            model.compile_layers()
        return work.t5vae_step(model, place)

    def compiled_t5() -> TrainingStep:
        t5 = work.bare_t5(size, place)
        work.compile_layers(t5)
        return work.t5_step(t5, place)

    plain: dict[str, Build] = {
        f"T5VAE, {bottleneck}": partial(of, bottleneck) for bottleneck in ("flatten", "attention")
    }
    if not place.on_gpu:
        yield plain
        return
    for title, build in plain.items():
        yield {title: build}
    yield {"T5, compiled": compiled_t5}
    yield {"T5VAE, flatten, compiled": partial(of, "flatten", compiled=True)}
    if find_spec("liger_kernel"):
        yield {"T5VAE, flatten, fused cross-entropy": partial(of, "flatten", fused=True)}
        both = partial(of, "flatten", fused=True, compiled=True)
        yield {"T5VAE, flatten, compiled, fused cross-entropy": both}


def warm(build: Build, batch: Batch, place: Place) -> tuple[TrainingStep, int]:
    """A step that has been taken, and on a GPU the memory that it needs."""
    before = torch.cuda.memory_allocated() if place.on_gpu else 0
    step = build()
    step(batch)
    if not place.on_gpu:
        return step, 0
    step(batch)
    torch.cuda.reset_peak_memory_stats()
    step(batch)
    return step, torch.cuda.max_memory_allocated() - before


def take_turns(
    t5: TrainingStep, steps: dict[str, TrainingStep], batch: Batch, turns: int, place: Place
) -> dict[str, Times]:
    found = {title: Times() for title in steps}
    before = place.seconds(t5, batch)
    for turn in range(turns):
        for title in list(steps)[:: -1 if turn % 2 else 1]:
            found[title].seconds.append(place.seconds(steps[title], batch))
        after = place.seconds(t5, batch)
        for times in found.values():
            times.beside.append((before + after) / 2)
        before = after
    return found


def training(size: Size, place: Place) -> tuple[str, list[Target]]:
    batches = {full: work.batch(size, full) for full in KINDS}
    found: dict[bool, dict[str, Times]] = {full: {} for full in KINDS}
    memory, rates = {}, []
    t5, memory[T5] = warm(
        lambda: work.t5_step(work.bare_t5(size, place), place), batches[True], place
    )
    for group in contenders(size, place):
        steps = {}
        for title, build in group.items():
            print(f"{size.name}, {title}", file=sys.stderr)
            steps[title], memory[title] = warm(build, batches[True], place)
        for full, batch in batches.items():
            if place.on_gpu:  # what is compiled is compiled again for rows with pads
                for title in steps:
                    steps[title](batch)
            found[full] |= take_turns(t5, steps, batch, size.turns, place)
            rates.append(work.product_rate(size, place))
        steps.clear()
        gc.collect()
        if place.on_gpu:
            torch.cuda.empty_cache()
            torch._dynamo.reset()

    rate = peak = median(rates)
    limit = CPU_LIMIT.format(rate=rate / 1e9)
    if place.on_gpu:
        peak = peak_flops(torch.device("cuda"), half=True) or rate
        limit = GPU_LIMIT.format(peak=peak / 1e12, share=rate / peak)
    text = TRAINING.format(
        size=size.name,
        place=name_of(place),
        dtype=dtype_of(place),
        rows=size.rows,
        turns=size.turns,
        length=LENGTH,
        latent=LATENT,
        shortest=SHORTEST,
        mean=batches[False].lengths.float().mean(),
        limit=limit,
    )
    texts, targets = [text], []
    of_t5 = {full: median(chain(*(t.beside for t in found[full].values()))) for full in KINDS}
    for full, kind in KINDS.items():
        times = {T5: Times([of_t5[full]], [of_t5[full]])} | found[full]
        texts += [f"### {kind.capitalize()}\n", steps_table(size, place, full, times, memory, peak)]
        for title in ("T5VAE, flatten", "T5VAE, attention"):
            what = f"{size.name}, {title}, {kind}: a training step over T5's"
            targets.append(Target(what, WANTED_STEP, median(times[title].over()), at_most=True))
    return "\n".join([*texts, split(size, place, of_t5)]), targets


def steps_table(
    size: Size,
    place: Place,
    full: bool,
    found: dict[str, Times],
    memory: dict[str, int],
    peak: float,
) -> str:
    tokens = int(work.batch(size, full).lengths.sum())
    of_t5 = work.t5_operations(size)
    rows = []
    for title, times in found.items():
        seconds, operations = median(times.seconds), of_t5
        if title.startswith("T5VAE"):
            config = work.configuration(size, title.split(", ")[1])
            operations = training_flops(config, size.rows, LENGTH, LENGTH, tokens)
        row = (
            title,
            f"{1000 * seconds:,.1f}",
            "1" if title == T5 else spread(times.over(), 3),
            f"{operations / of_t5:.3f}",
            f"{operations / seconds / peak:.1%}",
        )
        rows.append((*row, f"{memory[title] / 2**30:.1f}") if place.on_gpu else row)
    limit = ("MFU", "GiB") if place.on_gpu else ("share of the limit",)
    return table(("", "ms", "over T5", "operations over T5's", *limit), rows)


def split(size: Size, place: Place, of_t5: dict[bool, float]) -> str:
    t5, model = work.bare_t5(size, place), work.t5vae(work.configuration(size, "flatten"), place)
    rows: dict[str, list[str]] = {}
    for full, kind in KINDS.items():
        print(f"{size.name}, parts, {kind}", file=sys.stderr)
        total = 0.0
        for name, pair in work.parts(t5, model, work.batch(size, full), place).items():
            theirs, ours = (1000 * median_seconds(part, place) if part else 0.0 for part in pair)
            difference = (ours - theirs) / 1000 / of_t5[full]
            total += difference
            row = [f"{theirs:,.1f}", f"{ours:,.1f}", f"{difference:+.1%}"]
            rows.setdefault(name, [name]).extend(row)
        rows.setdefault("all", ["all"]).extend(["", "", f"{total:+.1%}"])
    names = ("T5", "T5VAE, flatten", "difference")
    header = ("", *(f"{name}, {kind}" for kind in KINDS.values() for name in names))
    return SPLIT + table(header, [tuple(row) for row in rows.values()])


def median_seconds(run: Callable[[], object], place: Place) -> float:
    """Of 3 times, after a first one."""
    return median([place.seconds(run) for _ in range(4)][1:])


# Decoding


@torch.inference_mode()
def decoding(size: Size, place: Place) -> tuple[str, list[Target]]:
    print(f"{size.name}, decoding", file=sys.stderr)
    config = work.configuration(size, "flatten", tie_word_embeddings=False)
    model = work.t5vae(config, place).eval()
    draw = torch.Generator().manual_seed(0)
    z_BD = torch.randn(size.latents, LATENT, generator=draw).to(place.device, place.dtype)
    few_BD = z_BD[: size.few]

    def one_by_one(decode: Callable) -> list[Tensor]:
        return [decode(model, z_1D)[0] for z_1D in few_BD.split(1)]

    ways: dict[str, tuple[Callable, Callable, Tensor]] = {
        "the original's": (partial(one_by_one, work.decode_original), work.decode_original, few_BD),
        "`generate`, one by one": (
            partial(one_by_one, work.decode_batch),
            work.decode_batch,
            few_BD,
        ),
        f"`generate`, {size.latents} in a batch": (
            partial(work.decode_batch, model, z_BD),
            work.decode_batch,
            z_BD,
        ),
    }
    original, _, in_batch = ways
    expected, found = ways[original][0](), ways[in_batch][0]()
    same = [torch.equal(row, ids[: len(row)]) for row, ids in zip(expected, found, strict=False)]
    turns = 3
    times = {way: Times() for way in ways}
    for _ in range(turns):
        for way, (run, _, latents) in ways.items():
            times[way].seconds.append(place.seconds(run) / len(latents))
            times[way].beside.append(times[original].seconds[-1])
    faster = {way: [1 / ratio for ratio in times[way].over()] for way in ways}
    operations = {
        way: work.operations(decode, model, latents[: 1 if latents is few_BD else 2])
        for way, (_, decode, latents) in ways.items()
    }
    rows = [
        (
            way,
            figure(1000 * median(times[way].seconds)),
            "1" if way == original else spread(faster[way], 1),
            figure(operations[way] / 1e9),
            figure(operations[way] / median(times[way].seconds) / 1e9),
        )
        for way in ways
    ]
    by_cache = operations[original] / operations[in_batch]
    text = DECODING.format(
        size=size.name,
        place=name_of(place),
        dtype=dtype_of(place),
        length=LENGTH,
        latent=LATENT,
        few=size.few,
        turns=turns,
        made=sum(map(len, expected)) / size.few,
        same=sum(same) / size.few,
        distinct=len({tuple(row.tolist()) for row in expected}),
        by_cache=by_cache,
        by_batch=median(faster[in_batch]) / by_cache,
    )
    header = ("", "ms a latent", "times as fast", "billion operations", "billion a second")
    what = f"{size.name}, decoding {size.latents} latents: times as fast as the original's way"
    return text + table(header, rows), [Target(what, WANTED_DECODE, median(faster[in_batch]))]


# Report


def name_of(place: Place) -> str:
    return torch.cuda.get_device_name() if place.on_gpu else "the CPU"


def dtype_of(place: Place) -> str:
    return "bf16" if place.dtype == torch.bfloat16 else "fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all runs")
    parser.add_argument("--write", action="store_true", help=f"save as {DOC.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.write and args.quick:
        parser.error("--write saves whole runs: leave out --quick")

    work.start_process_group()
    places = [(work.SMALL, Place(torch.device("cpu"), torch.float32))]
    if torch.cuda.is_available():
        places.append((work.BASE, Place(torch.device("cuda"), torch.bfloat16)))
    sections = []
    for size, place in places:
        chosen = work.TINY if args.quick else size
        sections += [training(chosen, place), decoding(chosen, place)]
    if not torch.cuda.is_available():
        sections.append((NO_DEVICE, []))
    dist.destroy_process_group()

    versions = installed(sys.executable, ("torch", "transformers", "liger-kernel"))
    head = HEAD.format(machine=machine(versions), threads=torch.get_num_threads())
    publish(head, sections, DOC if args.write else None)


if __name__ == "__main__":
    main()
