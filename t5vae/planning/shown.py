"""A plan for people."""

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from t5vae.planning.machine import GIB, GIGABIT, GIGABYTE, Rates
from t5vae.planning.plan import Plan
from t5vae.planning.times import Course, StepTime


def shown(found: Plan) -> Group:
    """A plan for people."""
    where = "accelerator" if found.accelerated else "CPU"
    ranks = f"{found.world_size} rank{'s' * (found.world_size > 1)}"
    head = (
        f"{found.parameters:,} parameters on {ranks}, one {where} each; a step of a rank is "
        f"{found.accumulation} x {found.micro_batch_size} sequences of up to {found.length} tokens"
    )
    grid = Table("memory of a rank", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    moments = {"backward pass": found.memory.backward, "optimiser's step": found.memory.step}
    for moment in moments:
        grid.add_column(moment, justify="right")
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        sizes = (parts.get(part, 0) for parts in moments.values())
        grid.add_row(part, *(_size(size) if size else "-" for size in sizes))
    sums = (_size(sum(parts.values())) for parts in moments.values())
    grid.add_row("together", *sums, style="bold")
    lines = [
        _verdict(found),
        _host(found.memory.host),
        _sent(found.sent),
        _reads(found),
        *_times(found),
    ]
    top = [Text(f"{found.undealt}; this is a plan with the first", style="bold"), Text()]
    return Group(
        *(top if found.undealt else []),
        Text(head),
        Text(),
        grid,
        Text(),
        *map(Text, filter(None, lines)),
    )


def _verdict(found: Plan) -> str:
    if found.gpu_memory is None:
        return f"memory: {_size(found.memory.peak)}"
    answer = "fits in" if found.fits else "does not fit in"
    text = f"memory: {_size(found.memory.peak)} {answer} {_size(found.gpu_memory)}; "
    if found.largest is None:
        return text + (
            "no micro batch does: try a higher deepspeed.zero_stage, model.gradient_checkpointing, "
            "deepspeed.offload_optimizer, or more ranks"
        )
    micro, accumulation = found.largest
    return text + (
        f"the largest micro batch that does is data.micro_batch_size={micro} "
        f"(accumulation {accumulation})"
    )


def _host(parts: dict[str, int]) -> str:
    told = ", ".join(f"{part} {_size(size)}" for part, size in parts.items())
    return f"host memory: {_size(sum(parts.values()))} ({told})" if parts else ""


def _sent(parts: dict[str, int]) -> str:
    told = ", ".join(f"{part} {_size(size)}" for part, size in parts.items() if size)
    return f"sent in a step: {_size(sum(parts.values()))}" + (f" ({told})" if told else "")


def _reads(found: Plan) -> str:
    own, node, store = found.reads, found.node_reads, found.store_per_epoch
    if own is None or node is None or store is None:
        return ""
    return (
        f"read in a step: {_size(own.per_step)} of a rank; in an epoch: {_size(own.per_epoch)}, "
        f"{own.over_fair:.2f} times a fair share; {_size(store['node'])} of a node, "
        f"{node.over_fair:.2f} times; {_size(store['all'])} of all"
    )


def _times(found: Plan) -> list[str]:
    saved = found.checkpoint
    lines = [
        f"a checkpoint: {_size(saved.in_all)}, {_size(saved.of_rank)} of a rank; saved, or read "
        f"again, in {_seconds(saved.seconds)}",
    ]
    if found.step is None:
        lines.append("time of a step: give --tflops, what a rank's CPU multiplies in a second")
    else:
        lines += _step(found.step)
    if found.run:
        lines.append(_course(f"the run, {found.run.steps:,} steps", found.run))
    if found.epoch:
        lines.append(_course(f"an epoch, {found.epoch.steps:,.1f} steps", found.epoch))
    return [*lines, _rates(found.rates)]


def _step(step: StepTime) -> list[str]:
    parts = {"compute": step.compute, "send": step.sent}
    told = [f"{what} {_seconds(sum(of.values()))}{_parts(of)}" for what, of in parts.items() if of]
    if step.reading:
        told.append(f"read {_seconds(step.reading)}")
    return [
        f"a step: {_seconds(step.at_best)} if all overlaps that can, {_seconds(step.at_most)} if "
        f"nothing does: {', '.join(told)}"
    ]


def _parts(seconds: Mapping[str, float]) -> str:
    told = ", ".join(f"{part} {_seconds(size)}" for part, size in seconds.items())
    return f" ({told})" if len(seconds) > 1 else ""


def _course(what: str, course: Course) -> str:
    told = [f"{_range(course.hours)} hours", f"{_range(course.device_hours)} device hours"]
    if course.dollars:
        told.append(f"{_range(course.dollars)} dollars")
    return f"{what}: {', '.join(told)}"


def _rates(rates: Rates) -> str:
    peak = (
        ""
        if rates.peak is None
        else f"{rates.peak / 1e12:g} TFLOP/s of a rank x {rates.utilisation:g}, "
    )
    return (
        f"at {peak}{rates.link / GIGABYTE:g} GB/s within a node, {rates.network / GIGABIT:g} "
        f"Gbit/s of a node, {rates.store / GIGABYTE:g} GB/s of the store, "
        f"{rates.disk / GIGABYTE:g} GB/s of the disk"
    )


def _range(ends: tuple[float, float]) -> str:
    low, high = (f"{end:,.0f}" if end >= 100 else f"{end:.3g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _seconds(seconds: float) -> str:
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:,.3g} {name}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e6:.3g} us"


def _size(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:.0f} B"
