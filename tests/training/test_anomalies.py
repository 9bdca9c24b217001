import json

import pytest

from t5vae.common.errors import UserError
from t5vae.training.anomalies import SETTLED, Watch, gone_wrong


def look(watch, nll=2.0, norm=None, *, applied=True, ranks=()):
    """A step; what was told of it."""
    figures = {"nats_per_token": nll, **({} if norm is None else {"grad_norm": norm})}
    return watch.look(applied=applied, nonfinite_ranks=list(ranks), figures=figures)


def settled(limit=3, spike=5.0, nll=2.0, norm=1.0, steps=SETTLED):
    """A watch that has seen enough even steps."""
    watch = Watch(limit, spike)
    for _ in range(steps):
        assert look(watch, nll, norm) is None
    return watch


def bad(watch):
    return look(watch, float("nan"), float("nan"), applied=False, ranks=[0])


def test_good_steps_are_passed_over_in_silence():
    watch = settled(steps=100)
    assert watch.counts == {"skipped": 0, "nonfinite": 0, "spikes": 0}
    assert not watch.is_over


def test_a_loss_that_is_not_finite_is_told_with_its_ranks_and_counted():
    watch = settled()
    told = look(watch, float("nan"), applied=False, ranks=[1, 3])
    assert told == "the loss of rank 1, 3 is not finite: skipped"
    assert watch.counts == {"skipped": 1, "nonfinite": 1, "spikes": 0}


def test_a_gradient_that_is_not_finite_is_told_and_counted():
    watch = settled()
    told = look(watch, 2.0, float("nan"), applied=False)
    assert told == "the gradient is not finite: skipped"
    assert watch.counts == {"skipped": 1, "nonfinite": 0, "spikes": 0}


def test_steps_that_were_skipped_leave_the_means_alone():
    watch = settled()
    before = dict(watch.means)
    bad(watch)
    look(watch, 1000.0, 1000.0, applied=False)
    assert watch.means == before
    assert watch.seen == SETTLED


@pytest.mark.parametrize(
    ("nll", "norm", "words"),
    [
        (10.1, 1.0, ["nats_per_token 10.1 is a spike (usually 2)"]),
        (2.0, 5.1, ["grad_norm 5.1 is a spike (usually 1)"]),
        (10.1, 5.1, ["nats_per_token 10.1", "grad_norm 5.1"]),
    ],
)
def test_a_spike_is_told_with_what_is_usual_and_counted_once(nll, norm, words):
    watch = settled()
    told = look(watch, nll, norm)
    for word in words:
        assert word in told
    assert told.count("spike") == len(words)
    assert watch.counts == {"skipped": 0, "nonfinite": 0, "spikes": 1}


def test_just_below_the_limit_there_is_no_spike():
    assert look(settled(), 9.99, 4.99) is None


def test_the_first_steps_are_no_spikes_since_nothing_is_usual_yet():
    watch = Watch(3, 5.0)
    for step in range(SETTLED):
        assert look(watch, 1000.0 if step % 2 else 1.0) is None
    assert watch.spikes == 0


def test_spikes_are_not_looked_for_where_the_factor_is_0():
    watch = settled(spike=0.0)
    assert look(watch, 1e9, 1e9) is None
    assert watch.spikes == 0


def test_a_running_mean_is_the_plain_one_at_first():
    watch = Watch(0, 5.0)
    for value in (1.0, 20.0, 3.0, 6.0):
        look(watch, value)
    assert watch.means == pytest.approx({"nats_per_token": 7.5})


def test_a_running_mean_forgets():
    watch = settled(steps=200, nll=2.0)
    for _ in range(200):
        look(watch, 1.0)
    assert watch.means["nats_per_token"] == pytest.approx(1.0, abs=0.02)
    assert watch.means["nats_per_token"] > 1.0


def test_a_spike_moves_the_mean_no_further_than_the_limit_does():
    one, other = settled(), settled()
    look(one, 10.0)
    look(other, 1e30)
    assert other.means["nats_per_token"] == pytest.approx(one.means["nats_per_token"])


def test_a_lasting_rise_becomes_the_level():
    watch = settled(limit=0, nll=2.0)
    told = [look(watch, 12.0, 1.0) for _ in range(30)]
    assert told[0]
    assert told[-1] is None
    assert 1 <= watch.spikes < 10


def test_a_steep_rise_ends_the_run_before_it_becomes_the_level():
    watch = settled(limit=10, nll=2.0)
    for _ in range(10):
        assert not watch.is_over
        look(watch, 200.0, 1.0)
    assert watch.is_over


def test_a_norm_that_is_known_only_later_has_its_own_mean():
    watch = settled(norm=None)
    assert look(watch, 2.0, 1000.0) is None
    assert look(watch, 2.0, 1000.0) is None
    assert look(watch, 2.0, 5001.0)


def test_bad_steps_in_a_row_end_the_run_at_the_limit():
    watch = settled(limit=3)
    for over in (False, False, True):
        assert bad(watch)
        assert watch.is_over is over


def test_a_good_step_between_begins_the_row_anew():
    watch = settled(limit=3)
    for _ in range(5):
        bad(watch)
        bad(watch)
        look(watch)
        assert watch.in_a_row == 0
    assert not watch.is_over
    assert watch.skipped == 10


def test_all_kinds_of_bad_steps_count_in_a_row():
    watch = settled(limit=3)
    bad(watch)
    look(watch, 2.0, float("nan"), applied=False)
    assert not watch.is_over
    look(watch, 1e6)
    assert watch.is_over
    assert watch.counts == {"skipped": 2, "nonfinite": 1, "spikes": 1}


def test_without_a_limit_no_run_ends():
    watch = settled(limit=0)
    for _ in range(1000):
        bad(watch)
    assert not watch.is_over


def test_a_resumed_run_counts_on_exactly():
    watch = settled()
    look(watch, 11.0, 1.1)
    bad(watch)
    resumed = Watch(3, 5.0)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed == watch
    for nll, applied in ((2.1, True), (3.0, False), (100.0, True), (100.0, True)):
        assert look(resumed, nll, applied=applied) == look(watch, nll, applied=applied)
        assert resumed == watch
    assert watch.in_a_row == 3


def test_a_resumed_run_keeps_its_own_limits():
    resumed = Watch(9, 2.0)
    resumed.load_state_dict(settled(limit=3, spike=5.0).state_dict())
    assert (resumed.limit, resumed.spike) == (9, 2.0)


def test_the_error_says_how_many_what_last_and_what_to_run():
    watch = settled()
    for _ in range(3):
        told = bad(watch)
    error = gone_wrong(watch, told, "t5vae shards inspect data --position=96")
    assert isinstance(error, UserError)
    message = str(error)
    assert len(message.splitlines()) == 1
    for word in ("3 steps in a row", told, "t5vae shards inspect data --position=96"):
        assert word in message
