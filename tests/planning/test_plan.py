"""`t5vae plan`, held against what real runs take."""

import json
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest

import shards
from shards import ShardStream
from t5vae.common.errors import UserError
from t5vae.config import BatchSplit, load_config
from t5vae.metrics.reading import read_metrics
from t5vae.planning.memory import PYTHON, Sizes, regime_of
from t5vae.planning.plan import plan, reads, sent
from tests.launching import rank_starter, run_of, small_config

WIDE = {"d_model": 512, "d_kv": 64, "d_ff": 8192, "num_layers": 3, "num_heads": 8}
NARROW = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 4}


def test_a_plan_is_of_the_configuration_as_it_is(make_config):
    config = make_config(data={**make_config().data.model_dump(), "micro_batch_size": 4})
    found = plan(config, nodes=2, gpus_per_node=1)
    assert (found.world_size, found.accelerated) == (2, True)
    assert (found.micro_batch_size, found.accumulation) == (4, 2)
    assert found.length == 24
    assert found.fits is None
    assert found.largest is None
    assert found.reads.over_fair == pytest.approx(2)  # a small dataset is one window


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_largest_micro_batch_is_the_largest_that_fits(make_config, nodes):
    config = make_config(
        data={**make_config().data.model_dump(), "global_batch_size": 1024},
        optim={"name": "adamw"},
    )
    shares = [n for n in range(1, 1024 // nodes + 1) if 1024 // nodes % n == 0]

    def peak(micro):
        own = config.data.model_copy(update={"micro_batch_size": micro})
        return plan(
            config.model_copy(update={"data": own}), nodes=nodes, gpus_per_node=0
        ).memory.peak

    peaks = {micro: peak(micro) for micro in shares}
    for micro, larger in pairwise(shares):
        there = (peaks[micro] + peaks[larger]) / 2
        found = plan(config, nodes=nodes, gpus_per_node=0, gpu_memory=there / 2**30)
        assert found.largest == (micro, 1024 // nodes // micro)
        assert found.fits is False
    found = plan(config, nodes=nodes, gpus_per_node=0, gpu_memory=1000)
    assert found.fits
    assert found.largest == (1024 // nodes, 1)


def test_a_micro_batch_that_deepspeeds_own_configuration_sets_is_kept(make_config):
    config = make_config(
        data={**make_config().data.model_dump(), "micro_batch_size": 4},
        deepspeed={"config": {"train_micro_batch_size_per_gpu": 4}},
    )
    assert plan(config, nodes=1, gpus_per_node=0, gpu_memory=1000).largest == (4, 4)


@pytest.mark.parametrize("memory", [0, -1, float("nan")])
def test_memory_that_is_none_is_refused(make_config, memory):
    with pytest.raises(UserError, match="--gpu-memory"):
        plan(make_config(), nodes=1, gpus_per_node=1, gpu_memory=memory)


def test_a_batch_that_cannot_be_dealt_is_planned_with_the_nearest(make_config):
    found = plan(make_config(), nodes=3, gpus_per_node=1)
    assert found.undealt == (
        "data.global_batch_size 16 cannot be dealt to 3 ranks; "
        "use data.global_batch_size=15, or data.global_batch_size=18"
    )
    assert (found.global_batch_size, found.micro_batch_size, found.accumulation) == (15, 5, 1)
    assert found.reads is not None
    assert plan(make_config(), nodes=2, gpus_per_node=1).undealt is None


def test_the_large_preset_can_be_planned_on_more_ranks_than_it_was_made_for():
    found = plan(load_config("large"), nodes=64, gpus_per_node=8)
    assert "512 ranks in micro batches of 64; use data.micro_batch_size=8, or " in found.undealt
    assert (found.global_batch_size, found.micro_batch_size, found.accumulation) == (4096, 8, 1)


@pytest.mark.parametrize(
    ("optimizer", "stage", "accumulation", "gradients", "weights"),
    [
        # bytes a parameter that two ranks were seen to send, in bf16
        ("adamw", 0, 2, 4, 0),
        ("adamw", 1, 1, 2, 1),
        ("adamw", 1, 2, 4, 1),
        ("adamw", 2, 2, 8, 1),
        ("adamw", 3, 2, 4, 2),
        ("muon", 3, 1, 2, 1),
        ("muon", 3, 2, 8, 2),
    ],
)
def test_what_is_sent_follows_from_the_stage(
    make_config, optimizer, stage, accumulation, gradients, weights
):
    config = make_config(optim={"name": optimizer}, deepspeed={"zero_stage": stage})
    sizes = Sizes(total=10**6, own=9 * 10**5, largest_group=10**5)
    found = sent(regime_of(config, BatchSplit(16, 2, 8 // accumulation, accumulation)), sizes)
    assert found["gradients"] == gradients * 10**6
    assert found["weights"] == weights * 10**6
    gathered = 4 * accumulation if (optimizer, stage) == ("muon", 3) else 0
    assert found.get("muon", 0) == gathered * 9 * 10**5
    assert found["latents"] == 16 * 8 * 4 / 2
    assert not any(sent(regime_of(config, BatchSplit(16, 1, 16, 1)), sizes).values())


@pytest.fixture(scope="module")
def long_dataset(tmp_path_factory):
    """Enough blocks for lanes: 300 of 16 sequences, and a short one."""
    folder = tmp_path_factory.mktemp("long")
    lines = "\n".join(f"v{i} = {i}" for i in range(4810)) + "\n"
    (folder / "lines.txt").write_text(lines)
    options = {"tokenizer": "byte", "max_length": 16, "valid_fraction": 0, "block_size": 16}
    shards.build(folder / "lines.txt", folder / "data", **options)
    return folder / "data"


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_reads_are_those_of_the_windows_that_a_ranks_sequences_lie_in(long_dataset, ranks):
    steps, batch = 40, 48
    for rank in range(ranks):
        with ShardStream(
            long_dataset, seed=5, global_batch_size=batch, rank=rank, world_size=ranks
        ) as stream:
            own = stream.bytes_read(steps)
            seen = np.concatenate([next(stream).sequence.numpy() for _ in range(steps)])
            source = stream._dealer.sources[0]
            touched = set((seen // 16).tolist())
            table = source.reader.table
            expected = sum(
                int(table[b]["tokens"]) * 2 + int(table[b]["sequences"]) * 2 for b in touched
            )
            assert own == expected


def test_an_epoch_of_one_rank_reads_everything_once(long_dataset, make_config):
    config = make_config(data={"shards": str(long_dataset), "global_batch_size": 16})
    dataset = config.data.open()
    found = reads(config, dataset, 1)
    split = dataset.indexes[0].split("train")
    assert found.per_epoch == pytest.approx(2 * split.tokens + 2 * split.sequences, rel=0.02)
    assert found.over_fair == 1


def command(monkeypatch, capsys, *arguments):
    from t5vae.cli import main

    monkeypatch.setattr("sys.argv", ["t5vae", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


@pytest.fixture
def file(tmp_path, dataset):
    return small_config(tmp_path, dataset)


def test_the_command_prints_tables_or_one_document(monkeypatch, capsys, file):
    code, out, _ = command(monkeypatch, capsys, file, "--nodes", 2, "--gpu-memory", 16)
    assert code == 0
    for words in ("parameters on 2 ranks", "backward pass", "moments", "fits in 16.00 GiB"):
        assert words in out
    assert "the largest micro batch that does is data.micro_batch_size=8 (accumulation 1)" in out
    code, out, _ = command(monkeypatch, capsys, file, "--gpus-per-node", 2, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["world_size"] == 2
    assert document["rates"] == asdict(plan(load_config(file), nodes=1, gpus_per_node=2).rates)
    assert document["peak"] == max(
        sum(document["memory"][m].values()) for m in ("backward", "step")
    )


def test_the_command_tells_time_and_dollars(monkeypatch, capsys, file):
    asked = (file, "--nodes", 3, "train.steps=7200")
    code, out, _ = command(monkeypatch, capsys, *asked)
    assert code == 0
    first, *_ = out.splitlines()
    assert "cannot be dealt to 3 ranks" in first
    assert first.endswith("; this is a plan with the first")
    assert "give --tflops" in out
    assert "the run, " not in out
    speed = ("--tflops", 0.5, "--utilisation", 0.25, "--network", 8, "--price", 3)
    code, out, _ = command(monkeypatch, capsys, *asked, *speed)
    assert code == 0
    for words in ("a step: ", "the run, 7,200 steps: ", " dollars", "an epoch, ", "a checkpoint: "):
        assert words in out
    assert "at 0.5 TFLOP/s of a rank x 0.25, 1 GB/s within a node, 8 Gbit/s of a node" in out
    code, out, _ = command(monkeypatch, capsys, *asked, *speed, "--json")
    document = json.loads(out)
    step, run = document["step"], document["run"]
    assert step["compute"]["model"] == pytest.approx(document["operations"]["model"] / 0.125e12)
    assert step["sent"]["gradients"] == pytest.approx(document["sent"]["gradients"] / 1e9)
    assert run["hours"] == [2 * step["at_best"], 2 * step["at_most"]]
    assert run["dollars"] == pytest.approx([9 * hours for hours in run["hours"]])
    assert document["store_per_epoch"]["all"] == 3 * document["reads"]["per_epoch"]


def test_what_is_too_little_for_any_micro_batch_names_the_ways_out(monkeypatch, capsys, file):
    code, out, _ = command(monkeypatch, capsys, file, "--gpu-memory", 0.1)
    assert code == 0
    assert "no micro batch does: try a higher deepspeed.zero_stage" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nodes", "9" * 20],
        ["--gpu-memory", "0"],
        ["--device", "x"],
        ["--disk", "0"],
        ["data.shards=nowhere"],
        ["a.b=1"],
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, file, arguments):
    code, out, err = command(monkeypatch, capsys, file, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.fixture(scope="module")
def longest(tmp_path_factory):
    """Sequences as long as a plan takes them all to be: a CPU computes no pads."""
    folder = tmp_path_factory.mktemp("longest")
    lines = [f"values_{i:05} = f({i:05})" for i in range(1000)]
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    shards.build(folder / "lines.txt", folder / "shards", tokenizer="byte", max_length=24)
    return folder / "shards"


@pytest.mark.distributed
def test_real_runs_take_what_was_planned(longest, tmp_path_factory):
    """Beside the process itself: within a sixth."""
    adamw, muon = {"optim": {"name": "adamw"}}, {"optim": {"name": "muon"}}
    zero = [{"deepspeed": {"zero_stage": stage}} for stage in range(4)]
    copied = {"checkpoint": {"asynchronous": True, "every": 1}}
    variants = {
        "states, fp32, ZeRO-1": (1, 8, None, WIDE, adamw | zero[1] | copied, "fp32"),
        "sums over micro steps, ZeRO-1": (2, 8, 2, WIDE, adamw | zero[1], "bf16"),
        "sums over micro steps, ZeRO-2": (2, 8, 2, WIDE, adamw | zero[2], "bf16"),
        "Muon's momentum, ZeRO-3": (2, 8, 2, WIDE, muon | zero[3], "bf16"),
        "activations, fp32": (1, 768, None, NARROW, adamw, "fp32"),
    }
    with rank_starter(tmp_path_factory.mktemp("ranks")) as start:
        for name, (ranks, batch, micro, t5, sections, precision) in variants.items():
            config = small_config(
                tmp_path_factory.mktemp("run"),
                longest,
                data={
                    "shards": str(longest),
                    "global_batch_size": batch,
                    "micro_batch_size": micro,
                },
                model={"t5": t5, "latent_size": 64, "vocab_size": 2048},
                train={"steps": 2, "precision": precision},
                **sections,
            )
            done = start(ranks, config)
            assert done.end() == [0] * ranks, done.output()
            taken = read_metrics(run_of(config))[-1]["memory_bytes"] - PYTHON
            planned = plan(load_config(config), nodes=ranks, gpus_per_node=0).memory.peak - PYTHON
            assert planned == pytest.approx(taken, rel=1 / 6), f"{name}: {planned:,} for {taken:,}"
