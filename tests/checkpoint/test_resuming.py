"""checkpoint.resume auto and never."""

import errno
import os
import random

import numpy as np
import pytest
import torch

from t5vae.checkpoint import resuming
from t5vae.checkpoint.randomness import seed_everything
from t5vae.checkpoint.resuming import Start
from t5vae.cluster.run_folder import lock_run
from t5vae.common.errors import StorageError, UserError
from t5vae.training.anomalies import Anomalies
from tests.checkpoint.beginning import (
    IDENTITY,
    Began,
    are_weights_of,
    damage,
    from_weights,
    names,
)


@pytest.mark.parametrize("rule", ["auto", "never"])
def test_where_there_is_nothing_a_run_starts_anew(begin, make_engine, rule):
    began = begin(2, checkpoint={"resume": rule})
    assert began.start == Start(done=0, data={}, anomalies={}, weights_from=None)
    assert began.said == []
    assert began.dropped == [0]
    assert all(are_weights_of(engine, make_engine(seed=9)) for engine in began.engines)


def test_a_run_goes_on_from_its_newest_checkpoint_on_every_rank(begin, run, save, make_engine):
    means = {"nats_per_token": 1.5}
    anomalies = Anomalies(9, 1.0, skipped=2, spikes=1, means=means, seen=30)
    for step in (10, 20):
        engine = make_engine(seed=step, steps=3)
        told = {"watch": anomalies.state_dict(), "data": {"consumed": step}}
        save(run / "checkpoints", step, IDENTITY, engine, world=2, **told)
    began = begin(2)
    assert began.where == (20, None)
    assert began.start.data == {"consumed": 20}
    assert began.dropped == [20]
    assert began.said == [f"resuming from {run}/checkpoints/step-00000020"]
    for found in began.engines:
        assert are_weights_of(found, engine)
        state, wanted = found.optimizer.state_dict(), engine.optimizer.state_dict()
        for number, moments in wanted["state"].items():
            for kind, moment in moments.items():
                assert state["state"][number][kind].equal(moment), kind
    counting = Anomalies(3, 5.0)
    counting.load_state_dict(began.start.anomalies)
    assert counting == Anomalies(3, 5.0, skipped=2, spikes=1, means=means, seen=30)


def draws():
    return random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()


def test_a_new_run_draws_what_its_seed_says(begin):
    for seed in (0, 7):
        seed_everything(seed)
        expected = draws()
        begin(identity={**IDENTITY, "seed": seed})
        assert draws() == expected


def test_generators_go_on_where_they_were_saved(begin, run, save):
    seed_everything(5)
    random.gauss(0, 1)  # leaves half a pair behind
    np.random.randn()
    save(run / "checkpoints", 10, IDENTITY)
    expected = draws()
    assert draws() != expected
    begin()
    assert draws() == expected


def test_on_other_ranks_generators_are_seeded_by_seed_rank_and_step(begin, run, save):
    found = []
    for step in (10, 20):
        save(run / "checkpoints", step, IDENTITY, world=2)
        for start in (1, 2):
            seed_everything(start)  # makes no difference
            begin(1)
            found.append(draws())
    assert found[0] == found[1] != found[2] == found[3]


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (2, {}, ["world size: 2 before, 3 now"]),
        (3, {"zero_stage": 2}, ["zero stage: 0 before, 2 now"]),
        (3, {"precision": "bf16"}, ["precision: fp32 before, bf16 now"]),
        (3, {"mmd_batch": 8}, ["mmd batch: 16 before, 8 now"]),
        (1, {"mmd_batch": 8}, ["world size: 1 before, 3 now", "mmd batch: 16 before, 8 now"]),
        (3, {}, []),
    ],
)
def test_what_may_differ_is_told_and_the_run_goes_on(
    begin, run, save, make_engine, before, now, said
):
    engine = make_engine(seed=4)
    save(run / "checkpoints", 10, IDENTITY, engine, world=before)
    began = begin(3, layout=now)
    assert began.where == (10, None)
    assert began.said[1:] == said
    assert all(are_weights_of(found, engine) for found in began.engines)


@pytest.mark.parametrize("differs", [{"optimizer": "muon"}, {"seed": 7}, {"tokenizer": "bb"}])
def test_another_runs_checkpoint_is_refused_on_all_ranks(begin, run, save, make_engine, differs):
    save(run / "checkpoints", 10, IDENTITY, world=2)
    message = begin.refused(2, {**IDENTITY, **differs})
    for name, value in differs.items():
        assert name in message
        assert str(value) in message
        assert str(IDENTITY[name]) in message
    assert names(run / "checkpoints") == ["step-00000010"]


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(begin, run, save, make_engine):
    for step in (10, 20):
        save(run / "checkpoints", step, IDENTITY, make_engine(seed=step), world=2)
    damage(run / "checkpoints/step-00000020")
    began = begin(2)
    assert began.where == (10, None)
    assert "step-00000020 is damaged" in began.said[0]
    assert began.said[1].endswith("step-00000010")
    assert are_weights_of(began.engines[1], make_engine(seed=10))


def flip(file):
    """A bit, which no size tells."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_what_one_rank_finds_changed_is_left_by_all(begin, run, save, make_engine, world, rank):
    for step in (10, 20, 30):
        save(run / "checkpoints", step, IDENTITY, make_engine(seed=step), world=3)
    for step in (20, 30):
        flip(run / f"checkpoints/step-000000{step}/rank-0000{rank}.safetensors")
    began = begin(world)
    assert began.where == (10, None)
    assert [text.split("; ")[0] for text in began.said[:2]] == [
        f"step-000000{step} is damaged (rank-0000{rank}.safetensors has changed)"
        for step in (30, 20)
    ]
    assert all(are_weights_of(engine, make_engine(seed=10)) for engine in began.engines)
    assert began.dropped == [10]


@pytest.mark.parametrize("by", ["run", "checkpoint"])
def test_a_source_that_one_rank_finds_changed_is_not_taken(begin, other, by):
    flip(other / "checkpoints/step-00000020/rank-00001.safetensors")
    if by == "run":
        began = begin(2, checkpoint=from_weights(other))
        assert began.start.weights_from == str(other / "checkpoints/step-00000010")
    else:
        path = other / "checkpoints/step-00000020"
        message = begin.refused(2, checkpoint=from_weights(path))
        assert f"{path} holds no whole checkpoint" in message
    assert names(other / "checkpoints") == ["step-00000010", "step-00000020"]


def test_on_as_many_ranks_nobody_opens_a_file_but_to_hash_it_and_to_load_its_own(
    begin, run, save, monkeypatch
):
    """But for weights and moments, of which these ranks, without ZeRO, have all."""
    world = 5
    save(run / "checkpoints", 10, IDENTITY, world=world)
    opened, opens = [], os.open

    def opening(path, *args, **more):
        if str(path).endswith(".safetensors"):
            opened.append((resuming.dist.get_rank(), os.path.basename(path)))
        return opens(path, *args, **more)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(resuming.fragments, "load", lambda *args: None)
    assert begin(world).where == (10, None)
    assert sorted(opened) == sorted(
        2 * [(rank, f"rank-0000{rank}.safetensors") for rank in range(world)]
    )


@pytest.mark.parametrize("rule", ["auto", "weights"])
def test_a_run_whose_checkpoints_are_all_damaged_is_refused_every_time(begin, run, save, rule):
    for step in (10, 20):
        save(run / "checkpoints", step, IDENTITY)
        damage(run / f"checkpoints/step-000000{step}")
    left = ["step-00000010.damaged-0", "step-00000020.damaged-0"]
    for _ in range(2):
        message = begin.refused(2, checkpoint={"resume": rule})
        assert "every checkpoint" in message
        assert str(run / "checkpoints") in message
        assert all(name in message for name in left)
        assert names(run / "checkpoints") == left


def test_one_that_was_set_aside_earlier_stops_no_run_that_has_another(begin, run, save):
    for step in (10, 20):
        save(run / "checkpoints", step, IDENTITY)
    damage(run / "checkpoints/step-00000020")
    for _ in range(2):
        assert begin().start.done == 10


def test_what_a_crash_left_is_swept_at_the_start(begin, run, save):
    save(run / "checkpoints", 10, IDENTITY)
    for left in ("step-00000020.tmp", "step-00000005.deleted"):
        (run / "checkpoints" / left).mkdir()
    begin()
    assert names(run / "checkpoints") == ["step-00000010"]


@pytest.mark.parametrize("error", [UserError("damaged lines"), StorageError("no answer")])
@pytest.mark.parametrize("saved", [True, False])
def test_metrics_that_cannot_be_cut_off_are_told_on_all_ranks(
    make_config, together, make_engine, save, run, error, saved
):
    if saved:
        save(run / "checkpoints", 10, IDENTITY)

    def drop_after(step):
        assert step == (10 if saved else 0)
        raise error

    config = make_config()
    lock_run(config.run_dir).close()
    began = Began(config, together(2), make_engine, IDENTITY, drop_after)
    assert [str(found) for found in began.errors] == [str(error)] * 2
    assert all(isinstance(found, type(error)) for found in began.errors)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    ("call", "ending"),
    [("list", "checkpoints"), ("open", "manifest.json"), ("open", "rank-00001.safetensors")],
)
def test_a_run_never_starts_anew_or_elsewhere_because_its_storage_fails(
    make_config, together, make_engine, save, run, failing, monkeypatch, call, ending, number
):
    for step in (10, 20):
        save(run / "checkpoints", step, IDENTITY, world=2)
    failing(call, ending, number)
    began = Began(make_config(), together(2), make_engine, IDENTITY)
    assert all(isinstance(error, StorageError) for error in began.errors)
    assert len({str(error) for error in began.errors}) == 1
    assert began.dropped == []
    monkeypatch.undo()
    assert names(run / "checkpoints") == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("ending", ["checkpoints", "manifest.json", "rank-00001.safetensors"])
def test_a_run_goes_on_once_its_storage_answers(begin, run, save, failing, ending, number):
    save(run / "checkpoints", 20, IDENTITY, world=2)
    failing("list" if ending == "checkpoints" else "open", ending, number, times=2)
    assert begin(2).where == (20, None)


def test_what_a_crash_left_and_cannot_be_deleted_is_told_and_the_run_goes_on(
    begin, run, save, failing
):
    save(run / "checkpoints", 10, IDENTITY)
    (run / "checkpoints/step-00000020.tmp").mkdir()
    failing("rmdir", ".tmp", errno.ENOTEMPTY)
    began = begin(2)
    assert began.where == (10, None)
    assert "step-00000020.tmp could not be deleted (Directory not empty)" in began.said[0]


def test_the_first_rank_alone_reads_the_manifest(begin, run, save, monkeypatch):
    save(run / "checkpoints", 10, IDENTITY, world=3)
    read = resuming.read_manifest

    def by_the_first(checkpoint):
        assert resuming.dist.get_rank() == 0
        return read(checkpoint)

    monkeypatch.setattr(resuming, "read_manifest", by_the_first)
    assert begin(3).where == (10, None)
