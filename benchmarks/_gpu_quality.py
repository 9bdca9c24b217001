"""The section of `gpu.py` that ends it: how good the space of a T5-small is after some minutes."""

from collections.abc import Iterator

import quality as contest
from _gpu_runs import Launch, metrics
from _gpu_worker import Bench, Part
from _launches import TOY
from _report import table

from t5vae.checkpoint.export import export
from t5vae.config import load_config
from t5vae.evaluation import evaluate_run

AFTER = 45.0
"""Seconds for the export and the evaluation."""
SAMPLES = 2000

QUALITY = """\
"Ours" of `benchmarks/quality.py`, on its lines of up to {length} tokens: width {t5.d_model}, \
{t5.num_layers} + {t5.num_layers} layers, D = {config.model.latent_size}, batches of \
{config.data.global_batch_size}, {steps:,} steps{minutes}.

"""


def quality(bench: Bench) -> Iterator[Part]:
    """Train for what time there is, then judge; the run's own last evaluation is told before."""
    place = contest.place()
    minutes = max(10.0, bench.left - AFTER) / 60
    amount = (*place.settings, f"train.minutes={minutes}", f"eval.samples={SAMPLES}")
    if bench.smoke:
        few = ("eval.sequences=60", "eval.samples=60", "eval.interpolations=5")
        amount = (*TOY, "data.global_batch_size=64", "train.steps=10", *few)
    often = ("checkpoint.every=0", "eval.every=1000000000", "eval.decoded=256")
    launch = Launch(bench, "quality", *often, f"data.shards={bench.short_lines}", *amount)
    launch.end()

    config, last = load_config(launch.run / "config.yaml"), metrics(launch.run)[-1]
    head = QUALITY.format(
        length=contest.open_index(str(bench.short_lines)).max_length,
        config=config,
        t5=config.model.t5,
        steps=last["step"],
        minutes="" if bench.smoke else f" in {minutes:.1f} minutes, start-up included",
    )
    own = [
        (name, "" if value is None else f"{value:.3f}")
        for name, value in sorted(last.items())
        if name.startswith("eval/")
    ]
    yield Part("table", head + table(("the run's own last evaluation", ""), own))

    export(launch.run)
    report, *_ = evaluate_run(launch.run)
    rows = contest.figure_rows({"ours": report})
    scores = dict.fromkeys(("legacy", "autoencoder", "ours"), contest.score(report))
    targets = [t for t in contest.targets(report, scores, place) if "score" not in t.what]
    yield Part("table", head + table(("", "ours", *contest.CONTROLS), rows), tuple(targets))
