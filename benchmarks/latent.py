"""Measure how fast a trained run's space encodes and decodes, beside the original's way.

    python benchmarks/latent.py --quick
    python benchmarks/latent.py --write

On the CPU. Lines are those of the run's shards.

Shapes: N lines, T tokens, D latent size.
"""

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
    steps_of,
)
from _report import ROOT, Block, Page, Target, installed, ratios, say, spread, table
from _timing import per, seconds, take_turns
from torch.profiler import ProfilerActivity, profile

from t5vae.common.errors import UserError
from t5vae.config import load_config
from t5vae.latent import LatentSpace

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot", "aten::_efficient_att")
OURS, PLAIN, ORIGINAL = "LatentSpace", "plain, in batches", "the original's, one by one"
WANTED = {ORIGINAL: 50, PLAIN: 1.0}


class Amount(NamedTuple):
    lines: int
    few: int
    """Lines that are taken one by one."""
    turns: int


FULL, QUICK = Amount(10_000, 256, 7), Amount(512, 16, 2)


class Case(NamedTuple):
    """What is measured."""

    space: LatentSpace
    texts: list[str]
    few: int
    turns: int
    operations: Operations
    rate: float
    """Operations a second."""

    def section(
        self,
        what: str,
        ways: dict[str, tuple[Callable[[], object], int]],
        work_on_strings: Callable[[], object],
        needed: int,
        computed: int,
        found: str,
    ) -> Block:
        """Texts a second of each way, and what our time is made of.

        Args:
            ways: what is timed, and how many texts it is for.
            needed, computed: operations.
        """
        say(what)
        count = len(self.texts)
        runs = {way: per(lines, run) for way, (run, lines) in ways.items()}
        times = take_turns(runs, self.turns)
        faster = {way: ratios(taken, times[OURS]) for way, taken in times.items()}
        rows = [
            (
                way,
                spread([1 / each for each in taken], 0),
                "1" if way == OURS else spread(faster[way], 2),
            )
            for way, taken in times.items()
        ]
        most = median(times[ORIGINAL]) * count * self.rate / needed
        text = (
            f"{found} Needed are {needed / count / 1e6:.2f} million operations a line, at "
            f"{self.rate / 1e9:,.0f} billion a second: what took no more than that would be "
            f"{most:.1f} times as fast as the original's way.\n\n"
        )
        text += table(("", "texts a second", f"{OURS} is times as fast"), rows) + "\n"

        limit, vain = needed / self.rate, (computed - needed) / self.rate
        parts = {
            "needed: the limit": limit,
            "computed in vain": vain,
            "slower products": product_seconds(ways[OURS][0]) - limit - vain,
            "strings": median(seconds(work_on_strings) for _ in range(self.turns)),
        }
        whole = median(times[OURS]) * count
        parts |= {"the rest": whole - sum(parts.values()), "all": whole}
        rows = [
            (name, f"{1e6 * own / count:,.1f}", f"{own / whole:.1%}") for name, own in parts.items()
        ]
        title = f"the CPU, {what} {count:,} lines: times as fast as"
        targets = [
            Target(f"{title} {way}", least, median(faster[way])) for way, least in WANTED.items()
        ]
        return Block(what, text + table(("", "µs a text", "share"), rows), targets)


def product_seconds(run: Callable[[], object]) -> float:
    """In matrix products and attention, as the profiler finds them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = (event for event in profiler.key_averages() if event.key.startswith(PRODUCTS))
    return sum(event.self_cpu_time_total for event in events) / 1e6


def encoding(case: Case) -> Block:
    space, texts, few = case.space, case.texts, case.texts[: case.few]
    differ = (space.encode(texts) - encode_plain(space, texts)).abs().max().item()
    by_length = case.operations.encode_T
    needed = sum(by_length[len(row) - 1] for row in space.tokenize(texts))
    return case.section(
        "encoding",
        {
            OURS: (lambda: space.encode(texts), len(texts)),
            PLAIN: (lambda: encode_plain(space, texts), len(texts)),
            ORIGINAL: (lambda: encode_original(space, few), len(few)),
        },
        lambda: space.tokenize(texts),
        needed=needed,
        computed=needed,  # on a CPU pads are not
        found=f"Codes differ from the plain ones by {differ:.0e} at most.",
    )


def decoding(case: Case) -> Block:
    space = case.space
    z_ND = space.encode(case.texts)
    few_ND = z_ND[: case.few]
    with steps_of(space.model.t5.decoder) as shapes:
        ids = space.decode_ids(z_ND)
    texts = space.detokenize(ids)
    same = shared(texts, decode_plain(space, z_ND))
    same_few = shared(texts, decode_original(space, few_ND))
    step_T = case.operations.step_T
    expand, by_length = len(z_ND) * case.operations.expand, step_T.cumsum()
    return case.section(
        "decoding",
        {
            OURS: (lambda: space.decode(z_ND), len(z_ND)),
            PLAIN: (lambda: decode_plain(space, z_ND), len(z_ND)),
            ORIGINAL: (lambda: decode_original(space, few_ND), len(few_ND)),
        },
        lambda: space.detokenize(ids),
        needed=expand + sum(by_length[len(row) - 1] for row in ids),
        computed=expand + sum(rows * step_T[cached] for rows, cached in shapes),
        found=f"{same:.2%} of the texts are the plain way's, and {same_few:.2%} of the "
        f"{len(few_ND)} the original's.",
    )


def shared(texts: list[str], others: list[str]) -> float:
    """The share of equal ones among the first."""
    return sum(a == b for a, b in zip(texts, others, strict=False)) / len(others)


@torch.no_grad()
def measure(run: Path, amount: Amount) -> list[Block]:
    space = LatentSpace.load(run, device="cpu")
    dataset = load_config(run / "config.yaml").data.open()
    texts = dataset.texts("train", dataset.first("train", amount.lines))
    config, t5 = space.model.config, space.model.config.t5_config
    rate = work.product_rate(config.t5, space.batch_size * work.LENGTH, repeats=10)
    operations = count_operations(config)
    case = Case(space, texts, min(amount.few, len(texts)), amount.turns, operations, rate)
    tokens = sum(map(len, space.tokenize(texts))) / len(texts)
    run_told = (
        f"{t5.num_layers} and {t5.num_decoder_layers} layers of width {t5.d_model}, "
        f"{t5.vocab_size:,} tokens, T = {config.sequence_length}, D = {config.latent_size}; "
        f"{len(texts):,} lines of {tokens:.1f} tokens; batches of {space.batch_size}."
    )
    return [Block("run", run_told), encoding(case), decoding(case)]


def main() -> None:
    page = Page(__doc__, "benchmarks/latent.md", quick="few lines, to see that all runs")
    page.add_argument("--run", type=Path, default=ROOT / "runs/quickstart", help="a trained run")
    args = page.options()
    if not (args.run / "export").is_dir() or not (args.run / "config.yaml").is_file():
        page.exit(2, f"{args.run} is no trained and exported run: make one with `make train`\n")
    try:
        blocks = measure(args.run, QUICK if args.quick else FULL)
    except UserError as error:
        page.exit(2, f"{error}\n")
    threads = f"torch has {torch.get_num_threads()} threads."
    page.publish(blocks, installed("torch", "transformers", "tokenizers"), threads)


if __name__ == "__main__":
    main()
