"""Measure a T5VAE's training step beside a T5's, and its decoding beside the original's.

    python benchmarks/model.py --quick
    python benchmarks/model.py --write

On the CPU at T5-small size in fp32.

Shapes: B latents, D latent size.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median

import _model_work as work
import torch
import torch.distributed as dist
from _model_work import LATENT, LENGTH, Size
from _report import Block, Page, Target, figure, installed, ratios, say, spread, table
from _timing import per, seconds, take_turns
from torch import Tensor

from t5vae.model.flops import training_flops

WANTED_STEP, WANTED_DECODE = 1.05, 50
KINDS = {True: "all rows full", False: "real lengths"}
BOTTLENECKS = ("flatten", "attention")
TURNS = 3
"""Of decoding."""


# Training


def training(size: Size) -> list[Block]:
    batches = {full: work.batch(size, full) for full in KINDS}
    t5 = work.t5_step(work.bare_t5(size))
    models = [work.t5vae(work.configuration(size, bottleneck)) for bottleneck in BOTTLENECKS]
    steps = dict(zip(BOTTLENECKS, map(work.t5vae_step, models), strict=True))
    for step in (t5, *steps.values()):
        step(batches[True])
    blocks, of_t5 = [], {}
    rate = work.product_rate(size.t5, size.rows * LENGTH)
    for full, kind in KINDS.items():
        say(f"{size.name}, {kind}")
        beside, taken = [seconds(t5, batches[full])], {name: [] for name in steps}
        for turn in range(size.turns):
            for name in list(steps)[:: -1 if turn % 2 else 1]:
                taken[name].append(seconds(steps[name], batches[full]))
            beside.append(seconds(t5, batches[full]))
        means = [(before + after) / 2 for before, after in pairwise(beside)]
        of_t5[full] = median(means)
        over = {name: ratios(own, means) for name, own in taken.items()}
        operations = operations_of(size, int(batches[full].lengths.sum()))
        rows = [
            (
                title,
                f"{1000 * median(own):,.1f}",
                "1" if title == "T5" else spread(over[title.removeprefix("T5VAE, ")], 3),
                f"{operations[title] / operations['T5']:.3f}",
                f"{operations[title] / median(own) / rate:.1%}",
            )
            for title, own in {
                "T5": means,
                **{f"T5VAE, {name}": own for name, own in taken.items()},
            }.items()
        ]
        text = (
            f"Rows of {batches[full].lengths.float().mean():.2f} tokens; the limit is at "
            f"{rate / 1e9:,.0f} billion operations a second.\n\n"
        )
        header = ("", "ms", "over T5", "operations over T5's", "share of the limit")
        targets = [
            Target(
                f"{size.name}, T5VAE, {name}, {kind}: a training step over T5's",
                WANTED_STEP,
                median(own),
                at_most=True,
            )
            for name, own in over.items()
        ]
        blocks.append(Block(kind, text + table(header, rows), targets))
    return [*blocks, split(size, of_t5)]


def operations_of(size: Size, tokens: int) -> dict[str, float]:
    """Of a step's matrix products."""
    found: dict[str, float] = {"T5": work.t5_operations(size)}
    for name in BOTTLENECKS:
        config = work.configuration(size, name)
        found[f"T5VAE, {name}"] = training_flops(config, size.rows, LENGTH, LENGTH, tokens)
    return found


def split(size: Size, of_t5: dict[bool, float]) -> Block:
    """Parts that differ, alone, and their differences over T5's step."""
    t5, model = work.bare_t5(size), work.t5vae(work.configuration(size, "flatten"))
    rows: dict[str, list[str]] = {}
    for full, kind in KINDS.items():
        say(f"{size.name}, parts, {kind}")
        total = 0.0
        for name, pair in work.parts(t5, model, work.batch(size, full)).items():
            theirs, ours = (1000 * median_seconds(part) if part else 0.0 for part in pair)
            difference = (ours - theirs) / 1000 / of_t5[full]
            total += difference
            row = [f"{theirs:,.1f}", f"{ours:,.1f}", f"{difference:+.1%}"]
            rows.setdefault(name, [name]).extend(row)
        rows.setdefault("all", ["all"]).extend(["", "", f"{total:+.1%}"])
    names = ("T5", "T5VAE, flatten", "difference")
    header = ("", *(f"{name}, {kind}" for kind in KINDS.values() for name in names))
    return Block("difference", table(header, [tuple(row) for row in rows.values()]))


def median_seconds(run: Callable[[], object]) -> float:
    """Of 3 times, after a first one."""
    return median([seconds(run) for _ in range(4)][1:])


# Decoding

Way = tuple[Callable[[], object], Callable[..., Tensor], Tensor]
"""What is timed, what decodes in it, and which latents."""


@torch.inference_mode()
def decoding(size: Size) -> Block:
    say(f"{size.name}, decoding")
    model = work.t5vae(work.configuration(size, "flatten", tie_word_embeddings=False)).eval()
    z_BD = torch.randn(size.latents, LATENT, generator=torch.Generator().manual_seed(0))
    few_BD = z_BD[: size.few]

    def one_by_one(decode: Callable) -> list[Tensor]:
        return [decode(model, z_1D)[0] for z_1D in few_BD.split(1)]

    ways: dict[str, Way] = {
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
    runs = {way: per(len(latents), run) for way, (run, _, latents) in ways.items()}
    times = take_turns(runs, TURNS)
    faster = {way: ratios(times[original], own) for way, own in times.items()}
    operations = {
        way: work.operations(decode, model, latents[: 1 if latents is few_BD else 2])
        for way, (_, decode, latents) in ways.items()
    }
    rows = [
        (
            way,
            figure(1000 * median(times[way])),
            "1" if way == original else spread(faster[way], 1),
            figure(operations[way] / 1e9),
            figure(operations[way] / median(times[way]) / 1e9),
        )
        for way in ways
    ]
    by_cache = operations[original] / operations[in_batch]
    distinct = len({tuple(row.tolist()) for row in expected})
    text = (
        f"{sum(map(len, expected)) / size.few:.1f} tokens are made of a latent. In a batch "
        f"{sum(same) / size.few:.1%} of the {size.few} latents get the same ids as by the "
        f"original's way, {distinct} of which are distinct. The cache saves a factor of "
        f"{by_cache:.1f} by operations; the rest, a factor of "
        f"{median(faster[in_batch]) / by_cache:.1f}, is the batch's.\n\n"
    )
    header = ("", "ms a latent", "times as fast", "billion operations", "billion a second")
    what = f"{size.name}, decoding {size.latents} latents: times as fast as the original's way"
    target = Target(what, WANTED_DECODE, median(faster[in_batch]))
    return Block("decoding", text + table(header, rows), [target])


def main() -> None:
    page = Page(__doc__, "benchmarks/model.md", quick="a tiny model, to see that all runs")
    size = work.TINY if page.options().quick else work.SMALL
    work.start_process_group()
    blocks = [*training(size), decoding(size)]
    dist.destroy_process_group()
    threads = f"torch has {torch.get_num_threads()} threads."
    page.publish(blocks, installed("torch", "transformers"), threads)


if __name__ == "__main__":
    main()
