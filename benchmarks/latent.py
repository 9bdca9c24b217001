"""Measure how fast a trained run's space encodes and decodes, beside the original's way.

    python benchmarks/latent.py --quick
    python benchmarks/latent.py --write

On the CPU; where there is a CUDA device, on it too. Lines are those of the run's shards.

Shapes: N lines, T tokens, D latent size.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import _model_work as work
import torch
from _latent_work import (
    Operations,
    count_operations,
    decode_original,
    decode_plain,
    encode_original,
    encode_plain,
    shapes_of,
)
from _model_work import Place, Size
from _report import Target, installed, machine, publish, table
from torch.profiler import ProfilerActivity, profile

from t5vae.common.errors import UserError
from t5vae.config import load_config
from t5vae.latent import LatentSpace

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "benchmarks" / "latent.md"

WANTED_ORIGINAL, WANTED_PLAIN = 50, 1.0
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot", "aten::_efficient_att")
OURS, PLAIN, ORIGINAL = "LatentSpace", "plain, in batches", "the original's, one by one"


class Amount(NamedTuple):
    lines: int
    few: int
    """Lines that are taken one by one."""
    turns: int


FULL, QUICK = Amount(10_000, 256, 7), Amount(512, 16, 2)

HEAD = """\
# How fast one encodes and decodes

Printed by `python benchmarks/latent.py --write` on this machine: {machine} torch has {threads} \
threads on the CPU.
"""

SECTION = """\
## On {place}

A trained run, by default that of `make train`: {layers} and {decoder_layers} layers of \
width {width}, {vocabulary:,} tokens, T = {length}, D = {latent}, fp32, greedy. {lines:,} training \
lines of the run's shards, {tokens:.1f} tokens each on average with the end token; batches of \
{batch}. All ways go from strings to codes, or from these codes to strings. Every turn times all \
of them, in alternate order, and a ratio is to what {ours} took in the same turn; figures are \
medians of {turns} turns, in brackets the least and the most.

"""

ENCODING = """\
### Encoding

`LatentSpace.encode(texts)`. Plain: `tokenizer(texts, padding=True)` and `model(mode="encode")` on \
batches in the given order. The original's way: a line at a time, padded to T, timed on {few} \
lines. Codes differ from the plain ones by {differ:.0e} at most.

"""

DECODING = """\
### Decoding

`LatentSpace.decode(z)`. Plain: transformers' `model.generate(latent=z, do_sample=False)` and \
`tokenizer.batch_decode` on batches in the given order. The original's way: a latent at a time, \
decoder and output layer over all tokens so far, without a cache, until the end token; timed on \
{few} latents. {same:.2%} of the texts are the plain way's, and {same_few:.2%} of the {few} the \
original's.

"""

LIMIT = """\
What {ours}'s time is made of. Needed are the operations of the matrix products for the tokens of \
each line and no pads, {needed:.2f} million a line, at {rate:,.0f} billion a second: that rate has \
the faster of the model's two largest products, alone, for {rows:,} tokens, into a buffer that is \
there already, in this run. What took no more than that would be {most:.1f} times as fast as the \
original's way. Computed in vain, at the same rate, is {vain}. Slower products are what \
the profiler finds in matrix products and fused attention beyond both: they are smaller, and their \
results need memory. Strings are what {strings} takes alone. The rest: {rest}norms, activations, \
and torch's and Python's work for each call.

"""

NO_DEVICE = """\
## On a GPU

There was none on this machine.
"""


# Measurements


def take_turns(
    ways: dict[str, tuple[Callable[[], object], int]], turns: int, place: Place
) -> dict[str, list[float]]:
    """Seconds a line of each way, in every turn."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for run, _ in ways.values():
        run()
    for turn in range(turns):
        for way in list(ways)[:: -1 if turn % 2 else 1]:
            run, lines = ways[way]
            seconds[way].append(place.seconds(run) / lines)
    return seconds


def median_seconds(run: Callable[[], object], case: "Case") -> float:
    return median(case.place.seconds(run) for _ in range(case.turns))


def ratios(seconds: dict[str, list[float]], way: str) -> list[float]:
    """How many times as fast as a way ours is, in every turn."""
    return [theirs / own for theirs, own in zip(seconds[way], seconds[OURS], strict=True)]


def speeds(seconds: dict[str, list[float]]) -> str:
    rows = [
        (
            way,
            spread([1 / each for each in taken], 0),
            "1" if way == OURS else spread(ratios(seconds, way), 2),
        )
        for way, taken in seconds.items()
    ]
    return table(("", "texts a second", f"{OURS} is times as fast"), rows)


def make_up(
    case: "Case",
    seconds: float,
    run: Callable[[], object],
    needed: int,
    computed: int,
    strings: float,
) -> str:
    """Where the seconds a line go."""
    products = product_seconds(run, case.place)
    limit, vain = needed / case.rate, (computed - needed) / case.rate
    parts = {
        "needed: the limit": limit,
        "computed in vain": vain,
        "slower products": products - limit - vain,
        "strings": strings,
    }
    whole = seconds * len(case.texts)
    parts |= {"the rest": whole - sum(parts.values()), "all": whole}
    rows = [
        (name, f"{1e6 * own / len(case.texts):,.1f}", f"{own / whole:.1%}")
        for name, own in parts.items()
    ]
    return table(("", "µs a text", "share"), rows)


def product_seconds(run: Callable[[], object], place: Place) -> float:
    """In matrix products and attention, as the profiler finds them."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
        place.wait()
    return (
        sum(
            event.self_device_time_total if place.on_gpu else event.self_cpu_time_total
            for event in profiler.key_averages()
            if event.key.startswith(PRODUCTS)
        )
        / 1e6
    )


def spread(values: list[float], digits: int) -> str:
    least, most = min(values), max(values)
    return f"{median(values):,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


class Case(NamedTuple):
    """What is measured, and where."""

    space: LatentSpace
    texts: list[str]
    few: int
    turns: int
    place: Place
    operations: Operations
    rate: float
    """Operations a second."""

    @property
    def where(self) -> str:
        return torch.cuda.get_device_name() if self.place.on_gpu else "the CPU"

    def limit(self, needed: int, seconds: dict[str, list[float]], **words: str) -> str:
        return LIMIT.format(
            ours=OURS,
            needed=needed / len(self.texts) / 1e6,
            rate=self.rate / 1e9,
            rows=self.space.batch_size * work.LENGTH,
            most=median(seconds[ORIGINAL]) * len(self.texts) * self.rate / needed,
            **words,
        )

    def targets(self, what: str, seconds: dict[str, list[float]]) -> list[Target]:
        title = f"{self.where}, {what} {len(self.texts):,} lines: times as fast as"
        return [
            Target(f"{title} {way}", wanted, median(ratios(seconds, way)))
            for way, wanted in ((ORIGINAL, WANTED_ORIGINAL), (PLAIN, WANTED_PLAIN))
        ]


def encoding(case: Case) -> tuple[str, list[Target]]:
    space, texts, place = case.space, case.texts, case.place
    few = texts[: case.few]
    print(f"{case.where}, encoding", file=sys.stderr)
    with shapes_of(space.model.t5.encoder) as shapes:
        z_ND = space.encode(texts)
    differ = (z_ND - encode_plain(space, texts, place)).abs().max().item()
    seconds = take_turns(
        {
            OURS: (lambda: space.encode(texts), len(texts)),
            PLAIN: (lambda: encode_plain(space, texts, place), len(texts)),
            ORIGINAL: (lambda: encode_original(space, few, place), len(few)),
        },
        case.turns,
        place,
    )
    by_length = case.operations.encode_T
    needed = sum(by_length[len(row) - 1] for row in space.tokenize(texts))
    computed = sum(rows * by_length[tokens - 1] for rows, tokens, _ in shapes)
    strings = median_seconds(lambda: space.tokenize(texts), case)
    text = (
        ENCODING.format(differ=differ, few=len(few))
        + speeds(seconds)
        + "\n"
        + case.limit(needed, seconds, vain="what goes into pads", strings="tokenizing", rest="")
        + make_up(
            case,
            median(seconds[OURS]),
            lambda: space.encode(texts),
            needed,
            computed,
            strings,
        )
    )
    return text, case.targets("encoding", seconds)


def decoding(case: Case) -> tuple[str, list[Target]]:
    space, place = case.space, case.place
    z_ND = space.encode(case.texts)
    few_ND = z_ND[: case.few]
    print(f"{case.where}, decoding", file=sys.stderr)
    with shapes_of(space.model.t5.decoder) as shapes:
        ids = space.decode_ids(z_ND)
    texts = space.detokenize(ids)
    same = shared(texts, decode_plain(space, z_ND, place))
    same_few = shared(texts, decode_original(space, few_ND, place))
    seconds = take_turns(
        {
            OURS: (lambda: space.decode(z_ND), len(z_ND)),
            PLAIN: (lambda: decode_plain(space, z_ND, place), len(z_ND)),
            ORIGINAL: (lambda: decode_original(space, few_ND, place), len(few_ND)),
        },
        case.turns,
        place,
    )
    step_T = case.operations.step_T
    expand, by_length = len(z_ND) * case.operations.expand, step_T.cumsum()
    needed = expand + sum(by_length[len(row) - 1] for row in ids)
    computed = expand + sum(rows * step_T[cached] for rows, _, cached in shapes)
    strings = median_seconds(lambda: space.detokenize(ids), case)
    text = (
        DECODING.format(few=len(few_ND), same=same, same_few=same_few)
        + speeds(seconds)
        + "\n"
        + case.limit(
            needed,
            seconds,
            vain="what ended rows take until they are left out",
            strings="detokenizing",
            rest="the choice of tokens, the cache's copies, ",
        )
        + make_up(
            case,
            median(seconds[OURS]),
            lambda: space.decode(z_ND),
            needed,
            computed,
            strings,
        )
    )
    return text, case.targets("decoding", seconds)


@torch.no_grad()
def measure(run: Path, amount: Amount, place: Place) -> tuple[str, list[Target]]:
    space = LatentSpace.load(run, device=place.device)
    dataset = load_config(run / "config.yaml").data.open()
    texts = dataset.texts("train", dataset.first("train", amount.lines))
    config, t5 = space.model.config, space.model.config.t5_config
    largest = Size("", config.t5, rows=space.batch_size, latents=0, few=0, turns=0)
    rate = work.product_rate(largest, place, repeats=10)
    operations = count_operations(config)
    case = Case(space, texts, min(amount.few, len(texts)), amount.turns, place, operations, rate)
    head = SECTION.format(
        place=case.where,
        layers=t5.num_layers,
        decoder_layers=t5.num_decoder_layers,
        width=t5.d_model,
        vocabulary=t5.vocab_size,
        length=config.sequence_length,
        latent=config.latent_size,
        lines=len(texts),
        tokens=sum(map(len, space.tokenize(texts))) / len(texts),
        batch=space.batch_size,
        ours=OURS,
        turns=amount.turns,
    )
    sections = [encoding(case), decoding(case)]
    targets = [target for _, own in sections for target in own]
    return head + "\n".join(text for text, _ in sections), targets


def shared(texts: list[str], others: list[str]) -> float:
    """The share of equal ones among the first."""
    return sum(a == b for a, b in zip(texts, others, strict=False)) / len(others)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs/quickstart", help="a trained run")
    parser.add_argument("--quick", action="store_true", help="few lines, to see that all runs")
    parser.add_argument("--write", action="store_true", help=f"save as {DOC.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.write and args.quick:
        parser.error("--write saves whole runs: leave out --quick")
    if not (args.run / "export").is_dir() or not (args.run / "config.yaml").is_file():
        parser.exit(2, f"{args.run} is no trained and exported run: make one with `make train`\n")

    places = [Place(torch.device("cpu"), torch.float32)]
    if torch.cuda.is_available():
        places.append(Place(torch.device("cuda"), torch.float32))
    try:
        amount = QUICK if args.quick else FULL
        sections = [measure(args.run, amount, place) for place in places]
    except UserError as error:
        parser.exit(2, f"{error}\n")
    if not torch.cuda.is_available():
        sections.append((NO_DEVICE, []))

    versions = installed(sys.executable, ("torch", "transformers", "tokenizers"))
    head = HEAD.format(machine=machine(versions), threads=torch.get_num_threads())
    publish(head, sections, DOC if args.write else None)


if __name__ == "__main__":
    main()
