"""Sections of `gpu.py` that time what surrounds training: MMD, and encoding and decoding.

Shapes: N codes, D latent size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import mean, median
from typing import Any

import _latent_work as ways
import torch
from _gpu_worker import Bench, Part, tried
from _launches import QUICKSTART, T5_SMALL, TOY
from _mmd_peers import CONTENDERS, Peak, Timed, block, prepared
from _mmd_peers import limits as two_products
from _report import Target, figure, ratios, table
from _timing import seconds as clock

from t5vae.config import load_config
from t5vae.latent import LatentSpace
from t5vae.model import T5VAE
from t5vae.training.build import is_installed, model_config

TURNS = 7

# MMD

SIZES = ((4096, 256), (32768, 256), (512, 128), (4096, 1000))
PRECISION = {"triton": "bf16", "triton_imq": "bf16"}
"""Of a contender's products, where it is not fp32."""
NAMES = ("multi_rbf", "imq", "triton", "triton_imq", "gemm", "geomloss", "gemm_compiled")
OF_CUBLAS, OF_BLOCKED = 1.7, 1.3

PRODUCTS = """\
Forward and backward, over two products of 4 N² D operations in all by cuBLAS in that precision, \
into buffers that are there; medians of up to {turns} turns, each of which times all. Triton's \
products have factors of fp16, at the rate of bf16.

"""


@dataclass
class Found:
    """Of a contender at a size: seconds, and ratios to two products by precision, turn by turn."""

    seconds: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    bytes: int = 0
    failure: str = ""


def products(bench: Bench) -> Iterator[Part]:
    """MMD beside cuBLAS and its peers."""
    sizes = ((64, 16),) if bench.smoke else SIZES
    targets: list[Target] = []
    gains = []
    for number, (N, D) in enumerate(sizes):
        seconds = bench.left / (len(sizes) - number)
        found = compare(bench, N, D, NAMES, time.time() + seconds)
        head = PRODUCTS.format(turns=TURNS) if number == 0 else ""
        yield Part(f"{N} {D}", head + product_table(f"N = {N:,}, D = {D:,}", found))
        for name, own in found.items():
            blocked = found["imq" if name.endswith("imq") else "multi_rbf"]
            if own.failure or blocked.failure:
                continue
            if name in PRECISION:
                gains.append(median(blocked.seconds) / median(own.seconds))
            if N >= 4096 and D <= 256 and (name in PRECISION or own is blocked):
                precision = PRECISION.get(name, "fp32")
                what = f"{CONTENDERS[name].title}, N = {N:,}: over two products in {precision}"
                ratio = median(own.ratios[precision])
                targets.append(Target(what, OF_CUBLAS, ratio, at_most=True))
    if gains:
        what = "Triton: times as fast as blocked, at the best size"
        targets.append(Target(what, OF_BLOCKED, max(gains)))
        what = "Triton: times as fast as blocked, at the worst size"
        targets.append(Target(what, 1, min(gains)))
    yield Part("targets", "", tuple(targets))


def can_run(name: str, bench: Bench) -> bool:
    on_device = "triton" not in name or (bench.on_gpu and is_installed("triton"))
    return on_device and all(map(is_installed, CONTENDERS[name].packages))


def compare(bench: Bench, N: int, D: int, names: tuple[str, ...], end: float) -> dict[str, Found]:
    """Turns of all that can run here, until that time at most; one of each at least."""
    draw = torch.Generator().manual_seed(0)
    z_ND, p_ND = torch.randn(2, N, D, generator=draw).to(bench.device)
    device = z_ND.device
    limits = {name: Timed(call, device) for name, call in two_products(z_ND, z_ND).items()}
    calls: dict[str, Timed] = {}
    found: dict[str, Found] = {}
    for name in names:
        if can_run(name, bench) and (name != "gemm_compiled" or time.time() < end):
            call = tried(prepared, CONTENDERS[name], z_ND, p_ND, torch.get_num_threads())
            found[name] = Found(failure=call) if isinstance(call, str) else Found()
            if not isinstance(call, str):
                found[name].bytes = peak_of(call, device)
                calls[name] = Timed(call, device)
    for turn in range(TURNS + 1):
        least = {name: limit.seconds() for name, limit in limits.items()}
        for name, call in calls.items():
            seconds = call.seconds()
            if turn:
                found[name].seconds.append(seconds)
                for precision, limit in least.items():
                    found[name].ratios.setdefault(precision, []).append(seconds / limit)
        if turn and time.time() > end:
            break
    return found


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    call()
    peak = Peak(device)
    call()
    return peak.extra()


def product_table(title: str, found: dict[str, Found]) -> str:
    precisions = list(dict.fromkeys(chain(*(own.ratios for own in found.values()))))
    rows = [
        (CONTENDERS[name].title, own.failure)
        if own.failure
        else (
            CONTENDERS[name].title,
            figure(1000 * median(own.seconds)),
            *(figure(median(own.ratios[precision])) for precision in precisions),
            figure(own.bytes / 2**20),
        )
        for name, own in found.items()
    ]
    header = (title, "ms", *(f"over {precision}" for precision in precisions), "MiB")
    return table(header, rows)


# A rank's share

RANKS = 64
GATHERS = ((65536, 256), (65536, 1024))

GATHER = """\
What the first of {ranks} ranks does with the codes of all, once they are gathered: its {rows:,} \
rows against N, multi_rbf and imq, `blocked`, forward and backward, over the two products of its \
own rows. A gather brings it 4 N (D + 1) bytes.

"""


def gather(bench: Bench) -> Iterator[Part]:
    """MMD of one rank of many, whose gather is over."""
    sizes = ((256, 16),) if bench.smoke else GATHERS
    rows = []
    for N, D in sizes:
        draw = torch.Generator().manual_seed(0)
        z_ND = torch.randn(N, D, generator=draw).to(bench.device)
        b = N // RANKS
        limit = Timed(two_products(z_ND[:b], z_ND)["fp32"], z_ND.device)
        for kernel in ("multi_rbf", "imq"):
            contender = block(kernel, kernel)._replace(ranks=RANKS)
            call = prepared(contender, z_ND, z_ND, torch.get_num_threads())
            timed = Timed(call, z_ND.device)
            turns = [(timed.seconds(), limit.seconds()) for _ in range(TURNS + 1)][1:]
            own, least = zip(*turns, strict=True)
            over = median(ratios(own, least))
            times = (figure(1000 * median(own)), figure(1000 * median(least)), figure(over))
            rows.append(
                (f"{kernel}, N = {N:,}, D = {D:,}", *times, figure(4 * N * (D + 1) / 2**20))
            )
    header = ("", "ms", "two products in fp32, ms", "over them", "gathered, MiB")
    text = GATHER.format(ranks=RANKS, rows=sizes[0][0] // RANKS)
    yield Part("table", text + table(header, rows))


# Encoding and decoding

LINES, PLAIN_LINES, FEW = 100_000, 8_192, 64
PLAIN, ORIGINAL = "plain, in batches", "the original's way"
WANTED = {PLAIN: 1.0, ORIGINAL: 50.0}
OTHERS: dict[str, dict[str, Callable[..., object]]] = {
    "encode": {PLAIN: ways.encode_plain, ORIGINAL: ways.encode_original},
    "decode": {PLAIN: ways.decode_plain, ORIGINAL: ways.decode_original},
}

CHUNK = 4096
"""Texts of a call."""

CODES = """\
`LatentSpace` of a T5-small with random weights, fp32, batches of {batch}; {lines:,} lines of \
{tokens:.1f} tokens on average, which decode to {decoded:.1f} of at most {length}: by ours, as \
many as there was time for; {plain:,} by transformers' calls in batches in the given order; {few} \
by the original's way, one by one and without a cache.

"""


@torch.no_grad()
def codes(bench: Bench) -> Iterator[Part]:
    """Encode and decode lines in three ways."""
    count, plain, few = (64, 32, 4) if bench.smoke else (LINES, PLAIN_LINES, FEW)
    space, texts = untrained_space(bench, count)
    some = texts[:plain]
    text = CODES.format(
        length=space.model.config.sequence_length,
        batch=space.batch_size,
        lines=len(texts),
        tokens=mean(map(len, space.tokenize(some))),
        decoded=mean(map(len, space.decode_ids(space.encode(some[:CHUNK])))),
        plain=plain,
        few=few,
    )
    rows: list[tuple[str, ...]] = []
    targets = []
    for what, others in OTHERS.items():
        given = texts if what == "encode" else space.encode(texts)
        seconds = bench.left / 3 if what == "encode" else bench.left / 2
        ours, done = rate(getattr(space, what), given, seconds)
        rows.append((f"{what}: `LatentSpace`", f"{done:,}", figure(ours), "1"))
        for way, run in others.items():
            some = given[: plain if way == PLAIN else few]
            theirs, done = rate(lambda some, run=run: run(space, some), some, bench.left / 2)
            rows.append((f"{what}: {way}", f"{done:,}", figure(theirs), figure(ours / theirs)))
            targets.append(Target(f"{what}: times as fast as {way}", WANTED[way], ours / theirs))
        header = ("", "texts", "texts a second", "LatentSpace is times as fast")
        yield Part("table", text + table(header, rows), tuple(targets))


def rate(run: Callable[[Any], object], given: Sequence, seconds: float) -> tuple[float, int]:
    """Texts a second, and how many were done in about so many seconds, after a few."""
    run(given[:FEW])
    done, taken = 0, 0.0
    while done < len(given) and (taken < seconds or not done):
        chunk = given[done : done + CHUNK]
        taken += clock(run, chunk)
        done += len(chunk)
    return done / taken, done


def untrained_space(bench: Bench, count: int) -> tuple[LatentSpace, list[str]]:
    """A space, and lines for it."""
    sizes = TOY if bench.smoke else T5_SMALL
    config = load_config(QUICKSTART, [*sizes, f"data.shards={bench.lines}"])
    dataset = config.data.open()
    torch.manual_seed(0)
    model = T5VAE(model_config(config.model, config.objective, dataset)).eval().to(bench.device)
    texts = dataset.texts("train", dataset.first("train", count))
    return LatentSpace(model, dataset.tokenizer()), texts
