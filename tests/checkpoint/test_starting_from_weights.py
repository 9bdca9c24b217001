"""checkpoint.resume weights."""

import pytest

from t5vae.checkpoint import retention
from t5vae.checkpoint.resuming import Start
from tests.checkpoint.beginning import (
    IDENTITY,
    are_weights_of,
    damage,
    from_weights,
    names,
)


@pytest.mark.parametrize("step", [None, 10, 20])
def test_weights_alone_are_taken_from_a_run_or_a_checkpoint_of_it(begin, other, make_engine, step):
    source = other if step is None else other / f"checkpoints/step-000000{step}"
    began = begin(3, checkpoint=from_weights(source))
    taken = other / f"checkpoints/step-000000{step or 20}"
    assert began.start == Start(done=0, data={}, anomalies={}, weights_from=str(taken))
    assert began.said == [f"starting from the weights of {taken}"]
    assert began.dropped == [0]
    for engine in began.engines:
        assert are_weights_of(engine, make_engine(seed=step or 20))
        moments = engine.optimizer.state_dict()["state"][0]
        wanted = make_engine(seed=9).optimizer.state_dict()["state"][0]
        assert all(moments[kind].equal(wanted[kind]) for kind in wanted)


def test_a_source_is_left_as_it_is_damaged_or_not(begin, other, make_engine):
    damage(other / "checkpoints/step-00000020")
    began = begin(checkpoint=from_weights(other))
    assert began.start.weights_from == str(other / "checkpoints/step-00000010")
    assert are_weights_of(began.engines[0], make_engine(seed=10))
    assert names(other / "checkpoints") == ["step-00000010", "step-00000020"]


def test_a_run_from_weights_goes_on_once_it_has_a_checkpoint(begin, run, save, other, make_engine):
    engine = make_engine(seed=3)
    save(run / "checkpoints", 5, IDENTITY, engine, weights_from="there")
    for source in (other, None):
        began = begin(checkpoint=from_weights(source))
        assert began.where == (5, "there")
        assert are_weights_of(began.engines[0], engine)
    assert begin(checkpoint={"resume": "auto"}).where == (5, "there")
    assert names(run) == [".lock", "checkpoints"]


@pytest.mark.parametrize("differs", [{"optimizer": "muon"}, {"seed": 7}])
def test_weights_may_be_those_of_a_run_that_trained_otherwise(begin, other, differs):
    assert begin(identity={**IDENTITY, **differs}, checkpoint=from_weights(other)).start.done == 0


@pytest.mark.parametrize(
    "differs", [{"tokenizer": "bb"}, {"model": {"latent_size": 16}}, {"format": 99}]
)
def test_weights_of_another_model_or_tokenizer_are_refused(begin, other, differs):
    message = begin.refused(2, {**IDENTITY, **differs}, checkpoint=from_weights(other))
    assert next(iter(differs)) in message


def test_a_source_beside_a_run_of_its_own_is_refused(begin, run, save, other):
    save(run / "checkpoints", 5, IDENTITY)
    message = begin.refused(2, checkpoint=from_weights(other))
    assert str(run) in message
    assert "checkpoint.source" in message
    assert names(run / "checkpoints") == ["step-00000005"]


@pytest.mark.parametrize("source", ["nothing", "run without checkpoints", "damaged", "checkpoint"])
def test_a_source_without_a_whole_checkpoint_is_refused(begin, tmp_path, other, source):
    for path in retention.list_checkpoints(other / "checkpoints"):
        damage(path)
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    path = {
        "nothing": tmp_path / "nowhere",
        "run without checkpoints": tmp_path / "empty",
        "damaged": other,
        "checkpoint": other / "checkpoints/step-00000010",
    }[source]
    message = begin.refused(2, checkpoint=from_weights(path))
    assert f"{path} holds no whole checkpoint" in message
    assert names(other / "checkpoints") == ["step-00000010", "step-00000020"]


def test_without_a_source_the_runs_own_past_is_set_aside_and_its_weights_taken(
    begin, run, save, make_engine
):
    for step in (10, 20):
        save(run / "checkpoints", step, IDENTITY, make_engine(seed=step))
    (run / "metrics.jsonl").write_text('{"step": 20}\n')
    began = begin(2, checkpoint=from_weights())
    taken = run / "before-0/checkpoints/step-00000020"
    assert began.start == Start(weights_from=str(taken))
    assert are_weights_of(began.engines[1], make_engine(seed=20))
    assert names(run) == [".lock", "before-0", "checkpoints"]
    assert names(run / "before-0") == ["checkpoints", "metrics.jsonl"]
    assert names(run / "before-0/checkpoints") == ["step-00000010", "step-00000020"]
    assert names(run / "checkpoints") == []


def test_a_run_set_aside_that_saved_nothing_yet_starts_from_the_same_weights(
    begin, run, save, make_engine
):
    save(run / "checkpoints", 10, IDENTITY, make_engine(seed=10))
    starts = [begin(checkpoint=from_weights()).start for _ in range(2)]
    taken = str(run / "before-0/checkpoints/step-00000010")
    assert starts == [Start(weights_from=taken)] * 2
    assert names(run) == [".lock", "before-0", "checkpoints"]


def test_a_second_past_is_set_aside_beside_the_first(begin, run, save, make_engine):
    for step in (10, 20):
        save(run / "checkpoints", step, IDENTITY, make_engine(seed=step))
        began = begin(checkpoint=from_weights())
        assert are_weights_of(began.engines[0], make_engine(seed=step))
    assert began.start.weights_from == str(run / "before-1/checkpoints/step-00000020")
    assert names(run) == [".lock", "before-0", "before-1", "checkpoints"]
    again = begin(checkpoint=from_weights())
    assert again.start == began.start


def test_without_a_source_or_a_past_there_are_no_weights(begin, run):
    assert f"{run} holds no whole checkpoint" in begin.refused(2, checkpoint=from_weights())
