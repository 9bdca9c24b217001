"""The choice of threads, by a clock that the tests set."""

import itertools

import pytest
import torch

from shards.format.tokenizers import load_tokenizer
from t5vae.latent.codec import Codec
from t5vae.latent.threads import SHORT, Threads
from tests.latent.tiny import LINES, random_model

CPU = torch.device("cpu")
ALONE, ALL = 1, 2
LARGE, SMALL = 4096, 16
QUIET = {ALONE: 1e-4, ALL: 6e-5}  # seconds a unit of size, by threads
BUSY = {ALONE: 1e-4, ALL: 2e-3}


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(ALL)
    yield
    torch.set_num_threads(before)


class Machine:
    """Threads whose calls take as long as it is told."""

    def __init__(self, costs: dict[int, float]):
        self.costs, self.now = costs, 0.0
        self.threads = Threads(clock=lambda: self.now)
        self.threads.cpus = ALL

    def call(self, size: int = LARGE, job: str = "encode") -> int:
        """How many threads a call had."""
        with self.threads(job, size, CPU):
            count = torch.get_num_threads()
            self.now += size * self.costs[count]
        assert torch.get_num_threads() == ALL
        return count

    def calls(self, n: int, size: int = LARGE) -> list[int]:
        return [self.call(size) for _ in range(n)]


@pytest.mark.parametrize(("costs", "faster"), [(QUIET, ALL), (BUSY, ALONE)])
def test_large_calls_take_what_was_faster_and_little_time_goes_into_the_slower(costs, faster):
    machine = Machine(costs)
    assert set(machine.calls(3)) == {ALONE, ALL}
    began = machine.now
    counts = machine.calls(1000)
    assert counts.count(faster) > 900
    assert counts.count(3 - faster) > 0
    assert machine.now - began < 1000 * LARGE * costs[faster] * 1.06


def test_neighbours_come_and_go():
    machine, n = Machine(QUIET), 200
    machine.calls(n)
    machine.costs = BUSY
    assert machine.calls(n)[10:].count(ALONE) > 0.9 * (n - 10)
    machine.costs = QUIET
    machine.calls(1500)  # tries of what took twenty times as long are seldom
    assert machine.calls(n).count(ALL) > 0.9 * n


def test_one_outlier_changes_nothing():
    machine = Machine(QUIET)
    machine.calls(10)
    machine.costs = {ALONE: 1.0, ALL: 1.0}
    assert machine.call() == ALL
    machine.costs = QUIET
    assert machine.calls(10).count(ALL) >= 9


def test_small_calls_take_one_thread_and_never_try_more():
    machine = Machine(QUIET)
    assert SMALL * QUIET[ALONE] < SHORT
    assert machine.calls(30, SMALL) == [ALONE] * 30
    machine.calls(30, LARGE)
    assert machine.calls(30, SMALL) == [ALONE] * 30


@pytest.mark.parametrize(("costs", "faster"), [(QUIET, ALL), (BUSY, ALONE)])
def test_what_was_found_in_one_job_is_believed_in_the_next(costs, faster):
    machine = Machine(costs)
    machine.calls(10)
    assert [machine.call(job="score") for _ in range(5)] == [ALONE, ALONE, *[faster] * 3]


def test_all_threads_are_there_again_after_an_error_which_is_not_timed():
    machine = Machine(QUIET)
    for _ in range(5):
        with pytest.raises(RuntimeError), machine.threads("encode", LARGE, CPU):
            raise RuntimeError
        assert torch.get_num_threads() == ALL
    assert machine.calls(3) == [ALONE, ALONE, ALL]


def test_on_an_accelerator_and_with_one_thread_nothing_is_chosen():
    threads = Threads(clock=lambda: pytest.fail("timed"))
    with threads("encode", LARGE, torch.device("cuda")):
        assert torch.get_num_threads() == ALL
    torch.set_num_threads(1)
    with threads("encode", LARGE, CPU):
        assert torch.get_num_threads() == 1


def test_results_do_not_depend_on_the_choice():
    """Calls seem to take no time, which is left to one thread, or a second: both ways are tried."""
    tokenizer = load_tokenizer("byte")
    model = random_model(len(tokenizer))
    counts = []
    model.register_forward_pre_hook(lambda *_: counts.append(torch.get_num_threads()))
    alone, both = (Codec(model, tokenizer, batch_size=20) for _ in range(2))
    alone.threads = Threads(clock=lambda: 0.0)
    both.threads = Threads(clock=itertools.count().__next__)
    ids = alone.tokenize(LINES)
    z_ND = alone.encode_ids(ids)
    assert set(counts) == {ALONE}
    counts.clear()
    torch.testing.assert_close(both.encode_ids(ids), z_ND)
    assert set(counts) == {ALONE, ALL}
    torch.testing.assert_close(both.score_ids(ids, z_ND), alone.score_ids(ids, z_ND))
    counts.clear()
    assert both.decode_ids(z_ND) == alone.decode_ids(z_ND)
    assert both.decode_ids(z_ND[:50], 3) == alone.decode_ids(z_ND[:50], 3)
    assert set(counts) == {ALONE, ALL}
    assert torch.get_num_threads() == ALL
