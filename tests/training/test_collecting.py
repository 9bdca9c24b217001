"""Garbage collection between steps."""

import gc
import weakref

import pytest

from t5vae.training import collecting
from t5vae.training.collecting import collected_between_steps


class Cyclic:
    def __init__(self):
        self.itself = self


def made(number):
    """Makes garbage that only a collection frees; tells of it."""
    return weakref.WeakSet([Cyclic() for _ in range(number)])


@pytest.fixture
def collections():
    """The generation of each collection so far."""
    generations = []

    def collected(phase, info):
        if phase == "start":
            generations.append(info["generation"])

    gc.callbacks.append(collected)
    yield generations
    gc.callbacks.remove(collected)


def state():
    return gc.isenabled(), gc.get_freeze_count()


def test_nothing_is_collected_within_a_step(collections):
    with collected_between_steps():
        collections.clear()
        garbage = made(20_000)
        assert len(garbage) == 20_000
        assert collections == []


def test_what_a_step_leaves_is_collected_after_it():
    with collected_between_steps() as collect:
        for _ in range(3):
            garbage = made(100)
            collect()
            assert not garbage


def test_what_becomes_garbage_later_is_collected_within_some_steps(monkeypatch, collections):
    monkeypatch.setattr(collecting, "FULL", 4)
    with collected_between_steps() as collect:
        used = [Cyclic()]
        later = weakref.ref(used[0])
        collect()
        used.clear()
        collections.clear()
        collect()
        collect()
        assert later()
        collect()
        assert not later()
        assert collections == [1, 1, 2]


def test_what_there_was_is_not_looked_through_and_garbage_before_is_gone():
    before, garbage = Cyclic(), made(10)
    there = weakref.ref(before)
    with collected_between_steps():
        assert not garbage
        del before
        gc.collect()
        assert there()
    gc.collect()
    assert not there()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_collections_are_then_as_before_even_after_an_error(enabled, error):
    (gc.enable if enabled else gc.disable)()
    gc.unfreeze()
    try:
        try:
            with collected_between_steps():
                assert not gc.isenabled()
                assert gc.get_freeze_count() > 1000
                if error:
                    raise error
        except KeyboardInterrupt:
            assert error
        assert state() == (enabled, 0)
    finally:
        gc.enable()


def test_within_another_one_the_outer_one_goes_on():
    with collected_between_steps() as collect:
        with collected_between_steps():
            pass
        enabled, frozen = state()
        assert not enabled
        assert frozen > 1000
        garbage = made(100)
        assert len(garbage) == 100
        collect()
        assert not garbage
    assert state() == (True, 0)


def test_what_others_had_frozen_stays_so():
    gc.freeze()
    try:
        with collected_between_steps():
            pass
        enabled, frozen = state()
        assert enabled
        assert frozen > 1000
    finally:
        gc.unfreeze()
