"""Three numbers of a parameter against ranks that are dealt a row of pieces element by element."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t5vae.checkpoint.places import Place, Placed, grouped, places_of


@st.composite
def rows(draw):
    """Places of parameters that lie one after the other, and how many ranks share them."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    world = draw(st.integers(1, 40))
    size = -(-sum(lengths) // world) + draw(st.integers(0, 2))
    return [Place(sum(lengths[:n]), length, size) for n, length in enumerate(lengths)], world


@settings(max_examples=200, deadline=None)
@given(rows(), st.data())
def test_ranks_share_a_row_as_if_each_element_were_dealt_by_itself(row, data):
    places, world = row
    for place in places:
        owner = [(place.offset + n) // place.size for n in range(place.elements)]
        for rank in range(world):
            start, length = place.part(rank)
            mine = [n for n, of in enumerate(owner) if of == rank]
            assert mine == list(range(start, start + length))
        start = data.draw(st.integers(0, place.elements))
        length = data.draw(st.integers(0, place.elements + 3))
        assert list(place.ranks(start, length)) == sorted(set(owner[start : start + length]))


def test_places_come_back_out_of_json_and_kinds_are_told_once():
    fp32, half = torch.float32, torch.bfloat16
    moments = {"weight": fp32, "exp_avg": fp32}
    told = grouped(
        [
            (moments, {"a": Place(0, 6, 4), "b": Place(6, 5, 4)}),
            ({"weight": fp32, "momentum_buffer": half}, {"c": Place(0, 9, 3)}),
            (moments, {"d": Place(0, 2, 1)}),
        ]
    )
    assert len(told) == 2
    assert places_of(json.loads(json.dumps(told))) == {
        **{
            (kind, name): Placed(place, fp32)
            for kind in moments
            for name, place in {
                "a": Place(0, 6, 4),
                "b": Place(6, 5, 4),
                "d": Place(0, 2, 1),
            }.items()
        },
        ("weight", "c"): Placed(Place(0, 9, 3), fp32),
        ("momentum_buffer", "c"): Placed(Place(0, 9, 3), half),
    }


def test_what_is_there_twice_is_refused():
    group = {"kinds": {"weight": "F32"}, "parameters": {"a": [0, 6, 4]}}
    with pytest.raises(ValueError, match="weight of a is there twice"):
        places_of([group, group])
