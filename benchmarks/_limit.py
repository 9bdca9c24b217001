"""What a step of a CPU cannot take less than, and where its time goes; the launcher starts it.

    deepspeed benchmarks/_limit.py LENGTHS CONFIG [section.key=value ...]

The limit: the operations of matrix products for real tokens, and the optimiser's own, each at the
rate that products of its shape reach alone, with all ranks multiplying at once. Attention's scores
do not count. Prints JSON.
"""

import json
import time
from collections import Counter
from statistics import median

import torch
import torch.distributed as dist
from _bare_loop import own_arguments, start, variants
from torch.profiler import ProfilerActivity, profile

from t5vae.cluster.agreement import all_max
from t5vae.model import T5VAEConfig
from t5vae.training.muon import STEPS, WIDE

Product = tuple[int, int, int]
"""m, k, n of [m, k] @ [k, n]."""

SECONDS = 0.05  # of one turn of one product
TURNS = 5
PROFILED = 10  # steps
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "softmax of the logits": ("aten::_log_softmax", "aten::nll_loss"),
    "copies, fills": ("aten::copy_", "aten::fill_", "aten::cat", "aten::index", "aten::clone"),
    "communication": ("c10d::", "gloo:"),
    "norms, activations, sums": ("aten::",),
}
"""Kinds of operators by the beginnings of their names; the first that fits counts."""


def of_model(config: T5VAEConfig, rows: int, tokens: int) -> Counter[Product]:
    """Of a forward and a backward pass, for a "flatten" bottleneck of full rank."""
    t5, T = config.t5_config, config.sequence_length
    C, heads, F = t5.d_model, t5.num_heads * t5.d_kv, t5.d_ff
    inner = 2 if t5.is_gated_act else 1
    forward: Counter[Product] = Counter()

    def layer(count: int, tokens: int, inputs: int, outputs: int) -> None:
        forward[tokens, inputs, outputs] += count

    def feed_forward(count: int, tokens: int) -> None:
        layer(count * inner, tokens, C, F)
        layer(count, tokens, F, C)

    for count, attentions in ((t5.num_layers, 1), (t5.num_decoder_layers, 2)):
        layer(count * (3 + (attentions - 1)), tokens, C, heads)
        layer(count * attentions, tokens, heads, C)
        feed_forward(count, tokens)
    layer(2 * t5.num_decoder_layers, rows * T, C, heads)  # keys and values of the memory
    layer(1, tokens, C, config.token_size)
    layer(1, rows, T * config.token_size, config.latent_size)
    layer(1, rows, config.latent_size, T * config.token_size)
    layer(1, rows * T, config.token_size, C)
    feed_forward(1, rows * T)
    layer(1, tokens, C, t5.vocab_size)
    found: Counter[Product] = Counter()
    for (m, k, n), count in forward.items():
        for product in ((m, k, n), (m, n, k), (k, m, n)):
            found[product] += count
    return found


def of_muon(shapes: list[tuple[int, int]], ranks: int) -> Counter[Product]:
    """Of the updates of matrices, a rank's share: as many times 1 / ranks."""
    found: Counter[Product] = Counter()
    for m, n in map(sorted, shapes):
        if n >= WIDE * m:
            found[m, n, m] += 1
            found[m, m, m] += 4 * STEPS - 3
            found[m, m, n] += 1
        else:
            found[m, n, m] += STEPS
            found[m, m, m] += STEPS
            found[m, m, n] += STEPS
    return Counter({product: count / ranks for product, count in found.items()})


def seconds(product: Product, dtype: torch.dtype) -> float:
    """One product's, into a buffer that is there; all ranks multiply at once."""
    m, k, n = product
    a, b, out = (torch.ones(*size, dtype=dtype) for size in ((m, k), (k, n), (m, n)))
    turns = []
    dist.barrier()
    for _ in range(TURNS):
        count, begin = 0, time.perf_counter()
        while (now := time.perf_counter()) < begin + SECONDS:
            torch.mm(a, b, out=out)
            count += 1
        turns.append((now - begin) / count)
    return median(turns)


def where(events: list) -> dict[str, float]:
    """Seconds a step of each kind of operator; the rest is Python's, autograd's and DeepSpeed's."""
    found = dict.fromkeys((*KINDS, "Python, DeepSpeed, waiting for the other rank"), 0.0)
    for event in events:
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), [*found][-1])
        found[kind] += event.self_cpu_time_total / 1e6 / PROFILED
    return found


def main(*arguments: str) -> None:
    job, engine, device, batches = start(*arguments)
    config, take_step = job.config, variants(engine, job, device)["sums"]
    for batch in batches:
        take_step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(PROFILED):
            take_step(batches[number % len(batches)])

    tokens = round(sum(int(batch.lengths.sum()) for batch in batches) / len(batches))
    parts = {"model": of_model(job.settings, len(batches[0].ids), tokens)}
    dtypes = {"model": torch.bfloat16 if config.train.half else torch.float32}
    if config.optim.name == "muon":
        shapes = [tuple(p.shape) for p in engine.module.parameters() if p.use_muon]
        parts["muon"] = of_muon(shapes, job.ranks.world_size)
        half = config.optim.muon_precision == "bf16"
        dtypes["muon"] = torch.bfloat16 if half else torch.float32
    limit = {}
    for part, products in parts.items():
        own = sum(count * seconds(p, dtypes[part]) for p, count in sorted(products.items()))
        flops = sum(2 * m * k * n * count for (m, k, n), count in products.items())
        (slowest,) = all_max(own)
        limit[part] = {"seconds": slowest, "flops": flops}
    if job.ranks.is_first:
        precision = config.train.precision
        told = {"limit": limit, "where": where(profiler.key_averages()), "precision": precision}
        print(json.dumps(told), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*own_arguments())
