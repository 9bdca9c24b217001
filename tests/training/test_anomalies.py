import json

import pytest

from t5vae.common.errors import UserError
from t5vae.training.anomalies import SETTLED, Anomalies


def look(anomalies, nll=2.0, norm=None, *, applied=True, ranks=()):
    """A step, one of whose figures is nobody's business; what was told of it."""
    figures = {"nats_per_token": nll, **({} if norm is None else {"grad_norm": norm})}
    return anomalies.look({"loss": 1e9 * nll, **figures}, applied, set(ranks))


def is_over(anomalies):
    """Whether the run ends here."""
    try:
        anomalies.stop_if_over("an event", "a command")
    except UserError:
        return True
    return False


def settled(limit=3, spike=5.0, nll=2.0, norm=1.0, steps=SETTLED):
    """What has seen enough even steps."""
    anomalies = Anomalies(limit, spike)
    for _ in range(steps):
        assert look(anomalies, nll, norm) is None
    return anomalies


def bad(anomalies):
    return look(anomalies, float("nan"), float("nan"), applied=False, ranks=[0])


def test_good_steps_are_passed_over_in_silence():
    anomalies = settled(steps=100)
    assert anomalies.counts == {"skipped": 0, "nonfinite": 0, "spikes": 0}
    assert not is_over(anomalies)


def test_a_loss_that_is_not_finite_is_told_with_its_ranks_and_counted():
    anomalies = settled()
    event = look(anomalies, float("nan"), applied=False, ranks=[1, 3])
    assert event == "the loss of rank 1, 3 is not finite: skipped"
    assert anomalies.counts == {"skipped": 1, "nonfinite": 1, "spikes": 0}


def test_a_gradient_that_is_not_finite_is_told_and_counted():
    anomalies = settled()
    event = look(anomalies, 2.0, float("nan"), applied=False)
    assert event == "the gradient is not finite: skipped"
    assert anomalies.counts == {"skipped": 1, "nonfinite": 0, "spikes": 0}


def test_steps_that_were_skipped_leave_the_means_alone():
    anomalies = settled()
    before = dict(anomalies.means)
    bad(anomalies)
    look(anomalies, 1000.0, 1000.0, applied=False)
    assert anomalies.means == before
    assert anomalies.seen == SETTLED


@pytest.mark.parametrize(
    ("nll", "norm", "words"),
    [
        (10.1, 1.0, ["nats_per_token 10.1 is a spike (usually 2)"]),
        (2.0, 5.1, ["grad_norm 5.1 is a spike (usually 1)"]),
        (10.1, 5.1, ["nats_per_token 10.1", "grad_norm 5.1"]),
    ],
)
def test_a_spike_is_told_with_what_is_usual_and_counted_once(nll, norm, words):
    anomalies = settled()
    event = look(anomalies, nll, norm)
    for word in words:
        assert word in event
    assert event.count("spike") == len(words)
    assert anomalies.counts == {"skipped": 0, "nonfinite": 0, "spikes": 1}


def test_just_below_the_limit_there_is_no_spike():
    assert look(settled(), 9.99, 4.99) is None


def test_the_first_steps_are_no_spikes_since_nothing_is_usual_yet():
    anomalies = Anomalies(3, 5.0)
    for step in range(SETTLED):
        assert look(anomalies, 1000.0 if step % 2 else 1.0) is None
    assert anomalies.spikes == 0


def test_spikes_are_not_looked_for_where_the_factor_is_0():
    anomalies = settled(spike=0.0)
    assert look(anomalies, 1e9, 1e9) is None
    assert anomalies.spikes == 0


def test_a_running_mean_is_the_plain_one_at_first():
    anomalies = Anomalies(0, 5.0)
    for value in (1.0, 20.0, 3.0, 6.0):
        look(anomalies, value)
    assert anomalies.means == pytest.approx({"nats_per_token": 7.5})


def test_a_running_mean_forgets():
    anomalies = settled(steps=200, nll=2.0)
    for _ in range(200):
        look(anomalies, 1.0)
    assert anomalies.means["nats_per_token"] == pytest.approx(1.0, abs=0.02)
    assert anomalies.means["nats_per_token"] > 1.0


def test_a_spike_moves_the_mean_no_further_than_the_limit_does():
    one, other = settled(), settled()
    look(one, 10.0)
    look(other, 1e30)
    assert other.means["nats_per_token"] == pytest.approx(one.means["nats_per_token"])


def test_a_lasting_rise_becomes_the_level():
    anomalies = settled(limit=0, nll=2.0)
    events = [look(anomalies, 12.0, 1.0) for _ in range(30)]
    assert events[0]
    assert events[-1] is None
    assert 1 <= anomalies.spikes < 10


def test_a_steep_rise_ends_the_run_before_it_becomes_the_level():
    anomalies = settled(limit=10, nll=2.0)
    for _ in range(10):
        assert not is_over(anomalies)
        look(anomalies, 200.0, 1.0)
    assert is_over(anomalies)


def test_a_norm_that_is_known_only_later_has_its_own_mean():
    anomalies = settled(norm=None)
    assert look(anomalies, 2.0, 1000.0) is None
    assert look(anomalies, 2.0, 1000.0) is None
    assert look(anomalies, 2.0, 5001.0)


def test_bad_steps_in_a_row_end_the_run_at_the_limit():
    anomalies = settled(limit=3)
    for over in (False, False, True):
        assert bad(anomalies)
        assert is_over(anomalies) is over


def test_a_good_step_between_begins_the_row_anew():
    anomalies = settled(limit=3)
    for _ in range(5):
        bad(anomalies)
        bad(anomalies)
        look(anomalies)
        assert anomalies.in_a_row == 0
    assert not is_over(anomalies)
    assert anomalies.skipped == 10


def test_all_kinds_of_bad_steps_count_in_a_row():
    anomalies = settled(limit=3)
    bad(anomalies)
    look(anomalies, 2.0, float("nan"), applied=False)
    assert not is_over(anomalies)
    look(anomalies, 1e6)
    assert is_over(anomalies)
    assert anomalies.counts == {"skipped": 2, "nonfinite": 1, "spikes": 1}


def test_without_a_limit_no_run_ends():
    anomalies = settled(limit=0)
    for _ in range(1000):
        bad(anomalies)
    assert not is_over(anomalies)


def test_a_resumed_run_counts_on_exactly():
    anomalies = settled()
    look(anomalies, 11.0, 1.1)
    bad(anomalies)
    resumed = Anomalies(3, 5.0)
    resumed.load_state_dict(json.loads(json.dumps(anomalies.state_dict())))
    assert resumed == anomalies
    for nll, applied in ((2.1, True), (3.0, False), (100.0, True), (100.0, True)):
        assert look(resumed, nll, applied=applied) == look(anomalies, nll, applied=applied)
        assert resumed == anomalies
    assert anomalies.in_a_row == 3


def test_a_resumed_run_keeps_its_own_limits():
    resumed = Anomalies(9, 2.0)
    resumed.load_state_dict(settled(limit=3, spike=5.0).state_dict())
    assert (resumed.limit, resumed.spike) == (9, 2.0)


def test_the_error_says_how_many_what_last_and_what_to_run():
    anomalies = settled()
    for _ in range(3):
        event = bad(anomalies)
    with pytest.raises(UserError) as caught:
        anomalies.stop_if_over(event, "t5vae shards inspect data --position=96")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in ("3 steps in a row", event, "t5vae shards inspect data --position=96"):
        assert word in message
